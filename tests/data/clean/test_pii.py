"""Addresses are masked as datatrove does it, the same way every time."""

import pytest
from datatrove.pipeline.formatters import PIIFormatter

from data.clean import Pii
from data.documents import Document
from tests.data.clean.texts import prose


def masked(text: str, **settings: object) -> str:
    result = Pii(**settings).build().apply(Document(text, "here"))
    assert isinstance(result, Document)
    return result.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to jane.doe+x@mail.example.co.uk today.", "Write to email@example.com today."),
        ("a@b.org, c@d.net", "email@example.com, email@example.com"),
        ("from 8.8.8.8 to 1.1.1.1", "from 22.214.171.124 to 22.214.171.124"),
        ("localhost 127.0.0.1, 192.168.0.1 and 10.0.0.1", "localhost 127.0.0.1, 192.168.0.1 and 10.0.0.1"),
        ("@decorator\ndef f(a, b): return a @ b", "@decorator\ndef f(a, b): return a @ b"),
        ("version 4.2.1.7", "version 22.214.171.124"),  # looks like an address
        ("version 4.2.1 of 2.7.18", "version 4.2.1 of 2.7.18"),
    ],
)  # fmt: skip
def test_addresses_are_masked(text: str, expected: str) -> None:
    assert masked(text) == expected


def test_each_setting_does_what_it_says() -> None:
    text = "a@b.org 8.8.8.8 10.0.0.1"
    assert masked(text, emails=False) == "a@b.org 22.214.171.124 10.0.0.1"
    assert masked(text, ips=False) == "email@example.com 8.8.8.8 10.0.0.1"
    assert masked(text, public_ips_only=False) == "email@example.com 22.214.171.124 22.214.171.124"
    assert masked(text, email_replacement="<E>", ip_replacement="<I>") == "<E> <I> 10.0.0.1"


def test_the_text_is_datatroves_with_one_replacement_each() -> None:
    reference = PIIFormatter(email_replacement="email@example.com", ip_replacement="22.214.171.124")
    texts = [*prose(), *(text + " x@y.org 9.9.9.9 " + "a" * 900 + "@b.de" for text in prose())]
    assert [masked(text) for text in texts] == [reference.format(text) for text in texts]


def test_a_long_run_without_an_address_takes_no_time() -> None:
    text = (
        "x@y.org " + "QUJD/+9=" * 100_000 + " x@y.org"
    )  # base64 of 800 kB: minutes if searched from each of its words
    assert masked(text) == text.replace("x@y.org", "email@example.com")

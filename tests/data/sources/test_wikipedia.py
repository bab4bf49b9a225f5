"""Dumps of wikis: which pages count, and what is left of wikitext."""

import bz2
from xml.sax.saxutils import escape

import pytest

from data.documents import Document
from data.errors import DataError
from data.sources.wikitext import plain
from tests.data.sources.reading import reasons, records, texts

ARTICLE = """{{Infobox island|name=Sable}}
[[Datei:Karte.png|mini|A map of [[Sable]]]]
'''Sable''' ({{lang|fr|Île de Sable}}; {{IPA|x}}) is an ''island''<ref>A book.</ref> of [[sand dune|dunes]].<ref name="b" />

{| class="wikitable"
| a cell
|}
== Horses ==
Some 500&nbsp;horses live there{{citation needed}}, {{convert|30|km}} from [[Halifax]].
* one [http://example.org link]
** two
=== Empty ===
{{main|Horse}}
== Sources ==
<references />
[[Kategorie:Islands]] [[fr:Île de Sable]]
"""
TEXT = """Sable

Sable is an island of dunes.

Horses

Some 500 horses live there, from Halifax.
- one link
- two
"""


def export(*pages: str) -> bytes:
    """A MediaWiki XML export of a German wiki."""
    spaces = "".join(
        f'<namespace key="{number}" case="first-letter">{name}</namespace>'
        for number, name in [(0, ""), (1, "Diskussion"), (6, "Datei"), (14, "Kategorie")]
    )
    head = f"<siteinfo><sitename>Wiki</sitename><namespaces>{spaces}</namespaces></siteinfo>"
    namespace = "http://www.mediawiki.org/xml/export-0.11/"
    return f'<mediawiki xmlns="{namespace}" version="0.11">{head}{"".join(pages)}</mediawiki>\n'.encode()


def page(title: str, *texts: str, space: int = 0, redirect: str = "", model: str = "wikitext") -> str:
    inner = f'<redirect title="{redirect}" />' if redirect else ""
    revisions = "".join(
        f"<revision><id>{number}</id><timestamp>2024-01-01T00:00:00Z</timestamp><model>{model}</model>"
        f'<format>text/x-wiki</format><text bytes="{len(text)}" sha1="x">{escape(text)}</text></revision>'
        for number, text in enumerate(texts, start=1)
    )
    return f"<page><title>{title}</title><ns>{space}</ns><id>1</id>{inner}{revisions}</page>"


def test_articles_become_text_and_nothing_else_does(tmp_path):
    content = export(
        page("Sable", ARTICLE),
        page("Insel", "#REDIRECT [[Sable]]", redirect="Sable"),
        page("Diskussion:Sable", "Talk.", space=1),
        page("Data", "{}", model="json"),
        page("Only a box", "{{box}}"),
        page("Zwei", "Old.", "New."),
    )
    (tmp_path / "a.xml").write_bytes(content)
    (tmp_path / "b.xml.bz2").write_bytes(
        bz2.compress(content[:2000]) + bz2.compress(content[2000:])
    )  # a multistream dump
    found = records(kind="wikipedia", path=str(tmp_path), language="de")
    expected = [(f"{name}:{title}", text) for name in ("a.xml", "b.xml.bz2") for title, text in PAGES]
    documents = [record for record in found if isinstance(record, Document)]
    assert [(document.where.removeprefix(f"{tmp_path}/"), document.text) for document in documents] == expected
    empty = [f"{name}:{title}" for name in ("a.xml", "b.xml.bz2") for title in ("Data", "Only a box")]
    assert reasons(kind="wikipedia", path=str(tmp_path)) == [(where, "no_text") for where in empty]
    assert {document.language for document in documents} == {"de"}


PAGES = [("Sable", TEXT), ("Zwei", "Zwei\n\nNew.\n")]


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("It''s '''bold''', '''''both''''' and l''''eau'' <nowiki>''so''</nowiki>", "Its bold, both and l'eau ''so''"),
        ("an ''unclosed {{x|''}} quote<ref>r</ref> and {| no table", "an unclosed quote and {| no table"),
        ("[[a|b ''c'']] [[:Category:X]] [[File:x.jpg|thumb|[[y]]]]", "b c Category:X"),
        ("[http://x.y label] [http://x.y] http://x.y", "label http://x.y"),
        ("a ({{x}}) b, f() stays, ({{x}}, c), (d; {{x}}) e{{x}}.", "a b, f() stays, (c), (d) e."),
        ("Area <math>\\pi r^2</math> &amp; &lt;b&gt; <!-- not this -->", "Area $\\pi r^2$ & <b>"),
        ("; term : meaning\n: indented\n# first\n----\nlast __NOTOC__", "term meaning\nindented\n- first\n\nlast"),
        (
            "<syntaxhighlight lang=c>int a[[1]] = {};</syntaxhighlight><br/>x<gallery>a.jpg</gallery>",
            "int a[[1]] = {};\nx",
        ),
        ("== A ==\n=== B ===\ntext\n=== C ===\n{{x}}\n== D ==", "A\n\nB\n\ntext"),
        ("{{unclosed\n[[link\n</div> text", "{{unclosed\n[[link\n</div> text"),
    ],
)
def test_wikitext_is_read_as_a_reader_would(wikitext, text):
    assert plain(wikitext) == text


def test_odd_pages_are_tidied_in_a_time_that_grows_with_their_size():
    # Each would take minutes if a pattern began anew at every character.
    for odd in (" ", "\n", ":", "(", "- ", "({{x}} ", "{{x}}  ", "''a "):
        plain(f"a{odd * 10_000}b")


def test_a_page_that_is_too_long_is_located(tmp_path):
    (tmp_path / "a.xml").write_bytes(export(page("Long", "ü" * 600), page("Short", "Text.")))
    fields = {"kind": "wikipedia", "path": str(tmp_path), "max_document_bytes": 1000, "max_unreadable": 0.5}
    assert texts(**fields) == ["Short\n\nText.\n"]
    assert reasons(**fields) == [("a.xml:Long", "too_long")]


def test_a_dump_that_was_cut_off_or_is_none_is_refused(tmp_path):
    content = export(*(page(f"Page {number}", "Text. " * 2000) for number in range(20)))
    for name, written, after in [
        ("a.xml", content[:-1000], r"page 'Page 1\d'"),
        ("a.xml", content[:-5], "page 'Page 19'"),
        ("a.xml.bz2", bz2.compress(content)[:-10], r"page 'Page \d+'"),
        ("a.xml", b"<html></html>", "the start"),
        ("a.xml", b'{"text": "x"}', "the start"),
    ]:
        (tmp_path / name).write_bytes(written)
        with pytest.raises(DataError, match=rf"{name}: damaged after {after} \(.*\); fetch the file again$") as error:
            records(kind="wikipedia", path=str(tmp_path / name))
        assert "\n" not in str(error.value)

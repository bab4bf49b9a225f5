"""Email addresses and public IP addresses become ones that belong to nobody.

datatrove's PIIFormatter, with one replacement for each. It would take several in turn, counted over documents, and so the text of a
document would depend on those before it.
"""

import re
from dataclasses import replace
from typing import Literal

from data.clean.packages import import_package
from data.clean.step import Step, StepRecord
from data.documents import Document, Rejected

# No address is this long (RFC 5321: 64 + 1 + 255), but the search for one in such a run takes time that is quadratic in its length.
LONG_RUN = re.compile(r"([A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]{1000,})")


class Pii(StepRecord):
    """What is masked, and with what; FineWeb's choice."""

    kind: Literal["pii"] = "pii"
    emails: bool = True
    ips: bool = True  # IPv4. A version number of four parts, 1.2.3.4, is one too: switch it off for code
    public_ips_only: bool = True  # 192.168.0.1 and the like stay
    email_replacement: str = "email@example.com"
    ip_replacement: str = "22.214.171.124"

    def build(self) -> Step:
        """Import datatrove."""
        return _Pii(self)


class _Pii:
    def __init__(self, settings: Pii) -> None:
        formatters = import_package("datatrove.pipeline.formatters", "datatrove", "steps: pii")
        self._format = formatters.PIIFormatter(
            remove_emails=settings.emails,
            remove_ips=settings.ips,
            only_remove_public_ips=settings.public_ips_only,
            email_replacement=settings.email_replacement,
            ip_replacement=settings.ip_replacement,
        ).format

    def apply(self, document: Document) -> Document | Rejected:
        """The document with addresses masked."""
        parts = LONG_RUN.split(document.text)  # text, run, text, …
        parts[::2] = [self._format(part) for part in parts[::2]]
        text = "".join(parts)
        return document if text == document.text else replace(document, text=text)

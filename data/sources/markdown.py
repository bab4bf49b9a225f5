"""Markdown as plain text, cut at its headings."""

import re
from collections.abc import Iterator

HEADING = re.compile(r"^(#{1,6})[ \t]+(.*?)[ \t]*#*[ \t]*$", re.MULTILINE)


def sections(text: str, level: int) -> Iterator[str]:
    """Plain text of each section under a heading of at most `level`.

    A section begins with the headings it stands under, so that a scene of a play says which act and play it belongs to.
    Headings without text of their own give no section.
    """
    path: list[str] = []  # headings above and at this place, outermost first
    start = 0
    for match in [*HEADING.finditer(text), None]:
        if match is not None and len(match[1]) > level:
            continue
        body = text[start : match.start() if match else len(text)].strip()
        if body:
            yield plain("\n".join(path) + "\n\n" + body if path else body) + "\n"
        if match is not None:
            depth = len(match[1])
            path = [*path[: depth - 1], match[2]]
            start = match.end()


def plain(text: str) -> str:
    """Text without the marks of headings, emphasis, hard line breaks and escapes."""
    text = HEADING.sub(r"\2", text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1", r"\2", text)
    text = re.sub(r"(?<![\w\\])([*_])(?=\S)(.+?)(?<=[^\s\\])\1(?!\w)", r"\2", text)
    return re.sub(r"\\([^\w\s])", r"\1", text)

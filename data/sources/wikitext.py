"""Wikitext as plain text: what a reader of the page would read in its body, with the headings.

Templates, tables, references, pictures and categories leave nothing; formulas stay as LaTeX between dollars. The parser is
mwparserfromhell; it expands no templates, so that words which only a template prints are lost.
"""

import re
from collections.abc import Iterator
from typing import Any

DROPPED_NAMESPACES = frozenset({"file", "image", "media", "category"})  # MediaWiki knows these in every language
# Elements whose content is no running text.
DROPPED_TAGS = {
    *("ref", "references", "table", "gallery", "timeline", "imagemap", "templatestyles", "style", "script"),
    *("score", "hiero", "graph", "mapframe", "maplink", "inputbox", "categorytree", "section", "indicator"),
}
FORMULAS = {"math", "chem", "ce"}

VERBATIM = {"nowiki", "pre", "syntaxhighlight", "source"}
PARAGRAPHS = {"p", "div", "blockquote", "center", "poem"}

# Left out before the parsing, of which they would take a third. Bounds here and below keep odd pages from taking for ever.
UNSEEN = re.compile(
    r"<!--.{0,5000}?-->|<ref\b[^<>]{0,500}/>|<ref\b[^<>]{0,500}>.{0,5000}?</ref\s{0,9}>", re.DOTALL | re.IGNORECASE
)
INTERLANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z]+)*|simple")
SWITCH = re.compile(r"__[A-Z]+__")  # __NOTOC__
QUOTES = re.compile(r"'{2,}")  # italics, bold

# Two marks that `_render` leaves for the tidying, written as characters that XML cannot hold.
HEADING = re.compile(r"^\x02(\d)(.*)$")
GAP = "\x03"  # where a template stood
# What stood beside it in brackets, and the space before a mark of punctuation, are left out with it.
GAPS = (
    (re.compile(rf"{GAP}(?:[ \t]*{GAP})+"), GAP),
    (re.compile(rf"^([- ]{{0,9}}){GAP}[ \t,;:，；：{GAP}]*", re.MULTILINE), r"\1"),
    (re.compile(rf"[ \t]{{0,9}}[(（](?:[\s,;:，；：]|or\b){{0,9}}{GAP}(?:[\s,;:，；：{GAP}]|\bor\b)*[)）]"), ""),
    (re.compile(rf"([(（])[\s,;:，；：]{{0,9}}{GAP}[\s,;:，；：{GAP}]*"), r"\1"),
    (re.compile(rf"[\s,;:，；：]{{0,9}}{GAP}\s{{0,9}}(?=[)）])"), ""),
    (re.compile(rf"[ \t]{{0,9}}{GAP}[ \t]{{0,9}}(?=[,.;:])"), ""),
    (re.compile(GAP), ""),
)


def plain(wikitext: str, dropped_namespaces: frozenset[str] = DROPPED_NAMESPACES) -> str:
    """The text of a page, paragraphs parted by blank lines. Headings without text of their own are left out.

    Args:
        dropped_namespaces: lower-case names; links into these are no text, e.g. "datei" in a German wiki.

    Raises:
        ValueError, RecursionError: the wikitext cannot be parsed.
    """
    import mwparserfromhell

    try:
        # Quotes are ours, since one that is not closed makes the parser take what follows for text.
        code = mwparserfromhell.parse(UNSEEN.sub("", wikitext), skip_style_tags=True)
    except mwparserfromhell.parser.ParserError as error:
        raise ValueError(str(error)) from None
    text = SWITCH.sub("", "".join(_render(code, dropped_namespaces)))
    for pattern, replacement in GAPS:
        text = pattern.sub(replacement, text)
    return "\n".join(_tidy(text.split("\n")))


def _render(code: Any, dropped: frozenset[str]) -> Iterator[str]:
    from mwparserfromhell import nodes

    for node in code.nodes if code is not None else ():
        match node:
            case nodes.Text():
                yield QUOTES.sub(_quotes, node.value)
            case nodes.Wikilink():
                yield from _link(node, dropped)
            case nodes.ExternalLink():
                if not node.brackets:
                    yield str(node.url)
                elif node.title is not None:
                    yield from _render(node.title, dropped)
            case nodes.HTMLEntity():
                yield _entity(node)
            case nodes.Heading():
                title = "".join(_render(node.title, dropped)).strip()
                yield f"\n\x02{node.level}{title}\n"
            case nodes.Tag():
                yield from _tag(node, dropped)
            case nodes.Template():
                yield GAP
            case _:  # the arguments of templates, comments
                pass


def _quotes(run: re.Match[str]) -> str:
    """What is left of a run of quotes: 2 are italics, 3 bold, 5 both, and what is too much is text."""
    length = len(run[0])
    return "'" if length == 4 else "'" * max(0, length - 5)


def _link(link: Any, dropped: frozenset[str]) -> Iterator[str]:
    target = str(link.title).strip()
    prefix = target.partition(":")[0].strip().lower() if ":" in target else ""
    if prefix in dropped or (link.text is None and INTERLANGUAGE.fullmatch(prefix)):
        return
    if link.text is None:
        yield target.removeprefix(":")
    else:
        yield from _render(link.text, dropped)


def _tag(tag: Any, dropped: frozenset[str]) -> Iterator[str]:
    name = str(tag.tag).strip().lower()
    if name in DROPPED_TAGS:
        return
    if name in FORMULAS:
        yield f"${str(tag.contents).strip()}$"
    elif name == "li" and tag.wiki_markup:
        yield "- "
    elif name == "br":
        yield "\n"
    elif name in VERBATIM:
        yield str(tag.contents)
    elif name in PARAGRAPHS:
        yield "\n"
        yield from _render(tag.contents, dropped)
        yield "\n"
    else:
        yield from _render(tag.contents, dropped)


def _entity(entity: Any) -> str:
    try:
        character: str = entity.normalize()
    except (ValueError, OverflowError):  # a number that is no character
        return ""
    return " " if character == "\xa0" else character


def _tidy(lines: list[str]) -> Iterator[str]:
    """Lines without empty sections, without the white space and list marks that stood around what was left out."""
    waiting: list[tuple[int, str]] = []  # headings, outermost first, that have no text yet
    blank = begun = False
    for line in lines:
        if heading := HEADING.match(line):
            level = int(heading[1])
            waiting = [*(above for above in waiting if above[0] < level), (level, heading[2].strip())]
            continue
        line = re.sub(r"[ \t]+", " ", line).strip()
        line = re.sub(r"^(?:- ?)+(?=\S)", "- ", line)
        if not line.strip("-*:;#|!{} "):
            blank = True
            continue
        for _, title in waiting:
            yield from ["", title] if begun else [title]
            begun = blank = True
        waiting = []
        if blank and begun:
            yield ""
        yield line
        begun, blank = True, False

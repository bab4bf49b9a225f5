"""Dumps of Wikipedia and other wikis: the articles of a MediaWiki XML export as plain text."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Literal
from xml.etree.ElementTree import ParseError

from data.compressed import DAMAGE, damaged, opened
from data.documents import Document, Unreadable
from data.errors import DataError
from data.sources.base import Input, SourceBase, expand, one_each
from data.sources.wikitext import DROPPED_NAMESPACES, plain

ARTICLES, FILES, CATEGORIES = 0, 6, 14  # numbers of MediaWiki's namespaces


class Wikipedia(SourceBase):
    """The pages of a MediaWiki XML export, plain or compressed; articles only, redirects out, a title on the first line.

    Of several revisions of a page, the last in the file counts.
    """

    kind: Literal["wikipedia"]
    path: str | list[str]  # a file, a folder (its .xml), a pattern, or a list of these

    def inputs(self, cache: Path) -> list[Input]:
        _require()
        return one_each(expand(self.path, self.name, (".xml",)))

    def records(self, item: Input, cache: Path) -> Iterator[Document | Unreadable]:
        (path,) = item.files
        if Path(path).stat().st_size == 0:
            return
        mwxml = _require()
        last = "the start"
        try:
            with opened(path) as file:
                for title, text, dropped in _pages(file, mwxml):
                    yield self._document(title, text, dropped, path)
                    last = f"page {title!r}"
        # The last two come from numbers and times that are none.
        except (*DAMAGE, ParseError, mwxml.errors.MalformedXML, ValueError, TypeError) as error:
            raise damaged(path, last, error) from None

    def _document(self, title: str, text: str, dropped: frozenset[str], path: str) -> Document | Unreadable:
        where = f"{path}:{title}"
        # A character has at most 4 bytes, so that most texts need no counting.
        if len(text) * 4 > self.max_document_bytes and (size := len(text.encode())) > self.max_document_bytes:
            return self.too_long(where, size)
        try:
            body = plain(text, dropped)
        except (ValueError, RecursionError) as error:
            return Unreadable(where, "not_wikitext", f"wikitext that cannot be parsed ({error}); leave the page out")
        return Document(f"{title}\n\n{body}\n" if body else "", where, self.language)


def _pages(file: IO[bytes], mwxml: ModuleType) -> Iterator[tuple[str, str, frozenset[str]]]:
    """(title, wikitext, names of the namespaces whose links are no text) of each article."""
    root = mwxml.element_iterator.ElementIterator.from_file(file)
    if root.tag != "mediawiki":
        raise ParseError(f"its first element is {root.tag}, not mediawiki")
    dump = mwxml.Dump.from_element(root)
    names = (space.name for space in dump.site_info.namespaces or () if space.id in (FILES, CATEGORIES))
    dropped = DROPPED_NAMESPACES | frozenset(name.lower() for name in names if name)
    for page in dump.pages:
        if page.namespace == ARTICLES and page.redirect is None:
            text = ""
            for revision in page:
                text = _wikitext(revision)
            yield page.title, text, dropped
        root.element.clear()  # of what is left of the pages before, which the parser keeps


def _wikitext(revision: Any) -> str:
    """ "" for a text that was removed, or that is data or code."""
    content = revision.slots.contents.get("main")
    if content is None or content.model not in (None, "wikitext"):
        return ""
    return content.text or ""


def _require() -> ModuleType:
    try:
        import mwparserfromhell  # noqa: F401
        import mwxml
    except ImportError as error:
        raise DataError(f"kind: wikipedia needs {error.name}; pip install 'rorqual[data]'") from None
    return mwxml

"""The report of a preparation as one HTML file that asks for nothing from elsewhere."""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from data.counts import Count
from data.dedup.duplicates import Pair
from data.report import html, plots
from data.report.figures import PALETTE
from data.report.shape import RejectedDocument, Report, Tokens
from data.yaml_io import as_yaml

TEMPLATE = "page.html"


def write_report(report: Report, path: Path, recipe: dict[str, Any] | None = None) -> None:
    """Write the page. Equal reports give equal bytes.

    Args:
        recipe: what the manifest says of the recipe; None: the page does not show it.

    Raises:
        DataError: there is no place for a file at `path`.
    """
    html.write(render(report, recipe), path)


def render(report: Report, recipe: dict[str, Any] | None = None) -> str:
    """The page as text."""
    environment = html.environment(Path(__file__).parent)
    environment.filters |= {"number": number, "size": size, "share": share}
    colours = {source: PALETTE[n % len(PALETTE)] for n, source in enumerate(report.stages[0].sources)}
    train = {source: splits["train"] for source, splits in report.tokens.items() if "train" in splits}
    return environment.get_template(TEMPLATE).render(
        report=report,
        recipe=as_yaml(recipe) if recipe else "",
        colours=colours,
        stages=_stages(report, colours),
        reasons=_reasons(report, colours),
        rejected_documents=sum(
            count.documents for steps in report.rejected.values() for of in steps.values() for count in of.values()
        ),
        exact=_total(kinds["exact"] for kinds in report.duplicates.removed.values()),
        near=_total(kinds["near"] for kinds in report.duplicates.removed.values()),
        unreadable={source: records for source, records in report.unreadable.items() if records.reasons},
        unreadable_records=sum(sum(records.reasons.values()) for records in report.unreadable.values()),
        all_tokens=_all_tokens(tokens for splits in report.tokens.values() for tokens in splits.values()),
        languages=_ranked(report.languages, colours),
        splits=_splits(report),
        pairs=[(pair, *_compared(pair)) for pair in report.duplicates.examples],
        examples=_examples(report),
        range_of=_range_of,
        difference=_difference,
        lengths_plot=Markup(plots.lengths(report.lengths, colours, "bytes")),
        token_lengths_plot=Markup(plots.lengths(report.token_lengths, colours, "tokens")),
        clusters_plot=Markup(plots.clusters(report.duplicates.clusters, PALETTE[0])),
        bytes_per_token_plot=Markup(
            plots.bytes_per_token(
                {source: tokens.bytes_per_token for source, tokens in train.items() if tokens.documents},
                {source: t.reference_bytes_per_token for source, t in train.items() if t.reference_bytes_per_token},
                colours,
            )
        ),
    )


@dataclass(frozen=True)
class Part:
    """One source's piece of a bar."""

    source: str
    colour: str
    count: Count
    width: float  # percent of the bar's room


@dataclass(frozen=True)
class Row:
    """A line of a table with a bar."""

    name: str
    count: Count
    parts: list[Part]


class Stage(NamedTuple):
    """A line of the funnel."""

    name: str
    left: Count  # of all sources
    fell: int  # documents
    parts: list[Part]
    sources: dict[str, Count | None]  # None: the source has no such step


class Examples(NamedTuple):
    """Documents that fell for one reason of a step."""

    reason: str
    fell: int
    documents: list[RejectedDocument]


class Split(NamedTuple):
    """A line of the table of tokens."""

    source: str
    split: str
    tokens: Tokens


def number(value: int) -> str:
    """1234567 → "1,234,567"."""
    return f"{value:,}"


def size(value: int) -> Markup:
    """1234567 → "1.23 MB", with the exact number for whom points at it."""
    scaled, unit = float(value), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if scaled < 999.5:
            break
        scaled, unit = scaled / 1000, larger
    short = f"{scaled:.0f}" if unit == "B" or scaled >= 100 else f"{scaled:.1f}" if scaled >= 10 else f"{scaled:.2f}"
    return Markup('<data value="{}" title="{} bytes">{}\u202f{}</data>').format(value, number(value), short, unit)


def share(part: float, whole: float) -> str:
    """Percent, with the digits that matter."""
    if not whole:
        return "–"
    percent = 100 * part / whole
    if 0 < percent < 0.01:
        return "<0.01\u202f%"
    return f"{percent:.{0 if percent in (0, 100) else 1 if percent >= 1 else 2}f}\u202f%"


def _stages(report: Report, colours: Mapping[str, str]) -> list[Stage]:
    """The funnel. A source without a step keeps there what it had."""
    left = dict(report.stages[0].sources)
    read = _total(left.values())
    before, found = read, []
    for stage in report.stages:
        left |= stage.sources
        total = _total(left.values())
        own = {source: stage.sources.get(source) for source in colours}
        parts = _parts(left, colours, read.bytes, by_bytes=True)
        found.append(Stage(stage.name, total, before.documents - total.documents, parts, own))
        before = total
    return found


def _reasons(report: Report, colours: Mapping[str, str]) -> list[Row]:
    """Why documents fell: the steps' reasons and duplicates, the most frequent first."""
    found = {
        source: {f"{step}: {reason}": count for step, reasons in steps.items() for reason, count in reasons.items()}
        for source, steps in report.rejected.items()
    }
    for source, kinds in report.duplicates.removed.items():
        for kind, count in kinds.items():
            if count.documents:
                found.setdefault(source, {})[f"{kind} duplicate"] = count
    return _ranked(found, colours, by_bytes=False)


def _ranked(counts: Mapping[str, Mapping[str, Count]], colours: Mapping[str, str], by_bytes: bool = True) -> list[Row]:
    """Source → name → count, turned round: a row for each name, the largest first and as long as the room."""
    by_name: dict[str, dict[str, Count]] = {}
    for source, named in counts.items():
        for name, count in named.items():
            by_name.setdefault(name, {})[source] = count
    totals = {name: _total(of_source.values()) for name, of_source in by_name.items()}
    largest = max((_amount(total, by_bytes) for total in totals.values()), default=0)
    order = sorted(totals, key=lambda name: (-_amount(totals[name], by_bytes), name))
    return [Row(name, totals[name], _parts(by_name[name], colours, largest, by_bytes)) for name in order]


def _parts(counts: Mapping[str, Count], colours: Mapping[str, str], whole: int, by_bytes: bool) -> list[Part]:
    return [
        Part(source, colours[source], counts[source], round(100 * _amount(counts[source], by_bytes) / max(whole, 1), 3))
        for source in colours
        if source in counts and _amount(counts[source], by_bytes)
    ]


def _splits(report: Report) -> list[Split]:
    rows = [
        Split(source, split, tokens) for source, splits in report.tokens.items() for split, tokens in splits.items()
    ]
    names = list(dict.fromkeys(row.split for row in rows))
    return rows + [
        Split("all", split, _all_tokens(row.tokens for row in rows if row.split == split)) for split in names
    ]


def _all_tokens(tokens: Iterable[Tokens]) -> Tokens:
    mine = list(tokens)
    return Tokens(
        documents=sum(one.documents for one in mine),
        tokens=sum(one.tokens for one in mine),
        bytes=sum(one.bytes for one in mine),
    )


def _examples(report: Report) -> dict[str, list[Examples]]:
    """By step, in the order of the steps, the most frequent reason first."""
    fell: Counter[tuple[str, str]] = Counter()
    for steps in report.rejected.values():
        for step, reasons in steps.items():
            fell.update({(step, reason): count.documents for reason, count in reasons.items()})
    shown: dict[tuple[str, str], list[RejectedDocument]] = {}
    for example in report.examples:
        shown.setdefault((example.step, example.reason), []).append(example)
    order = [stage.name for stage in report.stages]
    place = {step: order.index(step) if step in order else len(order) for step, _ in shown}
    found: dict[str, list[Examples]] = {}
    for step, reason in sorted(shown, key=lambda key: (place[key[0]], -fell[key], key)):
        found.setdefault(step, []).append(Examples(reason, fell[step, reason], shown[step, reason]))
    return found


def _compared(pair: Pair) -> tuple[Markup, Markup]:
    """Both texts, with what the other one has not marked; word by word, and character by character where words have no spaces."""
    cut = re.compile(r"[a-zA-Z0-9\u00c0-\u1fff]+|\s+|.", re.DOTALL)
    kept, fallen = cut.findall(pair.kept_text), cut.findall(pair.fallen_text)
    blocks = difflib.SequenceMatcher(None, kept, fallen, autojunk=False).get_opcodes()
    return (
        Markup("").join(_marked("".join(kept[a:b]), tag == "equal") for tag, a, b, _, _ in blocks),
        Markup("").join(_marked("".join(fallen[c:d]), tag == "equal") for tag, _, _, c, d in blocks),
    )


def _marked(text: str, equal: bool) -> Markup:
    return Markup("{}" if equal or not text else "<mark>{}</mark>").format(text)


def _range_of(exponent: int) -> str:
    """What a power of two stands for in a histogram."""
    if exponent <= 1:
        return str(exponent)
    return f"{number(1 << exponent - 1)} to {number((1 << exponent) - 1)}"


def _difference(value: float, reference: float) -> str:
    """How much more than the reference, in percent with a sign."""
    return f"{100 * (value / reference - 1):+.1f}\u202f%".replace("-", "−")


def _total(counts: Iterable[Count]) -> Count:
    return sum(counts, Count())


def _amount(count: Count, by_bytes: bool) -> int:
    return count.bytes if by_bytes else count.documents

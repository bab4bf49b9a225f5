"""A plan as a page: it asks for nothing from elsewhere, and its pictures are to scale."""

import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.train.planning.plans import V3, even, plan_of, tiny, two, v3
from train.config import RecipeError
from train.planning.search import Fallen, Own, Search
from train.planning.shown import pictures
from train.planning.shown.contents import KINDS, parts_of, timeline_of
from train.planning.shown.page import render, write_page
from train.planning.simulation.simulate import Simulation


class Box(NamedTuple):
    x: float
    y: float
    width: float
    height: float
    kind: str
    about: str


def boxes(svg: str) -> list[Box]:
    found = re.findall(r"<rect ([^>]*)><title>([^<]*)</title></rect>", svg)
    values = [(dict(re.findall(r'([\w-]+)="([^"]*)"', given)), about) for given, about in found]
    return [
        Box(*(float(given[name]) for name in ("x", "y", "width", "height")), given.get("class", ""), about)
        for given, about in values
    ]


class Balanced(HTMLParser):
    """What is open, and all that asks for something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.asks: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.asks += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("plan", [tiny, two, v3])
def test_the_page_is_whole_and_asks_for_nothing(plan: Any) -> None:
    page = render(plan())
    read = Balanced(page)
    assert read.open == []
    assert read.asks and all(asked.startswith("#") and f'id="{asked[1:]}"' in page for asked in read.asks)
    assert not re.search(r"https?:|url\(|@import|<script|<link", page)


def test_equal_plans_give_equal_bytes() -> None:
    again = plan_of("v3", 2048, "H800", *V3)
    assert again is not v3() and render(again) == render(v3())


def test_every_pipeline_rank_has_a_bar_of_its_bytes() -> None:
    plan = v3()
    found = [box for box in boxes(pictures.memory(plan)) if box.kind == "part"]
    counted: Counter[str] = Counter()
    for box in found:
        rank, kind, count = re.match(r"(rank \d+), ([\w ]+): ([\d,]+) bytes", box.about).groups()  # type: ignore[union-attr]
        counted[f"{rank} {kind}"] += int(count.replace(",", ""))
    for held in plan.memory:
        for kind, count in parts_of(held).items():
            assert counted[f"rank {held.pipeline_rank} {KINDS[kind]}"] == count
    scales = {
        box.width / int(re.search(r"([\d,]+) bytes", box.about)[1].replace(",", "")) for box in found if box.width > 50
    }  # type: ignore[index]
    assert max(scales) == pytest.approx(min(scales), rel=1e-3)


@pytest.mark.parametrize("plan", [two, v3])
def test_nothing_lies_on_anything_else_or_outside(plan: Any) -> None:
    course = timeline_of(plan().step, plan().time)
    for svg in (pictures.memory(plan()), pictures.terms(plan().time.terms), pictures.pipeline(course)):
        height = float(re.search(r'viewBox="0 0 \d+ ([\d.]+)"', svg)[1])  # type: ignore[index]
        marks = sorted(box for box in boxes(svg) if box.kind != "wait")
        assert all(box.x >= 0 and box.x + box.width <= pictures.WIDTH + 0.02 for box in marks)
        assert all(box.y >= 0 and box.y + box.height <= height for box in marks)
        by_row: dict[float, list[Box]] = {}
        for box in marks:
            by_row.setdefault(box.y + box.height, []).append(box)
        for row in by_row.values():
            assert all(a.x + a.width <= b.x + 0.02 for a, b in pairwise(row))


def test_the_terms_of_the_time_follow_each_other_and_fill_the_step() -> None:
    plan = v3()
    assert plan.time
    *terms, whole = boxes(pictures.terms(plan.time.terms))
    assert [box.about for box in terms] == [f"{term.name}: {term.formula}" for term in plan.time.terms]
    assert sum(box.width for box in terms) == pytest.approx(whole.width, abs=0.1)
    assert all(a.x + a.width == pytest.approx(b.x, abs=0.02) for a, b in pairwise(terms))


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv", "dualpipev"])
def test_a_short_timeline_shows_what_every_rank_does(schedule: str) -> None:
    """A forward and a backward pass of each micro-batch in each stage, and gradients of weights where these stand alone."""
    course = timeline_of(even(schedule, 2, 4))
    shown = Counter(box.about for box in boxes(pictures.pipeline(course)) if box.kind == "chunk")
    kinds = Counter(re.match("forward|backward|gradients of inputs", about) is not None for about in shown.elements())
    assert kinds[True] >= 2 * 4 * course.stages - 4
    assert set(shown.values()) <= {1, 2}  # twice: both halves of an overlapped chunk


def test_a_page_of_one_process_has_no_pipeline() -> None:
    assert 'id="pipeline"' in render(two()) and 'id="pipeline"' not in render(tiny())


def test_search_and_simulation_are_on_the_page_where_they_are_given() -> None:
    plan = two()
    assert plan.device
    fallen = [Fallen("zero2 <8>", 1234, "do not fit", "99 GB: parallel.engine=zero2")]
    own = Own(plan, 3, 1.25, "")
    search = Search(plan.recipe, 2, plan.device, 1300, [plan] * 15, [plan], fallen, own, fit=66)
    found = {kind: getattr(plan.fullest, kind) for kind in KINDS if kind != "working"}
    simulation = Simulation(sum(found.values()), found, 1.5, 4)
    page = render(plan, search=search, simulation=simulation)
    for said in ("1,300 layouts were tried; 66 fit", "number 3, and takes 1.25", "3 more", "unproven=true: no row"):
        assert said in page
    assert page.count("<code>parallel.engine=fsdp") == 16
    assert "zero2 &lt;8&gt;" in page and "1,234" in page and "99 GB: parallel.engine=zero2" in page
    assert "ran 4 micro-batches in 1.5 s" in page
    plain = render(plan)
    assert 'id="search"' not in plain and 'id="simulation"' not in plain


def test_the_page_is_written_or_the_mistake_is_named(tmp_path: Path) -> None:
    write_page(tiny(), tmp_path / "plan.html")
    assert (tmp_path / "plan.html").read_text("utf-8") == render(tiny())
    with pytest.raises(RecipeError, match=r"^plot = .*: there is no folder"):
        write_page(tiny(), tmp_path / "nowhere" / "plan.html")

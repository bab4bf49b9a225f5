"""A plan as text."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.train.planning.plans import even, tiny, two, v3
from train.planning.shown import text
from train.planning.shown.contents import KINDS, Room, timeline_of
from train.planning.shown.text import FILL, in_words
from train.planning.written import words


@pytest.mark.parametrize("plan", [tiny, two, v3])
def test_lines_fit_a_terminal_and_hold_the_figures(plan: Any) -> None:
    lines = in_words(plan())
    assert max(map(len, lines)) <= 132
    table = lines[len(lines) - lines[::-1].index("") :]
    for name, value in plan().numbers().items():
        if isinstance(value, int) and not isinstance(value, bool):
            assert f"{words(name):32} {value:,}" in table
    for term in plan().time.terms if plan().time else ():
        assert any(line.startswith(term.name) for line in lines)


def test_one_process_has_no_pipeline() -> None:
    assert not any("rank 0" in line or line.startswith(("pipeline", "layers")) for line in in_words(tiny()))
    assert any(line.startswith("pipeline") for line in in_words(two()))


def test_bars_are_as_long_as_their_bytes() -> None:
    """18 GB in 72 characters, 4 a GB; the line of what is usable stands behind the 11th GB."""
    held: Any = SimpleNamespace(**dict.fromkeys(KINDS, 10**9))
    bar = text._stacked(held, Room(18e9, 11e9))
    assert bar == ("".join(4 * letter for letter in FILL.values()) + 16 * " " + "│").ljust(73)
    assert text._stacked(held, Room(7e9, None)).count(FILL["gathered"]) == 10


def test_a_device_with_far_more_memory_is_off_the_picture() -> None:
    lines = in_words(two())
    assert any("off the picture: what H100 has for a run: 74.8 GB" in line for line in lines)
    assert not any("│" in line for line in lines)
    assert any("│ is what H800 has for a run: 74.8 GB" in line for line in in_words(v3()))


def test_a_timeline_is_drawn_chunk_by_chunk() -> None:
    """1f1b on two ranks: a backward pass takes two forward passes, the first rank waits for the last one's first."""
    said, _, first, last = text._pipeline(timeline_of(even("1f1b", 2, 3)))
    assert said == "pipeline: ranks wait 25.0 % of the time in the mean, by FLOPs; a column is 1 F"  # 3 of 12
    assert first == "rank 0 FF··BBFBB·BB"
    assert last == "rank 1 ·FBBFBBFBB··"


def test_a_long_timeline_is_cut_in_the_middle() -> None:
    first, _, _, last, more = list(text._pipeline(timeline_of(even("1f1b", 4, 1000))))[-5:]
    assert 100 < len(first) == len(last) <= 132 and first.count("⋯") == 1
    assert first.startswith("rank 0 FFFF······BBFBBF") and first.endswith("BBFBB·BB·BB·BB")
    assert last.startswith("rank 3 ···FBBFBBFBB") and last.endswith("FBBFBB······")
    assert more.strip().startswith("⋯ and 936 micro-batches more")


def test_what_was_simulated_stands_beside_what_is_counted() -> None:
    plan = two()
    held = plan.fullest
    found = {kind: getattr(held, kind) for kind in ("parameters", "gradients", "moments", "gathered", "communication")}
    found["activations"] = (held.activations + held.working) // 2
    simulation: Any = SimpleNamespace(at_peak=found, peak=sum(found.values()), seconds=1.0, micro_batches=4)
    lines = in_words(plan, simulation)
    start = next(n for n, line in enumerate(lines) if line.startswith("formula beside simulation"))
    assert lines[start].split()[3:] == ["formula", "simulation", "formula", "/", "simulation"]
    ratios = {line[:28].strip(): line.split()[-1] for line in lines[start + 1 : start + 8]}
    assert (ratios["parameters"], ratios["activations"]) == ("1.000", "2.000")
    assert ratios["peak"] == f"{held.peak / simulation.peak:.3f}"

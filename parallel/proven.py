"""The combinations of engine and axes that `tests/parallel/test_parity.py`, and with "fp8" `test_fp8.py`, compare with one process,
and that are therefore open.

A combination is open because it was compared, never because its parts were: axes that are right alone have composed into wrong
gradients in other stacks.
"""

from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import NamedTuple, get_args

from parallel.placement import Schedule


class Cell(NamedTuple):
    """An engine, and those of "replicate", "expert", "context", "recompute", "offload", "fp8" and the pipeline's schedule that are
    used beside it."""

    engine: str
    axes: frozenset[str]

    def __str__(self) -> str:
        return " + ".join([self.engine, *sorted(self.axes)])


def _all_of(engine: str, *axes: str) -> Iterator[Cell]:
    """Every subset of the axes."""
    for size in range(len(axes) + 1):
        for chosen in combinations(axes, size):
            yield Cell(engine, frozenset(chosen))


def _in_pipelines(cells: Iterable[Cell]) -> Iterator[Cell]:
    """Each of them under every schedule."""
    return (Cell(cell.engine, cell.axes | {schedule}) for cell in cells for schedule in get_args(Schedule))


PROVEN = frozenset(
    {
        *_all_of("ddp", "recompute", "fp8"),
        *_all_of("fsdp", "replicate", "expert", "recompute", "offload", "fp8"),
        *_all_of("zero1", "expert", "recompute", "offload", "fp8"),
        *_all_of("zero2", "expert", "recompute", "offload", "fp8"),
        *_all_of("zero3", "recompute", "offload", "fp8"),
        *_all_of("ddp", "recompute", "context"),
        *_all_of("fsdp", "replicate", "expert", "recompute", "offload", "context"),
        *_all_of("zero1", "expert", "recompute", "offload", "context"),
        *_all_of("zero2", "expert", "recompute", "offload", "context"),
        *_all_of("zero3", "recompute", "offload", "context"),
        *_in_pipelines(_all_of("ddp", "recompute", "context")),
        *_in_pipelines(_all_of("fsdp", "replicate", "expert", "recompute", "context")),
        *_all_of("fsdp", "expert", "recompute", "context", "fp8"),
        *_in_pipelines(_all_of("ddp", "recompute", "fp8")),
        *_in_pipelines(_all_of("fsdp", "expert", "recompute", "context", "fp8")),
    }
)

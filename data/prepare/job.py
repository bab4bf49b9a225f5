"""What every item of a preparation is told, and where its results lie.

read/SOURCE/III-PPP.parquet       part P of input I: its documents as they came; gone once they are cleaned
read/SOURCE/III.json              account of input I, written when all its parts are
clean/SOURCE/III-PPP.parquet      what the steps left of a part, with the hashes that find duplicates
clean/SOURCE/III-PPP.json         account of the cleaning
dedup/…                           edges between equal and similar documents, then who of a shard's documents falls
tokenizer/, tokenizer.json        the tokenizer, and how it was made
encode/SOURCE/III-PPP.*           token ids of each split, and the account of the encoding
write/…                           pieces of the store
"""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

from data.clean import Step
from data.clean.step import StepRecord
from data.files import replace_file
from data.manifest import Record
from data.recipe import DataRecipe

R = TypeVar("R", bound=Record)


class Job(NamedTuple):
    """The same for every item."""

    recipe: DataRecipe
    name: str  # of the recipe
    folder: Path  # where the work lies
    cache: Path | None  # of fetched wheels


class Shard(NamedTuple):
    """A part of an input: what the stages after the reading work on."""

    source: int  # its number in the recipe
    name: str  # "SOURCE/III-PPP"


def steps_of(recipe: DataRecipe, source: int) -> list[StepRecord]:
    """The cleaning of a source: its own, or the recipe's."""
    own = recipe.sources[source].steps
    return list(recipe.steps if own is None else own)


def names_of(steps: Iterable[StepRecord]) -> list[str]:
    """A name for each step, for the report: its kind, with a number where it is not the first of its kind."""
    names: list[str] = []
    for step in steps:
        kind: str = step.kind  # type: ignore[attr-defined]
        earlier = sum(name.split(" ")[0] == kind for name in names)
        names.append(f"{kind} {earlier + 1}" if earlier else kind)
    return names


def built_steps(steps: Iterable[StepRecord]) -> list[Step]:
    """The steps themselves, each built once in a process."""
    return [_built(type(step), step.model_dump_json()) for step in steps]


@cache
def _built(kind: type[StepRecord], content: str) -> Step:
    return kind.model_validate_json(content).build()


def write_record(path: Path, record: Record) -> None:
    """Write an item's account, which says that the item is done."""
    with replace_file(path) as temporary:
        temporary.write_text(record.model_dump_json(), encoding="utf-8")


def read_record(path: Path, kind: type[R]) -> R:
    return kind.model_validate_json(path.read_bytes())

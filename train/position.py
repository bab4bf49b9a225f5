"""How far a run has read its data: what a checkpoint holds of it, and what a recipe may still change.

The samples that a run has consumed were drawn by its recipe as it stood then, and a recipe must go on saying so: then the order of
the samples is a function of the recipe, of an interrupted run as of one that never stopped. So what has begun cannot be edited.
What shall change in a run that is under way is written as one more stage, which begins where the run stands or later.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from data.samples import Read
from train.config import Recipe, RecipeError
from train.fields import show
from train.sections import Consumption, DataSection


@dataclass(frozen=True)
class Begun:
    """A stage of the data that has begun. Its samples are counted from its first one."""

    from_sample: int
    from_tokens: int  # consumed before its first step
    hash: str  # of the stage with the content of its stores (`Corpus.fingerprint`)
    read: dict[str, Read]  # how far the samples before it had read into every source


@dataclass(frozen=True)
class Position:
    """What has been consumed when a run starts or continues."""

    tokens: int = 0
    samples: int = 0
    sections: tuple[Begun, ...] = ()
    read: dict[str, Read] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """From a checkpoint's `run.json`."""
        sections = (Begun(**{**section, "read": _reads(section["read"])}) for section in record["data_sections"])
        return cls(record["tokens"], record["samples"], tuple(sections), _reads(record["read"]))

    def to_record(self) -> dict[str, Any]:
        """The entries of `run.json` that `of` reads, and totals by source."""
        sources = list(dict.fromkeys(read.source for read in self.read.values()))
        mine = {source: [read for read in self.read.values() if read.source == source] for source in sources}
        return {
            "tokens": self.tokens,
            "samples": self.samples,
            "samples_by_source": {name: sum(read.samples for read in reads) for name, reads in mine.items()},
            "tokens_by_source": {name: sum(read.tokens for read in reads) for name, reads in mine.items()},
            "data_sections": [asdict(section) for section in self.sections],
            "read": {name: asdict(read) for name, read in self.read.items()},
        }


def check_unchanged(recipe: Recipe, record: Mapping[str, Any]) -> None:
    """The recipe must draw what has been consumed as the recipe of the checkpoint did.

    Args:
        record: `run.json` of the checkpoint.

    Raises:
        RecipeError: it names the first key that would draw it otherwise, and how to write the change.
    """
    old, new, tokens = DataSection.model_validate(record["recipe"]["data"]), recipe.data, record["tokens"]
    run, consumed = f"the run in {recipe.run.dir}", f"has consumed {tokens:,} tokens"
    for key in ("seed", "mask_documents"):
        if getattr(old, key) != getattr(new, key):
            raise RecipeError(
                f"data.{key} = {show(getattr(new, key))}: {run} began with {show(getattr(old, key))}; it holds for a whole run; "
                "set it back, or set another run.dir"
            )
    over, new_over = (
        [list(each) for each in section.passed_over if each[0] < record["samples"]] for section in (old, new)
    )
    if over != new_over:
        raise RecipeError(
            f"data.passed_over = {show(new.passed_over)}: {run} has consumed {record['samples']:,} samples without "
            f"{show(over)}; what has been consumed stays; set it back, and add ranges from sample {record['samples']} on"
        )
    was, now = _begun(old, tokens), _begun(new, tokens)
    starts, new_starts = ({state.from_tokens for state in states} for states in (was, now))
    if gone := sorted(starts - new_starts):
        raise RecipeError(
            f"data.stages: the stage from {gone[0]:,} tokens on is missing; {run} {consumed}, and what has begun stays; put it back"
        )
    if late := sorted(new_starts - starts):
        raise RecipeError(
            f"data.stages: a stage begins at {late[0]:,} tokens; {run} {consumed} without it; write from_tokens: {tokens} or more"
        )
    for index, (before, after) in enumerate(zip(was, now)):
        for key, one, other in _differences(before, after):
            name = f"data.{key}" if index == 0 else f"data.stages.{index - 1}.{key}"
            change = f"{{from_tokens: {tokens}, {key.partition('.')[0]}: …}}"
            raise RecipeError(
                f"{name} = {show(other)}: {run} {consumed}, drawn with {show(one)}; what has begun stays; set it back, and let the "
                f"change begin here with data.stages=[{change}]"
            )


def _begun(section: DataSection, tokens: int) -> Sequence[Consumption]:
    """What a data section says about the samples of the first `tokens` tokens."""
    return [state for state in section.consumption() if state.from_tokens < tokens]


def _differences(before: Consumption, after: Consumption) -> list[tuple[str, Any, Any]]:
    """Key, value before and value after of all that would draw other samples; where a store lies is no such thing."""
    found: list[tuple[str, Any, Any]] = [
        (key, getattr(before, key), getattr(after, key)) for key in ("sequence_length", "packing")
    ]
    old, new = before.train, after.train
    if len(old) != len(new):
        found.append(("train", [source.path for source in old], [source.path for source in new]))
    found += [(f"train.{i}.weight", one.weight, other.weight) for i, (one, other) in enumerate(zip(old, new))]
    return [difference for difference in found if difference[1] != difference[2]]


def _reads(record: Mapping[str, Mapping[str, Any]]) -> dict[str, Read]:
    return {name: Read(**read) for name, read in record.items()}

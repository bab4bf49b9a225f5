"""What a run says when it cannot go on: who does not answer, and where every rank stands."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from train.guard.members import Member, in_words
from train.guard.place import Place


class Mark(NamedTuple):
    """What a rank is at, as its main thread last said."""

    doing: str
    step: int | None = None
    patience: float = 0.0  # seconds in which it need not move; the run's own where that is longer
    meeting: int = 0  # the number of the place, along their way, where all ranks meet for the first time

    def __str__(self) -> str:
        return self.doing if self.step is None else f"step {self.step}: {self.doing}"


class Answer(NamedTuple):
    """What a rank says of itself when asked."""

    mark: Mark
    place: Place


def report(why: str, answers: Mapping[Member, Answer], silent: Mapping[Member, Mark]) -> list[str]:
    """Lines for a person: the reason, those who are silent, then the ranks, in groups that stand at one place.

    Args:
        why: what made somebody ask.
        answers: of the ranks that said where they stand.
        silent: of the others, what they were last known to be at.
    """
    lines = [why]
    for mark in dict.fromkeys(silent.values()):
        members = [member for member, its in silent.items() if its == mark]
        lines.append(
            f"  {in_words(members)}: {'do' if len(members) > 1 else 'does'} not answer; last heard of in {mark}"
        )
    for answer in dict.fromkeys(answers.values()):
        members = [member for member, its in answers.items() if its == answer]
        lines.append(f"  {in_words(members)}: {answer.mark}, {answer.place}{_behind(answer.mark, [*answers.values()])}")
    return lines


def _behind(mark: Mark, answers: Sequence[Answer]) -> str:
    """Whether others have come further."""
    steps = [answer.mark.step for answer in answers if answer.mark.step is not None]
    return ", behind the others" if steps and mark.step is not None and mark.step < max(steps) else ""

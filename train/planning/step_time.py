"""Seconds of a step, term by term: products by kind, what is bound by memory, what messages are not hidden, bubble, optimizer."""

from dataclasses import dataclass

from train.planning.devices import Device
from train.planning.step import PlannedStep


@dataclass(frozen=True)
class Term:
    """A part of the time of a step."""

    name: str
    seconds: float
    formula: str  # with its numbers


@dataclass(frozen=True)
class StepTime:
    """The time of a step, as its slowest process spends it."""

    terms: tuple[Term, ...]  # they add up
    sent: dict[str, int]  # bytes that a process sends at most, by link: "node", "network"
    mfu: float

    @property
    def seconds(self) -> float:
        return sum(term.seconds for term in self.terms)


def step_time(step: PlannedStep, device: Device) -> StepTime:
    """What a step takes on so many of these devices."""
    raise NotImplementedError

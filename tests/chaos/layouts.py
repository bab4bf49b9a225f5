"""The layouts that a small run is disturbed under."""

import random
from dataclasses import dataclass

STEPS, SAVES_EVERY, KEEP = 36, 3, 3
HANG_SECONDS = 5  # after which a run says that a rank is stopped
COMMON = (
    f"schedule.tokens={STEPS * 8 * 32}",
    f"checkpoint.every_steps={SAVES_EVERY}",
    f"run.hang_seconds={HANG_SECONDS}",
    "parallel.micro_batch=2",
)


@dataclass(frozen=True)
class Layout:
    processes: int
    keys: str  # what stands behind `parallel.`, separated by blanks

    @property
    def changes(self) -> tuple[str, ...]:
        """As they stand on the command line."""
        return (*COMMON, *(f"parallel.{key}" for key in self.keys.split()))


LAYOUTS = {
    "alone": Layout(1, "engine=ddp"),
    "ddp": Layout(2, "engine=ddp"),
    "fsdp": Layout(2, "engine=fsdp"),
    "expert": Layout(4, "engine=fsdp expert=2"),
    "pipeline": Layout(2, "engine=ddp pipeline=2 schedule=zbv"),
    "zero1": Layout(2, "engine=zero1"),
    "zero3": Layout(2, "engine=zero3"),
    "context": Layout(2, "engine=fsdp context=2"),
}
CHANGING = "changing"  # another of them, on another number of processes, at each start
NAMES = (*LAYOUTS, CHANGING)


def next_layout(name: str, pick: random.Random) -> Layout:
    """Of a start: the named layout, or any."""
    return LAYOUTS[pick.choice(list(LAYOUTS)) if name == CHANGING else name]

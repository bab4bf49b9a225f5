"""Which process does what: a parallel configuration, checked against the number of processes, becomes a `Layout`.

This is the one place that knows how ranks are arranged; what is not built yet is refused here and in the recipe alike.
"""

from dataclasses import dataclass
from typing import Literal

EngineName = Literal["ddp", "fsdp", "zero1", "zero2", "zero3"]


class LayoutError(ValueError):
    """A layout that cannot run. The message names the field, the value, the rule and the fix."""


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over processes."""

    engine: EngineName = "ddp"
    expert: int = 1
    pipeline: int = 1
    context: int = 1
    micro_batch: int = 1  # sequences in one forward pass of one process


@dataclass(frozen=True)
class Layout:
    """A configuration that fits a number of processes.

    Raises:
        LayoutError: an axis or an engine is not built yet.
    """

    config: ParallelConfig
    world_size: int

    def __post_init__(self) -> None:
        if self.config.engine != "ddp":
            raise LayoutError(f"parallel.engine: {self.config.engine!r}: not built yet; use ddp")
        for axis in ("expert", "pipeline", "context"):
            if getattr(self.config, axis) != 1:
                raise LayoutError(f"parallel.{axis}: {getattr(self.config, axis)}: not built yet; use 1")

    @property
    def data_ranks(self) -> int:
        """Ranks that read different sequences; with DDP all of them."""
        return self.world_size

    def check_batch(self, sequences: int) -> None:
        """Refuse a global batch that the data ranks cannot share evenly."""
        if sequences % self.data_ranks:
            raise LayoutError(
                f"schedule.batch_tokens: a global batch of {sequences} sequences does not divide over {self.data_ranks} "
                f"processes; choose a multiple of {self.data_ranks} sequences or another number of processes"
            )

"""One rank's part of each global batch: the same sequences whatever the number of ranks, micro-batches and reading processes."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from data.errors import DataError
from data.prefetch import Arrays, Prefetch, Shape
from data.samples import Batch, Samples, empty_batch


class Planned(NamedTuple):
    """What a step reads."""

    first_sample: int
    sequences: int  # of the global batch
    micro_batch: int  # most sequences in one Batch


class Loader:
    """Shares out global batches: rank r of R takes the r-th R-th of each, in micro-batches.

    Args:
        samples: where the sequences come from.
        rank, world_size: this process among those that share the global batch.
        workers: processes that read ahead of the steps; 0: steps are read when they are asked for, by whoever asks.
        pin: put batches into page-locked memory, for copies to a GPU that do not wait.
    """

    def __init__(
        self, samples: Samples, rank: int = 0, world_size: int = 1, workers: int = 1, pin: bool = False
    ) -> None:
        self.samples = samples
        self._rank, self._world_size, self._workers, self._pin = rank, world_size, workers, pin

    def steps(self, plan: Iterable[Planned]) -> "Steps":
        """Micro-batches of each step of a plan. The processes that read ahead start now; closing the iterator ends them.

        Raises:
            DataError: from the iterator; a global batch that `world_size` does not divide, samples that run out, or a
                process that has died.
        """
        return Steps(self, plan)

    def step(self, planned: Planned) -> list[Batch]:
        """This rank's micro-batches of one step, read here and now."""
        batch = empty_batch(*self._shape(planned))
        self._fill(planned, [part.numpy() for part in batch])
        return self._cut(batch, planned.micro_batch)

    def _shape(self, planned: Planned) -> tuple[int, int]:
        """Sequences of this rank, and tokens of each."""
        sequences = planned.sequences
        if sequences % self._world_size:
            nearest = max(sequences // self._world_size, 1) * self._world_size
            raise DataError(
                f"batch = {sequences} sequences: {self._world_size} ranks must divide it; use a multiple, e.g. {nearest}"
            )
        return sequences // self._world_size, self.samples.width(planned.first_sample)

    def _shapes(self, planned: Planned) -> list[Shape]:
        """Of the tokens and the documents of this rank's share."""
        shape = self._shape(planned)
        return [(np.int64, shape), (np.int32, shape)]

    def _fill(self, planned: Planned, arrays: Arrays) -> None:
        """Write this rank's share of a step."""
        tokens, documents = arrays
        self.samples.fill(planned.first_sample + self._rank * len(tokens), tokens, documents)

    def _cut(self, batch: Batch, micro_batch: int) -> list[Batch]:
        """A rank's share of a step in micro-batches."""
        if self._pin:
            batch = Batch(*(part.pin_memory() for part in batch))
        return [Batch(*parts) for parts in zip(*(part.split(micro_batch) for part in batch))]


class Steps:
    """The steps of a plan, each the list of a rank's micro-batches; see `Loader.steps`."""

    def __init__(self, loader: Loader, plan: Iterable[Planned]) -> None:
        self._loader = loader
        self._ahead: Prefetch[Planned] | None = None
        if loader._workers:
            self._ahead = Prefetch(plan, loader._shapes, loader._fill, loader._workers)
        else:
            self._plan = iter(plan)

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._ahead is None:
            return self._loader.step(next(self._plan))
        planned, arrays = next(self._ahead)
        return self._loader._cut(Batch(*map(torch.from_numpy, arrays)), planned.micro_batch)

    def close(self) -> None:
        """End the processes that read ahead, if there are any."""
        if self._ahead is not None:
            self._ahead.close()

"""Finished runs as the fits see them: one column a quantity, in one set of units.

A column that a table does not have is None, and a fit that needs it says so. Two columns are derived where only one of them is
missing, by the definition of the compute: C = M·D with M = 6·N where no M was measured.
"""

from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Runs:
    """R finished runs.

    Attributes:
        loss: [R] of the validation text, nats per token (or bits per byte, where the table has those; a law keeps its unit).
        params: [R] N, parameters without embedding and head, all experts counted.
        active: [R] the part of N that one token uses.
        flops: [R] C = M·D, training FLOPs without embedding and head (DeepSeek LLM §3.1).
        tokens: [R] D.
        lr: [R] peak learning rate.
        batch: [R] tokens of a global batch.
        seed: [R] of the weights and of the order; runs that differ in nothing else measure the noise.
    """

    loss: Array
    params: Array | None = None
    active: Array | None = None
    flops: Array | None = None
    tokens: Array | None = None
    lr: Array | None = None
    batch: Array | None = None
    seed: Array | None = None

    @classmethod
    def of(cls, **columns: ArrayLike | None) -> Self:
        """From sequences of numbers, with the columns derived that can be."""
        runs = cls(**{name: None if c is None else np.asarray(c, dtype=np.float64) for name, c in columns.items()})  # type: ignore[arg-type]
        n, c, d = runs.params, runs.flops, runs.tokens
        if c is None and n is not None and d is not None:
            return replace(runs, flops=6 * n * d)
        if d is None and n is not None and c is not None:
            return replace(runs, tokens=c / (6 * n))
        if n is None and c is not None and d is not None:
            return replace(runs, params=c / (6 * d))
        return runs

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, rows: ArrayLike) -> Self:
        """The runs of a mask or of indices; an index may come several times, as a bootstrap draws it."""
        chosen = np.asarray(rows)
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: c[chosen] for name, c in columns.items() if c is not None})

    @property
    def flops_per_token(self) -> Array:
        """[R] M = C / D."""
        assert self.flops is not None and self.tokens is not None
        return self.flops / self.tokens

"""Finished runs as the fits see them: one column a quantity, in one set of units.

A column that a table does not have is None, and a fit that needs it says so. Where a table has two of size, tokens and compute, the
third is derived by C = 6·N·D with the N that one token uses, and the runs remember that their C is this one and not M·D.
"""

from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
COLUMNS = ("loss", "params", "active", "flops", "tokens", "lr", "batch", "seed")


@dataclass(frozen=True)
class Runs:
    """R finished runs.

    Attributes:
        loss: [R] of the validation text, nats per token (or bits per byte, where the table has those; a law keeps its unit).
        params: [R] N, parameters without embedding and head, all experts counted.
        active: [R] the part of N that one token uses.
        flops: [R] C, training FLOPs without embedding and head.
        tokens: [R] D.
        lr: [R] peak learning rate.
        batch: [R] tokens of a global batch.
        seed: [R] of the weights and of the order; runs that differ in nothing else measure the noise.
        compute: what C is: M·D (DeepSeek LLM §3.1), or 6·N·D where a column was derived by it.
    """

    loss: Array
    params: Array | None = None
    active: Array | None = None
    flops: Array | None = None
    tokens: Array | None = None
    lr: Array | None = None
    batch: Array | None = None
    seed: Array | None = None
    compute: Literal["M*D", "6*N*D"] = "M*D"

    @classmethod
    def of(cls, **columns: ArrayLike | None) -> Self:
        """From sequences of numbers, with the columns derived that can be."""
        runs = cls(**{name: None if c is None else np.asarray(c, dtype=np.float64) for name, c in columns.items()})  # type: ignore[arg-type]
        n, c, d = runs.active if runs.active is not None else runs.params, runs.flops, runs.tokens
        if c is None and n is not None and d is not None:
            return replace(runs, flops=6 * n * d, compute="6*N*D")
        if d is None and n is not None and c is not None:
            return replace(runs, tokens=c / (6 * n), compute="6*N*D")
        if n is None and c is not None and d is not None:
            return replace(runs, params=c / (6 * d), compute="6*N*D")
        return runs

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, rows: ArrayLike) -> Self:
        """The runs of a mask or of indices; an index may come several times, as a bootstrap draws it."""
        chosen = np.asarray(rows)
        columns = {name: getattr(self, name) for name in COLUMNS}
        return replace(self, **{name: c[chosen] for name, c in columns.items() if c is not None})

    @property
    def flops_per_token(self) -> Array:
        """[R] M = C / D."""
        assert self.flops is not None and self.tokens is not None
        return self.flops / self.tokens

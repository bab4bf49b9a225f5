"""A source cut into sequences of one length: consecutive windows of its packed stream.

Window k holds tokens [k·T, k·T + T + 1 + D_mtp): T inputs, and the D_mtp + 1 tokens that follow them, so that every position has a
real target at the main head and at every MTP depth. The next window starts T later, and so every token but a source's first is a
target once. Documents are cut where a window ends; `data.packing` is the other way.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from data.store import SourceTokens


class Sequences(Protocol):
    """A source as sequences of T + 1 + D_mtp tokens, known by their numbers."""

    def __len__(self) -> int:
        """How many sequences there are."""
        ...

    def fill(
        self,
        tokens: npt.NDArray[np.int64],
        documents: npt.NDArray[np.int32],
        rows: npt.NDArray[np.int64],
        numbers: npt.NDArray[np.int64],
    ) -> None:
        """Copy sequences `numbers` [n] into the rows `rows` [n] of tokens and documents, both [B, T+1+D_mtp]."""
        ...


class Windows:
    """The windows of a source, `Sequences` of tokens that all are real."""

    def __init__(self, source: SourceTokens, sequence_length: int, mtp_depth: int) -> None:
        self._source, self._stride = source, sequence_length
        self._beyond = 1 + mtp_depth  # tokens of a window after its T

    def __len__(self) -> int:
        return max((len(self._source) - self._beyond) // self._stride, 0)

    def fill(
        self,
        tokens: npt.NDArray[np.int64],
        documents: npt.NDArray[np.int32],
        rows: npt.NDArray[np.int64],
        numbers: npt.NDArray[np.int64],
    ) -> None:
        width = self._stride + self._beyond
        for row, start in zip(rows.tolist(), (numbers * self._stride).tolist()):
            tokens[row] = self._source.read(start, start + width)
            documents[row] = self._source.documents_of(start, start + width)

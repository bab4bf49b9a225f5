"""Batches for validation: the same windows of the validation split every time, whatever the number of ranks and the batch."""

from collections.abc import Iterator, Sequence

import numpy as np

from data.errors import DataError
from data.samples import Batch, empty_batch
from data.store import Store
from data.windows import Windows


def validation_batches(
    stores: Sequence[Store] | Store,
    sequence_length: int,
    mtp_depth: int,
    batch: int,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[str, Batch]]:
    """Fixed windows of the validation split, each source in turn: every token but the first is a target once.

    Over all ranks the set of sequences is the same whatever `world_size` and `batch`. Every rank gets the same number of
    batches; in the last ones of a source, a rank may get fewer rows, or none (B = 0).

    Args:
        batch: most sequences in one Batch of one rank.
        max_tokens: targets in all, shared equally among the sources; at least one sequence of each. None: all there are.

    Yields:
        (source, Batch). The last tokens of a source, too few for a whole window, are left out.

    Raises:
        DataError: no source holds a whole window.
    """
    width = sequence_length + 1 + mtp_depth
    stores = [stores] if isinstance(stores, Store) else list(stores)
    sources: list[tuple[str, Windows]] = []
    for store in stores:
        for source in store.sources("validation"):
            name = source.name if len(stores) == 1 else f"{store.path.name}/{source.name}"
            windows = Windows(source, sequence_length, mtp_depth)
            if len(windows):
                sources.append((name, windows))
    if not sources:
        raise DataError(
            f"data.validation: no source of {', '.join(str(s.path) for s in stores)} has the {width} tokens of one window in its "
            f"validation split; lower data.sequence_length, or raise `validation` in the data recipe"
        )
    limit = None if max_tokens is None else max(max_tokens // len(sources) // sequence_length, 1)
    for name, windows in sources:
        count = len(windows) if limit is None else min(len(windows), limit)
        for start in range(0, count, batch * world_size):
            mine = np.arange(start, min(start + batch * world_size, count))[rank::world_size]
            filled = empty_batch(len(mine), width)
            windows.fill(filled.tokens.numpy(), filled.documents.numpy(), np.arange(len(mine)), mine)
            yield name, filled

"""Samples that a run passes over: what its steps read instead, so that a run that rolled back is a run of a recipe all the same.

`data.passed_over: [[first, last], …]` names samples by their index in the run's order. A step that would read any of a range begins
behind it; its tokens, and with them learning rate, batch and all else, are what they were. Passed-over samples count as read: the
epochs of a source go on through them.
"""

from collections.abc import Iterable, Sequence

SampleRange = tuple[int, int]  # the first and the last


def begin(sample: int, sequences: int, passed_over: Iterable[SampleRange]) -> int:
    """First sample of a step of so many sequences that follows on `sample` consumed ones. The ranges ascend."""
    for first, last in passed_over:
        if first < sample + sequences and sample <= last:
            sample = last + 1
    return sample


def consumed(sample: int, steps: int, sequences: int, passed_over: Iterable[SampleRange]) -> int:
    """Samples consumed after so many steps of so many sequences that follow on `sample` consumed ones."""
    for first, last in passed_over:
        if sample <= last:
            before = max(first - sample, 0) // sequences  # whole steps in front of the range
            if steps <= before:
                break
            sample, steps = last + 1, steps - before
    return sample + steps * sequences


def to_pass_over(
    wanted: SampleRange, checkpointed: Sequence[int], before: Iterable[SampleRange], most: int
) -> SampleRange | None:
    """What a run that rolls back passes over; None: it has rolled back `most` times to the checkpoint it would go to.

    Args:
        wanted: what it should pass over.
        checkpointed: samples that each checkpoint has consumed, ascending. What the oldest has read is not undone.
        before: what it has passed over when it rolled back.
    """
    first, last = max(wanted[0], checkpointed[0]), wanted[1]
    start = max(samples for samples in checkpointed if samples <= first)
    return (first, last) if sum(one >= start for one, _ in before) < most else None


def union(*ranges: Sequence[SampleRange]) -> tuple[SampleRange, ...]:
    """The samples of all, as ascending ranges; adjacent ones stay apart."""
    merged: list[SampleRange] = []
    for first, last in sorted({(first, last) for each in ranges for first, last in each}):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return tuple(merged)

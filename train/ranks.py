"""What the ranks of a group decide together, so that an error on one of them is an error on all and none waits for ever."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")


class Ranks:
    """The ranks of a gloo group; without a group, this process alone. What is passed between them must be picklable."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = dist.get_rank(group) if group else 0
        self.size = dist.get_world_size(group) if group else 1

    def first(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and give its result to every rank, or raise its error there."""
        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                outcome = [(action(), None)]
            except Exception as error:
                outcome = [(None, error)]
        if self._group:
            dist.broadcast_object_list(outcome, group=self._group, group_src=0)
        result, failure = outcome[0]
        if failure is not None:
            raise failure
        return result

    def all(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; where it fails on any, raise the first rank's error on all.

        Where nothing fails, the ranks exchange a byte.
        """
        result: list[T] = []
        failure: Exception | None = None
        try:
            result.append(action())
        except Exception as error:
            failure = error
        if any(self.union([failure is not None])):
            raise next(found for found in self.gather(failure) if found is not None)
        return result[0]

    def in_step(self, items: Iterable[T]) -> Iterator[T]:
        """Items of which every rank has equally many; where one cannot be made on any rank, the error is raised on all."""
        iterator = iter(items)
        end = object()
        while (item := self.all(lambda: next(iterator, end))) is not end:
            yield cast(T, item)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        values: list[Any] = [value] * self.size
        if self._group:
            dist.all_gather_object(values, value, group=self._group)
        return values

    def total(self, number: int) -> int:
        """The sum over ranks."""
        tensor = torch.tensor(number, dtype=torch.int64)
        if self._group:
            dist.all_reduce(tensor, group=self._group)
        return int(tensor)

    def union(self, flags: list[bool]) -> list[bool]:
        """Per position, whether any rank's flag is set."""
        tensor = torch.tensor(flags, dtype=torch.uint8)
        if self._group and flags:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return tensor.bool().tolist()

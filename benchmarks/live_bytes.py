"""The bytes of live tensors through a step, on any device and without an allocator that counts.

Every tensor that an operation reads or writes is noted by its storage when it is first seen, and again when the storage is freed.
Views share a storage and count once. What a kernel allocates for itself and frees before it returns is not seen.
"""

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(NamedTuple):
    everything: int  # bytes
    without_state: int  # bytes, storages of parameters, gradients and optimizer state left out


class LiveBytes(TorchDispatchMode):
    """Use as a context manager around a step; `peak` afterwards says how much was alive at once since `start`."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[int, int] = {}  # address of a live storage → its number
        self.events: list[tuple[int, int]] = []  # (number, bytes allocated or, negative, freed)
        self.first_event = 0
        self.next_number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.note(tree_leaves((args, kwargs, result)))
        return result

    def note(self, values: Iterable[Any]) -> set[int]:
        """Count the tensors among `values` from here on. Returns the numbers of their storages."""
        return {self._number(value.untyped_storage()) for value in values if isinstance(value, Tensor)}

    def start(self) -> None:
        """`peak` shall look at what happens from here on, on top of what is alive."""
        self.first_event = len(self.events)

    @property
    def now(self) -> int:
        """Bytes that are alive, of all that has been noted."""
        return sum(size for _, size in self.events)

    def peak(self, state: set[int]) -> Peak:
        """The largest sums since `start`, the second without the storages numbered in `state`; each at a moment of its own."""
        live = without_state = 0
        largest = [0, 0]
        for index, (number, size) in enumerate(self.events):
            live += size
            without_state += 0 if number in state else size
            if index >= self.first_event - 1:
                largest = [max(largest[0], live), max(largest[1], without_state)]
        return Peak(*largest)

    def _number(self, storage: torch.UntypedStorage) -> int:
        address = storage._cdata
        if address not in self.numbers:
            number, size = self.next_number, storage.nbytes()
            self.next_number += 1
            self.numbers[address] = number
            self.events.append((number, size))
            weakref.finalize(storage, self._freed, address, size)
        return self.numbers[address]

    def _freed(self, address: int, size: int) -> None:
        self.events.append((self.numbers.pop(address), -size))

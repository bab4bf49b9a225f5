"""Attention by FlashAttention: the packages `flash_attn` (version 2, extra `flash`) and `flash_attn_interface` (version 3), and
PyTorch's own copy for sequences of unequal lengths.

Documents become sequences of a batch without padding: all tokens one after another, [B·T, H, …], and where each document begins,
among queries and among keys, of which the last ones belong together. Keys before those that the first query of a row sees are a
sequence without queries.

How many there are is known on the device; the host, which launches the kernels, must not wait for it. So room is made for as many
as the host was told (`expect`), and what is left of it are empty sequences at the end, which cost little as long as they are few:
kernels launch programs for the longest possible sequence of each, and keep buffers with 128 rows more for each.

Version 2 and PyTorch's copy want values as wide as keys. Version 3 takes 192 and 128 forward; backward not every build does
(flash-attention issue 1487).
"""

from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ConfigError
from model.ops.attention.once import once_per_batch

ROOM = 32  # documents; room grows by so many, since kernels that know their shapes would be compiled again for each


class Flash:
    """`Attend` by a package of FlashAttention.

    Raises:
        ConfigError: it is not installed.
    """

    operation = ("flash_attn", "_flash_attn_forward")  # what an output comes from, by namespace and name

    def __init__(self, package: str = "flash_attn", hint: str = "pip install 'rorqual[flash]'"):
        self.package, self.hint = package, hint
        self.module: Any = None  # the package, once imported
        self.room: int | None = None  # documents of a micro-batch that the host knows of, at most

    def expect(self, documents: Tensor) -> None:
        """Learn of a micro-batch while it is on the host: [B, T or more] document numbers, of whole sequences."""
        changes = int((documents[:, 1:] != documents[:, :-1]).sum())
        self.room = max(self.room or 0, rounded(len(documents) + changes))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None) -> Tensor:
        if starts is None:
            return self.attend(q, k, v, scale)
        # Validation and whoever says nothing beforehand wait for the device, once a micro-batch.
        room = room_for(starts, k.shape[1], self.room if torch.is_grad_enabled() else None)
        begins, longest = sequences(starts, k.shape[1], room), (q.shape[1], k.shape[1])
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # [B·T, H, …]
        return self.attend_within(q, k, v, scale, begins, longest).unflatten(0, starts.shape)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Causal attention, [B, T, H, …]; since 2.1 of queries at the last positions."""
        return only_output(self.load().flash_attn_func(q, k, v, softmax_scale=scale, causal=True))

    def attend_within(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, begins: tuple[Tensor, Tensor], longest: tuple[int, int]
    ) -> Tensor:
        """The same of sequences one after another, [N, H, …].

        Args:
            begins: of queries and of keys, where each sequence begins and the last one ends.
            longest: the most queries, and keys, that a sequence may have.
        """
        return only_output(
            self.load().flash_attn_varlen_func(q, k, v, *begins, *longest, softmax_scale=scale, causal=True)
        )

    def missing(self) -> str:
        """What to do where it is not installed; else empty, and it is imported."""
        if not find_spec(self.package):
            return f"{self.package} is not installed: {self.hint}"
        self.module = import_module(self.package)
        return ""

    def is_kept(self) -> bool:
        """Whether its forward pass is an operation, which `parallel.recompute` can keep; not in every build. Imports it."""
        namespace, name = self.operation
        return not self.missing() and hasattr(getattr(torch.ops, namespace), name)

    def load(self) -> Any:
        if self.module is None and (why := self.missing()):
            raise ConfigError(why)
        return self.module


class Flash3(Flash):
    operation = ("flash_attn_3", "_flash_attn_forward")

    def __init__(self) -> None:
        super().__init__("flash_attn_interface", "build it from the folder `hopper` of FlashAttention's repository")


class VariableLength(Flash):
    """`Attend` by PyTorch's copy of FlashAttention 2. Without documents it is what SDPA's is."""

    operation = ("torch_attn", "_varlen_attn")

    def __init__(self) -> None:
        super().__init__("torch.nn.attention.varlen", "it comes with a later torch")

    def missing(self) -> str:
        why = super().missing()
        if not why and not {"scale", "window_size"} <= signature(self.module.varlen_attn).parameters.keys():
            why = f"{self.package}.varlen_attn of this torch has no scale and window_size: a later one has them"
        return why

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        batch, longest = len(q), (q.shape[1], k.shape[1])
        of_queries, of_keys = (
            torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=q.device) for length in longest
        )
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        return self.attend_within(q, k, v, scale, (of_queries, of_keys), longest).unflatten(0, (batch, -1))

    def attend_within(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, begins: tuple[Tensor, Tensor], longest: tuple[int, int]
    ) -> Tensor:
        causal = (-1, 0)  # window: all keys before, none after
        return self.load().varlen_attn(q, k, v, *begins, *longest, scale=scale, window_size=causal)


@once_per_batch
def sequences(starts: Tensor, keys: int, room: int) -> tuple[Tensor, Tensor]:
    """Where each document begins among all B·Tq queries and among all B·Tk keys, and where the last one ends: both [room + 1]
    int32, the rest empty ones.

    Raises:
        RuntimeError: there is not room for all; on a GPU the device reports it, later.
    """
    rows, queries = starts.shape
    begins = is_first(starts, keys)
    torch._assert_async(begins.sum() <= room, "a micro-batch has more documents than the host was told of")
    # What begins no document goes to a place that is cut off.
    place = torch.where(begins, begins.cumsum(0) - 1, room + 1)
    row = torch.arange(rows, dtype=torch.int32, device=starts.device).unsqueeze(1)
    query = torch.arange(queries, dtype=torch.int32, device=starts.device)
    of_queries = row * queries + F.pad(query, (1, 0))  # [B, 1 + Tq], as is_first has them
    of_keys = row * keys + F.pad(starts, (1, 0))

    def listed(places: Tensor, total: int) -> Tensor:
        ends = torch.full((room + 2,), total, dtype=torch.int32, device=starts.device)
        return ends.scatter_(0, place, places.flatten()).narrow(0, 0, room + 1)

    return listed(of_queries, rows * queries), listed(of_keys, rows * keys)


@once_per_batch
def room_for(starts: Tensor, keys: int, known: int | None) -> int:
    """For how many documents room is made: what is known, else as many as there are, for which the host waits."""
    return known or rounded(int(is_first(starts, keys).sum()))


def is_first(starts: Tensor, keys: int) -> Tensor:
    """Whether a sequence begins, [B·(1 + Tq)]: in each row first that of the keys that nobody sees, then those at each query."""
    queries = starts.shape[1]
    query = torch.arange(queries, device=starts.device)
    begins = (query == 0) | (starts == query + keys - queries)
    return torch.cat((starts.narrow(1, 0, 1) > 0, begins), 1).flatten()


def rounded(documents: int) -> int:
    return -(-documents // ROOM) * ROOM


def only_output(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Some versions return what the backward pass needs beside it."""
    return out[0] if isinstance(out, tuple) else out

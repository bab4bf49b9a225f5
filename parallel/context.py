"""Context parallelism: ranks share each sequence, so that one longer than a device's memory can be learned from.

A sequence of T tokens is cut into 2C pieces of L, and rank r of C has the pieces r and 2C−1−r (zig-zag). Causal attention of piece
p reads p + 1 pieces, so that every rank reads 2C + 1 in all, and none waits for another:

    pieces    0   1   2   3   4   5   6   7
    rank      0   1   2   3   3   2   1   0            C = 4

What travels is the latent of MLA. Keys and values are linear in it, so each rank makes those of the whole sequence from the latents
and rotary keys of all ranks, R + rope numbers a token and layer, where others send keys and values, H · (nope + rope + v) (their
rotary part is shared by heads, but lies in each of the keys). What that saves and costs stands in the README.

Everything else of the model sees pieces as sequences (`model.context`).
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from model.ops.attention import AttentionBackend
from model.ops.attention.once import once_per_batch
from model.rope import Rotation
from model.transformer import Transformer


def share_sequences(model: Transformer, mesh: DeviceMesh) -> None:
    """Let each rank of a mesh [context] compute its pieces of every sequence."""
    model.set_context(ZigZag(mesh.get_group()))


class ZigZag:
    """The `Context` of a rank among those of a group."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.ranks, self.rank = group.size(), dist.get_rank(group)
        self.pieces, self.pieces_here = 2 * self.ranks, 2
        self.mine = (self.rank, self.pieces - 1 - self.rank)

    def cut(self, whole: Tensor, ahead: int) -> Tensor:
        length = (whole.shape[1] - ahead) // self.pieces
        return torch.cat([whole[:, piece * length : (piece + 1) * length + ahead] for piece in self.mine])

    def gather(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        whole: Tensor = _Gather.apply(torch.cat((latent, k_rope), dim=-1), self)
        latent, k_rope = whole.split((latent.shape[-1], k_rope.shape[-1]), dim=-1)
        return latent, k_rope

    def attention(self, backend: AttentionBackend) -> AttentionBackend:
        return partial(self._attend, backend)

    def _attend(
        self,
        backend: AttentionBackend,
        q: Tensor,
        kv: Tensor,
        k_rope: Tensor,
        rotation: Rotation,
        scale: float,
        starts: Tensor | None,
    ) -> Tensor:
        length, outputs = q.shape[1], []
        of_pieces = (None, None) if starts is None else _of_pieces(starts, self.pieces, self.mine)
        for piece, queries, of_piece in zip(self.mine, q.chunk(2), of_pieces):
            end = (piece + 1) * length
            seen = Rotation(*(part[:end] for part in rotation))
            outputs.append(backend(queries, kv[:, :end], k_rope[:, :end], seen, scale, of_piece))
        return torch.cat(outputs)

    def average(self, of_pieces: Tensor) -> Tensor:
        total = torch.stack(of_pieces.chunk(2)).sum(0)
        total = torch.ops._c10d_functional.all_reduce(total, "sum", self.group.group_name)
        return torch.ops._c10d_functional.wait_tensor(total).repeat(2, 1) / self.pieces

    def in_order(self, by_rank: Tensor) -> Tensor:
        """[C · 2B, L, …] as ranks hand them out → [B, T, …]."""
        pieces = by_rank.unflatten(0, (self.ranks, 2, -1))  # [C, 2, B, L, …]
        both = torch.cat((pieces[:, 0], pieces[:, 1].flip(0)))  # [2C, B, L, …] from the first piece to the last
        return both.transpose(0, 1).flatten(1, 2)

    def by_rank(self, whole: Tensor) -> Tensor:
        """The inverse of `in_order`."""
        both = whole.unflatten(1, (self.pieces, -1)).transpose(0, 1)  # [2C, B, L, …]
        first, second = both.chunk(2)
        return torch.stack((first, second.flip(0)), dim=1).flatten(0, 2)


@once_per_batch
def _of_pieces(starts: Tensor, number: int, mine: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """[B, T] → [B, L] of each piece; the same tensors for all layers, which attention knows its masks by."""
    pieces = starts.chunk(number, dim=1)
    return pieces[mine[0]], pieces[mine[1]]


class _Gather(torch.autograd.Function):
    """Pieces [2B, L, …] of all ranks → whole sequences [B, T, …]; gradients are summed over the ranks that read them."""

    @staticmethod
    def forward(ctx: Any, pieces: Tensor, context: ZigZag) -> Tensor:
        ctx.context = context
        ranks, group = context.ranks, context.group.group_name
        gathered = torch.ops._c10d_functional.all_gather_into_tensor(pieces.contiguous(), ranks, group)
        return context.in_order(torch.ops._c10d_functional.wait_tensor(gathered))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        context = ctx.context
        ranks, group = context.ranks, context.group.group_name
        scattered = torch.ops._c10d_functional.reduce_scatter_tensor(
            context.by_rank(grad).contiguous(), "sum", ranks, group
        )
        return torch.ops._c10d_functional.wait_tensor(scattered), None

"""What a model must know where it computes pieces of sequences and others compute the rest (context parallelism).

A piece is some consecutive positions of a sequence together with the 1 + D_mtp tokens behind them, so that embeddings, the inputs
of MTP modules and targets need nothing from elsewhere. Everything treats pieces as sequences of their own but the two that look
at a whole one: attention, which needs the latents of the positions before, and the sequence-wise balance loss. What these need
stands here as a protocol; `WholeSequences` answers where nothing is elsewhere, and `parallel.context` where ranks share sequences.
"""

from typing import Protocol

from torch import Tensor

from model.ops.attention import AttentionBackend


class Context(Protocol):
    """How a device's pieces belong to sequences. B sequences of T positions are B' pieces of L here."""

    pieces: int  # of a sequence, on all devices together: T = pieces · L
    pieces_here: int  # of them on this device: B' = pieces_here · B

    def cut(self, whole: Tensor, ahead: int) -> Tensor:
        """This device's pieces of sequences and what lies ahead of each position, [B, T + ahead] → [B', L + ahead]."""
        ...

    def gather(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Of pieces [B', L, R] and [B', L, rope] → of whole sequences, [B, T, R] and [B, T, rope]."""
        ...

    def attention(self, backend: AttentionBackend) -> AttentionBackend:
        """Attention of pieces' queries [B', L, H, nope + rope] → [B', L, H, v] over whole sequences, by a backend. Keys, values,
        rotation and starts are those of whole sequences."""
        ...

    def average(self, of_pieces: Tensor) -> Tensor:
        """[B', E] of pieces → [B', E] the mean over all pieces of each one's sequence. Without a derivative."""
        ...


class WholeSequences:
    """The `Context` of a device that computes whole sequences."""

    pieces = pieces_here = 1

    def cut(self, whole: Tensor, ahead: int) -> Tensor:
        return whole

    def gather(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        return latent, k_rope

    def attention(self, backend: AttentionBackend) -> AttentionBackend:
        return backend

    def average(self, of_pieces: Tensor) -> Tensor:
        return of_pieces


WHOLE = WholeSequences()

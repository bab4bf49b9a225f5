"""What a model is asked between steps, for validation and samples, answered by the ranks of a pipeline together.

One batch after the other goes through all stages, forward alone. Ranks do not wait for each other beyond that: under 1f1b and
interleaved the first begins with the next batch while the last is at work on this one; under a V-shaped schedule the first rank
has the last stage too, and sees a batch to its end before it begins another.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from model.attention import LatentCache
from model.transformer import Part, Scores, Transformer
from parallel.outbox import Outbox
from parallel.placement import Placement

SUMS = ("nats", "hits", "targets", "expert_counts")  # of `Scores`


class BetweenSteps:
    """The answers of a model of which each rank has some stages. All ranks of the pipeline ask together.

    `answer` puts them in the place of the model's own methods. What wraps these methods, as FSDP does to gather parameters, comes
    after it: then `logits` and `decode_mtp` gather, and so do `score_part` and `decode_part`, which are called from here.
    """

    def __init__(self, model: Transformer, parts: Sequence[Part], placement: Placement, outbox: Outbox):
        self.model, self.parts, self.placement, self.outbox = model, parts, placement, outbox
        self.group, self.rank = outbox.group, dist.get_rank(outbox.group)
        self.last = placement.rank_of(len(parts) - 1)
        self.logits_here, self.decode_mtp_here = model.logits, model.decode_mtp

    def answer(self) -> None:
        model = self.model
        model.score, model.decode = self.score, self.decode  # type: ignore[method-assign]
        model.logits, model.decode_mtp = self.logits, self.decode_mtp  # type: ignore[method-assign]

    def score(self, tokens: Tensor, documents: Tensor) -> Scores:
        """As `Transformer.score`, but of each rank its own stages' share: all are sums."""
        found: list[Scores] = []

        def run(stage: int, x: Tensor | None) -> Tensor | None:
            x, scores = self.model.score_part(self.parts[stage], x, tokens, documents)
            found.append(scores)
            return x

        self._through(run, self.model.hidden_shape(tokens))
        together = {name: torch.stack([getattr(scores, name) for scores in found]).sum(0) for name in SUMS}
        return Scores(**together, labels=torch.cat([scores.labels for scores in found]))

    def decode(self, tokens: Tensor, caches: list[LatentCache]) -> Tensor:
        shape = (*tokens.shape, self.model.config.hidden_size)
        x = self._through(lambda stage, x: self.model.decode_part(self.parts[stage], x, tokens, caches), shape)
        return self._from_last(x, shape)

    def decode_mtp(self, depth: int, hidden: Tensor, next_tokens: Tensor, cache: LatentCache) -> Tensor:
        x = None
        if self.rank == self.last:
            x = self.decode_mtp_here(depth, hidden, next_tokens, cache)
        else:  # how far a module has read is known everywhere
            cache.length += next_tokens.shape[1]
        return self._from_last(x, (*next_tokens.shape, self.model.config.hidden_size))

    def logits(self, hidden: Tensor) -> Tensor:
        x = self.logits_here(hidden) if self.rank == self.last else None
        return self._from_last(x, (*hidden.shape[:-1], self.model.config.vocab_size))

    def _through(self, run: Callable[[int, Tensor | None], Tensor | None], shape: Sequence[int]) -> Tensor | None:
        """Let a batch go through all stages.

        Args:
            run: a stage by its number, with the states that come in.
            shape: of the states that leave a stage.

        Returns:
            What the last of this rank's stages gave out.
        """
        x: Tensor | None = None
        for stage in self.placement.stages_of(self.rank):
            if stage > 0 and (source := self.placement.rank_of(stage - 1)) != self.rank:
                x = self._room(shape)
                dist.recv(x, group=self.group, group_src=source)
            x = run(stage, x)
            if stage + 1 < len(self.parts) and (target := self.placement.rank_of(stage + 1)) != self.rank:
                assert x is not None
                self.outbox.wait()  # one message may be on its way beside the work
                self.outbox.send(x, target)
        return x

    def _from_last(self, x: Tensor | None, shape: Sequence[int]) -> Tensor:
        """To all ranks what the one with the last stage has."""
        whole = self._room(shape) if self.rank != self.last or x is None else x.contiguous()
        dist.broadcast(whole, group=self.group, group_src=self.last)
        return whole

    def _room(self, shape: Sequence[int]) -> Tensor:
        return torch.empty(shape, dtype=self.model.compute_dtype, device=self.model.device)

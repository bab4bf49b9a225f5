"""Which kernel computes attention on a GPU: not known by name, but measured at start-up.

Every candidate at hand goes forward and backward on the shapes of the run. What raises, or differs from the reference by more than
rounding, is left out; of the rest the fastest is used, and a line for the log has everybody's time. The first rank measures and the
others follow, so that all ranks compute alike. What hangs, or makes the device fault, cannot be left out: such a run ends there,
and is begun again with another one named in its recipe.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from model.config import ConfigError, ModelConfig
from model.ops.attention import BACKENDS, AttentionBackend, document_starts, reference_attention
from model.ops.attention.assembled import Assembled, sdpa
from model.ops.attention.flash import Flash, Flash3, VariableLength
from model.ops.attention.flex import flex
from model.ops.measure import reason, times
from model.rope import Rotation, rotation, softmax_scale

CANDIDATES: dict[str, Callable[[], AttentionBackend]] = {
    "cudnn": lambda: Assembled(partial(sdpa, SDPBackend.CUDNN_ATTENTION)),
    "cudnn-padded": lambda: Assembled(partial(sdpa, SDPBackend.CUDNN_ATTENTION), pads=True),
    "sdpa-flash": lambda: Assembled(partial(sdpa, SDPBackend.FLASH_ATTENTION), pads=True),
    "sdpa-efficient": lambda: Assembled(partial(sdpa, SDPBackend.EFFICIENT_ATTENTION)),
    "varlen": lambda: Assembled(VariableLength(), pads=True),
    "flex": lambda: Assembled(flex, is_kept=False),
    "flash-attn": lambda: Assembled(Flash(), pads=True),
    "flash-attn-3": lambda: Assembled(Flash3()),
    "flash-attn-3-padded": lambda: Assembled(Flash3(), pads=True),
    "sdpa": lambda: BACKENDS["sdpa"],
}
# ‖error‖ / ‖expected‖ of a head's outputs in each row, and of its gradients in 128 rows together, since a gradient's row may be
# zero. bf16 makes 0.007, a scale that is off by a hundredth 0.025 and more, one key too many at a document's start 0.2 and more.
LARGEST_ERROR = 0.02
ROWS = 128
LONGEST_COMPARED = 8192  # tokens of a sequence; the reference holds Tq × Tk scores of a head, some times over
DOCUMENT = 512  # tokens, the mean of documents that candidates are tried on


class Workload(NamedTuple):
    """Attention as training will ask for it. Of sequences that are cut, a call's queries are those of one piece; measured is the
    last piece, whose queries have most to see."""

    config: ModelConfig
    batch: int
    length: int
    documents: bool  # attention stays inside them
    dtype: torch.dtype
    keeps_outputs: bool = False  # blocks are computed again, but for attention where that can be kept
    pieces: int = 1  # of a sequence; twice the context ranks

    @property
    def queries(self) -> int:
        return self.length // self.pieces


def choose(
    named: str, work: Workload, device: torch.device, first: Callable[[Callable[[], Any]], Any]
) -> tuple[AttentionBackend, list[str]]:
    """What computes attention, and what the log should say.

    Args:
        named: by whom the recipe wants it, or "auto".
        first: runs a function on one rank, and gives its result to all.

    Raises:
        ConfigError: nobody computes it, or not the one that is named, or only the first rank has what was chosen.
    """
    if device.type == "cpu" or named in BACKENDS.keys() - CANDIDATES.keys():
        if named != "auto" and named not in BACKENDS:
            raise ConfigError(f"run.attention = {named}: runs on a GPU only; leave it at auto")
        return BACKENDS["fused" if named == "auto" else named], []
    candidates = CANDIDATES if named == "auto" else {named: CANDIDATES[named]}
    name, line = first(partial(fastest, work, candidates, device))
    backend = CANDIDATES[name]()
    if why := missing(backend):
        raise ConfigError(
            f"the first rank computes attention by {name}, and on this one {why}; install it for every rank or for none"
        )
    return backend, [line]


def missing(backend: AttentionBackend) -> str:
    """Why it cannot run here at all; empty if it may."""
    flash = backend.attend if isinstance(backend, Assembled) else None
    return flash.missing() if isinstance(flash, Flash) else ""


def fastest(
    work: Workload, candidates: Mapping[str, Callable[[], AttentionBackend]], device: torch.device
) -> tuple[str, str]:
    """The fastest candidate that is right, and a line about all.

    Raises:
        ConfigError: none is.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, of every kernel that refuses
        trials = try_all(work, {name: make() for name, make in candidates.items()}, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    best = min(trials, key=lambda name: trials[name].seconds)
    if trials[best].why:
        reasons = "; ".join(f"{name}: {trial.why}" for name, trial in trials.items())
        raise ConfigError(f"run.attention: nothing here computes {describe(work)}: {reasons}")
    told = (f"{n} – ({t.why})" if t.why else f"{n} {1e3 * t.seconds:.3g}" for n, t in trials.items())
    return best, f"{describe(work)}, forward and backward: {', '.join(told)} ms → {best}"


def describe(work: Workload) -> str:
    c = work.config
    sizes = f"{c.num_attention_heads} heads of {c.qk_head_dim} and {c.v_head_dim}"
    of_all = f" of {work.length}" if work.pieces > 1 else ""
    return f"attention [{work.batch}×{work.queries}{of_all}], {sizes}{', within documents' * work.documents}"


class Trial(NamedTuple):
    """What came of one candidate."""

    seconds: float = math.inf
    why: str = ""  # it is left out; empty where it is right


def try_all(work: Workload, backends: Mapping[str, AttentionBackend], device: torch.device) -> dict[str, Trial]:
    """Run every candidate, compare it with the reference, and time those that are right in turn."""
    small = work._replace(batch=min(work.batch, 2), length=min(work.length, LONGEST_COMPARED))
    given, upstream = draw(small, device)
    expected = by_reference(given, upstream)
    trials = {}
    for name, backend in backends.items():
        try:
            why = missing(backend)
            if not why:
                tell(backend, given)
                why = "" if agrees(both_ways(backend, given, upstream), expected) else "wrong"
        except Exception as error:
            why = reason(error)
        trials[name] = Trial(why=why)
    del given, upstream, expected
    given, upstream = draw(work, device)
    runs = {}
    for name, backend in backends.items():
        if not trials[name].why:
            tell(backend, given)
            is_run_again = work.keeps_outputs and isinstance(backend, Assembled) and not backend.is_kept()
            run = partial(both_ways, backend, given, upstream, is_run_again)
            try:
                run()
            except Exception as error:  # of memory, say
                trials[name] = Trial(why=reason(error))
            else:
                runs[name] = run
    return trials | {name: Trial(seconds) for name, seconds in times(runs, device).items()}


class Given(NamedTuple):
    """What a backend is called with."""

    q: Tensor
    kv: Tensor
    k_rope: Tensor
    rotation: Rotation
    scale: float
    starts: Tensor | None


class Results(NamedTuple):
    out: Tensor  # [B, Tq, H, v]
    q: Tensor  # gradients
    kv: Tensor
    k_rope: Tensor


def draw(work: Workload, device: torch.device) -> tuple[Given, Tensor]:
    """Normal numbers, and the gradient of the output."""
    c = work.config
    generator = torch.Generator(device).manual_seed(0)

    def normal(tokens: int, *shape: int) -> Tensor:
        return torch.randn(work.batch, tokens, *shape, device=device, dtype=work.dtype, generator=generator)

    heads, rope = c.num_attention_heads, c.qk_rope_head_dim
    q = normal(work.queries, heads, c.qk_head_dim)
    kv = normal(work.length, heads, c.qk_nope_head_dim + c.v_head_dim)
    k_rope = normal(work.length, c.kv_lora_rank + rope)[..., c.kv_lora_rank :]  # a view, as the model makes it
    starts = None
    if work.documents:
        ends = torch.rand(work.batch, work.length, device=device, generator=generator) < 1 / DOCUMENT
        starts = document_starts(ends.cumsum(1))[:, -work.queries :]
    turn = rotation(c, torch.arange(work.length, device=device))
    return Given(q, kv, k_rope, turn, softmax_scale(c), starts), normal(work.queries, heads, c.v_head_dim)


def both_ways(backend: AttentionBackend, given: Given, upstream: Tensor, is_run_again: bool = False) -> Results:
    """The output, perhaps made twice, and the gradients of what it was made of."""
    q, kv, k_rope = leaves = [x.detach().requires_grad_() for x in given[:3]]
    with torch.enable_grad():
        for _ in range(1 + is_run_again):
            out = backend(q, kv, k_rope, given.rotation, given.scale, given.starts)
        return Results(out.detach(), *torch.autograd.grad(out, leaves, upstream))


def by_reference(given: Given, upstream: Tensor) -> Results:
    """The same in fp32, a sequence and a head at a time."""
    sequences = []
    for b in range(len(upstream)):
        starts = None if given.starts is None else given.starts[b : b + 1]
        k_rope = given.k_rope[b : b + 1].float()
        heads = [
            both_ways(reference_attention, Given(q, kv, k_rope, given.rotation, given.scale, starts), grad)
            for q, kv, grad in zip(*(each_head(x[b : b + 1]) for x in (given.q, given.kv, upstream)))
        ]
        out, dq, dkv, dk_rope = zip(*heads)
        of_heads = [torch.cat(parts, 2) for parts in (out, dq, dkv)]
        sequences.append([*of_heads, torch.stack(dk_rope).sum(0)])
    return Results(*(torch.cat(parts) for parts in zip(*sequences)))


def each_head(x: Tensor) -> Iterator[Tensor]:
    """[B, T, H, …] → each head, [B, T, 1, …] fp32."""
    return (head.float() for head in x.split(1, 2))


def agrees(found: Results, expected: Results) -> bool:
    """Whether all is right but for rounding."""
    return all(
        f.shape == e.shape and bool((errors(f, e, by_row=e is expected.out) <= LARGEST_ERROR).all())
        for f, e in zip(found, expected)
    )


def errors(found: Tensor, expected: Tensor, by_row: bool) -> Tensor:
    """‖error‖ / ‖expected‖ of each row, or of 128 rows together. Both [B, T, …, width]."""
    return squares(found.float() - expected, by_row).sqrt() / squares(expected, by_row).sqrt().clamp_min(1e-12)


def squares(x: Tensor, by_row: bool) -> Tensor:
    rows = x.square().sum(-1)
    return rows if by_row else torch.cat([part.sum(1, keepdim=True) for part in rows.split(ROWS, 1)], 1)


def tell(backend: AttentionBackend, given: Given) -> None:
    """What the host will know of documents in training."""
    if given.starts is not None:
        expect(backend, F.pad(given.starts.cpu(), (1, 0)))  # what a piece has before it is at least one document


def expect(backend: AttentionBackend, documents: Tensor) -> None:
    """Tell a backend of a micro-batch's documents, those of whole sequences, [B, T or more], while they are on the host."""
    if isinstance(backend, Assembled) and isinstance(backend.attend, Flash):
        backend.attend.expect(documents)

"""Each kernel of a training step alone, forward and backward: its error against float64, its time, its share of what bounds it.

    python benchmarks/kernels.py --shape benchmarks/shapes/reference.json --json FILE

Ours stands beside its plain PyTorch twin ("plain") and beside what a user of PyTorch would take. Kernels that move bytes are held
against a plain copy measured in the same run, by the bytes that they must read and write; products against the peak of the matrix
product. All that compute the same thing take turns, so that what disturbs one disturbs all; times are medians. Sizes are those of
the shape's model and micro-batch; errors are found on a few of its tokens. Kernels of FP8: `fp8_kernels.py`.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import asked
import torch
import torch.nn.functional as F
from contestants import OPTIMIZER, Shape
from fp8_kernels import copy_bandwidth, relative_error
from sides import compute_dtype
from torch import Tensor

from data.files import replace_file
from model.ops import attention, experts, rms_norm, routing, rows, swiglu
from model.ops.attention.choose import CANDIDATES
from model.ops.attention.reference import assemble, visible
from model.ops.cross_entropy import linear_cross_entropy, reference_cross_entropy
from model.ops.measure import in_turns, reason
from model.rope import Rotation, rotation, softmax_scale
from train.optimizer import build_optimizer
from train.planning.devices import peak_flops

EPS = 1e-6
FEW = 64  # positions on which errors are found
PARAMETERS = {"cpu": 1 << 22, "cuda": 1 << 26}  # elements that the optimizers move, more than a cache holds

Outputs = Tensor | tuple[Tensor, ...]


class Contest(NamedTuple):
    """One kernel on one size, by whoever computes it; all take the same inputs."""

    kernel: str
    size: str
    contestants: Mapping[str, Callable[..., Outputs]]
    exact: Callable[..., Outputs]  # in the dtype of its inputs
    inputs: tuple[Tensor, ...]  # those of floating point have gradients
    flops: float = 0  # of both passes; 0 where bytes are what bounds it
    bytes: float = 0  # read and written at least, in both passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=asked.shape, required=True, help="a file of benchmarks/shapes")
    parser.add_argument("--only", help="kernels with this in their names")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=asked.count, default=20, help="timed calls of each")
    parser.add_argument("--json", type=asked.new_file, help="write the result here")
    arguments = parser.parse_args()
    shape, device = arguments.shape, torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    result = measure(shape, device, arguments.rounds, arguments.only or "")
    if arguments.json:
        with replace_file(arguments.json) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(as_table(result)))


def measure(shape: Shape, device: torch.device, rounds: int, only: str) -> dict[str, Any]:
    dtype = compute_dtype(device.type)
    bandwidth, peak = copy_bandwidth(device, rounds), peak_flops(device, dtype)
    fewer_words = shape.config.override({"vocab_size": min(shape.config.vocab_size, 1024)})
    few = replace(shape, config=fewer_words, micro_batch=1, sequence_length=min(FEW, shape.sequence_length))
    elements = PARAMETERS[device.type]
    found = []
    for contest, small in zip(contests(shape, device, dtype, elements), contests(few, device, dtype, 1 << 12)):
        if only in contest.kernel:
            found += run(contest, small, bandwidth, peak, device, rounds)
    return {
        "shape": shape.name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, one thread",
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "copy_bytes_per_second": bandwidth,
        "peak_flops": peak,
        "kernels": found,
    }


def contests(shape: Shape, device: torch.device, dtype: torch.dtype, elements: int) -> Iterator[Contest]:
    for make in (norms, attentions, gates, sorts, gathers, combines, swiglus, networks, heads):
        yield make(shape, device, dtype)
    yield optimizers(device, elements)


def norms(shape: Shape, device: torch.device, dtype: torch.dtype) -> Contest:
    n, d = shape.micro_tokens, shape.config.hidden_size
    x, weight = draw(device, dtype, n, d), draw(device, torch.float32, d)
    contestants = {
        "ours": lambda x, w: rms_norm.rms_norm(x, w, EPS),
        "plain": lambda x, w: rms_norm.reference_rms_norm(x, w, EPS),
        "F.rms_norm": lambda x, w: F.rms_norm(x, (d,), w.to(x.dtype), EPS),
    }
    exact = lambda x, w: x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * w  # noqa: E731
    return Contest("RMSNorm", f"{n}×{d}", contestants, exact, (x, weight), bytes=5 * x.nbytes)


def attentions(shape: Shape, device: torch.device, dtype: torch.dtype) -> Contest:
    """From what the linear maps hand out, rotation and putting together included."""
    c, b, t = shape.config, shape.micro_batch, shape.sequence_length
    heads = c.num_attention_heads
    turned, scale = rotation(c, torch.arange(t, device=device)), softmax_scale(c)

    def exact(q: Tensor, kv: Tensor, k_rope: Tensor) -> Tensor:
        q, k, v = assemble(q, kv, k_rope, Rotation(*(part.to(q.dtype) for part in turned)))  # [B, H, T, …]
        scores = q @ k.transpose(-1, -2) * scale
        scores = scores.masked_fill(~visible(None, q.shape[2], k.shape[2], q.device), float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2)

    def by(backend: attention.AttentionBackend) -> Callable[..., Tensor]:
        return lambda q, kv, k_rope: backend(q, kv, k_rope, turned, scale, None)

    contestants: dict[str, Callable[..., Outputs]] = {name: by(run) for name, run in attention.BACKENDS.items()}
    if device.type == "cuda":
        contestants |= {name: by(make()) for name, make in CANDIDATES.items()}
    inputs = (
        draw(device, dtype, b, t, heads, c.qk_head_dim),
        draw(device, dtype, b, t, heads, c.qk_nope_head_dim + c.v_head_dim),
        draw(device, dtype, b, t, c.qk_rope_head_dim),
    )
    flops = 3 * 2 * b * t * t / 2 * heads * (c.qk_head_dim + c.v_head_dim)
    return Contest("attention", f"{b}×{t}×{heads}×{c.qk_head_dim}/{c.v_head_dim}", contestants, exact, inputs, flops)


def gates(shape: Shape, device: torch.device, dtype: torch.dtype) -> Contest:
    """Choice, weights and balance loss, from logits. The chosen experts stand in no order: weights are sorted here."""
    c, b, t = shape.config, shape.micro_batch, shape.sequence_length
    logits, bias = draw(device, torch.float32, b, t, c.n_routed_experts), torch.zeros(c.n_routed_experts, device=device)
    rule = routing.Rule(c.n_group, c.topk_group, c.num_experts_per_tok, c.norm_topk_prob, c.routed_scaling_factor)

    def by(route: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., Outputs]:
        def run(logits: Tensor) -> Outputs:
            _, weights, loss = route(logits, bias.to(logits.dtype), rule)
            return weights.sort(-1).values, loss

        return run

    contestants = {"ours": by(routing.route), "plain": by(routing.reference_route)}
    size = f"{b * t}×{c.n_routed_experts}, top {c.num_experts_per_tok}"
    return Contest("gate", size, contestants, by(routing.reference_route), (logits,), bytes=3 * logits.nbytes)


def sorts(shape: Shape, device: torch.device, dtype: torch.dtype) -> Contest:
    """The order of (token, expert) pairs by their experts; nothing has a gradient."""
    ids, experts = choice(shape, device), shape.config.n_routed_experts

    def plain(ids: Tensor) -> Outputs:
        order = ids.flatten().argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
        return order.double(), place.double()

    def ours(ids: Tensor) -> Outputs:
        found = routing.sort_by_expert(ids, experts)
        return found.order.double(), found.place.flatten().double()

    return Contest(
        "sort by expert",
        "×".join(map(str, ids.shape)),
        {"ours": ours, "plain": plain},
        plain,
        (ids,),
        bytes=3 * ids.nbytes,
    )


def gathers(shape: Shape, device: torch.device, dtype: torch.dtype) -> Contest:
    """Tokens to rows of experts; backward, rows to tokens."""
    place, x = pairs(shape, device).place, draw(device, dtype, shape.micro_tokens, shape.config.hidden_size)
    contestants = {"ours": rows.spread_rows, "plain": rows.reference_spread_rows}
    moved = 2 * x.nbytes * (1 + place.shape[1])
    return Contest(
        "gather",
        f"{len(x)}×{place.shape[1]}×{x.shape[1]}",
        contestants,
        rows.reference_spread_rows,
        (x, place),
        bytes=moved,
    )


def combines(shape: Shape, device: torch.device, dtype: torch.dtype) -> Contest:
    """Rows of experts to tokens; backward, tokens to rows."""
    place, d = pairs(shape, device).place, shape.config.hidden_size
    x = draw(device, dtype, place.numel(), d)
    contestants = {"ours": rows.sum_rows, "plain": rows.reference_sum_rows}
    moved = 2 * x.nbytes * (1 + 1 / place.shape[1])
    size = f"{len(place)}×{place.shape[1]}×{d}"
    return Contest("combine", size, contestants, rows.reference_sum_rows, (x, place), bytes=moved)


def swiglus(shape: Shape, device: torch.device, dtype: torch.dtype) -> Contest:
    m, f = shape.micro_tokens * shape.config.num_experts_per_tok, shape.config.moe_intermediate_size
    gate_up = draw(device, dtype, m, 2 * f)
    contestants = {"ours": swiglu.swiglu, "plain": swiglu.reference_swiglu}
    return Contest("swiglu", f"{m}×{f}", contestants, swiglu.reference_swiglu, (gate_up,), bytes=4 * gate_up.nbytes)


def networks(shape: Shape, device: torch.device, dtype: torch.dtype) -> Contest:
    """The routed experts of a layer, from tokens to tokens."""
    c, found = shape.config, pairs(shape, device)
    n, d, f, k = shape.micro_tokens, c.hidden_size, c.moe_intermediate_size, c.num_experts_per_tok
    fixed = (found.order // k, found.place, found.counts)

    def by(backend: Callable[..., Tensor]) -> Callable[..., Outputs]:
        return lambda x, weights, gate_up, down: backend(x, *fixed, weights, gate_up, down)

    def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        return F.grouped_mm(x, weight.mT, offs=counts.cumsum(0).to(torch.int32))

    contestants = {
        "ours": by(experts.experts),
        "plain": by(experts.reference_experts),
        "F.grouped_mm": by(partial(experts.reference_experts, grouped_mm=grouped_mm)),
    }
    inputs = (
        draw(device, dtype, n, d),
        torch.rand(n * k, device=device),
        draw(device, dtype, c.n_routed_experts, 2 * f, d) / d**0.5,
        draw(device, dtype, c.n_routed_experts, d, f) / f**0.5,
    )
    size = f"{n}×{k}×{d}×{f}, {c.n_routed_experts} experts"
    return Contest("experts", size, contestants, by(experts.reference_experts), inputs, flops=3 * 2 * n * k * 3 * d * f)


def heads(shape: Shape, device: torch.device, dtype: torch.dtype) -> Contest:
    n, d, v = shape.micro_tokens, shape.config.hidden_size, shape.config.vocab_size
    labels = torch.randint(v, (n,), device=device)
    contestants = {
        "ours": lambda h, w: linear_cross_entropy(h, w, labels),
        "F.cross_entropy": lambda h, w: reference_cross_entropy(h, w, labels),
    }
    exact = lambda h, w: F.cross_entropy(h @ w.T, labels, reduction="sum")  # noqa: E731
    inputs = (draw(device, dtype, n, d), draw(device, torch.float32, v, d) / d**0.5)
    return Contest("head and loss", f"{n}×{d}×{v}", contestants, exact, inputs, flops=3 * 2 * n * d * v)


def optimizers(device: torch.device, elements: int) -> Contest:
    """A step of AdamW over fp32 parameters of several sizes. Not a function: each call steps on from the last."""
    sizes = (elements // 2, elements // 4, *4 * [elements // 16])

    def stepping(
        make: Callable[..., torch.optim.Optimizer], dtype: torch.dtype = torch.float32
    ) -> Callable[..., Outputs]:
        parameters = [torch.nn.Parameter(draw(device, dtype, size)) for size in sizes]
        for p in parameters:
            p.grad = wave(p.detach())
        optimizer = make([(str(i), p) for i, p in enumerate(parameters)])
        for group in optimizer.param_groups:
            group["lr"] = 1e-2

        def step(_: Tensor) -> Outputs:
            optimizer.step()
            return tuple(p.detach() for p in parameters)

        return step

    o = OPTIMIZER

    def torchs(**how: bool) -> Callable[..., torch.optim.Optimizer]:
        return lambda named: torch.optim.AdamW(
            [p for _, p in named], betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, **how
        )

    contestants = {
        "ours": stepping(partial(build_optimizer, settings=OPTIMIZER)),
        "plain": stepping(torchs(foreach=False)),
        "torch fused": stepping(torchs(fused=True)),
        "torch foreach": stepping(torchs(foreach=True)),
    }
    exact = stepping(torchs(foreach=False), torch.float64)
    nothing = torch.zeros((), dtype=torch.int64, device=device)
    return Contest("AdamW", f"{elements}", contestants, exact, (nothing,), bytes=7 * 4 * elements)


def run(
    contest: Contest, small: Contest, bandwidth: float, peak: float, device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """Errors and times of all contestants, which take turns."""
    exact = Passes(small.exact, tuple(t.double() if t.is_floating_point() else t for t in small.inputs))()
    found: list[dict[str, Any]] = []
    calls: dict[str, Passes] = {}
    for name, call in contest.contestants.items():
        row: dict[str, Any] = {"kernel": contest.kernel, "size": contest.size, "by": name}
        found.append(row)
        try:
            outputs = Passes(small.contestants[name], small.inputs)()
            row["error"] = max(relative_error(a, b) for a, b in zip(outputs, exact))
            both = Passes(call, contest.inputs)
            both()
        except Exception as failure:  # a device that a library does not know is a result too
            row["failed"] = reason(failure)
            continue
        calls[name] = both
    seconds = in_turns(calls, device, rounds)
    for row in found:
        if row["by"] in calls:
            values = seconds[row["by"]]
            rate = (contest.flops or contest.bytes) / statistics.median(values)
            row |= {"seconds": statistics.median(values), "spread": [min(values), max(values)], "rate": rate}
            row |= {
                "unit": "FLOP/s" if contest.flops else "B/s",
                "share": rate / (peak if contest.flops else bandwidth),
            }
    return found


class Passes:
    """A kernel forward and, where inputs are of floating point, backward. Outputs have the same gradients in every call.

    Called, it returns the outputs and the gradients of the inputs.
    """

    def __init__(self, call: Callable[..., Outputs], inputs: tuple[Tensor, ...]):
        self.call = call
        self.leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
        self.wanted = [leaf for leaf in self.leaves if leaf.requires_grad]
        self.gradients = [wave(out) for out in self._forward()] if self.wanted else []

    def __call__(self) -> list[Tensor]:
        outputs = self._forward()
        gradients = torch.autograd.grad(outputs, self.wanted, self.gradients) if self.wanted else ()
        return [t.detach() for t in (*outputs, *gradients)]

    def _forward(self) -> tuple[Tensor, ...]:
        outputs = self.call(*self.leaves)
        return outputs if isinstance(outputs, tuple) else (outputs,)


def wave(like: Tensor) -> Tensor:
    """Numbers between 0.5 and 1.5 in no pattern that a kernel knows; the loss of a head has 1."""
    if like.dim() == 0:
        return torch.ones_like(like)
    return (torch.arange(like.numel(), device=like.device).view(like.shape) % 8191 / 8191 + 0.5).to(like.dtype)


def choice(shape: Shape, device: torch.device) -> Tensor:
    """Different experts for each token, at random. [N, K]"""
    scores = torch.rand(shape.micro_tokens, shape.config.n_routed_experts, generator=torch.Generator().manual_seed(0))
    return scores.topk(shape.config.num_experts_per_tok, dim=-1).indices.to(device)


def pairs(shape: Shape, device: torch.device) -> routing.Sorted:
    return routing.sort_by_expert(choice(shape, device), shape.config.n_routed_experts)


def draw(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)


def as_table(result: dict[str, Any]) -> list[str]:
    lines = [
        f"{result['shape']}, {result['device']}, {result['dtype']}; copy {result['copy_bytes_per_second'] / 1e9:.4g} GB/s, peak "
        f"{result['peak_flops'] / 1e12:.4g} TFLOP/s; forward and backward",
        "| kernel | size | by | error | µs | rate | share of the bound |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["kernels"]:
        head = f"| {row['kernel']} | {row['size']} | {row['by']} | "
        if "failed" in row:
            lines.append(f"{head}failed: {row['failed'][:80]} | | | |")
            continue
        scale, unit = (1e9, "GFLOP/s") if row["unit"] == "FLOP/s" else (1e9, "GB/s")
        lines.append(
            f"{head}{row['error']:.1e} | {row['seconds'] * 1e6:,.0f} | {row['rate'] / scale:,.0f} {unit} | {row['share']:.0%} |"
        )
    return lines


if __name__ == "__main__":
    main()

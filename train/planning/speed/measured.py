"""How fast this machine's CPU is at the work of a model: our own operations, run at the model's own sizes and timed.

A CPU has no figure that a table could hold: what a product reaches depends on its sizes, on threads and on what is compiled. So
each kind of work of `train.planning.speed.rates` is run here as a layer runs it, forward and backward, with so few tokens and
experts that all of it takes a few seconds for any model, and remembered. The best of several runs counts: neighbours only slow
them down.
"""

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from model.config import ModelConfig
from model.layers import Linear, RMSNorm
from model.ops import rows as row_ops
from model.ops import swiglu
from model.ops.attention import BACKENDS
from model.ops.cross_entropy import CPU_ROWS, linear_cross_entropy
from model.ops.experts import experts
from model.ops.routing import sort_by_expert
from model.rope import rotation, softmax_scale
from model.router import Router
from train.launch import keep_freed_memory
from train.optimizer import build_optimizer
from train.planning.devices import Device, measured_machine
from train.planning.speed.rates import Rates
from train.planning.speed.work import How, work_of_head, work_of_layer
from train.sections import OptimizerSection

SECONDS = 0.3  # of one kind of work, and three runs at least
FLOPS = 1e10  # of one run
ELEMENTS = 1 << 24  # of matrices of experts, and of weights for the optimizer


def measured_rates(device: Device, c: ModelConfig, how: How) -> Rates:
    """What a process reaches at a micro-batch of this model, on the part of this machine that is its device."""
    tokens = min(how.tokens, 4096)
    alone = _measured(c, tokens, min(how.length, tokens), how.element, torch.get_num_threads())
    return Rates(
        **{kind: rate / device.shared for kind, rate in alone.items()},
        half=0.0,  # experts were measured with as many rows each
        node=device.link_bandwidth,
        network=device.network,
        sending=1.0,  # the CPU does it
    )


def forget() -> None:
    """Measure anew when asked again."""
    measured_machine.cache_clear()
    _measured.cache_clear()


@cache
def _measured(c: ModelConfig, tokens: int, length: int, element: int, threads: int) -> dict[str, float]:
    """Of a process that is alone: rates by their names in `Rates`."""
    keep_freed_memory()  # as a run does
    dtype = torch.float32 if element == 4 else torch.bfloat16
    memory = _memory(c, tokens, dtype)
    forward, backward = _attention(c, tokens, length, dtype)
    return {
        "linear": _linear(c, tokens, dtype),
        "experts": _experts(c, tokens, dtype) if c.n_moe_layers else 1.0,
        "attention": forward,
        "attention_backward": backward,
        "head": _head(c, tokens, dtype, memory),
        "memory": memory,
        "optimizer": _optimizer(),
    }


def _linear(c: ModelConfig, tokens: int, dtype: torch.dtype) -> float:
    """FLOP/s of the linear maps of a block, weighed by their FLOPs."""
    dim, heads = c.hidden_size, c.num_attention_heads
    queries = heads * c.qk_head_dim
    shapes = [(dim, queries)] if c.q_lora_rank is None else [(dim, c.q_lora_rank), (c.q_lora_rank, queries)]
    shapes += [
        (dim, c.kv_lora_rank + c.qk_rope_head_dim),
        (c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim)),
        (heads * c.v_head_dim, dim),
    ]
    width = c.n_shared_experts * c.moe_intermediate_size if c.n_moe_layers else c.intermediate_size
    shapes += [(dim, width), (dim, width), (width, dim)]
    less = _less(tokens, 6 * sum(a * b for a, b in shapes))
    shapes = [(a // less, b // less) for a, b in shapes]
    rows = _fitting(tokens, 6 * sum(a * b for a, b in shapes))
    maps = [Linear(a, b) for a, b in shapes]
    inputs = [torch.randn(rows, a, dtype=dtype, requires_grad=True) for a, _ in shapes]
    grads = [torch.randn(rows, b, dtype=dtype) for _, b in shapes]

    def run() -> None:
        for layer, x, grad in zip(maps, inputs, grads):
            layer.weight.grad = x.grad = None
            layer(x).backward(grad)

    return 6 * rows * sum(a * b for a, b in shapes) / _best(run)


def _experts(c: ModelConfig, tokens: int, dtype: torch.dtype) -> float:
    """FLOP/s of the products of experts, with as many rows each as this many tokens give them, or fewer."""
    less = _less(tokens, 6 * 3 * c.hidden_size * c.moe_intermediate_size)
    dim, width = c.hidden_size // less, c.moe_intermediate_size // less
    one = 3 * dim * width
    number = max(1, min(c.n_routed_experts, ELEMENTS // one))
    k = min(c.num_experts_per_tok, number)
    rows = max(1, tokens * c.num_experts_per_tok * number // (c.n_routed_experts * k))  # as many to an expert
    rows = _fitting(rows, 6 * k * one)
    order, place, counts = sort_by_expert(torch.rand(rows, number).topk(k).indices, number)
    index, weights = order // k, torch.rand(rows * k, requires_grad=True)
    x = torch.randn(rows, dim, dtype=dtype, requires_grad=True)
    gate_up = torch.randn(number, 2 * width, dim, requires_grad=True)
    down = torch.randn(number, dim, width, requires_grad=True)
    grad = torch.randn(rows, dim, dtype=dtype)

    def run() -> None:
        x.grad = weights.grad = gate_up.grad = down.grad = None
        experts(x, index, place, counts, weights, gate_up.to(dtype), down.to(dtype)).backward(grad)

    halves, outputs = torch.randn(rows * k, 2 * width, dtype=dtype), torch.randn(rows * k, dim, dtype=dtype)

    def between() -> None:
        """What is no product."""
        _between_products(halves, outputs, place, weights.detach())

    return 6 * rows * k * one / max(_best(run) - _best(between), 1e-9)


def _between_products(halves: Tensor, outputs: Tensor, place: Tensor, weights: Tensor) -> None:
    """SwiGLU and the sum over a token's experts, forward and backward, of rows of experts."""
    gate, up = halves.chunk(2, dim=-1)
    product = swiglu.multiply(gate, up, weights)
    row_ops.sum_up(outputs, place)
    swiglu.multiply_backward(product, gate, up, weights)
    row_ops.sum_up(outputs, place)


def _attention(c: ModelConfig, tokens: int, length: int, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of its products forward and backward; the latter twice as many."""
    heads, of_token = c.num_attention_heads, c.num_attention_heads * (c.qk_head_dim + c.v_head_dim)
    length = min(length, max(128, int((FLOPS / 3 / of_token) ** 0.5)))
    sequences = max(1, _fitting(tokens, 3 * length * of_token) // length)
    shape = (sequences, length)
    q = torch.randn(*shape, heads, c.qk_head_dim, dtype=dtype, requires_grad=True)
    kv = torch.randn(*shape, heads, c.qk_nope_head_dim + c.v_head_dim, dtype=dtype, requires_grad=True)
    k_rope = torch.randn(*shape, c.qk_rope_head_dim, dtype=dtype, requires_grad=True)
    angles, scale = rotation(c, torch.arange(length)), softmax_scale(c)
    grad = torch.randn(*shape, heads, c.v_head_dim, dtype=dtype)

    def forward() -> Tensor:
        return BACKENDS["fused"](q, kv, k_rope, angles, scale, None)

    def both() -> None:
        q.grad = kv.grad = k_rope.grad = None
        forward().backward(grad)

    one = _best(forward)
    flops = sequences * length * length * of_token
    return flops / one, 2 * flops / max(_best(both) - one, 1e-9)


def _head(c: ModelConfig, tokens: int, dtype: torch.dtype, memory: float) -> float:
    """FLOP/s of the head's products; the time of the loss is that of the bytes it moves."""
    words = min(c.vocab_size, max(256, int(FLOPS / (6 * CPU_ROWS * c.hidden_size))))
    rows = _fitting(tokens, 6 * words * c.hidden_size)
    x = torch.randn(rows, c.hidden_size, dtype=dtype, requires_grad=True)
    weight = torch.randn(words, c.hidden_size, requires_grad=True)
    labels = torch.randint(words, (rows,))

    def run() -> None:
        x.grad = weight.grad = None
        linear_cross_entropy(x, weight, labels).backward()

    alone = _of_words(c, words)
    seconds = _best(run)
    moved = work_of_head(alone, How.simple(rows, rows, dtype.itemsize)).forward.moved / memory
    return 6 * rows * words * c.hidden_size / max(seconds - moved, seconds / 2)


def _of_words(c: ModelConfig, words: int) -> ModelConfig:
    """The model with a head of so many words alone."""
    return c.override({"num_nextn_predict_layers": 0, "vocab_size": words, "bos_token_id": 0, "eos_token_id": 1})


def _memory(c: ModelConfig, tokens: int, dtype: torch.dtype) -> float:
    """Bytes/s of what a block does beside its products, forward and backward: of those that `train.planning.speed.work` counts."""
    layer = c.num_hidden_layers - 1
    is_moe = c.is_moe(layer)
    rows = min(tokens, 1 + int(1e9 / _moved(c, layer, 1, dtype)))
    dim, k = c.hidden_size, c.num_experts_per_tok
    width = c.n_shared_experts * c.moe_intermediate_size if is_moe else c.intermediate_size
    norms = [RMSNorm(width) for width in (dim, dim)]
    latents = [RMSNorm(width) for width in (c.q_lora_rank or 0, c.kv_lora_rank) if width]
    x = torch.randn(1, rows, dim, dtype=dtype, requires_grad=True)
    of_latents = [torch.randn(rows, *norm.weight.shape, dtype=dtype, requires_grad=True) for norm in latents]
    gate, up = (torch.randn(rows, width, dtype=dtype, requires_grad=True) for _ in range(2))
    grad, of_product = torch.randn(1, rows, dim, dtype=dtype), torch.randn(rows, width, dtype=dtype)
    router = Router(c) if is_moe else None
    if router:
        torch.nn.init.normal_(router.weight, std=0.02)
    halves = torch.randn(rows * k, 2 * c.moe_intermediate_size, dtype=dtype)
    outputs = torch.randn(rows * k, dim, dtype=dtype)

    def run() -> None:
        h = x
        for norm in norms:
            h = h + norm(h)
        h.backward(grad)
        for norm, latent in zip(latents, of_latents):
            norm(latent).backward(latent.detach())
        swiglu.swiglu(gate, up).backward(of_product)
        if router:
            routing = router(x)
            order, place, _ = sort_by_expert(routing.expert_ids, c.n_routed_experts)
            weights = row_ops.permute(routing.weights.flatten(), order, place.flatten())
            _between_products(halves, outputs, place, weights.detach())
            weights.backward(torch.ones_like(weights))
        x.grad = gate.grad = up.grad = None

    return rows * _moved(c, layer, 1, dtype) / _best(run)


def _moved(c: ModelConfig, layer: int, tokens: int, dtype: torch.dtype) -> float:
    how = How.simple(tokens, 1, dtype.itemsize)
    work = work_of_layer(c, layer, how)
    return work.forward.moved + work.inputs.moved


def _optimizer() -> float:
    """Bytes/s of AdamW with the norm before it, of weights, gradients and moments in fp32."""
    weight = torch.nn.Parameter(torch.randn(ELEMENTS))
    weight.grad = gradient = torch.randn(ELEMENTS)
    optimizer = build_optimizer([("weight", weight)], OptimizerSection())

    def run() -> None:
        torch._foreach_norm([gradient])
        optimizer.step()

    return ELEMENTS * (8 + 8 + 16) / _best(run)


def _less(tokens: int, flops: float) -> int:
    """By how much the widths of matrices are divided, so that a run may have CPU_ROWS rows, each of so many FLOPs: large ones reach
    what smaller ones do, but few rows less than many."""
    return max(1, round((min(tokens, CPU_ROWS) * flops / FLOPS) ** 0.5))


def _fitting(rows: int, flops: float) -> int:
    """As many of these rows as a run may have, each of so many FLOPs."""
    return max(1, min(rows, int(FLOPS / flops)))


def _best(run: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs: of the CPU where one thread computes, since a neighbour does not take those."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    run()
    best, begin, runs = float("inf"), time.perf_counter(), 0
    while runs < 3 or time.perf_counter() - begin < SECONDS:
        start = clock()
        run()
        best, runs = min(best, clock() - start), runs + 1
    return best

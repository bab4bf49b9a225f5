"""Each kernel of FP8 training alone: its error against float64, its time, and its share of what bounds it.

    python benchmarks/fp8_kernels.py --shapes v3 --json FILE

Quantisation and SwiGLU move bytes: what bounds them is a plain copy, measured in the same run. Products are held against the
device's FP8 peak; every implementation at hand runs, and the product in bf16 ("plain") beside them. All that compute the same thing
take turns, so that what disturbs one disturbs all; times are medians. On a CPU the reference runs, which shows that this program
works and nothing else.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from data.files import replace_file
from model.ops.fp8.choose import CANDIDATES, kernels_for, of
from model.ops.fp8.kernels import Kernels
from model.ops.fp8.products import COLUMNS, EMULATION, GROUPS, ROWS, WITHIN_GROUPS
from model.ops.fp8.quantize import E4M3, TILE, Quantized, dequantize, padded_ends
from model.ops.measure import in_turns, timed
from train.planning.devices import peak_flops

UNTRIED = ("triton specialized",)  # may hang; no candidate before a GPU has run it


class Shapes(NamedTuple):
    """The sizes of a run."""

    rows: int  # M of quantisation and SwiGLU, so many that nothing fits into a cache
    hidden: int
    width: int  # of an expert
    weight: tuple[int, int]
    maps: tuple[tuple[int, int, int], ...]  # M, N, K of single products
    experts: int
    of_experts: int  # rows of all of them


V3 = Shapes(
    rows=16384,
    hidden=7168,
    width=2048,
    weight=(18432, 7168),
    maps=((4096, 7168, 16384), (4096, 24576, 1536), (4096, 18432, 7168), (4096, 7168, 18432)),
    experts=8,
    of_experts=32768,
)
SMALL = Shapes(64, 256, 144, (272, 256), ((48, 144, 272),), 3, 96)


class Contest(NamedTuple):
    """One kernel on one shape, by whoever computes it."""

    kernel: str
    size: str
    flops: float  # 0 where bytes are what bounds it
    inputs: tuple[Tensor, ...]
    contestants: dict[str, Callable[[], Any]]
    errors: Callable[[str, Any], dict[str, float]]  # by a contestant's name and output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=["v3", "small"], default="v3", help="DeepSeek-V3's, or some of a few rows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20, help="timed groups of calls of each")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    result = measure({"v3": V3, "small": SMALL}[arguments.shapes], torch.device(arguments.device), arguments.rounds)
    if arguments.json:
        with replace_file(arguments.json) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")


@torch.no_grad()
def measure(shapes: Shapes, device: torch.device, rounds: int) -> dict[str, Any]:
    """Run all contests and print a line for each contestant."""
    gpu = device.type == "cuda"
    kernels = kernels_for(device)
    bandwidth = copy_bandwidth(device, rounds)
    peak = peak_flops(device, E4M3 if gpu else torch.float32)
    print(f"copy {bandwidth / 1e9:.4g} GB/s, peak {peak / 1e12:.4g} TFLOP/s")
    found = []
    for contest in (*movers(kernels, shapes, device), *products(kernels, shapes, device)):
        for row in run(contest, bandwidth, peak, device, rounds):
            print(in_words(row))
            found.append(row)
    return {
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "torch": torch.__version__,
        "copy_bytes_per_second": bandwidth,
        "peak_flops": peak,
        "kernels": found,
    }


def movers(kernels: Kernels, shapes: Shapes, device: torch.device) -> Iterator[Contest]:
    """Quantisation and SwiGLU."""
    m, d, f = shapes.rows, shapes.hidden, shapes.width
    x, w = draw(device, m, d), torch.randn(shapes.weight, device=device)
    counts = equal_groups(m, shapes.experts, device)
    rows = kernels.quantize_rows(x, True)
    gate, up = draw(device, m, 2 * f).chunk(2, dim=1)
    grad, kept_gate, kept_up = draw(device, m, f), kernels.quantize_rows(gate, False), kernels.quantize_rows(up, False)

    def mover(
        kernel: str, call: Callable[[], Any], inputs: Any, exact: Callable[[], Tensor], pick: Any = None
    ) -> Contest:
        def errors(name: str, out: Any) -> dict[str, float]:
            quantized = pick(out) if pick else out
            return {"error": relative_error(dequantize(quantized)[..., : exact().shape[-1]], exact())}

        leaves = tuple(tree_leaves(inputs))
        return Contest(kernel, "×".join(map(str, leaves[0].shape)), 0, leaves, {"ours": call}, errors)

    both = partial(kernels.quantize_rows_and_columns, x)
    grouped = partial(kernels.requantize_columns, rows, counts)
    yield mover("rows", partial(kernels.quantize_rows, x, True), x, lambda: x)
    yield mover("columns", partial(kernels.quantize_columns, x), x, lambda: x.T)
    yield mover("rows and columns", both, x, lambda: x.T, lambda out: out[1])
    yield mover("columns of rows, grouped", grouped, rows, lambda: spread(dequantize(rows), counts).T)
    yield mover("blocks", partial(kernels.quantize_blocks, w, torch.bfloat16, False), w, lambda: w)
    yield mover("blocks, transposed", partial(kernels.quantize_blocks, w, torch.bfloat16, True), w, lambda: w.T)
    yield mover("swiglu", partial(kernels.swiglu, gate, up, None), (gate, up), lambda: swiglu(gate, up))
    inputs = grad, kept_gate, kept_up
    gradients = partial(kernels.swiglu_backward, *inputs, None, counts)
    of_gate = partial(gradient_of_gate, grad, dequantize(kept_gate), dequantize(kept_up))
    yield mover("swiglu backward, grouped", gradients, inputs, of_gate, lambda out: out.gate)


def products(kernels: Kernels, shapes: Shapes, device: torch.device) -> Iterator[Contest]:
    """The three products of linear maps and of experts; in bf16 too."""
    for m, n, k in shapes.maps:
        x, w, dy = draw(device, m, k), draw(device, n, k), draw(device, m, n)
        rows, blocks = kernels.quantize_rows(x, False), kernels.quantize_blocks(w, torch.bfloat16, False)
        yield product(ROWS, (m, n, k), (rows, blocks), (x, w), partial(torch.mm, x, w.T))
        columns = kernels.quantize_columns(dy), kernels.quantize_columns(x)
        yield product(COLUMNS, (m, n, k), columns, (dy.T, x.T), partial(torch.mm, dy.T, x))
    m, e = shapes.of_experts, shapes.experts
    counts = equal_groups(m, e, device)
    ends = counts.cumsum(0).to(torch.int32)
    for n, k in ((shapes.width, shapes.hidden), (shapes.hidden, shapes.width)):
        x, w, dy = draw(device, m, k), draw(device, e, n, k), draw(device, m, n)
        rows, blocks = kernels.quantize_rows(x, True), kernels.quantize_blocks(w, torch.bfloat16, False)
        plain = partial(F.grouped_mm, x, w.mT, offs=ends)
        yield product(GROUPS, (m, n, k), (rows, blocks), (x, w), plain, counts)
        a, b = (kernels.requantize_columns(kernels.quantize_rows(t, True), counts) for t in (dy, x))
        plain = partial(F.grouped_mm, dy.T, x, offs=ends)
        yield product(WITHIN_GROUPS, (m, n, k), (a, b), (dy.T, x.T), plain, counts)


def product(
    kind: str,
    size: tuple[int, int, int],
    factors: tuple[Quantized, Quantized],
    plain_factors: tuple[Tensor, Tensor],
    plain: Callable[[], Tensor],
    counts: Tensor | None = None,
) -> Contest:
    """A contest over a product.

    Args:
        factors: quantised.
        plain_factors: what they were made of, in the same order of dimensions.
        plain: the product in the compute dtype.
    """
    operands = (*factors, counts) if counts is not None else factors
    dtype = plain_factors[0].dtype
    names = (EMULATION,) if plain_factors[0].device.type == "cpu" else (*CANDIDATES, *UNTRIED)
    contestants = {name: partial(run, *operands, dtype) for name in names if (run := of(name, kind))}

    def errors(name: str, out: Tensor) -> dict[str, float]:
        in_all = {"error_in_all": relative_error(out, exact(kind, *plain_factors, counts))}
        if name == "plain":
            return in_all
        a, b = (dequantize(factor) for factor in factors)
        return in_all | {"error": relative_error(out, exact(kind, a, b, counts, padded=kind == WITHIN_GROUPS))}

    return Contest(
        kind, "×".join(map(str, size)), 2.0 * math.prod(size), plain_factors, contestants | {"plain": plain}, errors
    )


def exact(kind: str, a: Tensor, b: Tensor, counts: Tensor | None, padded: bool = False) -> Tensor:
    """The product in float64. padded: each group of columns fills tiles."""
    if counts is None:
        return a.double() @ b.double().T
    if kind == GROUPS:
        parts = zip(a.split(counts.tolist()), b)
        return torch.cat([rows.double() @ matrix.double().T for rows, matrix in parts])
    ends = padded_ends(counts) if padded else counts.cumsum(0)
    spans = zip([0, *ends.tolist()], ends.tolist())
    return torch.stack([a[:, i:j].double() @ b[:, i:j].double().T for i, j in spans])


def run(contest: Contest, bandwidth: float, peak: float, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Errors and times of all contestants, which take turns."""
    found, calls = [], {}
    for name, call in contest.contestants.items():
        row: dict[str, Any] = {"kernel": contest.kernel, "size": contest.size, "by": name}
        found.append(row)
        try:
            out = call()
            row |= contest.errors(name, out)
        except Exception as failure:  # a library that refuses a shape is a result too
            row["failed"] = str(failure).strip().split("\n")[0]
            continue
        row["bytes"] = sum(t.nbytes for t in (*contest.inputs, *tree_leaves(out)))
        calls[name] = call
        del out
    seconds = in_turns(calls, device, rounds)
    for row in found:
        if row["by"] in calls:
            values = seconds[row["by"]]
            rate = (contest.flops or row["bytes"]) / statistics.median(values)
            row |= {"seconds": statistics.median(values), "spread": [min(values), max(values)], "rate": rate}
            row |= {
                "unit": "FLOP/s" if contest.flops else "B/s",
                "share": rate / (peak if contest.flops else bandwidth),
            }
    return found


def in_words(row: dict[str, Any]) -> str:
    head = f"{row['kernel']} [{row['size']}] {row['by']}: "
    if "failed" in row:
        return head + f"failed: {row['failed']}"
    scale, unit = (1e12, "TFLOP/s") if row["unit"] == "FLOP/s" else (1e9, "GB/s")
    errors = ", ".join(f"{name.replace('_', ' ')} {row[name]:.2e}" for name in ("error", "error_in_all") if name in row)
    low, high = (s * 1e6 for s in row["spread"])
    times = f"{row['seconds'] * 1e6:.4g} µs ({low:.4g} … {high:.4g})"
    return head + f"{times}, {row['rate'] / scale:.4g} {unit}, {row['share']:.1%}, {errors}"


def copy_bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes/s of a copy that no cache holds, read and written bytes together."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(timed(partial(target.copy_, source), device) for _ in range(rounds))


def relative_error(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖ in float64."""
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm())


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.double()) * up.double()


def gradient_of_gate(grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    g, s = gate.double(), gate.double().sigmoid()
    return grad.double() * up.double() * s * (1 + g * (1 - s))


def draw(device: torch.device, *shape: int) -> Tensor:
    """Normal numbers in the compute dtype of the device."""
    return torch.randn(shape, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)


def equal_groups(rows: int, groups: int, device: torch.device) -> Tensor:
    counts = torch.full((groups,), rows // groups, device=device)
    counts[: rows % groups] += 1
    return counts


def spread(x: Tensor, counts: Tensor) -> Tensor:
    """x with zeros behind each group, up to whole tiles."""
    return torch.cat([F.pad(part, (0, 0, 0, -len(part) % TILE)) for part in x.split(counts.tolist())])


if __name__ == "__main__":
    main()

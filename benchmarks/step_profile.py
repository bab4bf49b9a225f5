"""Where the time of a training step goes: every operation belongs to one class of work, by its name or by what it runs inside of.

The time of an operation is its own, without those that it calls. On a GPU it is that of its kernels, and what is left of the step
are gaps, in which no kernel ran. For products, what they had to compute (`model.flops.flops_by_part`) over their time is a rate,
held against the measured peak; what recomputation adds is in the time and not in the rate.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from contestants import Shape
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

from model.flops import Recompute, flops_by_part

LINEAR, EXPERTS, HEAD, ATTENTION = "linear maps", "experts", "head", "attention"
LOSS, NORMS, GATE, SWIGLU, OPTIMIZER, REST = (
    "softmax of the loss", "norms", "gate and permutation", "swiglu", "clipping and optimizer", "rest",
)  # fmt: skip
GAPS = "gaps: no kernel"
STEPS = 3
IS_PRODUCT = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm", "mkldnn_", "linear")

# An operation belongs where the outermost operation around it does that has one of these in its name, in this order.
CLASSES = (
    (OPTIMIZER, ("Optimizer.step", "fused_adam", "adamw", "_foreach_")),
    (LOSS, ("cross_entropy", "CrossEntropy")),
    (ATTENTION, ("rorqual::attention", "scaled_dot_product", "rorqual::assemble", "Attention", "Assemble")),
    (EXPERTS, ("_grouped_mm", "GroupedMM", "rorqual::experts", "_Experts", "multiply_groups", "multiply_within_groups")),
    (SWIGLU, ("swiglu", "SwiGLU", "silu")),
    (NORMS, ("rms_norm", "RMSNorm", "RmsNorm")),
    (GATE, (
        "rorqual::route", "rorqual::sort", "rorqual::gather", "rorqual::combine", "rorqual::rows", "ToExperts", "FromExperts",
        "topk", "TopK", "sort", "embedding_bag", "index_select", "IndexSelect", "scatter", "gather", "Gather", "sigmoid", "Sigmoid",
    )),
)  # fmt: skip
PRODUCTS_INSIDE = {LOSS: HEAD, SWIGLU: LINEAR}


def profile(
    step: Callable[[], Any], shape: Shape, recompute: Recompute, device: torch.device, peak: float
) -> dict[str, Any]:
    """Seconds of a step by class of work, and by operation; means over a few steps.

    Args:
        peak: FLOP/s that a product can reach.
    """
    on_gpu = device.type == "cuda"
    with torch.profiler.profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    ) as found:
        for _ in range(STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    events = found.events()
    assert events is not None
    seconds: dict[str, float] = defaultdict(float)
    operations: dict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        own = sum(kernel.duration for kernel in event.kernels) if on_gpu else event.self_cpu_time_total
        if own:
            name = class_of(event)
            seconds[name] += own / 1e6 / STEPS
            operations[name, event.name] += own / 1e6 / STEPS
    if on_gpu:
        seconds[GAPS] = gaps(events) / 1e6 / STEPS
    if HEAD not in seconds and LOSS in seconds:  # products and softmax in one kernel
        seconds[HEAD] = seconds.pop(LOSS)
        operations = {(HEAD if kind == LOSS else kind, name): own for (kind, name), own in operations.items()}
    total = sum(seconds.values())
    flops = {part: shape.tokens * f for part, f in flops_by_part(shape.config, shape.sequence_length).items()}
    return {
        "shape": shape.name,
        "recompute": recompute,
        "seconds": total,
        "peak_flops": peak,
        "classes": {
            name: {
                "seconds": own,
                "share": own / total,
                "of_the_peak": flops[name] / own / peak if name in flops else None,
            }
            for name, own in sorted(seconds.items(), key=lambda item: -item[1])
        },
        "operations": [
            {"class": name, "operation": operation, "seconds": own, "share": own / total}
            for (name, operation), own in sorted(operations.items(), key=lambda item: -item[1])[:40]
        ],
    }


def class_of(event: FunctionEvent) -> str:
    """The class of work that an operation belongs to."""
    for name in [around.name for around in ancestors(event)][::-1]:
        for kind, words in CLASSES:
            if any(word in name for word in words):
                return PRODUCTS_INSIDE.get(kind, kind) if is_product(event) else kind
    return LINEAR if any(is_product(around) for around in ancestors(event)) else REST


def ancestors(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """The operation itself, and those it runs inside of."""
    inner: FunctionEvent | None = event
    while inner is not None:
        yield inner
        inner = inner.cpu_parent


def is_product(event: FunctionEvent) -> bool:
    return event.name.removeprefix("aten::").startswith(IS_PRODUCT)


def gaps(events: Any) -> float:
    """Microseconds between the first kernel and the last in which none ran."""
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if e.device_type == DeviceType.CUDA)
    idle, end = 0.0, spans[0][0] if spans else 0.0
    for start, stop in spans:
        idle += max(0.0, start - end)
        end = max(end, stop)
    return idle


def as_lines(found: dict[str, Any]) -> list[str]:
    """The profile as a table."""
    lines = [
        f"where a step of ours goes, {found['shape']}, recompute {found['recompute']}: {found['seconds'] * 1e3:.0f} ms",
        "| work | ms | share | products: of the peak | its largest operations |",
        "|---|---|---|---|---|",
    ]
    for name, row in found["classes"].items():
        largest = [o for o in found["operations"] if o["class"] == name][:3]
        named = ", ".join(f"{o['operation']} {o['seconds'] * 1e3:.0f}" for o in largest)
        rate = "" if row["of_the_peak"] is None else f"{row['of_the_peak']:.0%}"
        lines.append(f"| {name} | {row['seconds'] * 1e3:.1f} | {row['share']:.1%} | {rate} | {named} |")
    return lines


def draw(found: dict[str, Any], path: Path) -> None:
    """One bar for each class of work, the longest on top; what products would take at the peak is dark."""
    from matplotlib.figure import Figure

    rows = list(found["classes"].items())[::-1]
    figure = Figure(figsize=(9, 0.45 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    milliseconds = [1e3 * row["seconds"] for _, row in rows]
    axes.barh([name for name, _ in rows], milliseconds, color="#9ecae1")
    at_peak = [ms * (row["of_the_peak"] or 0) for ms, (_, row) in zip(milliseconds, rows)]
    axes.barh([name for name, _ in rows], at_peak, color="#3182bd", label="at the measured peak of products")
    for place, (ms, (_, row)) in enumerate(zip(milliseconds, rows)):
        axes.annotate(f" {row['share']:.1%}", (ms, place), va="center")
    axes.set_xlabel("ms of a step")
    axes.set_title(f"{found['shape']}: {found['seconds'] * 1e3:.0f} ms, recompute {found['recompute']}", loc="left")
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    figure.savefig(path, dpi=120)

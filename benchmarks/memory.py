"""Peak memory of a training step by component, measured, beside the planner's account of the same step.

    python benchmarks/memory.py --shape benchmarks/shapes/reference.json --json FILE

Every storage that an operation of the step touches is counted from its first appearance until it is freed
(`train.planning.simulation.live_bytes`). It belongs to parameters, gradients or moments, or to the part of the model whose
forward pass made it and left it for the backward pass. The peak is no sum: gradients appear where activations vanish, and a block
at work needs room of its own. On a GPU the allocator's peak stands beside it. The account is that of `rorqual plan`:
`parallel.footprint` and `model.activations`.
"""

import argparse
import json
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import asked
import torch
from contestants import Ours, Shape
from sides import compute_dtype
from torch import nn

from data.files import replace_file
from model.activations import Device, ForwardPass, activation_bytes, working_bytes
from model.block import Block
from model.flops import Recompute
from model.layers import MLP
from model.moe import MoE
from model.transformer import Transformer
from parallel.footprint import footprint
from parallel.layout import Layout, ParallelConfig
from parallel.peak import fullest, moments_of
from train.planning.simulation.live_bytes import LiveBytes

HEAD, WORK = "embedding and head", "at work"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=asked.shape, required=True, help="a file of benchmarks/shapes")
    parser.add_argument("--recompute", nargs="+", choices=get_args(Recompute), default=list(get_args(Recompute)))
    parser.add_argument("--mtp", type=asked.count, default=0, help="MTP modules")
    parser.add_argument("--account", action="store_true", help="the account alone, which needs no device of that size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=asked.new_file, help="write the result here")
    arguments = parser.parse_args()
    shape = arguments.shape.with_mtp(arguments.mtp)
    modes = {mode: {"account": account(shape, arguments.device, mode)} for mode in arguments.recompute}
    if not arguments.account:
        for mode, found in modes.items():  # each in a process of its own, with an allocator of its own
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found |= pool.apply(measure, (shape, arguments.device, mode))
    result = {"shape": shape.name, "device": arguments.device, "torch": torch.__version__, "modes": modes}
    if arguments.json:
        with replace_file(arguments.json) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(as_table(result)))


def account(shape: Shape, device: str, mode: Recompute) -> dict[str, int]:
    """Bytes by component, from the shape alone."""
    config, element = shape.config, compute_dtype(device).itemsize
    layout = Layout(ParallelConfig(), 1, config)
    held = footprint(layout, config)
    where: Device = "cuda" if device == "cuda" else "cpu"
    forward = ForwardPass(shape.micro_batch, shape.sequence_length, element, mode, where)
    kept = activation_bytes(config, forward)
    state = {"parameters": held.parameters, "gradients": held.gradients, "moments": held.moments}
    working = working_bytes(config, forward)
    micro_batches = -(-shape.batch // shape.micro_batch)
    peak = held.parameters + held.moments + fullest(moments_of(layout, config, forward, 4, micro_batches)).all
    return state | kept | {WORK: working, "peak": peak}


def measure(shape: Shape, device: str, mode: Recompute) -> dict[str, Any]:
    """What lives at the peak of a step, by component; and what the forward pass leaves."""
    torch.set_num_threads(1)
    where = torch.device(device)
    ours = Ours(shape, where, compute_dtype(device), mode)
    batch = shape.draw().to(where)
    ours.step(batch)
    live = Labelled(ours.model)
    live.own("parameters", [*ours.model.parameters(), *ours.model.buffers()])
    live.own("moments", (t for values in ours.optimizer.state.values() for t in values.values()))
    live.own("batch", batch)
    ours.optimizer.register_step_pre_hook(lambda *_: live.own("gradients", (p.grad for p in ours.model.parameters())))
    with live.watching():
        ours.step(batch)  # finds what lasts from step to step
        live.start()
        ours.step(batch)
    found: dict[str, Any] = {"measured": live.components()}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        ours.step(batch)
        found["allocator"] = torch.cuda.max_memory_allocated()
    return found


class Labelled(LiveBytes):
    """Live bytes by who made them."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model
        self.labels: dict[int, str] = {}  # of a storage's number
        self.inside: list[str] = []  # parts of the model that run forward, the innermost last
        self.forward_ends = 0  # number of events

    def own(self, label: str, tensors: Any) -> None:
        self.labels |= dict.fromkeys(self.note(tensors), label)

    def note(self, values: Any) -> set[int]:
        numbers = super().note(values)
        for number in numbers:
            self.labels.setdefault(number, self.inside[-1] if self.inside else WORK)
        return numbers

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what happens, and know inside of which part of the model it does."""
        hooks = []
        for module in self.model.modules():
            if label := part_of(module):
                hooks.append(module.register_forward_pre_hook(lambda *_, label=label: self.inside.append(label)))
                hooks.append(module.register_forward_hook(self._leave, always_call=True))
        with self:
            yield
        for hook in hooks:
            hook.remove()

    def components(self) -> dict[str, int]:
        """Bytes by label when the last forward pass had ended, and the "peak" since `start`."""
        kept: Counter[str] = Counter()
        for number, size in self.events[: self.forward_ends]:
            kept[self.labels[number]] += size
        kept["gradients"] = sum(p.nbytes for p in self.model.parameters())  # as they lie there after the backward pass
        del kept[WORK], kept["batch"]
        return {**kept, "peak": self.peak(set()).everything}

    def _leave(self, module: nn.Module, *_: Any) -> None:
        self.inside.pop()
        if isinstance(module, Transformer):
            self.forward_ends = len(self.events)


def part_of(module: nn.Module) -> str | None:
    """The account's name for what a module keeps; None: it belongs to the part around it."""
    if isinstance(module, Transformer):
        return HEAD
    if isinstance(module, MoE | MLP):
        return "feed-forward"
    return "attention" if isinstance(module, Block) else None


def as_table(result: dict[str, Any]) -> list[str]:
    """Measured and accounted for, by component and mode."""
    lines = [
        f"{result['shape']}, {result['device']}, MB",
        "| recompute | component | measured | account | difference |",
        "|---|---|---|---|---|",
    ]
    for mode, found in result["modes"].items():
        accounted, measured = found["account"], found.get("measured", {})
        for name in dict.fromkeys([*accounted, *measured]):
            a, m = accounted.get(name), measured.get(name)
            shown = [f"{value / 1e6:,.1f}" if value is not None else "–" for value in (m, a)]
            difference = f"{a / m - 1:+.1%}" if a and m else ""
            lines.append(f"| {mode} | {name} | {' | '.join(shown)} | {difference} |")
        if "allocator" in found:
            lines.append(f"| {mode} | the allocator's peak | {found['allocator'] / 1e6:,.1f} | | |")
    return lines


if __name__ == "__main__":
    main()

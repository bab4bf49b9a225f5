"""One training step of Rorqual against the same step of `transformers`' DeepseekV3: time and memory.

    python benchmarks/train_step.py --shape benchmarks/shapes/reference.json --json FILE

Each side lives in a process of its own. On a CPU all are pinned to one core with one thread each, and one is idle while another
steps, A B A B …: a neighbour's noise then hits both, and the ratio is taken pair by pair. On a GPU (bf16, CUDA events) they
alternate as well, unless the shape says that only one has room. `transformers` runs with the fastest of its experts and attention
implementations, found by trial in the run.

`--mtp N` lets ours with N MTP modules take its turns too. `--warm STEPS --store STORE` trains ours first, so that all start from
weights that route as a real run's, on real tokens. `--profile PICTURE` says where a step of ours goes.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import asked
import torch
from contestants import Shape
from sides import Seconds, Side, Task, compute_dtype
from step_profile import as_lines, draw

from data.files import replace_file
from model.flops import Recompute, flops_mfu

SAME_LOSS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # largest difference of the first losses, in nats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=asked.shape, required=True, help="a file of benchmarks/shapes")
    parser.add_argument("--json", type=asked.new_file, help="write the result here")
    parser.add_argument("--pairs", type=asked.count, default=10, help="timed steps of each side")
    parser.add_argument("--warmup", type=asked.count, default=2, help="steps of each side before the timed ones")
    parser.add_argument("--core", type=int, help="the CPU core both are pinned to; default: the last one")
    parser.add_argument("--recompute", choices=get_args(Recompute), help="of ours; default: as a run's on this device")
    parser.add_argument("--mtp", type=asked.count, default=0, help="MTP modules of a third contestant")
    parser.add_argument("--warm", type=asked.count, default=0, help="steps of training before all start; needs --store")
    parser.add_argument(
        "--store", type=asked.store, help="a token store to take the tokens from; default: random tokens"
    )
    parser.add_argument("--profile", type=asked.picture, help="draw here where a step of ours goes")
    arguments = parser.parse_args()
    if bool(arguments.warm) != bool(arguments.store):
        parser.error("--warm trains on the real tokens of --store; give both or neither")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    core = (arguments.core if arguments.core is not None else max(os.sched_getaffinity(0))) if device == "cpu" else None
    recompute: Recompute = arguments.recompute or ("selective" if device == "cuda" else "none")
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "weights.pt") if arguments.warm else None
        task = Task(arguments.shape, device, core, recompute, weights, arguments.store, arguments.warm)
        result = compare(task, arguments.pairs, arguments.warmup, arguments.mtp, bool(arguments.profile))
    if arguments.json:
        with replace_file(arguments.json) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "profile"}, indent=2))
    if arguments.profile:
        draw(result["profile"], arguments.profile)
        print("\n".join(["", *as_lines(result["profile"])]))
    print("\n".join(["", *as_table(result)]))


def compare(task: Task, pairs: int, warmup: int, modules: int = 0, profiles: bool = False) -> dict[str, Any]:
    """Run all sides and put their figures beside each other. Ratios of speed and memory are ours and theirs."""
    shape, names = task.shape, ["ours", "theirs", *(["mtp"] if modules else [])]
    warmed = warm(task, modules) if task.weights else None
    found: dict[str, dict[str, Any]] = {}
    for together in [[name] for name in names] if shape.alone else [names]:
        found |= take_turns(together, task, pairs, warmup, modules, profiles)
    check_first_losses(found, task)
    ours, theirs = found["ours"], found["theirs"]
    both = {"ours": ours, "theirs": theirs}
    steps: list[tuple[Seconds, Seconds]] = list(zip(ours["steps"], theirs["steps"]))
    ratios = sorted(b.wall / a.wall for a, b in steps)
    flops, peak = flops_mfu(shape.config, shape.sequence_length), ours["peak_flops"]
    speed = {name: shape.tokens / statistics.median(s.wall for s in side["steps"]) for name, side in both.items()}
    memory = {name: side["memory"] for name, side in both.items()}
    on_cpu = task.device == "cpu"
    return {
        "shape": shape.name,
        "tokens_per_step": shape.tokens,
        "device": f"{platform.machine()}, one core, one thread" if on_cpu else torch.cuda.get_device_name(),
        "compute_dtype": str(compute_dtype(task.device)).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "recompute": task.recompute,
        "warmed": warmed,
        "theirs_fastest": theirs["choice"]["fastest"],
        "theirs_trials_seconds": theirs["choice"]["seconds"],
        "speed_ratio": statistics.median(ratios),
        "speed_ratio_spread": [ratios[0], ratios[-1]],
        "speed_ratio_of_cpu_time": statistics.median(b.cpu / a.cpu for a, b in steps) if on_cpu else None,
        "tokens_per_second": speed,
        "peak_flops": peak,
        "flops_per_token": flops,
        "mfu": {name: rate * flops / peak for name, rate in speed.items()},
        "memory_ratio": memory["ours"]["everything"] / memory["theirs"]["everything"],
        "memory_ratio_without_state": memory["ours"]["without_state"] / memory["theirs"]["without_state"],
        "peak_bytes": memory,
        "first_loss": {name: side["first_loss"] for name, side in both.items()},
        "step_seconds": {name: [s.wall for s in side["steps"]] for name, side in both.items()},
        "mtp": cost_of_mtp(ours, found["mtp"], shape, modules, peak, on_cpu) if modules else None,
        "profile": ours.get("profile"),
    }


def warm(task: Task, modules: int) -> dict[str, Any]:
    """Train the weights that all start from, MTP modules too."""
    side = Side("ours", task, modules)
    try:
        return side.ask("warm", task.first_step, task.weights)
    finally:
        side.close()


def take_turns(
    names: list[str], task: Task, pairs: int, warmup: int, modules: int, profiles: bool
) -> dict[str, dict[str, Any]]:
    """What the sides measure that live at the same time."""
    sides = {name: Side(name, task, modules if name == "mtp" else 0) for name in names}
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    try:
        if "theirs" in sides:
            found["theirs"]["choice"] = sides["theirs"].ask("choose")
        if "ours" in sides:
            found["ours"]["peak_flops"] = sides["ours"].ask("peak_flops")
        for name, side in sides.items():
            found[name]["first_loss"] = side.ask("start")
        check_first_losses(found, task)
        for _ in range(warmup - 1):  # the first step was one
            for side in sides.values():
                side.ask("step")
        turns = [{name: side.ask("step") for name, side in sides.items()} for _ in range(pairs)]
        for name, side in sides.items():
            found[name] |= {"steps": [turn[name] for turn in turns], "memory": side.ask("memory")}
        if profiles and "ours" in sides:
            found["ours"]["profile"] = sides["ours"].ask("profile", found["ours"]["peak_flops"])
    finally:
        for side in sides.values():
            side.close()
    return found


def check_first_losses(found: dict[str, dict[str, Any]], task: Task) -> None:
    first = {name: side["first_loss"] for name, side in found.items()}
    difference = max(first.values()) - min(first.values())
    assert difference <= SAME_LOSS[compute_dtype(task.device)], (
        f"first losses differ by {difference:.1e}: the sides do different work ({first})"
    )


def cost_of_mtp(
    plain: dict[str, Any], mtp: dict[str, Any], shape: Shape, modules: int, peak: float, on_cpu: bool
) -> dict[str, Any]:
    """The step with MTP over the step without, turn by turn, beside the same ratio of FLOPs."""
    flops, more = (flops_mfu(s.config, shape.sequence_length) for s in (shape, shape.with_mtp(modules)))
    pairs: list[tuple[Seconds, Seconds]] = list(zip(plain["steps"], mtp["steps"]))
    ratios = sorted(b.wall / a.wall for a, b in pairs)
    rate = shape.tokens / statistics.median(s.wall for s in mtp["steps"])
    return {
        "modules": modules,
        "time_ratio": statistics.median(ratios),
        "time_ratio_spread": [ratios[0], ratios[-1]],
        "time_ratio_of_cpu_time": statistics.median(b.cpu / a.cpu for a, b in pairs) if on_cpu else None,
        "flops_ratio": more / flops,
        "tokens_per_second": rate,
        "mfu": rate * more / peak,
        "peak_bytes": mtp["memory"],
    }


def as_table(result: dict[str, Any]) -> list[str]:
    """The figures that matter, in rows of contestants."""
    mtp, peaks = result["mtp"], dict(result["peak_bytes"])
    rates, mfu = dict(result["tokens_per_second"]), dict(result["mfu"])
    names = {"ours": f"ours, recompute {result['recompute']}", "theirs": f"transformers, {result['theirs_fastest']}"}
    if mtp:
        names["mtp"] = f"ours with {mtp['modules']} MTP"
        rates["mtp"], mfu["mtp"], peaks["mtp"] = mtp["tokens_per_second"], mtp["mfu"], mtp["peak_bytes"]
    low, high = result["speed_ratio_spread"]
    by_cpu = result["speed_ratio_of_cpu_time"]
    lines = [
        f"{result['shape']}, {result['device']}, {result['compute_dtype']}, {result['tokens_per_step']} tokens a step; "
        f"ours is × {result['speed_ratio']:.2f} ({low:.2f} … {high:.2f}"
        + (f"; of CPU time {by_cpu:.2f})" if by_cpu else ")"),
        "| | tokens/s | of the peak | live bytes at the peak | without state | allocator |",
        "|---|---|---|---|---|---|",
    ]
    for name, shown in names.items():
        peak, columns = peaks[name], [shown, f"{rates[name]:,.0f}", f"{mfu[name]:.1%}"]
        for key in ("everything", "without_state", "allocator"):
            columns.append(f"{peak[key] / 1e6:,.0f} MB" if key in peak else "–")
        lines.append("| " + " | ".join(columns) + " |")
    ratios = f"{result['memory_ratio']:.2f} | {result['memory_ratio_without_state']:.2f}"
    lines.append(f"| ours / transformers | {result['speed_ratio']:.2f} | | {ratios} | |")
    if mtp:
        lines.append(f"| MTP: time × {mtp['time_ratio']:.3f}, FLOPs × {mtp['flops_ratio']:.3f} | | | | | |")
    return lines


if __name__ == "__main__":
    main()

"""Published training throughputs of DeepSeek-V3 beside what the planner predicts for the same layout, term by term.

    python benchmarks/published_plans.py [--only NAME …] [--json FILE]

Nothing runs on a GPU, and nothing is fitted: the rates of `train.planning.speed.rates` come from other sources. A row says what
of the published set-up could not be planned. Beneath each stand the terms, and what would change with one thing that others do
otherwise:

    rows once a node    a token's row is sent to a node once and passed on there, to at most 4 nodes: half of the 8 rows that ours
                        sends (DeepSeek-V3 §3.2.2, DeepEP). On nodes of 8, a network that is twice as fast
    messages hidden     no step waits for tokens on their way to experts
    memory halved       operations that are bound by memory move half of the bytes: kernels that do several of them at once
    imbalance 1.2       the fullest expert rank gets 1.2 times the mean, where all else is for even loads

FLOPs a token tell with which model a figure was made: 260.6 GFLOP with one MTP module, 250.4 without, attention causal; published
TFLOP/s over tokens/s give the same two numbers.
"""

import argparse
import json
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import asked

from data.files import replace_file
from train.config import load_recipe
from train.planning.devices import Device, find_device
from train.planning.plan import Plan
from train.planning.speed.step_time import StepTime, step_time
from train.planning.step import PlannedStep
from train.schedule import Schedule

LENGTH = 4096


class Row(NamedTuple):
    """A published figure."""

    source: str
    device: str
    processes: int
    sequences: int  # of a batch
    published: float  # tokens/s of a device
    parallel: str
    fp8: bool = True
    mtp: bool = True
    differs: str = ""  # from what is planned

    def plan(self) -> Plan:
        recipe = load_recipe(
            "v3",
            [
                "run.device=cuda",
                f"schedule.batch_tokens={self.sequences * LENGTH}",
                f"parallel={{engine: fsdp, recompute: selective, unproven: true, {self.parallel}}}",
                f"precision.fp8={json.dumps(self.fp8)}",
                f"precision.fp8_dispatch={json.dumps(self.fp8)}",
                f"model.num_nextn_predict_layers={int(self.mtp)}",
            ],
        )
        return Plan.of(recipe, Schedule(recipe.schedule, recipe.data.lengths), self.processes, find_device(self.device))


BRIDGE = "NVIDIA Megatron Bridge, docs/performance-summary"
INTERLEAVED = "ours hides no tokens behind the other direction under interleaved, theirs does; expert loads forced even"
ROWS = {
    "DeepSeek-V3": Row(
        "arXiv 2412.19437 Table 1: 180,000 GPU-hours per trillion tokens, §3.2: PP16, EP64 on 8 nodes, ZeRO-1",
        "h800",
        2048,
        15360,
        1e12 / (180e3 * 3600),
        "pipeline: 16, schedule: dualpipev, expert: 64",
        differs="fsdp without resharding is ZeRO-1 that gathers in bf16; evaluation and restarts are in the figure",
    ),
    "H100": Row(
        f"{BRIDGE}-archive, 25.09: 1,297 tokens/s, 338 TFLOP/s; TP2 PP8 VP4 EP64, 8,192 sequences",
        "h100",
        1024,
        8192,
        1297,
        "pipeline: 8, schedule: interleaved, stages_per_rank: 4, expert: 64",
        differs=f"TP2 is left out, so micro-batches are 64 for 128; theirs also recomputes dense networks; {INTERLEAVED}",
    ),
    "GB200": Row(
        f"{BRIDGE}-archive, 26.02: 3,955 tokens/s, 1,028 TFLOP/s; MXFP8, PP4 VP4 EP64",
        "gb200",
        256,
        4096,
        3955,
        "pipeline: 4, schedule: interleaved, stages_per_rank: 4, expert: 64",
        differs=f"MXFP8 is planned as FP8; CUDA graphs; {INTERLEAVED}",
    ),
    "GB200, bf16": Row(
        f"{BRIDGE}, 25.11: 3,139 tokens/s, 782 TFLOP/s; PP4 VP4 EP64, without MTP",
        "gb200",
        256,
        4096,
        3139,
        "pipeline: 4, schedule: interleaved, stages_per_rank: 4, expert: 64",
        fp8=False,
        mtp=False,
        differs=INTERLEAVED,
    ),
    "GB300": Row(
        f"{BRIDGE}-archive, 26.02: 4,612 tokens/s, 1,199 TFLOP/s; MXFP8, PP2 VP8 EP32, micro-batches of 2",
        "gb300",
        256,
        4096,
        4612,
        "pipeline: 2, schedule: interleaved, stages_per_rank: 8, expert: 32, micro_batch: 2",
        differs=f"MXFP8 is planned as FP8; CUDA graphs; {INTERLEAVED}",
    ),
    "B200": Row(
        f"{BRIDGE}-archive, 26.02: 2,689 tokens/s, 699 TFLOP/s; MXFP8, PP16 EP8",
        "b200",
        256,
        4096,
        2689,
        "pipeline: 16, expert: 8",
        differs="MXFP8 is planned as FP8; expert loads forced even",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help=f"of {', '.join(ROWS)}"
    )
    parser.add_argument("--json", type=asked.new_file, help="write the result here")
    arguments = parser.parse_args()
    found = {name: compare(ROWS[name]) for name in arguments.only}
    for name, result in found.items():
        print("\n".join([f"## {name}", "", *as_lines(result), ""]))
    print("\n".join(as_table(found)))
    if arguments.json:
        with replace_file(arguments.json) as temporary:
            temporary.write_text(json.dumps(found, indent=2) + "\n")


def compare(row: Row) -> dict[str, Any]:
    """The figure, the prediction, its terms, and what would change."""
    plan = row.plan()
    device, tokens = plan.device, plan.step.span.batch_tokens
    assert device and plan.time
    seconds = plan.time.seconds
    hours = per_trillion(1.0, plan.step)
    return {
        "source": row.source,
        "differs": row.differs,
        "published_tokens_per_second": row.published,
        "tokens_per_second": tokens / seconds / row.processes,
        "published_hours": 1e12 / row.published / 3600,
        "hours": hours * seconds,
        "mfu": plan.time.mfu,
        "mfu_of_bf16": plan.time.mfu * plan.time.peak / device.bf16,
        "peak_bytes": plan.fullest.peak,
        "usable_bytes": device.usable,
        "sent": plan.time.sent,
        "terms": [asdict(term) | {"hours": hours * term.seconds} for term in plan.time.terms],
        "what_if": {name: hours * (other - seconds) for name, other in what_if(plan.step, device, plan.time).items()},
    }


def what_if(step: PlannedStep, device: Device, time: StepTime) -> dict[str, float]:
    """Seconds of the step, were one thing otherwise."""
    seconds = {term.name: term.seconds for term in time.terms}
    others = {
        "messages hidden": time.seconds - seconds.get("tokens to experts", 0.0),
        "memory halved": step_time(step, replace(device, memory_bandwidth=2 * device.memory_bandwidth)).seconds,
        "imbalance 1.2": step_time(replace(step, imbalance=1.2), device).seconds,
    }
    if device.node == 8 and step.layout.config.expert > 8:
        others = {"rows once a node": step_time(step, replace(device, network=2 * device.network)).seconds} | others
    return others


def per_trillion(seconds: float, step: PlannedStep) -> float:
    """Device-hours for 10¹² tokens, of so many seconds a step."""
    return seconds * step.layout.world_size / 3600 * 1e12 / step.span.batch_tokens


def as_lines(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['source']}", f"Otherwise: {result['differs']}", ""]
    lines += ["| term | hours per 10¹² tokens | formula |", "|---|---|---|"]
    lines += [f"| {term['name']} | {term['hours']:,.0f} | {term['formula']} |" for term in result["terms"]]
    lines += [f"| **all** | **{result['hours']:,.0f}** | published {result['published_hours']:,.0f} |", ""]
    return lines + [f"- {name}: {hours:+,.0f}" for name, hours in result["what_if"].items()]


def as_table(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| row | published tokens/s | predicted | predicted / published | MFU of the bf16 peak | peak GB | usable GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, r in found.items():
        ratio = r["tokens_per_second"] / r["published_tokens_per_second"]
        lines.append(
            f"| {name} | {r['published_tokens_per_second']:,.0f} | {r['tokens_per_second']:,.0f} | {ratio:.2f} | "
            f"{r['mfu_of_bf16']:.1%} | {r['peak_bytes'] / 1e9:.1f} | {r['usable_bytes'] / 1e9:.1f} |"
        )
    return lines


if __name__ == "__main__":
    main()

"""Predicted and measured seconds of a step on this machine's CPU.

    python benchmarks/planned_time.py [--only NAME …] [--rounds 3] [--steps 4] [--json FILE]

Each process has one thread and a core of its own. In every round it measures what operations reach
(`train.planning.speed.measured`, as a plan for `--device cpu` does), predicts the step from it, and takes real steps of the
engine; so a neighbour's noise hits both. A round's step is its fastest one, in wall time and in time of the CPU; the table has
the medians of the rounds. Where neighbours take part of the cores, the prediction, of operations timed by the CPU's clock, is to
be held against that clock.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import asked
import torch
import torch.distributed as dist
from planned_memory import draw, engine_of

from data.files import replace_file
from parallel.engine import StepSettings
from train.config import load_recipe
from train.launch import keep_freed_memory
from train.planning.devices import find_device
from train.planning.plan import Plan
from train.planning.speed.measured import forget
from train.planning.speed.step_time import step_time
from train.planning.step import PlannedStep
from train.schedule import Schedule

SHAPES = Path(__file__).parent / "shapes"


class Case(NamedTuple):
    """A shape of `benchmarks/shapes` on a number of processes."""

    shape: str
    processes: int = 1
    parallel: str = "engine: ddp"

    def step(self) -> PlannedStep:
        """Every process computes the shape's batch."""
        shape = json.loads((SHAPES / f"{self.shape}.json").read_text())
        model, length, batch = shape["model"], shape["sequence_length"], shape["batch"]
        fields = {"preset": model} if isinstance(model, str) else {"preset": "tiny", **model}
        fields |= {"num_nextn_predict_layers": 0, "max_position_embeddings": length}
        recipe = load_recipe(
            "tiny",
            [
                "run.device=cpu",
                f"model={json.dumps(fields)}",
                f"data.sequence_length={length}",
                f"parallel={{unproven: true, micro_batch: {batch}, {self.parallel}}}",
                f"schedule={{tokens: 1e7, lr: 1e-3, batch_tokens: {length * batch * self.processes}}}",
            ],
        )
        return Plan.of(recipe, Schedule(recipe.schedule, recipe.data.lengths), self.processes).step


CASES = {
    "reference": Case("reference"),
    "wide": Case("wide"),
    "narrow": Case("narrow"),
    "tiny": Case("tiny"),
    "tiny, ddp x2": Case("tiny", 2),
    "tiny, fsdp x2": Case("tiny", 2, "engine: fsdp"),
    "tiny, fsdp, expert x2": Case("tiny", 2, "engine: fsdp, expert: 2"),
}


class Round(NamedTuple):
    """Of one process."""

    predicted: float
    wall: float
    cpu: float
    terms: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=f"of {', '.join(CASES)}"
    )
    parser.add_argument("--rounds", type=asked.count, default=3)
    parser.add_argument("--steps", type=asked.count, default=4, help="of a round")
    parser.add_argument("--json", type=asked.new_file, help="write the result here")
    arguments = parser.parse_args()
    found = {name: compare(CASES[name], arguments.rounds, arguments.steps) for name in arguments.only}
    print("\n".join(as_table(found)))
    if arguments.json:
        with replace_file(arguments.json) as temporary:
            temporary.write_text(json.dumps(found, indent=2) + "\n")


def compare(case: Case, rounds: int, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(case.processes) as pool:
        tasks = [(rank, case, folder, rounds, steps) for rank in range(case.processes)]
        ranks = pool.starmap(measure, tasks, chunksize=1)
    slowest = max(ranks, key=lambda of_rank: statistics.median(r.wall for r in of_rank))

    def median(name: str) -> float:
        return statistics.median(getattr(r, name) for r in slowest)

    return {
        "predicted": median("predicted"),
        "wall": median("wall"),
        "cpu": median("cpu"),
        "rounds": [r._asdict() for r in slowest],
    }


def measure(rank: int, case: Case, folder: str, rounds: int, steps: int) -> list[Round]:
    """As one process."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1 - rank % len(cores)]})
    keep_freed_memory()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=case.processes)
    step = case.step()
    engine = engine_of(step)
    batches = draw(step, step.layout.data_rank(rank))
    settings = StepSettings(lr=1e-4, gamma=1e-3, alpha=1e-4, lambda_=0.3, batch=step.span.sequences)
    engine.step(batches, settings)
    found = []
    for _ in range(rounds):
        forget()
        dist.barrier()
        predicted = step_time(step, find_device("cpu"))  # all measure at once: what each reaches beside the others
        dist.barrier()
        times = []
        for _ in range(max(1, steps)):
            wall, cpu = time.perf_counter(), time.process_time()
            engine.step(batches, settings)
            times.append((time.perf_counter() - wall, time.process_time() - cpu))
        walls, cpus = zip(*times)
        found.append(Round(predicted.seconds, min(walls), min(cpus), {t.name: t.seconds for t in predicted.terms}))
    dist.barrier()
    dist.destroy_process_group()
    return found


def as_table(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| shape | predicted s | wall s | CPU s | predicted / wall | predicted / CPU |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in found.items():
        ratios = f"{r['predicted'] / r['wall']:.2f} | {r['predicted'] / r['cpu']:.2f}"
        lines.append(f"| {name} | {r['predicted']:.3f} | {r['wall']:.3f} | {r['cpu']:.3f} | {ratios} |")
    return lines


if __name__ == "__main__":
    main()

"""The bytes of a process by formula, by simulation and as measured, layout by layout.

    python benchmarks/planned_memory.py --json planned_memory.json
    python benchmarks/planned_memory.py --only "fsdp x2" "v3 on 2,048"

| column     | the fullest process of a step when it holds most                                                             |
|------------|--------------------------------------------------------------------------------------------------------------|
| formula    | `train.planning.memory.memory_of`, as `rorqual plan` says it                                                 |
| simulation | `train.planning.simulation.simulate`: the engine's own step on tensors without memory; not DeepSpeed's       |
| measured   | gloo processes that take real steps: storages that operations touch (`train.planning.simulation.live_bytes`) |

The model that is measured is that of recipes/planned_memory.yaml. Its experts get uneven shares of random tokens: what came to
those of the fullest process, over what left it, in the micro-batch that brought most, goes into formula and simulation. Layouts
that no machine here can hold are planned for GPUs and simulated only, with 1.2 times the mean at the fullest experts.
"""

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import asked
import torch
import torch.distributed as dist

from data.files import replace_file
from model.init import initialize
from model.transformer import Transformer
from parallel.build import build_engine
from parallel.engine import StepSettings
from parallel.expert import AllToAllDispatcher
from parallel.recompute import apply_recompute
from train.config import load_recipe
from train.optimizer import build_optimizer
from train.planning.memory import memory_of
from train.planning.plan import Plan
from train.planning.simulation.live_bytes import LiveBytes, StepBytes
from train.planning.simulation.simulate import simulate
from train.planning.step import PlannedStep
from train.schedule import Schedule

RECIPE = str(Path(__file__).parent / "recipes/planned_memory.yaml")
DEVICE = torch.device("cpu")
IMBALANCE = 1.2  # of layouts that are not measured


class Case(NamedTuple):
    """A recipe on a number of processes."""

    processes: int
    overrides: tuple[str, ...]
    recipe: str = RECIPE

    def step(self, imbalance: float) -> PlannedStep:
        recipe = load_recipe(self.recipe, self.overrides)
        return Plan.of(recipe, Schedule(recipe.schedule, recipe.data.lengths), self.processes, imbalance=imbalance).step


def on(processes: int, parallel: str, *others: str, sequences: int = 4) -> Case:
    """Every rank that reads data of its own reads so many sequences a step."""
    case = Case(processes, (f"parallel={{{parallel}, unproven: true}}", *others))
    ranks = load_recipe(case.recipe, case.overrides).layout(processes).data_ranks
    return case._replace(overrides=(*case.overrides, f"schedule.batch_tokens={512 * sequences * ranks}"))


def on_gpus(recipe: str, processes: int, parallel: str, *others: str) -> Case:
    return Case(
        processes, (f"parallel={{{parallel}, micro_batch: 1, unproven: true}}", "run.device=cuda", *others), recipe
    )


MEASURED = {
    "ddp x1": on(1, "engine: ddp, micro_batch: 2"),
    "ddp x1, one micro-batch": on(1, "engine: ddp, micro_batch: 2", sequences=2),
    "ddp x1, selective": on(1, "engine: ddp, micro_batch: 4, recompute: selective"),
    "ddp x1, full": on(1, "engine: ddp, micro_batch: 4, recompute: full"),
    "ddp x1, bf16": on(1, "engine: ddp, micro_batch: 2", "precision.compute=bf16"),
    "ddp x2": on(2, "engine: ddp, micro_batch: 2"),
    "ddp, context x2": on(2, "engine: ddp, context: 2, micro_batch: 2"),
    "ddp, zbv x2": on(2, "engine: ddp, pipeline: 2, schedule: zbv, micro_batch: 1"),
    "fsdp x2": on(2, "engine: fsdp, micro_batch: 2"),
    "fsdp x2, selective": on(2, "engine: fsdp, micro_batch: 2, recompute: selective"),
    "fsdp x2, full": on(2, "engine: fsdp, micro_batch: 2, recompute: full"),
    "fsdp x2, bf16": on(2, "engine: fsdp, micro_batch: 2", "precision.compute=bf16", "precision.moments=bf16"),
    "fsdp x2, kept gathered": on(2, "engine: fsdp, micro_batch: 2, reshard_after_forward: false"),
    "fsdp x3, uneven": on(3, "engine: fsdp, micro_batch: 2"),
    "fsdp, replicate x4": on(4, "engine: fsdp, replicate: 2, micro_batch: 2"),
    "fsdp, expert x2": on(2, "engine: fsdp, expert: 2, micro_batch: 2"),
    "fsdp, expert x4": on(4, "engine: fsdp, expert: 2, micro_batch: 2"),
    "fsdp, 1f1b x4": on(4, "engine: fsdp, pipeline: 2, micro_batch: 1"),
    "fsdp, expert, dualpipev x4": on(4, "engine: fsdp, expert: 2, pipeline: 2, schedule: dualpipev, micro_batch: 1"),
    "zero1 x2": on(2, "engine: zero1, micro_batch: 2"),
    "zero2 x2": on(2, "engine: zero2, micro_batch: 2"),
    "zero3 x2": on(2, "engine: zero3, micro_batch: 2"),
}


V3_PIPELINE = "engine: fsdp, pipeline: 16, expert: 64, schedule: dualpipev"
SIMULATED = {
    "v2-lite on 64": on_gpus("v2-lite", 64, "engine: fsdp"),
    "v2-lite on 64, full": on_gpus("v2-lite", 64, "engine: fsdp, recompute: full"),
    "v2-lite on 64, expert": on_gpus("v2-lite", 64, "engine: fsdp, expert: 8"),
    "v2-lite on 64, replicate": on_gpus("v2-lite", 64, "engine: fsdp, replicate: 8, recompute: none"),
    "v2-lite on 32, 1f1b": on_gpus("v2-lite", 32, "engine: fsdp, pipeline: 4"),
    "v2-lite on 16, ddp, zbv": on_gpus("v2-lite", 16, "engine: ddp, pipeline: 8, schedule: zbv"),
    "v3 on 1,024, bf16": on_gpus("v3", 1024, "engine: fsdp, expert: 64", "precision.fp8=false"),
    "v3 on 1,024": on_gpus("v3", 1024, "engine: fsdp, expert: 64", "precision.fp8_dispatch=true"),
    "v3 on 2,048": on_gpus("v3", 2048, V3_PIPELINE, "schedule.batch_tokens=62914560", "precision.fp8_dispatch=true"),
}


class Measured(NamedTuple):
    """One process."""

    peak: int
    at_peak: dict[str, int] | None  # by kind; None: DeepSpeed's, whose storages nobody tells apart
    imbalance: float  # rows that came to its experts over those that left it


class Batch(NamedTuple):
    tokens: torch.Tensor  # [B, T + 1 + D_mtp] int64
    documents: torch.Tensor  # the same, int32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*MEASURED, *SIMULATED], default=[*MEASURED, *SIMULATED],
                        metavar="LAYOUT", help="some of the layouts, by name")  # fmt: skip
    parser.add_argument("--json", type=asked.new_file, help="write the result here")
    arguments = parser.parse_args()
    print(HEADER)
    found = {}
    for name in arguments.only:
        found[name] = compared(MEASURED[name]) if name in MEASURED else simulated(SIMULATED[name])
        print(as_row(name, found[name]), flush=True)
    if arguments.json:
        with replace_file(arguments.json) as temporary:
            temporary.write_text(json.dumps({"torch": torch.__version__, "layouts": found}, indent=2) + "\n")


def compared(case: Case) -> dict[str, Any]:
    ranks = measure(case)
    fullest = max(range(case.processes), key=lambda rank: ranks[rank].peak)
    step = case.step(ranks[fullest].imbalance)
    found = counted(step, fullest // step.layout.stage_ranks)
    return found | {"measured": ranks[fullest]._asdict(), "measured_on_each": [rank.peak for rank in ranks]}


def simulated(case: Case) -> dict[str, Any]:
    step = case.step(IMBALANCE if "expert" in case.overrides[0] else 1.0)
    ranks = range(step.layout.config.pipeline)
    return counted(step, max(ranks, key=lambda rank: memory_of(step, rank).peak))


def counted(step: PlannedStep, pipeline_rank: int) -> dict[str, Any]:
    """Formula and, where there is one, simulation."""
    found: dict[str, Any] = {"formula": asdict(memory_of(step, pipeline_rank)), "imbalance": step.imbalance}
    return (
        found
        if step.layout.config.engine.startswith("zero")
        else found | {"simulation": asdict(simulate(step, pipeline_rank))}
    )


HEADER = (
    "| layout | formula, MB | simulation | measured | formula / simulation | formula / measured | at |\n"
    "|---|---|---|---|---|---|---|"
)


def as_row(name: str, found: dict[str, Any]) -> str:
    peaks = [found[kind]["peak"] if kind in found else None for kind in ("formula", "simulation", "measured")]
    ratios = [peaks[0] / peak if peak else None for peak in peaks[1:]]
    columns = ["–" if peak is None else f"{peak / 1e6:,.1f}" for peak in peaks]
    columns += ["–" if ratio is None else f"{ratio:.3f}" for ratio in ratios]
    return f"| {name} | {' | '.join(columns)} | {found['formula']['when']} |"


def measure(case: Case) -> list[Measured]:
    """What each process holds when it holds most."""
    processes = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder, processes.Pool(case.processes) as pool:
        return pool.starmap(measure_one, [(rank, case, folder) for rank in range(case.processes)], chunksize=1)


def measure_one(rank: int, case: Case, folder: str) -> Measured:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=case.processes)
    step = case.step(1.0)
    engine: Any = engine_of(step)
    settings = StepSettings(lr=1e-3, gamma=1e-3, alpha=1e-4, lambda_=0.3, batch=step.span.sequences)
    batches = draw(step, step.layout.data_rank(rank))
    of_deepspeed = step.layout.config.engine.startswith("zero")
    live, rows = LiveBytes() if of_deepspeed else StepBytes(engine), Rows()
    engine.step(batches, settings)  # what lasts from step to step is there
    with live.watching() if isinstance(live, StepBytes) else live:
        engine.step(batches, settings)
        live.start()
        with rows.counted():
            engine.step(batches, settings)
    at_peak = live.at_peak() if isinstance(live, StepBytes) else None
    dist.barrier()
    dist.destroy_process_group()
    alone = (
        1 if step.layout.config.pipeline > 1 else step.micro_batches
    )  # micro-batches that are not there at the same time
    return Measured(live.peak(set()).everything, at_peak, rows.imbalance(alone))


class Rows:
    """Rows of tokens that left a process for experts, and those that came to its own, layer by layer."""

    def __init__(self) -> None:
        self.left: list[int] = []
        self.came: list[int] = []

    @contextmanager
    def counted(self) -> Iterator[None]:
        dispatch = AllToAllDispatcher.dispatch

        def count(dispatcher: Any, *tokens: Any) -> Any:
            handle = dispatch(dispatcher, *tokens)
            self.left.append(sum(handle.trip.send))
            self.came.append(sum(handle.trip.receive))
            return handle

        with patch.object(AllToAllDispatcher, "dispatch", count):
            yield

    def imbalance(self, parts: int) -> float:
        """Of so many equal parts of a step that in which most came: that, over what left."""
        size = len(self.left) // parts
        starts = range(0, size * parts, size) if size else ()
        return max((sum(self.came[at : at + size]) / sum(self.left[at : at + size]) for at in starts), default=1.0)


def engine_of(step: PlannedStep) -> Any:
    """As `train.trainer` builds it."""
    recipe = step.recipe
    with torch.device("meta"):
        model = Transformer(step.config, compute_dtype=step.compute, mask_documents=recipe.data.mask_documents)
    apply_recompute(model, recipe.recompute)
    optimizer = partial(build_optimizer, settings=recipe.optimizer, moments=recipe.precision.moments)
    return build_engine(
        step.layout,
        model,
        DEVICE,
        lambda model, write: initialize(model, 0, DEVICE, write),
        optimizer,
        recipe.optimizer.clip,
    )


def draw(step: PlannedStep, data_rank: int) -> list[Batch]:
    """The micro-batches of a process: random tokens, a document to a sequence."""
    generator = torch.Generator().manual_seed(data_rank)
    size = (step.micro_batch, step.span.sequence_length + 1 + step.config.num_nextn_predict_layers)
    drawn = [torch.randint(step.config.vocab_size, size, generator=generator) for _ in range(step.micro_batches)]
    return [Batch(tokens, torch.zeros_like(tokens, dtype=torch.int32)) for tokens in drawn]


if __name__ == "__main__":
    main()

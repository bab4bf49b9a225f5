"""A step of one process of a run, with the real model and the real engine, without their memory and without the other processes.

Nothing is estimated here: tensors are fake (shapes and storages, no memory), the process group answers at once, and the bytes
that are alive are counted (`train.planning.simulation.live_bytes`). So a layout of thousands of processes is tried on one CPU in
a minute. It is an account beside that of `train.planning.memory`, which knows formulas and no code.

What is as in the run: modules, engine, layout, schedule, recomputation, dtypes, optimizer, the order of everything, hence what is
alive when. What is not:

- Values: tokens are zeros, and every layer's fullest expert rank is the one looked at (`train.planning.simulation.load`).
- Messages arrive at once. A run holds a sent one until its receiver has it, and gathers ahead while it computes.
- Of a step's micro-batches only so many go through as can be alive at the same time (`enough`).
- On a GPU: attention by a kernel that pads nothing and masks nothing; results of kernels stand for them, with the rows that
  grouped products read by an index; no `run.compile`; neither the allocator's slack nor what CUDA and NCCL take.
- On a CPU what C++ kernels take while they run.
"""

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from data.samples import Batch
from model.ops.attention.choose import Workload
from model.ops.attention.choose import choose as choose_attention
from model.ops.fp8.choose import kernels_for
from model.transformer import Transformer
from parallel.build import build_engine
from parallel.engine import StepSettings
from parallel.layout import Layout, LayoutError
from parallel.moments import start_state
from parallel.recompute import apply_recompute
from train.config import RecipeError
from train.optimizer import build_optimizer
from train.planning.simulation.live_bytes import StepBytes
from train.planning.simulation.load import Load
from train.planning.simulation.stand_ins import Buckets, FakeTensors, Fp8OfAGpu, Scratch, attention_of_a_gpu, stand_ins
from train.planning.step import PlannedStep

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Simulation:
    """What was counted in a step of one process."""

    peak: int  # bytes on its device, most at once
    at_peak: dict[str, int]  # by the kinds of `train.planning.simulation.live_bytes`; they add up to it
    seconds: float  # that it took to find out
    micro_batches: int  # that went through


class Asked(NamedTuple):
    """What shall be simulated: the first process of a pipeline rank.

    Attributes:
        micro_batches: None: `enough`.
    """

    step: PlannedStep
    pipeline_rank: int = 0
    micro_batches: int | None = None


def simulate(step: PlannedStep, pipeline_rank: int = 0) -> Simulation:
    """Simulate the first process of a pipeline rank, in a process of its own.

    Raises:
        LayoutError: such a layout cannot be simulated; the message names the nearest that can.
    """
    return simulate_all([Asked(step, pipeline_rank)])[0]


def simulate_all(asked: Sequence[Asked]) -> list[Simulation]:
    """`simulate` several, one after the other in one process, to which nothing of them is left."""
    for one in asked:
        check(one.step)
    context = multiprocessing.get_context("forkserver")
    answers, there = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(there, list(asked)), daemon=True)
    process.start()
    there.close()
    found: list[Simulation] = []
    try:
        for _ in asked:
            answer = answers.recv()
            if isinstance(answer, Exception):
                raise answer
            found.append(answer)
    except EOFError:
        process.join()
        raise RuntimeError(f"the simulating process ended with exit code {process.exitcode}") from None
    finally:
        answers.close()
        process.kill()
        process.join()
    return found


def check(step: PlannedStep) -> None:
    """Refuse what cannot be simulated."""
    c = step.layout.config
    if c.engine.startswith("zero"):
        raise LayoutError(
            f"parallel.engine = {c.engine}: DeepSpeed's memory cannot be simulated, that of ddp and fsdp can; "
            "use parallel.engine=fsdp, or plan without a simulation"
        )
    if c.offload != "none":
        raise LayoutError(
            f"parallel.offload = {c.offload}: a simulation cannot tell the host's memory from the device's; "
            "use parallel.offload=none, or plan without a simulation"
        )


def _serve(answers: Connection, asked: list[Asked]) -> None:
    torch.set_num_threads(1)
    for one in asked:
        try:
            answers.send(simulate_here(*one))
        except (LayoutError, RecipeError) as mistake:
            answers.send(mistake)
        except Exception:
            answers.send(RuntimeError(f"the simulation failed:\n{traceback.format_exc()}"))


def simulate_here(step: PlannedStep, pipeline_rank: int = 0, micro_batches: int | None = None) -> Simulation:
    """The same in this process, which must not have a process group, and in which fake tensors may be left in caches."""
    began = time.perf_counter()
    layout, gpu = step.layout, step.recipe.on_gpu
    micro_batches = micro_batches or enough(layout, step.micro_batches)
    rank = pipeline_rank * layout.stage_ranks
    with _alone_among(layout.world_size, rank), stand_ins(Load(step.skew), gpu):
        with torch.device("meta"):
            model = model_of(step)
        apply_recompute(model, layout.config.recompute)
        with FakeTensors():
            engine = _engine(step, model)
            launch = _launcher(step, engine)
            live = StepBytes(engine)
            with live.watching(), Scratch() if gpu else nullcontext():
                if getattr(engine, "replicas", None):  # DDP's buckets, which last, are not seen before they are filled
                    launch(1)
                    live.start()
                launch(micro_batches)
    at_peak = live.at_peak()
    return Simulation(sum(at_peak.values()), at_peak, time.perf_counter() - began, micro_batches)


def enough(layout: Layout, micro_batches: int) -> int:
    """How many micro-batches show all that more would: two, which are summed; in a pipeline twice as many as it has ranks, when all
    of its stages are full, or what its schedule asks for."""
    c = layout.config
    if c.pipeline == 1:
        return min(micro_batches, 2)
    return min(micro_batches, max(2 * c.pipeline, c.stages))


@contextmanager
def _alone_among(world_size: int, rank: int) -> Iterator[None]:
    """One rank of many, which answer at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def model_of(step: PlannedStep) -> Transformer:
    """As `train.trainer` makes it, but for kernels that are chosen by trial on a GPU."""
    recipe, config, layout = step.recipe, step.config.at_length(step.span.sequence_length), step.layout.config
    gpu, masked = recipe.on_gpu, recipe.data.mask_documents
    fp8 = (Fp8OfAGpu() if gpu else kernels_for(CPU)) if recipe.precision.fp8 else None
    if gpu:
        attention: Any = attention_of_a_gpu()
    else:
        pieces = 2 * layout.context if layout.context > 1 else 1
        work = Workload(config, step.micro_batch, step.span.sequence_length, masked, step.compute, False, pieces)
        attention, _ = choose_attention(recipe.run.attention, work, CPU, lambda run: run())
    return Transformer(config, compute_dtype=step.compute, attention=attention, mask_documents=masked, fp8=fp8)


def _engine(step: PlannedStep, model: Transformer) -> Any:
    recipe = step.recipe
    optimizer = partial(build_optimizer, settings=recipe.optimizer, moments=recipe.precision.moments)
    engine: Any = build_engine(step.layout, model, CPU, lambda *_: None, optimizer, recipe.optimizer.clip)
    for group in engine.optimizer.param_groups:  # which else are made in the first step
        for parameter in group["params"]:
            start_state(engine.optimizer, group, parameter)
    if step.layout.config.engine == "ddp" and engine.replicas:
        engine.buckets_are_final, engine.replicas.reducer = True, Buckets(engine.replicas.reducer)
    if engine.pipeline:
        engine.pipeline.outbox.waiter = None
    return engine


def _launcher(step: PlannedStep, engine: Any) -> Callable[[int], Any]:
    """What takes a step of so many micro-batches."""
    config, span = step.config.at_length(step.span.sequence_length), step.span
    engine.model.set_positions(config)
    size = step.micro_batch, span.sequence_length + 1 + config.num_nextn_predict_layers
    settings = StepSettings(lr=1e-4, gamma=1e-3, alpha=1e-4, lambda_=0.3, batch=span.sequences)

    def launch(micro_batches: int) -> None:
        batches = [
            Batch(torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int32))
            for _ in range(micro_batches)
        ]
        engine.launch(batches, settings)

    return launch

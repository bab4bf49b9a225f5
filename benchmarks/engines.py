"""Every engine takes the same steps of the same model, side by side in one run: tokens/s beside those of `ddp`.

    python benchmarks/engines.py --processes 2 --json engines.json

An engine has processes of its own (gloo, one thread each), which are idle while another steps. The engines step in turn, round
after round, so that a neighbour disturbs all of them, and ratios are taken within a round. Beside ours stand `transformers`'
DeepseekV3 under plain PyTorch DDP and under FSDP2, as one would write them. On a machine with fewer cores than processes the
figures say what an engine adds to the work, not how it scales; what it sends is counted (`parallel.traffic`), not timed.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import asked
import torch
import torch.distributed as dist
from contestants import CLIP, LR, OPTIMIZER, Shape, Theirs, without_weights
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from data.files import replace_file
from model.init import initialize
from parallel.build import build_engine
from parallel.engine import StepSettings
from parallel.layout import Layout, ParallelConfig
from parallel.traffic import step_traffic
from train.optimizer import build_optimizer

DEVICE = torch.device("cpu")
LATE = timedelta(minutes=10)  # after which a silent process is given up
IMPLEMENTATION = ("grouped_mm", "sdpa")  # of transformers: experts, attention; the fastest in `train_step.py`
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["contestants", "parallel.fsdp", "deepspeed", "transformers.models.deepseek_v3"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--shape", type=asked.shape, default=str(Path(__file__).parent / "shapes/engines.json"),
                        help="a file of benchmarks/shapes; its batch is that of one process")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each engine")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each engine before the timed ones")
    parser.add_argument("--only", nargs="*", help="names of engines; ddp is always there")
    parser.add_argument("--json", type=asked.new_file, help="write the result here")
    arguments = parser.parse_args()
    names = [*layouts(arguments.processes), *THEIRS]
    if arguments.only is not None:
        names = [name for name in names if name == "ddp" or name in arguments.only]
    result = compare(arguments.shape, arguments.processes, names, arguments.rounds, arguments.warmup)
    if arguments.json:
        with replace_file(arguments.json) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")
    print(as_table(result))


def layouts(processes: int) -> dict[str, ParallelConfig]:
    """Ours, by the name in the report."""
    found = {
        "ddp": ParallelConfig(),
        "fsdp": ParallelConfig("fsdp"),
        "fsdp, kept gathered": ParallelConfig("fsdp", reshard_after_forward=False),
        "fsdp + expert": ParallelConfig("fsdp", expert=processes),
        "zero1": ParallelConfig("zero1"),
        "zero2": ParallelConfig("zero2"),
        "zero3": ParallelConfig("zero3"),
    }
    if processes % 2 == 0 and processes > 2:
        found["fsdp + replicate"] = ParallelConfig("fsdp", replicate=2)
    return found


def compare(shape: Shape, processes: int, names: list[str], rounds: int, warmup: int) -> dict[str, Any]:
    """Let every engine step in turn, and put their figures beside each other."""
    load = os.getloadavg()[0]
    sides = {name: Side(name, shape, processes) for name in names}
    try:
        first = {name: side.step().loss for name, side in sides.items()}
        assert max(first.values()) - min(first.values()) < 1e-4, f"the sides do different work: {first}"
        for _ in range(warmup - 1):
            for side in sides.values():
                side.step()
        steps = [{name: side.step() for name, side in sides.items()} for _ in range(rounds)]
    finally:
        for side in sides.values():
            side.close()
    tokens = processes * shape.tokens
    engines = {}
    for name in names:
        ratios = sorted(step["ddp"].wall / step[name].wall for step in steps)
        engines[name] = {
            "tokens_per_second": tokens / statistics.median(step[name].wall for step in steps),
            "speed_ratio": statistics.median(ratios),
            "speed_ratio_spread": [ratios[0], ratios[-1]],
            "speed_ratio_of_cpu_time": statistics.median(step["ddp"].cpu / step[name].cpu for step in steps),
            "bytes_sent_by_a_rank": bytes_sent(name, shape, processes),
        }
    return {
        "shape": shape.name,
        "processes": processes,
        "tokens_per_step": tokens,
        "rounds": rounds,
        "torch": torch.__version__,
        "load_at_the_start": load,
        "first_loss": first,
        "engines": engines,
    }


def bytes_sent(name: str, shape: Shape, processes: int) -> float | None:
    if name in THEIRS:
        return None
    layout = Layout(layouts(processes)[name], processes, shape.config)
    flows = step_traffic(layout, shape.config, tokens=shape.tokens, micro_batches=1, element_size=4)
    return sum(flow.sent for flow in flows)


def as_table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['shape']}, {result['processes']} processes, {result['tokens_per_step']} tokens a step",
        "| engine | tokens/s | of ddp's (spread) | of CPU time | MB sent by a rank |",
        "|---|---|---|---|---|",
    ]
    for name, found in result["engines"].items():
        low, high = found["speed_ratio_spread"]
        sent = found["bytes_sent_by_a_rank"]
        columns = [
            name,
            f"{found['tokens_per_second']:,.0f}",
            f"{found['speed_ratio']:.2f} ({low:.2f} – {high:.2f})",
            f"{found['speed_ratio_of_cpu_time']:.2f}",
            "–" if sent is None else f"{sent / 1e6:.1f}",
        ]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines)


class Step(NamedTuple):
    """One step of all ranks of a side."""

    loss: float
    wall: float  # seconds of the slowest rank
    cpu: float  # seconds of all ranks together


class Side:
    """The processes of one engine, which step when they are asked and are idle in between."""

    def __init__(self, name: str, shape: Shape, processes: int):
        self.name = name
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(processes):
            ours, theirs = PROCESSES.Pipe()
            store = f"file://{self.folder.name}/store"
            process = PROCESSES.Process(target=serve, args=(theirs, name, shape, rank, processes, store), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def step(self) -> Step:
        for pipe in self.pipes:
            pipe.send("step")
        ranks: list[Step] = []
        for pipe in self.pipes:
            if not pipe.poll(LATE.total_seconds()):
                raise TimeoutError(f"{self.name}: no answer after {LATE}")
            ranks.append(pipe.recv())
        return Step(ranks[0].loss, max(rank.wall for rank in ranks), sum(rank.cpu for rank in ranks))

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(timeout=10)
            process.kill()
        self.folder.cleanup()


def serve(pipe: Connection, name: str, shape: Shape, rank: int, processes: int, store: str) -> None:
    """The life of a rank: step when asked, until the other end is closed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes, timeout=LATE)
    step = THEIRS[name](shape) if name in THEIRS else ours(layouts(processes)[name], shape)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step()
        pipe.send(Step(loss, time.perf_counter() - wall, time.process_time() - cpu))


Stepper = Callable[[], float]


def ours(config: ParallelConfig, shape: Shape) -> Stepper:
    engine = build_engine(
        Layout(config, dist.get_world_size(), shape.config),
        without_weights(shape.config, torch.float32),
        DEVICE,
        lambda model, write: initialize(model, 0, DEVICE, write),
        partial(build_optimizer, settings=OPTIMIZER),
        CLIP,
    )
    batch = shape.draw()
    settings = StepSettings(LR, gamma=0.0, alpha=0.0, lambda_=0.0, batch=shape.batch * dist.get_world_size())
    return lambda: engine.step([batch], settings).losses.main


def theirs_under_ddp(shape: Shape) -> Stepper:
    contestant = Theirs(shape, DEVICE, torch.float32, *IMPLEMENTATION)
    contestant.model = DistributedDataParallel(contestant.model)  # type: ignore[assignment]
    return partial(contestant.step, shape.draw())


def theirs_under_fsdp(shape: Shape) -> Stepper:
    contestant = Theirs(shape, DEVICE, torch.float32, *IMPLEMENTATION)
    for layer in contestant.model.model.layers:
        fully_shard(layer)
    fully_shard(contestant.model)
    contestant.optimizer = build_optimizer(contestant.model.named_parameters(), OPTIMIZER)
    for group in contestant.optimizer.param_groups:
        group["lr"] = LR
    return partial(contestant.step, shape.draw())


THEIRS: dict[str, Callable[[Shape], Stepper]] = {
    "transformers under DDP": theirs_under_ddp,
    "transformers under FSDP2": theirs_under_fsdp,
}


if __name__ == "__main__":
    main()

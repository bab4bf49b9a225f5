"""What recomputation saves and what it costs: live bytes of a training step under each mode of `parallel.recompute`.

    python benchmarks/recompute.py --shape benchmarks/shapes/reference.json --json FILE

With `--processes N` the experts of a layer lie on N ranks (fsdp + expert, gloo), each of which has the shape's whole batch. What
is counted are the storages that operations touch (`train.planning.simulation.live_bytes`), so the figures are the same on any
machine; the time is CPU time, which a neighbour disturbs least, beside that of the mode `none`.
"""

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import asked
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from contestants import CLIP, LR, OPTIMIZER, Shape, without_weights
from torch.distributed.tensor import DTensor

from data.files import replace_file
from model.activations import ForwardPass, activation_bytes
from model.flops import Recompute
from model.init import initialize
from parallel.build import build_engine
from parallel.engine import StepSettings
from parallel.layout import Layout, ParallelConfig
from parallel.recompute import apply_recompute
from train.optimizer import build_optimizer
from train.planning.simulation.live_bytes import LiveBytes

TIMED = 3
DEVICE = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Measured(NamedTuple):
    """One rank's step."""

    activations: int  # bytes that live after the forward pass and did not before it
    peak: int  # largest sum of live bytes without parameters, gradients and optimizer state
    cpu_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=asked.shape, required=True, help="a file of benchmarks/shapes")
    parser.add_argument("--json", type=asked.new_file, help="write the result here")
    parser.add_argument("--processes", type=int, default=1, help="ranks that share the experts")
    parser.add_argument("--compute", choices=DTYPES, default="fp32")
    arguments = parser.parse_args()
    result = compare(arguments.shape, arguments.processes, DTYPES[arguments.compute])
    if arguments.json:
        with replace_file(arguments.json) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")
    print(as_table(result))


def compare(shape: Shape, processes: int, dtype: torch.dtype) -> dict[str, Any]:
    """The modes beside each other. Of several ranks the mean activations: the rows of one are what another did not get."""
    modes: dict[str, dict[str, Any]] = {}
    for mode, ranks in run(shape, processes, dtype).items():
        forward = ForwardPass(
            shape.batch,
            shape.sequence_length,
            dtype.itemsize,
            mode,
            casts_weights=processes == 1,
            spreads_experts=processes > 1,
        )
        modes[mode] = {
            "activations": round(statistics.mean(rank.activations for rank in ranks)),
            "activations_by_formula": sum(activation_bytes(shape.config, forward).values()),
            "peak_without_state": max(rank.peak for rank in ranks) if processes == 1 else None,
            "cpu_seconds": max(rank.cpu_seconds for rank in ranks),
        }
    return {
        "shape": shape.name,
        "processes": processes,
        "compute": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "modes": modes,
    }


def run(shape: Shape, processes: int, dtype: torch.dtype) -> dict[Recompute, list[Measured]]:
    """What each rank measured, by mode."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(rank_main, (shape, processes, dtype, folder), nprocs=processes)
        ranks = [torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(processes)]
    return {mode: [found[mode] for found in ranks] for mode in get_args(Recompute)}


def rank_main(rank: int, shape: Shape, processes: int, dtype: torch.dtype, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    found = {mode: measure(shape, dtype, mode) for mode in get_args(Recompute)}
    torch.save(found, Path(folder, str(rank)))
    dist.destroy_process_group()


def measure(shape: Shape, dtype: torch.dtype, mode: Recompute) -> Measured:
    """Steps of one rank of the current group: some by the clock, then one under `LiveBytes`."""
    ranks = dist.get_world_size()
    parallel = ParallelConfig("fsdp" if ranks > 1 else "ddp", expert=ranks, micro_batch=shape.batch, recompute=mode)
    model = without_weights(shape.config, dtype)
    apply_recompute(model, mode)
    engine: Any = build_engine(
        Layout(parallel, ranks, shape.config),
        model,
        DEVICE,
        lambda model, write: initialize(model, 0, DEVICE, write),
        partial(build_optimizer, settings=OPTIMIZER),
        CLIP,
    )
    batch = shape.draw()
    settings = StepSettings(lr=LR, gamma=0.0, alpha=0.0, lambda_=0.0, batch=shape.batch * ranks)
    engine.step([batch], settings)
    seconds = []
    for _ in range(TIMED):
        begin = time.process_time()
        engine.step([batch], settings)
        seconds.append(time.process_time() - begin)

    live, kept = LiveBytes(), []
    forward, gradients = engine.forward, set[int]()
    state = live.note([*model.parameters(), *(v for s in engine.optimizer.state.values() for v in s.values())])
    live.note([*model.buffers(), *batch])

    def noted(*arguments: Any) -> Any:
        before = live.now
        output = forward(*arguments)
        gathered = sum(p.nbytes for p in model.parameters() if ranks > 1 and not isinstance(p, DTensor))
        kept.append(live.now - before - gathered)
        return output

    def note_gradients(*_: Any) -> None:
        gradients.update(live.note(engine.gradients().values()))

    engine.forward = noted
    engine.optimizer.register_step_pre_hook(note_gradients)
    with live:
        engine.step([batch], settings)  # finds what lasts from step to step, such as buckets
        live.start()
        engine.step([batch], settings)
    return Measured(kept[-1], live.peak(state | gradients).without_state, statistics.median(seconds))


def as_table(result: dict[str, Any]) -> str:
    where = "one process" if result["processes"] == 1 else f"{result['processes']} processes that share the experts"
    lines = [
        f"{result['shape']}, {result['compute']}, {where}",
        "| mode | activations | of `none` | by formula | peak without state | CPU time of a step |",
        "|---|---|---|---|---|---|",
    ]
    modes = result["modes"]
    for mode, found in modes.items():
        peak = found["peak_without_state"]
        columns = [
            f"`{mode}`",
            megabytes(found["activations"]),
            f"{found['activations'] / modes['none']['activations']:.0%}",
            megabytes(found["activations_by_formula"]),
            "–" if peak is None else megabytes(peak),
            f"× {found['cpu_seconds'] / modes['none']['cpu_seconds']:.2f}",
        ]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines)


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


if __name__ == "__main__":
    main()

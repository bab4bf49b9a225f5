"""Every engine in one process, on this machine's device, against `ddp` on its CPU: the same losses, as far as bf16 has them.

    python benchmarks/same_losses.py --shape benchmarks/shapes/reference.json --compute bf16 --json same_losses.json

A few steps with MTP, balancing and clipping, from the same weights on the same tokens. The CPU takes them in fp32 and in the
compute dtype: how far these two lie apart is what a device may differ from either. `--engines` leaves out what is not installed.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import asked
import torch
import torch.distributed as dist
from contestants import CLIP, OPTIMIZER, Batch, Shape, without_weights

from data.files import replace_file
from model.init import initialize
from parallel.build import build_engine
from parallel.engine import StepSettings
from parallel.layout import Layout, ParallelConfig
from train.optimizer import build_optimizer

DEPTHS = 1  # of multi-token prediction
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CPU = torch.device("cpu")


class Run(NamedTuple):
    losses: list[list[float]]  # of each step: main, MTP, balance
    norms: list[float]  # of the gradient before clipping
    seconds: float  # of the last step
    peak_bytes: int | None  # as the GPU's allocator counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=asked.shape, required=True, help="a file of benchmarks/shapes")
    parser.add_argument("--compute", choices=DTYPES, default="bf16")
    parser.add_argument("--engines", nargs="+", default=["ddp", "fsdp", "zero1", "zero2", "zero3"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=asked.new_file, help="write the result here")
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0,
                            world_size=1)  # fmt: skip
    result = compare(arguments.shape, DTYPES[arguments.compute], device, arguments.engines, arguments.steps)
    if arguments.json:
        with replace_file(arguments.json) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")
    print(as_table(result))
    dist.destroy_process_group()


def compare(shape: Shape, dtype: torch.dtype, device: torch.device, engines: list[str], steps: int) -> dict[str, Any]:
    """Errors are the largest over the steps: of a loss in nats, of the norm relative to it."""
    shape = replace(shape, config=shape.config.override({"num_nextn_predict_layers": DEPTHS}))
    train = partial(run, shape, steps)
    cpu_fp32 = train("ddp", torch.float32, CPU)
    cpu = train("ddp", dtype, CPU) if dtype is not torch.float32 else cpu_fp32
    runs = {"ddp on the CPU": cpu} | {name: train(name, dtype, device) for name in engines}
    return {
        "shape": shape.name,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "compute": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "steps": steps,
        "losses_of_fp32": cpu_fp32.losses,
        "runs": {
            name: {
                "loss_error_against_fp32": loss_error(found, cpu_fp32),
                "loss_error_against_the_cpu": loss_error(found, cpu),
                "norm_error_against_fp32": max(abs(a / b - 1) for a, b in zip(found.norms, cpu_fp32.norms)),
                **found._asdict(),
            }
            for name, found in runs.items()
        },
    }


def loss_error(found: Run, expected: Run) -> float:
    pairs = zip(found.losses, expected.losses)
    return max(abs(a - b) for some, others in pairs for a, b in zip(some, others))


def run(shape: Shape, steps: int, engine_name: Any, dtype: torch.dtype, device: torch.device) -> Run:
    model = without_weights(shape.config, dtype)
    fill: Callable[..., None] = lambda model, write: initialize(model, 0, CPU, write)  # noqa: E731
    layout = Layout(ParallelConfig(engine_name, micro_batch=shape.batch), 1, shape.config)
    engine = build_engine(layout, model, device, fill, partial(build_optimizer, settings=OPTIMIZER), CLIP)
    settings = StepSettings(lr=1e-3, gamma=1e-3, alpha=1e-2, lambda_=0.3, batch=shape.batch)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses, norms, seconds = [], [], 0.0
    for step in range(steps):
        batch = draw(shape, step).to(device)
        begin = time.perf_counter()
        result = engine.step([batch], settings)  # hands out numbers of the host, so it has waited for the device
        seconds = time.perf_counter() - begin
        losses.append([result.losses.main, *result.losses.mtp, result.losses.balance])
        norms.append(result.grad_norm)
    return Run(losses, norms, seconds, torch.cuda.max_memory_allocated() if device.type == "cuda" else None)


def draw(shape: Shape, step: int) -> Batch:
    """Tokens of a skewed distribution, so that there is something to learn, in documents of random length."""
    generator = torch.Generator().manual_seed(step)
    size = (shape.batch, shape.sequence_length + 1 + DEPTHS)
    tokens = (torch.rand(size, generator=generator) ** 4 * shape.config.vocab_size).long()
    documents = (torch.rand(size, generator=generator) < 0.01).cumsum(1).int()
    return Batch(tokens, documents)


def as_table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['shape']}, {result['compute']}, {result['device']}, {result['steps']} steps",
        "| engine | loss, nats from fp32 | from the CPU | norm, from fp32 | last step | peak |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in result["runs"].items():
        peak = found["peak_bytes"]
        columns = [
            name,
            f"{found['loss_error_against_fp32']:.1e}",
            f"{found['loss_error_against_the_cpu']:.1e}",
            f"{found['norm_error_against_fp32']:.1e}",
            f"{found['seconds'] * 1e3:.0f} ms",
            "–" if peak is None else f"{peak / 1e6:.0f} MB",
        ]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""What every test process needs, imported once by the server that forks them (`tests.processes`).

A child then starts in milliseconds instead of seconds, and finds this machine's GEMM peak measured.
"""

import importlib
import os

import torch
import torch._dynamo  # DistributedDataParallel imports it when it is made
import torch.distributed.tensor

from train.planning.devices import peak_flops

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would find it too, and warn that it is nothing else
for module in (
    "tests.workers",
    "tests.parallel.harness",
    "parallel.fsdp",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # every ZeRO engine imports it, and torch.compile with it
    "deepspeed.module_inject.auto_ep_layer",  # and this
    "parallel.deepspeed",
    "train.cli",
    "train.trainer",
    "data.prepare",
    "train.scaling.fits.fit",
    "datatrove.pipeline.dedup.minhash",
    "transformers.models.auto.tokenization_auto",
):
    importlib.import_module(module)
torch.set_num_threads(1)
for dtype in (torch.float32, torch.float16):
    peak_flops(torch.device("cpu"), dtype)

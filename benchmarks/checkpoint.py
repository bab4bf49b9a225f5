"""How long a checkpoint takes to write and to read, against torch.distributed.checkpoint's own files, which are pickles.

    python benchmarks/checkpoint.py --json FILE

One process saves and loads the same tensors in turn: through `train.storage` with the marker (`train.marker`), and through DCP's
`FileSystemWriter` and `FileSystemReader`, which hash nothing. Both sync what they write; both read from the page cache.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from data.files import replace_file
from train.checkpoint import Checkpoint, Checkpoints
from train.marker import verify

TENSORS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk that is meant; default: that of temporary files")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    state = {f"w{i}": torch.randn(arguments.megabytes * 2500, 1) for i in range(TENSORS)}
    blank = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        seconds: dict[str, list[float]] = {}
        for _ in range(arguments.turns):
            for name, action in sides(Path(folder), state, blank).items():
                seconds.setdefault(name, []).append(timed(action))
        size = {name: total(Path(folder) / name) for name in ("ours", "theirs")}
    middle = {name: statistics.median(found) for name, found in seconds.items()}
    result = {
        "machine": f"{os.cpu_count()} cores, torch {torch.__version__}, one thread, {arguments.megabytes} MB in {TENSORS} tensors",
        "seconds": middle,
        "spread": {name: (min(found), max(found)) for name, found in seconds.items()},
        "ours_over_theirs": {
            "save": middle["save"] / middle["their save"],
            "load": middle["load"] / middle["their load"],
            "verify and load": (middle["verify"] + middle["load"]) / middle["their load"],
            "bytes": size["ours"] / size["theirs"],
        },
    }
    text = json.dumps(result, indent=2)
    if arguments.json:
        with replace_file(arguments.json) as temporary:
            temporary.write_text(text + "\n")
    print(text)
    dist.destroy_process_group()


def sides(folder: Path, state: dict[str, Tensor], blank: dict[str, Tensor]) -> dict[str, Callable[[], object]]:
    """What is timed, in this order; each turn begins with empty folders."""
    ours, theirs = folder / "ours", folder / "theirs"
    shutil.rmtree(ours, ignore_errors=True)
    shutil.rmtree(theirs, ignore_errors=True)
    checkpoints = Checkpoints(ours, asynchronous=False)
    path = ours / "step-00000001"
    opened: list[Checkpoint] = []
    return {
        "save": lambda: checkpoints.save(1, {"parameters": state}, {}),
        "their save": lambda: dcp.save(state, storage_writer=dcp.FileSystemWriter(theirs)),
        "verify": lambda: verify(path),
        "open": lambda: opened.append(Checkpoint(path)),
        "load": lambda: opened[0].load({"parameters": blank}),
        "their load": lambda: dcp.load(blank, storage_reader=dcp.FileSystemReader(theirs)),
    }


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def total(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()

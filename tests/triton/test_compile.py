"""Every kernel compiles for Hopper, fits there, and uses the instructions that it was written for. No GPU is needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.triton import NO_TRITON

pytest.importorskip("triton", reason=NO_TRITON)

# Of a Hopper multiprocessor. Of shared memory one program can have 227 KiB, and each costs 1 KiB more.
SHARED, LARGEST_SHARED, RESERVED = 228 * 1024, 227 * 1024, 1024
REGISTERS = 64 * 1024


def test_kernels_compile_for_hopper_within_its_registers_and_shared_memory() -> None:
    command = [sys.executable, "-m", "tests.triton.ahead_of_time"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
    compiled = json.loads(run.stdout)
    assert compiled
    for kernel in compiled:
        assert kernel["cubin"] > 0 and not kernel["missing"], kernel
        assert kernel["shared"] <= LARGEST_SHARED and kernel["stack"] == 0, kernel
        assert kernel["programs"] * (kernel["shared"] + RESERVED) <= SHARED, kernel
        registers = -(-kernel["registers"] // 8) * 8  # which a warp is given
        assert kernel["programs"] * kernel["threads"] * registers <= REGISTERS, kernel

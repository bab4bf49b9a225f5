"""Every kernel compiles for Hopper, fits there, and uses the instructions that it was written for. No GPU is needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model.fp8.conftest import NO_TRITON

pytest.importorskip("triton", reason=NO_TRITON)

SHARED = 227 * 1024  # bytes that a program can have of the shared memory of a Hopper multiprocessor


def test_kernels_compile_for_hopper_within_its_registers_and_shared_memory() -> None:
    command = [sys.executable, "-m", "tests.model.fp8.ahead_of_time"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert run.returncode == 0, run.stderr
    compiled = json.loads(run.stdout)
    assert compiled
    for kernel in compiled:
        assert kernel["cubin"] > 0 and not kernel["missing"], kernel
        assert kernel["shared"] <= SHARED and kernel["stack"] == 0, kernel

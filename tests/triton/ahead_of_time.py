"""Kernels compiled for a Hopper GPU without one: `python -m tests.triton.ahead_of_time` prints what came out, as JSON.

In a process of its own, since Triton interprets kernels in that of the tests. What is compiled stands beside the tests, in modules
`compile_*.py` with a list `CASES`. What does not fit in registers is spilled to the stack; `cuobjdump`, which Triton brings, tells.
"""

import json
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TESTS = Path(__file__).parents[1]
HOPPER = GPUTarget("cuda", 90, 32)


class Case(NamedTuple):
    """One form of a kernel, as a launch would ask for it."""

    name: str
    kernel: JITFunction
    arguments: dict[
        str, Any
    ]  # a pointer or descriptor by its type ("*bf16"), a size by its value; what is missing is None
    instructions: tuple[str, ...]  # regular expressions that its PTX must have
    num_warps: int
    num_stages: int = 3
    maxnreg: int | None = None
    programs: int = 1  # that a launch expects on a multiprocessor at once


class Compiled(NamedTuple):
    name: str
    cubin: int  # bytes
    programs: int
    threads: int  # of a program
    shared: int  # bytes of shared memory
    registers: int  # of a thread
    stack: int  # bytes; of spilled registers
    missing: list[str]  # instructions


def compile_case(case: Case) -> Compiled:
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes = {}
    for index, parameter in enumerate(case.kernel.params):
        value = case.arguments.get(parameter.name)
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = value if isinstance(value, str) else "i32"
        aligned = (
            value.startswith("*") if isinstance(value, str) else value % 16 == 0 and not parameter.do_not_specialize
        )
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, constants, attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.maxnreg}
    built = triton.compile(source, target=HOPPER, options=options)
    missing = [pattern for pattern in case.instructions if not re.search(pattern, built.asm["ptx"])]
    cubin, threads = built.asm["cubin"], built.metadata.num_warps * 32
    return Compiled(case.name, len(cubin), case.programs, threads, built.metadata.shared, *resources(cubin), missing)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found, told
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    paths = sorted(path.relative_to(TESTS.parent).with_suffix("") for path in TESTS.rglob("compile_*.py"))
    cases = [case for path in paths for case in import_module(".".join(path.parts)).CASES]
    json.dump([compile_case(case)._asdict() for case in cases], sys.stdout)

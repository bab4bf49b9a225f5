"""Kernels for a CPU, in C++: `library(NAME)` compiles NAME.cpp at its first use, for the machine that it runs on.

They take fp32 tensors by address, and know nothing of PyTorch: a file compiles in about a second with any C++ compiler that has
vector extensions (GCC, Clang). What comes out is kept in the user's cache, under a name made of the source, the compiler and the
processor, so that machines that share a home directory do not share code that one of them cannot run.

Without a compiler the operations are PyTorch's: same answer to rounding, slower.
"""

import ctypes
import fcntl
import functools
import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp",
    "-fPIC", "-shared",
)  # fmt: skip


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The kernels of NAME.cpp; None where they cannot be compiled, which is said once."""
    compiler = _compiler()
    if compiler is None:
        return None
    sources = [HERE / f"{name}.cpp", *sorted(HERE.glob("*.h"))]
    identity = [*(path.read_bytes() for path in sources), " ".join(FLAGS).encode(), compiler[1], _processor()]
    built = _cache() / f"{name}-{hashlib.sha256(b'|'.join(identity)).hexdigest()[:24]}.so"
    try:
        if not built.exists():
            _compile(compiler[0], sources[0], built)
        return ctypes.CDLL(str(built))
    except (OSError, subprocess.CalledProcessError) as failure:
        log.warning(
            "model.ops.cpu: %s did not compile %s, PyTorch's operations take its place:\n%s",
            compiler[0], sources[0].name, getattr(failure, "stderr", None) or failure,
        )  # fmt: skip
        return None


def takes(*tensors: Tensor | None) -> bool:
    """Whether the kernels are for these: fp32 on a CPU, and in memory."""
    given = [t for t in tensors if t is not None]
    return all(t.device.type == "cpu" and t.dtype is torch.float32 for t in given)


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """Of a tensor's first element; 0 for none."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@functools.cache
def _compiler() -> tuple[str, bytes] | None:
    """The first compiler there is, and its version."""
    for name in COMPILERS:
        if path := shutil.which(name):
            version = subprocess.run([path, "--version"], capture_output=True, check=False).stdout
            return path, version
    log.warning(
        "model.ops.cpu: no C++ compiler (%s) on PATH; PyTorch's operations take its place", ", ".join(COMPILERS)
    )
    return None


def _compile(compiler: str, source: Path, built: Path) -> None:
    """One process compiles, others that ask at the same time wait for it. A file of that name is always whole."""
    with (built.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if built.exists():
            return
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            made = Path(folder) / built.name
            subprocess.run([compiler, *FLAGS, str(source), "-o", str(made)], capture_output=True, check=True, text=True)
            made.replace(built)


@functools.cache
def _cache() -> Path:
    """A folder to write into, of this user alone."""
    home = Path.home() / ".cache" / "rorqual"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            return home
    except OSError:
        return Path(tempfile.mkdtemp(prefix="rorqual-"))


def _processor() -> bytes:
    """What decides which instructions `-march=native` means."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "").encode()
    except OSError:
        return platform.processor().encode()

"""Kernels for a CPU, in C++: `library(NAME)` compiles NAME.cpp at its first use, for the machine that it runs on.

They take fp32 tensors by address, and know nothing of PyTorch: a file compiles in one or two seconds with any C++ compiler that has
vector extensions (GCC, Clang). What comes out is kept in the user's cache, under a name made of the source, the compiler and the
processor, so that machines that share a home directory do not share code that one of them cannot run. What lies there is run:
a folder that another user may write to is not used, a temporary one takes its place until the process ends.

Without a compiler, or without any folder, the operations are PyTorch's: same answer to rounding, slower.
"""

import atexit
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
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
    """The kernels of NAME.cpp; None where they cannot be had, which is said once."""
    compiler, cache = _compiler(), _cache()
    if compiler is None or cache is None:
        return None
    sources = [HERE / f"{name}.cpp", *sorted(HERE.glob("*.h"))]
    identity = [*(path.read_bytes() for path in sources), " ".join(FLAGS).encode(), compiler[1], _processor()]
    built = cache / f"{name}-{hashlib.sha256(b'|'.join(identity)).hexdigest()[:24]}.so"
    try:
        _compile(compiler[0], sources[0], built)
    except subprocess.CalledProcessError as failure:
        _warn(f"{compiler[0]} did not compile {sources[0].name}", f":\n{failure.stderr}")
        return None
    except OSError as failure:
        _warn(f"{sources[0].name} could not be compiled", f": {failure}")
        return None
    try:
        return ctypes.CDLL(str(built))
    except OSError as failure:
        _warn(f"{built} was compiled and does not load", f": {failure}")
        return None


def takes(*tensors: Tensor | None) -> bool:
    """Whether the kernels are for these: fp32 on a CPU, and in memory."""
    given = [t for t in tensors if t is not None]
    return all(t.device.type == "cpu" and t.dtype is torch.float32 for t in given)


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """Of a tensor's first element; 0 for none."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def numbers(*values: int) -> tuple[ctypes.c_int64, ...]:
    """int64_t arguments."""
    return tuple(map(ctypes.c_int64, values))


def rows(x: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
    """Where rows begin, and how far apart they lie."""
    return address(x), ctypes.c_int64(x.stride(0))


def threads() -> ctypes.c_int64:
    return ctypes.c_int64(torch.get_num_threads())


def unit_stride(x: Tensor) -> Tensor:
    """With the numbers of a row one after another; a copy only where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def _compiler() -> tuple[str, bytes] | None:
    """The first compiler that runs, and its version."""
    for name in COMPILERS:
        if path := shutil.which(name):
            try:
                return path, subprocess.run([path, "--version"], capture_output=True, check=False).stdout
            except OSError as failure:
                log.info("model.ops.cpu: %s does not run: %s", path, failure)
    _warn(f"no C++ compiler ({', '.join(COMPILERS)}) on PATH")
    return None


def _compile(compiler: str, source: Path, built: Path) -> None:
    """Leave a whole library behind. One process compiles, others that ask at the same time wait for it.

    Behind the library stands its SHA-256, which loaders do not read: to load a file that was cut would end the process (SIGBUS).
    """
    with (built.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_whole(built):
            return
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            made = Path(folder) / built.name
            subprocess.run([compiler, *FLAGS, str(source), "-o", str(made)], capture_output=True, check=True, text=True)
            digest = hashlib.sha256(made.read_bytes()).digest()
            with made.open("ab") as file:
                file.write(digest)
                file.flush()
                os.fsync(file.fileno())
            made.replace(built)


def _is_whole(built: Path) -> bool:
    content = built.read_bytes() if built.exists() else b""
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


@functools.cache
def _cache() -> Path | None:
    """A folder to write into, of this user alone; None without any."""
    try:
        home = Path.home() / ".cache" / "rorqual"  # without HOME, a user that is not in the password file has none
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = home.stat()
        if status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            with tempfile.TemporaryFile(dir=home):
                return home
        log.warning("model.ops.cpu: %s is another user's, or others may write to it: it is not used", home)
    except (OSError, RuntimeError):
        pass
    try:
        made = Path(tempfile.mkdtemp(prefix="rorqual-"))  # of mode 0700
    except OSError as failure:
        _warn("no folder to compile into", f": {failure}")
        return None
    atexit.register(_remove, made, os.getpid())
    return made


def _remove(folder: Path, owner: int) -> None:
    """By the process that made it: a forked one that ends leaves it to its parent."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _warn(what: str, why: str = "") -> None:
    log.warning("model.ops.cpu: %s; PyTorch's operations take its place%s", what, why)


def _processor() -> bytes:
    """What decides which instructions `-march=native` means."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "").encode()
    except OSError:
        return platform.processor().encode()

"""Files as arrays, without a descriptor that stays open.

Python's `mmap`, and with it `numpy.memmap`, keeps a copy of the file's descriptor for as long as the map lives (3.13 is the first
that can do without), so that a store of a thousand files meets the limit of open files, which is 1024 on most systems. The
system call itself needs the descriptor no longer than it runs.
"""

import ctypes
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value


def map_file(path: Path, dtype: np.dtype[Any], count: int, offset: int = 0) -> npt.NDArray[Any]:
    """`count` items of a file from byte `offset` on: a read-only array, mapped until nobody looks at it any more.

    The file must not become shorter in this time. No items cannot be mapped and need no file.

    Raises:
        OSError: the file is missing, or cannot be mapped.
    """
    if count == 0:
        return np.zeros(0, dtype)
    size = offset + count * dtype.itemsize
    descriptor = os.open(path, os.O_RDONLY)
    try:
        address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    finally:
        os.close(descriptor)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    memory = (ctypes.c_char * size).from_address(address)
    # A process that ends needs no unmapping, and its last arrays may still be read while it does.
    weakref.finalize(memory, _LIBC.munmap, address, size).atexit = False
    array = np.frombuffer(memoryview(memory), dtype, count, offset)
    array.flags.writeable = False
    return array

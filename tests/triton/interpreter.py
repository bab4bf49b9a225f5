"""Triton's interpreter with the arithmetic of a GPU, so that a CPU can run the kernels (seen with triton 3.7.1).

Triton runs a kernel in numpy where its knob `runtime.interpret` is on when the kernel is decorated. What it computes there is not
what a GPU does, and `interpret` mends what our kernels use:

| stock                                                  | here                                                         |
|--------------------------------------------------------|--------------------------------------------------------------|
| casts to bf16 and E4M3 cut bits off, wrap or flush     | PyTorch's casts: to nearest even, E4M3 saturating            |
| `tl.dot` takes bf16 for integers, E4M3 through fp16    | the operands in fp32, numpy's product                        |
| `tl.fma` rounds the product before it adds             | one rounding                                                 |
| an autotuned kernel asks a GPU which form is fastest   | the first form                                               |
| a function of Triton's own is interpreted only where   | wherever a kernel calls it                                   |
| the knob was on before Triton was imported             |                                                              |

Casts are PyTorch's, not yet a GPU's: that those agree is for the same tests on a GPU to show. The knob is turned on in this process
alone, so that processes which it starts compile as they would.
"""

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

FLOATS = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_prepared: set[str] = set()  # modules whose functions may be called from kernels
_launch = interpreter.GridExecutor.__call__


def interpret() -> None:
    """Interpret every kernel that is decorated from here on."""
    triton.knobs.propagate_env, before = False, triton.knobs.propagate_env
    triton.knobs.runtime.interpret = True
    triton.knobs.propagate_env = before
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.InterpreterBuilder.create_fma = fma
    interpreter.GridExecutor.__call__ = launch
    interpreter.InterpretedFunction.__call__ = call
    JITFunction.__call__ = call
    Autotuner.run = run_first


def convert(bits: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: Any) -> np.ndarray:
    """Numbers of one floating-point type as those of another, both as they lie in memory; same shape."""
    numbers = torch.from_numpy(np.ascontiguousarray(bits).view(f"i{source.primitive_bitwidth // 8}"))
    width = target.primitive_bitwidth // 8
    converted = numbers.view(FLOATS[source.name]).to(FLOATS[target.name]).contiguous()
    return converted.view(BITS[width]).numpy().view(f"u{width}").reshape(bits.shape)


def dot(self: Any, a: Any, b: Any, total: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """total + a b; a product of two bf16 or E4M3 numbers is exact in fp32."""
    product = np.matmul(_in_fp32(a), _in_fp32(b))
    return interpreter.TensorHandle((total.data + product).astype(total.data.dtype), total.dtype.scalar)


def _in_fp32(operand: Any) -> np.ndarray:
    return convert(operand.data, operand.dtype.scalar, tl.float32, None).view(np.float32)


def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    """x · y + z in fp32, rounded once.

    The product is exact in fp64. Their sum is rounded to odd there: where it is inexact, to the neighbour whose last bit is set, so
    that the rounding to fp32 sees on which side of a tie it lay (Boldo and Melquiond, "Emulation of a FMA").
    """
    with np.errstate(all="ignore"):
        product, term = x.data.astype(np.float64) * y.data, z.data.astype(np.float64)
        total = product + term
        part = total - product
        error = (product - (total - part)) + (term - part)
        bits = total.view(np.int64)
        even = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
        bits = bits + np.where(even, np.where((error > 0) == (total > 0), 1, -1), 0)
        return interpreter.TensorHandle(bits.view(np.float64).astype(np.float32), z.dtype.scalar)


def launch(self: Any, *args: Any, **kwargs: Any) -> None:
    """Run the whole grid; a GPU does not warn of 0 / 0."""
    with np.errstate(all="ignore"):
        _launch(self, *args, **kwargs)


def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A function called from a kernel, ours or one of Triton's."""
    if self.fn.__module__ not in _prepared:
        interpreter._patch_lang(self.fn)
        _prepared.add(self.fn.__module__)
    return interpreter.InterpretedFunction(self.fn).rewrite()(*args, **kwargs)


def run_first(self: Autotuner, *args: Any, **kwargs: Any) -> Any:
    """An autotuned kernel in its first configuration."""
    self.best_config = self.configs[0]
    return self.fn.run(*args, **kwargs | self.best_config.all_kwargs())

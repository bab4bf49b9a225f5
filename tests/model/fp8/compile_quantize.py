"""The kernels of `model.ops.fp8.triton.quantize` and `.swiglu` in the forms that training launches."""

import triton.language as tl

from model.ops.fp8.triton import quantize, swiglu
from tests.triton.ahead_of_time import Case

SCALE = "*fp32"
ROWS = {"rows": "*fp8e4nv", "rows_scale": SCALE}
COLUMNS = {"columns": "*fp8e4nv", "columns_scale": SCALE}
ENCODES = (r"cvt\.rn\.satfinite\.e4m3x2\.f32", r"st\.global\.v[24]\.b32")  # eight numbers or more in one store
DECODES = (r"cvt\.rn\.f16x2\.e4m3x2", r"ld\.global\.v[24]\.b32")
LOADS = (r"ld\.global\.v4\.b32",)


def _quantize(dtype: str, power_of_two: bool, **outputs: str) -> Case:
    arguments = {"x": dtype, **outputs, "M": 4096, "K": 7168, "stride": 7168}
    made = "+".join(name for name in outputs if "scale" not in name)
    return Case(
        f"{made} of {dtype}",
        quantize._quantize,
        arguments | {"POWER_OF_TWO": power_of_two, "HEIGHT": quantize.TILE if "columns" in outputs else quantize.LOW},
        (*LOADS, *ENCODES),
        **(quantize.TWO if "columns" in outputs else {"num_warps": 4}),
    )


def _blocks(dtype: str, transpose: bool) -> Case:
    sizes = {"N": 4096, "K": 7168, "batch_stride": 4096 * 7168, "stride": 7168}
    return Case(
        f"blocks of {dtype}{', transposed' * transpose}",
        quantize._quantize_blocks,
        {"weight": dtype, "data": "*fp8e4nv", "scale": SCALE, **sizes, "COMPUTE": tl.bfloat16, "TRANSPOSE": transpose},
        (*LOADS, *ENCODES),
        **quantize.THREE,
    )


def _swiglu(weighted: bool) -> Case:
    weights = {"weights": "*fp32"} if weighted else {}
    sizes = {"M": 4096, "F": 2048, "gate_stride": 4096, "up_stride": 4096, "HEIGHT": quantize.LOW}
    return Case(
        "swiglu" + ", weighted" * weighted,
        swiglu._swiglu,
        {"gate": "*bf16", "up": "*bf16", "data": "*fp8e4nv", "scale": SCALE, **weights, **sizes},
        (*LOADS, *ENCODES, r"ex2\.approx"),
        num_warps=4,
    )


def _swiglu_backward(weighted: bool) -> Case:
    names = [p.name for p in swiglu._swiglu_backward.params]
    tensors = names[names.index("gate") : names.index("places")]
    arguments = {name: "*fp32" if name.endswith(("scale", "weights")) else "*fp8e4nv" for name in tensors}
    if not weighted:
        del arguments["weights"]
    sizes = {"M": 4096, "F": 2048, "tiles": 40, "stride": 2048}
    return Case(
        "swiglu, backward" + ", weighted" * weighted,
        swiglu._swiglu_backward,
        {"grad": "*bf16", **arguments, "places": "*i32", **sizes},
        (*LOADS, *DECODES, *ENCODES, r"ex2\.approx"),
        num_warps=16,
    )


CASES = [
    _quantize("*bf16", True, **ROWS),
    _quantize("*fp32", False, **ROWS),
    _quantize("*bf16", False, **COLUMNS),
    _quantize("*bf16", False, **ROWS, **COLUMNS),
    _quantize("*fp32", False, **ROWS, **COLUMNS),
    Case(
        "columns of rows in groups",
        quantize._requantize,
        {**ROWS, **COLUMNS, "places": "*i32", "M": 4096, "K": 7168, "tiles": 40},
        (*DECODES, *ENCODES),
        **quantize.THREE,
    ),
    Case(
        "places of tiles",
        quantize._find_places,
        {"counts": "*i64", "places": "*i32", "groups": 256, "WIDTH": 256},
        (),
        num_warps=1,
    ),
    _blocks("*fp32", transpose=False),
    _blocks("*bf16", transpose=True),
    _swiglu(weighted=False),
    _swiglu(weighted=True),
    _swiglu_backward(weighted=False),
    _swiglu_backward(weighted=True),
]

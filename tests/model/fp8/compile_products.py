"""The kernels of `model.ops.fp8.triton.products`, each variant with as many stages as autotuning may give it."""

from typing import Any

from triton.runtime.jit import JITFunction

from model.ops.fp8.triton import products
from tests.triton.ahead_of_time import Case

FACTORS = {"a": "*fp8e4nv", "a_scale": "*fp32", "b": "*fp8e4nv", "b_scale": "*fp32"}
SIZES = {"M": 4096, "N": 7168, "K": 16384, "P": 8192, "E": 8, "bucket": 4096, "GROUPS": 8}
# E4M3 by groups of four warps, from zero, and by the tensor memory accelerator.
INSTRUCTIONS = (r"wgmma\.mma_async\.sync\.aligned\.m64n128k32\.f32\.e4m3\.e4m3", r"cp\.async\.bulk\.tensor\.2d")
TWO_GROUPS = (r"setmaxnreg\.inc",)  # of warps that multiply, with the registers of the one that loads


def _case(kernel: JITFunction, specialize: bool, rows: int = 128, **others: Any) -> Case:
    configs = products._SPECIALIZED if specialize else products._PLAIN
    config = max((c for c in configs if c.kwargs["BLOCK_M"] == rows), key=lambda c: c.num_stages)
    arguments = FACTORS | SIZES | {"out": "*bf16", "counts": "*i64"} | config.kwargs | others
    return Case(
        f"{kernel.fn.__name__} {rows}{' specialized' * specialize}",
        kernel,
        {p.name: arguments[p.name] for p in kernel.params},
        INSTRUCTIONS + TWO_GROUPS * specialize,
        config.num_warps,
        config.num_stages,
        config.maxnreg,
        products.PROGRAMS[rows],
    )


CASES = [
    _case(products.rows_by_blocks, False),
    _case(products.rows_by_blocks, True, out="*fp32"),
    _case(products.groups_by_blocks, False, out="*fp32"),
    _case(products.groups_by_blocks, False, rows=64, out="*fp32"),
    _case(products.columns_by_columns, False),
    _case(products.columns_by_columns, False, rows=64, out="*fp32"),
    _case(products.columns_by_columns, True, counts=None, out="*fp32"),
]

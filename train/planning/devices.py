"""Peak rates and memory of accelerators, the denominator of MFU and the planner's numbers.

Rates are dense: vendors often print the rate for 2:4 sparse matrices, twice as much. bf16 and fp16, both with fp32
accumulation, share one figure.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from functools import cache

import torch

MEASURE_SECONDS = 0.25  # of one size of product


class DeviceError(ValueError):
    """A device the table does not know, or that lacks what was asked of it. One line."""


@dataclass(frozen=True)
class Device:
    """One accelerator as the vendor describes it.

    Attributes:
        name: what it is called here and by `--device`.
        pattern: regular expression, searched without regard to case in the driver's name of the device.
        bf16: peak of dense bf16 matrix products, FLOP/s.
        fp8: peak of dense fp8 matrix products, FLOP/s; None where the hardware has none.
        memory: bytes of device memory as sold (10⁹ per GB); a driver shows a little less.
        memory_bandwidth: bytes/s.
        link_bandwidth: bytes/s in one direction between the devices of a node (NVLink, Infinity Fabric, else PCIe).
        source: the vendor's document that has the figures.
    """

    name: str
    pattern: str
    bf16: float
    fp8: float | None
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    source: str


# fmt: off
_TABLE = (
    # name, pattern in the driver's name; TFLOP/s in bf16 and fp8; memory GB, GB/s; link GB/s; source.
    # The first pattern that is found decides, so variants stand before the plain name.
    ("GB300",     r"GB300",       2500,   5000,    279, 8000, 900, "NVIDIA GB300 NVL72 page, a 72nd of it"),
    ("GB200",     r"GB200",       2500,   5000,    186, 8000, 900, "NVIDIA GB200 NVL72 page, a 72nd of it"),
    ("B300",      r"B300",        2250,   4500,    270, 7700, 900, "NVIDIA HGX B300 page, an 8th of it"),
    ("B200",      r"B200",        2250,   4500,    180, 7700, 900, "NVIDIA HGX B200 page, an 8th of it"),
    ("GH200",     r"GH200",       989.4,  1978.9,   96, 4000, 450, "NVIDIA GH200 datasheet, HBM3"),
    ("H200-NVL",  r"H200 NVL",    835.5,  1671,    141, 4800, 450, "NVIDIA H200 datasheet"),
    ("H200",      r"H200",        989.4,  1978.9,  141, 4800, 450, "NVIDIA H200 datasheet, SXM"),
    ("H100-NVL",  r"H100 NVL",    835.5,  1671,     94, 3900, 300, "NVIDIA H100 datasheet"),
    ("H100-PCIe", r"H100.*PCIe",  756,    1513,     80, 2000,  64, "NVIDIA H100 architecture whitepaper"),
    ("H100",      r"H100",        989.4,  1978.9,   80, 3350, 450, "NVIDIA H100 architecture whitepaper, SXM5"),
    ("H800-PCIe", r"H800.*PCIe",  756,    1513,     80, 2000,  64, "as H100 PCIe"),
    ("H800",      r"H800",        989.4,  1978.9,   80, 3350, 200, "as H100 SXM5, NVLink of 400 GB/s both ways"),
    ("H20",       r"H20\b",       148,    296,      96, 4000, 450, "NVIDIA H20 datasheet"),
    ("A100-40GB", r"A100.*40GB",  312,    None,     40, 1555, 300, "NVIDIA A100 datasheet"),
    ("A100",      r"A100",        312,    None,     80, 2039, 300, "NVIDIA A100 datasheet, SXM with 80 GB"),
    ("A800",      r"A800",        312,    None,     80, 2039, 200, "as A100, NVLink of 400 GB/s both ways"),
    ("L40S",      r"L40S",        362,    733,      48,  864,  32, "NVIDIA L40S datasheet"),
    ("L40",       r"L40\b",       181,    362,      48,  864,  32, "NVIDIA L40 datasheet"),
    ("L4",        r"L4\b",        121,    242.5,    24,  300,  32, "NVIDIA L4 datasheet"),
    ("A40",       r"A40\b",       149.7,  None,     48,  696,  32, "NVIDIA A40 datasheet"),
    ("A10",       r"A10\b",       125,    None,     24,  600,  32, "NVIDIA A10 datasheet"),
    ("RTX-5090",  r"RTX 5090",    209.5,  419,      32, 1792,  64, "NVIDIA RTX Blackwell whitepaper"),
    ("RTX-4090",  r"RTX 4090",    165.2,  330.3,    24, 1008,  32, "NVIDIA Ada GPU architecture whitepaper"),
    ("RTX-3090",  r"RTX 3090",    71,     None,     24,  936,  32, "NVIDIA GA102 architecture whitepaper"),
    ("MI355X",    r"MI355X",      2516.6, 5033.2,  288, 8000, 538, "AMD Instinct MI355X datasheet"),
    ("MI325X",    r"MI325X",      1307.4, 2614.9,  256, 6000, 448, "AMD Instinct MI325X datasheet"),
    ("MI300X",    r"MI300X",      1307.4, 2614.9,  192, 5300, 448, "AMD Instinct MI300X datasheet"),
    ("MI250X",    r"MI250X",      191.5,  None,     64, 1638, 200, "AMD Instinct MI250X datasheet, one die of two"),
)
# fmt: on

DEVICES = tuple(
    Device(name, pattern, bf16 * 1e12, fp8 * 1e12 if fp8 else None, memory * 1e9, bandwidth * 1e9, link * 1e9, source)
    for name, pattern, bf16, fp8, memory, bandwidth, link, source in _TABLE
)


def lookup(name: str) -> Device:
    """The device of a driver's name ("NVIDIA H100 80GB HBM3") or of the table's own ("H100-PCIe").

    Raises:
        DeviceError: the table does not know it.
    """
    found = _find(name)
    if found is None:
        known = ", ".join(device.name for device in DEVICES)
        raise DeviceError(f"device {name!r}: is not in the table of devices; give one of {known}")
    return found


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float:
    """FLOP/s that MFU divides by, of the device that this process computes on.

    The vendor's dense peak for bf16, fp16 and fp8; for what has no such figure (a CPU, fp32, an unknown GPU) the best
    matrix product that this process measures, once. A run in FP8 divides by the peak of FP8, though attention, head and gates do
    not compute in it: a figure that is never flattering. A CPU, which emulates FP8 by products in fp32, has the peak of these.

    Raises:
        DeviceError: fp8 on a GPU without it.
    """
    device = torch.device(device)
    known = _find(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if dtype is torch.float8_e4m3fn:
        if device.type == "cpu":
            return peak_flops(device, torch.float32)
        if known is None or known.fp8 is None:
            raise DeviceError(
                f"device {known.name if known else device}: has no fp8 rate in the table of devices; set precision.fp8 to false"
            )
        return known.fp8
    if known is not None and dtype in (torch.bfloat16, torch.float16):
        return known.bf16
    return measured_gemm_peak(dtype, str(device), torch.get_num_threads())


@cache
def measured_gemm_peak(dtype: torch.dtype, device: str = "cpu", threads: int | None = None) -> float:
    """FLOP/s of the fastest of several square matrix products, measured for about half a second and remembered.

    The best and not the mean, since a neighbour on the machine can only slow a product down.

    Args:
        dtype: of both factors.
        device: where it runs.
        threads: of the CPU's matrix product; None as this process has it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        best = 0.0
        for size in (256, 1024) if device == "cpu" else (8192,):
            # A CPU may take seconds for 1024³ in half precision; then the small product has to do.
            if best == 0 or 2 * size**3 / best < MEASURE_SECONDS:
                best = max(best, 2 * size**3 / _fastest_product(size, dtype, device))
        return best
    finally:
        torch.set_num_threads(before)


def _fastest_product(size: int, dtype: torch.dtype, device: str) -> float:
    """Seconds of the fastest size³ product within MEASURE_SECONDS, one at least."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out = a @ b  # the first product picks a kernel
    best, begin = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - begin < MEASURE_SECONDS:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        if device != "cpu":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _find(name: str) -> Device | None:
    for device in DEVICES:
        if name.lower() == device.name.lower():
            return device
    return next((device for device in DEVICES if re.search(device.pattern, name, re.IGNORECASE)), None)

"""Peak rates, memory and links of accelerators, the denominator of MFU and the planner's numbers; of a CPU, as measured.

Rates are dense: vendors often print the rate for 2:4 sparse matrices, twice as much. bf16 and fp16, both with fp32
accumulation, share one figure; fp32 is not TF32. What of a peak is reached is in `train.planning.speed.rates`.
"""

from __future__ import annotations

import difflib
import os
import re
import socket
import threading
import time
from dataclasses import dataclass, replace
from functools import cache

import torch

MEASURE_SECONDS = 0.25  # of one size of product

# Of a GPU's memory a run cannot have: CUDA's context with the kernels that are loaded (half a GB on an H100), buffers of NCCL's
# communicators (a few hundred MB each: the world's, and those of shards, experts, sequences and the pipeline), and what the
# allocator holds in blocks that nothing fits into; the last two are assumed. What a driver shows beyond the memory as sold (an
# H100 of 80 GB: 85.5e9 bytes) is left out.
CONTEXT, COMMUNICATORS, SLACK = 0.6e9, 1.4e9, 0.04


class DeviceError(ValueError):
    """A device the table does not know, or that lacks what was asked of it. One line."""


@dataclass(frozen=True)
class Device:
    """One accelerator as the vendor describes it, in a node as vendors build them.

    Attributes:
        name: what it is called here and by `--device`.
        pattern: regular expression, searched without regard to case among the words of the driver's name of the device.
        bf16: peak of dense bf16 matrix products, FLOP/s.
        fp8: peak of dense fp8 matrix products, FLOP/s; None where the hardware has none.
        fp32: peak of fp32 outside of tensor cores, FLOP/s: PyTorch multiplies in TF32 only where it is told to.
        memory: bytes of device memory as sold (10⁹ per GB); a driver shows a little more.
        memory_bandwidth: bytes/s.
        link_bandwidth: bytes/s in one direction between the devices of a node (NVLink, Infinity Fabric, else PCIe).
        node: devices that this link joins.
        network: bytes/s in one direction of a device's share of the network between nodes.
        source: the vendor's documents that have the figures.
        reserve: bytes of `memory` that no run can have.
        shared: processes that compute on it in turns; one on a GPU.
    """

    name: str
    pattern: str
    bf16: float
    fp8: float | None
    fp32: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    node: int
    network: float
    source: str
    reserve: float
    shared: float = 1.0

    @property
    def usable(self) -> float:
        """Bytes that a run may use."""
        return self.memory - self.reserve

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s of dense products of this dtype; that of bf16 for fp16.

        Raises:
            DeviceError: fp8 on a device without it.
        """
        if dtype is torch.float32:
            return self.fp32
        if dtype is not torch.float8_e4m3fn:
            return self.bf16
        if self.fp8 is None:
            raise _without_fp8(self.name)
        return self.fp8


# fmt: off
_SYSTEMS = {
    # devices that the link joins; Gb/s of network a device; source.
    "NVL72 CX8": (72, 800, "DGX GB300: a ConnectX-8 a GPU"),
    "NVL72 CX7": (72, 400, "DGX GB200: a ConnectX-7 a GPU"),
    "HGX 800":   (8,  800, "DGX B300: eight ConnectX-8 for eight GPUs"),
    "HGX 400":   (8,  400, "DGX H100, H200 and B200: eight ConnectX-7 for eight GPUs; DeepSeek-V3's H800 the same"),
    "HGX 200":   (8,  200, "DGX A100: eight ConnectX-6 for eight GPUs"),
    "MGX":       (1,  400, "MGX with one superchip: a ConnectX-7"),
    "NVL4":      (4,  200, "NVIDIA Enterprise Reference Architecture 2-8-5-200, bridges of four"),
    "NVL2":      (2,  200, "NVIDIA Enterprise Reference Architecture 2-8-5-200, bridges of two"),
    "PCIe 200":  (8,  200, "NVIDIA Enterprise Reference Architecture 2-8-5-200"),
    "PCIe 100":  (8,  100, "assumed"),
    "desktop":   (8,   10, "assumed: a 10 Gb/s card a GPU"),
    "OAM 400":   (8,  400, "ROCm's clusters, Azure ND MI300X v5: eight cards of 400 Gb/s for eight GPUs"),
    "Frontier":  (8,  100, "OLCF Frontier user guide: four cards of 200 Gb/s for eight dies"),
}
_TABLE = (
    # name, pattern in the driver's name; TFLOP/s in bf16, fp8 and fp32; memory GB, GB/s; link GB/s; system; source.
    # The first pattern that is found decides, so variants stand before the plain name.
    ("GB300",     r"GB300",      2500,   5000,   80,    279, 8000, 900, "NVL72 CX8", "NVIDIA GB300 NVL72 page, a 72nd of it"),
    ("GB200",     r"GB200",      2500,   5000,   80,    186, 8000, 900, "NVL72 CX7", "NVIDIA GB200 NVL72 page, a 72nd of it"),
    ("B300",      r"B300",       2250,   4500,   75,    270, 7700, 900, "HGX 800",   "NVIDIA HGX B300 page, an 8th of it"),
    ("B200",      r"B200",       2250,   4500,   75,    180, 7700, 900, "HGX 400",   "NVIDIA HGX B200 page, an 8th of it"),
    ("GH200",     r"GH200",      989.4,  1978.9, 67,     96, 4000, 450, "MGX",       "NVIDIA GH200 datasheet, HBM3"),
    ("H200-NVL",  r"H200 NVL",   835.5,  1671,   60,    141, 4800, 450, "NVL4",      "NVIDIA H200 datasheet"),
    ("H200",      r"H200",       989.4,  1978.9, 67,    141, 4800, 450, "HGX 400",   "NVIDIA H200 datasheet, SXM"),
    ("H100-NVL",  r"H100 NVL",   835.5,  1671,   60,     94, 3900, 300, "NVL2",      "NVIDIA H100 datasheet"),
    ("H100-PCIe", r"H100.*PCIe", 756,    1513,   51,     80, 2000,  64, "PCIe 200",  "NVIDIA H100 architecture whitepaper"),
    ("H100",      r"H100",       989.4,  1978.9, 67,     80, 3350, 450, "HGX 400",   "NVIDIA H100 architecture whitepaper, SXM5"),
    ("H800-PCIe", r"H800.*PCIe", 756,    1513,   51,     80, 2000,  64, "PCIe 200",  "as H100 PCIe"),
    ("H800",      r"H800",       989.4,  1978.9, 67,     80, 3350, 200, "HGX 400",   "as H100 SXM5, NVLink of 400 GB/s both ways"),
    ("H20",       r"H20",        148,    296,    44,     96, 4000, 450, "HGX 400",   "NVIDIA H20 datasheet"),
    ("A100-40GB", r"A100.*40GB", 312,    None,   19.5,   40, 1555, 300, "HGX 200",   "NVIDIA A100 datasheet"),
    ("A100",      r"A100",       312,    None,   19.5,   80, 2039, 300, "HGX 200",   "NVIDIA A100 datasheet, SXM with 80 GB"),
    ("A800",      r"A800",       312,    None,   19.5,   80, 2039, 200, "HGX 200",   "as A100, NVLink of 400 GB/s both ways"),
    ("L40S",      r"L40S",       362,    733,    91.6,   48,  864,  32, "PCIe 200",  "NVIDIA L40S datasheet"),
    ("L40",       r"L40",        181,    362,    90.5,   48,  864,  32, "PCIe 100",  "NVIDIA L40 datasheet"),
    ("L4",        r"L4",         121,    242.5,  30.3,   24,  300,  32, "PCIe 100",  "NVIDIA L4 datasheet"),
    ("A40",       r"A40",        149.7,  None,   37.4,   48,  696,  32, "PCIe 100",  "NVIDIA A40 datasheet"),
    ("A10",       r"A10",        125,    None,   31.2,   24,  600,  32, "PCIe 100",  "NVIDIA A10 datasheet"),
    ("RTX-5090",  r"RTX 5090",   209.5,  419,    104.8,  32, 1792,  64, "desktop",   "NVIDIA RTX Blackwell whitepaper"),
    ("RTX-4090",  r"RTX 4090",   165.2,  330.3,  82.6,   24, 1008,  32, "desktop",   "NVIDIA Ada GPU architecture whitepaper"),
    ("RTX-3090",  r"RTX 3090",   71,     None,   35.6,   24,  936,  32, "desktop",   "NVIDIA GA102 architecture whitepaper"),
    ("MI355X",    r"MI355X",     2516.6, 5033.2, 157.3, 288, 8000, 538, "OAM 400",   "AMD Instinct MI355X datasheet"),
    ("MI325X",    r"MI325X",     1307.4, 2614.9, 163.4, 256, 6000, 448, "OAM 400",   "AMD Instinct MI325X datasheet"),
    ("MI300X",    r"MI300X",     1307.4, 2614.9, 163.4, 192, 5300, 448, "OAM 400",   "AMD Instinct MI300X datasheet"),
    ("MI250X",    r"MI250X",     191.5,  None,   23.9,   64, 1638, 200, "Frontier",  "AMD Instinct MI250X datasheet, a die of two"),
)
# fmt: on

DEVICES = tuple(
    Device(
        name,
        pattern,
        bf16 * 1e12,
        fp8 * 1e12 if fp8 else None,
        fp32 * 1e12,
        memory * 1e9,
        bandwidth * 1e9,
        link * 1e9,
        _SYSTEMS[system][0],
        _SYSTEMS[system][1] / 8 * 1e9,
        f"{source}; network: {_SYSTEMS[system][2]}",
        CONTEXT + COMMUNICATORS + SLACK * memory * 1e9,
    )
    for name, pattern, bf16, fp8, fp32, memory, bandwidth, link, system, source in _TABLE
)


def find_device(name: str, processes: int = 1) -> Device:
    """A device of the table, or `cpu`: what one of so many processes has of this machine.

    Raises:
        DeviceError: there is none of this name; with the nearest.
    """
    return this_machine(processes) if name.lower() == "cpu" else lookup(name)


def lookup(name: str) -> Device:
    """The device of a driver's name ("NVIDIA H100 80GB HBM3") or of the table's own ("H100-PCIe").

    Raises:
        DeviceError: the table does not know it.
    """
    found = _find(name)
    if found is None:
        names = {device.name.lower(): device.name for device in DEVICES}
        near = difflib.get_close_matches(name.lower(), names, n=1)
        fix = f"did you mean {names[near[0]]}? It has" if near else "give one of"
        raise DeviceError(f"device {name!r}: is not in the table of devices; {fix} {', '.join(names.values())}, or cpu")
    return found


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float:
    """FLOP/s that MFU divides by, of the device that this process computes on.

    The vendor's dense peak (`Device.peak`); for what has no such figure (a CPU, an unknown GPU) the best matrix product that this
    process measures, once. A run in FP8 divides by the peak of FP8, though attention, head and gates do not compute in it: a figure
    that is never flattering. A CPU, which emulates FP8 by products in fp32, has the peak of these.

    Raises:
        DeviceError: fp8 on a GPU without it.
    """
    device = torch.device(device)
    known = _find(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if known:
        return known.peak(dtype)
    if dtype is torch.float8_e4m3fn:
        if device.type != "cpu":
            raise _without_fp8(device)
        dtype = torch.float32
    return measured_gemm_peak(dtype, str(device), torch.get_num_threads())


def _without_fp8(device: object) -> DeviceError:
    return DeviceError(f"device {device}: has no fp8 rate in the table of devices; set precision.fp8 to false")


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


def this_machine(processes: int = 1) -> Device:
    """What one of so many processes has of this machine's CPU, where each has as many threads as this one.

    Memory, its bandwidth and the loopback are shared by all; cores by as many as there are too few of them for. Processes are one
    node, whatever their number: they send to each other over the loopback, as gloo does.
    """
    whole = measured_machine()
    if processes == 1:
        return whole
    shared = max(1.0, processes * torch.get_num_threads() / len(os.sched_getaffinity(0)))
    assert whole.fp8
    return replace(
        whole,
        bf16=whole.bf16 / shared,
        fp8=whole.fp8 / shared,
        fp32=whole.fp32 / shared,
        memory=whole.memory / processes,
        memory_bandwidth=whole.memory_bandwidth / processes,
        link_bandwidth=whole.link_bandwidth / processes,
        network=whole.network / processes,
        reserve=whole.reserve / processes,
        shared=shared,
    )


@cache
def measured_machine() -> Device:
    """What this process has of its CPU where it is alone, measured in a second or two and remembered."""
    bf16, fp32, fp8 = (peak_flops("cpu", dtype) for dtype in (torch.bfloat16, torch.float32, torch.float8_e4m3fn))
    memory = float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if os.path.exists("/proc/meminfo"):  # with what the system would give up of its caches
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":") for line in lines)
        memory = float(fields["MemAvailable"].split()[0]) * 1024
    link = measured_loopback()
    return Device(
        "cpu",
        "cpu",
        bf16,
        fp8,
        fp32,
        memory,
        measured_copy(),
        link,
        1 << 20,
        link,
        "measured on this machine",
        SLACK * memory,
    )


def measured_copy(size: int = 1 << 26) -> float:
    """Bytes/s of memory, read and written, of the fastest copy of so many bytes; larger than caches."""
    source = torch.ones(size // 4)
    target = torch.empty_like(source)
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < MEASURE_SECONDS:
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * size / best


def measured_loopback(size: int = 1 << 25) -> float:
    """Bytes/s in one direction of the fastest of several messages to oneself by TCP."""
    message, best = bytes(size), float("inf")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        receiver, _ = server.accept()
        with receiver:
            into = memoryview(bytearray(1 << 20))
            for _ in range(4):
                start, left = time.perf_counter(), size
                sending = threading.Thread(target=sender.sendall, args=(message,))
                sending.start()
                while left:
                    left -= receiver.recv_into(into)
                sending.join()
                best = min(best, time.perf_counter() - start)
    return size / best


def _find(name: str) -> Device | None:
    for device in DEVICES:
        if name.lower() == device.name.lower():
            return device
    return next((device for device in DEVICES if re.search(_as_words(device.pattern), name, re.IGNORECASE)), None)


def _as_words(pattern: str) -> str:
    """A100, but not RTX A1000; RTX 4090, but not RTX 4090 Laptop."""
    return rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9]| (?:Ti|D|Laptop)\b)"

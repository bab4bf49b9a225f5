"""How much of a device's peak each kind of work reaches. For GPUs published figures, for this machine's CPU what is measured here.

Products are counted against the best one that was found on a GPU (`BEST`), of whatever shape suits it: stas00/ml-engineering,
"Maximum Achievable Matmul FLOPS". What they reach of that is taken for the same on all GPUs:

    linear maps and head  0.80. DeepGEMM's first README, H800: the six FP8 shapes of V3 with 4,096 rows, 590 to 1,358 TFLOP/s, by
                          their FLOPs 1,130 in the mean; the best is 1,403. In bf16 assumed to be the same
    experts               0.875 · n / (n + 110) with n rows each. The same README, grouped, gate, up and down together: 45 % of the
                          peak with 256 rows, 50 % with 512, 56 % with 1,024, 61 % with 4,096. In bf16 assumed to be the same
    attention, forward    0.74. FlashAttention-3 on an H100, 4,096 tokens, heads of 128: 590 TFLOP/s (pytorch/benchmark #2391; 740
                          at best, arXiv 2407.08608); the best product is 794
    attention, backward   0.44. Assumed: three quarters of forward, and 5 products where 4 are counted
    all products in fp32  of the peak in fp32 what bf16 reaches of its own. Assumed

and of bandwidths:

    memory                0.80. Assumed
    link in a node        0.78. DeepEP V1: 153 and 158 GB/s of an H800's 200
    network               0.86. DeepEP V1 between two nodes: 43 GB/s of 50; 43 and 46 where rows travel one by one to 64 ranks
    sending               20/132 of the device for what travels while it computes. DeepSeek-V3 §3.2.2: so many multiprocessors
"""

from dataclasses import dataclass
from functools import cache

import torch

from model.config import ModelConfig
from train.planning.devices import Device, DeviceError
from train.planning.speed.work import How

BEST = {  # bf16 and FP8, of the peak; of others that of an H100
    "GB300": (0.73, 0.72),  # as GB200
    "GB200": (0.73, 0.72),
    "B300": (0.79, 0.75),
    "B200": (0.78, 0.76),
    "GH200": (0.84, 0.78),
    "H200": (0.80, 0.73),
    "H100": (0.80, 0.71),
    "A100": (0.87, 0.0),
    "MI355X": (0.68, 0.68),  # FP8 of AMD's: as bf16
    "MI325X": (0.60, 0.60),
    "MI300X": (0.51, 0.51),
}
LINEAR, EXPERTS, ATTENTION, ATTENTION_BACKWARD = 0.80, 0.875, 0.74, 0.44
HALF = 110  # rows of an expert
MEMORY, NODE, NETWORK = 0.80, 0.78, 0.86
SENDING = 20 / 132


@dataclass(frozen=True)
class Rates:
    """Of one device at the work of a step.

    Attributes:
        linear, experts, attention, attention_backward, head: FLOP/s; of experts with many rows each.
        half: rows of an expert with which its products reach half of that.
        memory, optimizer: bytes/s.
        node, network: bytes/s in one direction.
        sending: share of the device that messages take while it computes; 1: nothing is gained by doing both.
    """

    linear: float
    experts: float
    half: float
    attention: float
    attention_backward: float
    head: float
    memory: float
    optimizer: float
    node: float
    network: float
    sending: float

    def of_experts(self, rows: float) -> float:
        """FLOP/s of experts with so many rows each."""
        return self.experts * rows / (rows + self.half) if rows else self.experts


def rates_of(device: Device, config: ModelConfig, how: How) -> Rates:
    """What a device reaches at a micro-batch of a model.

    Raises:
        DeviceError: FP8 on a device without it, or on a CPU, which emulates it.
    """
    if device.name == "cpu":
        if how.fp8:
            raise DeviceError("device cpu: emulates FP8, and nobody has timed that; set precision.fp8 to false")
        from train.planning.speed.measured import measured_rates  # it asks for Rates

        return measured_rates(device, config, how)
    return _published(device, how.fp8, how.element)


@cache
def _published(device: Device, fp8: bool, element: int) -> Rates:
    of_bf16, of_fp8 = BEST.get(device.name, BEST["H100"])
    exact = of_bf16 * (device.bf16 if element == 2 else device.fp32)
    best = of_fp8 * device.peak(torch.float8_e4m3fn) if fp8 else exact
    return Rates(
        linear=LINEAR * best,
        experts=EXPERTS * best,
        half=HALF,
        attention=ATTENTION * exact,
        attention_backward=ATTENTION_BACKWARD * exact,
        head=LINEAR * exact,
        memory=MEMORY * device.memory_bandwidth,
        optimizer=MEMORY * device.memory_bandwidth,
        node=NODE * device.link_bandwidth,
        network=NETWORK * device.network,
        sending=SENDING,
    )

"""How much of a device's peak each kind of work reaches. For GPUs published figures, for this machine's CPU what is measured here.

One set of fractions for all GPUs, those of Hopper. Others reach less of their peaks: the best bf16 product has 73 % of a GB200's
and 51 % of an MI300X's (stas00/ml-engineering, "Maximum Achievable Matmul FLOPS"); for these predictions are too fast.

    linear maps, FP8      0.57 of the peak. DeepGEMM's first README, H800: the six shapes of V3 with 4,096 rows, 590 to 1,358
                          TFLOP/s, weighed by their FLOPs
    linear maps and head  0.65 in bf16. Assumed: DeepGEMM's shapes have 81 % of the best FP8 product found on an H100 (1,403
                          TFLOP/s, stas00/ml-engineering), and the best of bf16 is taken for 80 % of the peak
    experts               0.62 · n / (n + 110) with n rows each, FP8. The same README, grouped, gate, up and down together: 45 %
                          of the peak with 256 rows, 50 % with 512, 56 % with 1,024, 61 % with 4,096. In bf16 0.68: assumed
    attention, forward    0.60. FlashAttention-3 on an H100, 4,096 tokens, heads of 128: 590 TFLOP/s (pytorch/benchmark #2391); 740
                          at best (arXiv 2407.08608)
    attention, backward   0.36. Assumed: three quarters of forward, and 5 products where 4 are counted
    all products in fp32  0.05 of the peak of bf16. Assumed: without tensor cores an H100 has 67 of 989 TFLOP/s
    memory                0.80. Assumed
    link in a node        0.78. DeepEP V1: 153 and 158 GB/s of an H800's 200
    network               0.86. DeepEP V1 between two nodes: 43 GB/s of 50; 43 and 46 where rows travel one by one to 64 ranks
    sending               20/132 of the device for what travels while it computes. DeepSeek-V3 §3.2.2: so many multiprocessors
"""

from dataclasses import dataclass
from functools import cache

from model.config import ModelConfig
from train.planning.devices import Device, DeviceError
from train.planning.work import How

FP32 = 0.05
LINEAR = {"fp8": 0.57, "bf16": 0.65, "fp32": FP32}
EXPERTS = {"fp8": 0.62, "bf16": 0.68, "fp32": FP32}
HALF = 110  # rows of an expert
ATTENTION, ATTENTION_BACKWARD = 0.60, 0.36
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
    if how.fp8 and (device.fp8 is None or device.name == "cpu"):
        has = (
            "emulates FP8, and nobody has timed that"
            if device.name == "cpu"
            else "has no fp8 rate in the table of devices"
        )
        raise DeviceError(f"device {device.name}: {has}; set precision.fp8 to false")
    if device.name == "cpu":
        from train.planning.measured import measured_rates  # it asks for Rates

        return measured_rates(device, config, how)
    return _published(device, how.fp8, how.element)


@cache
def _published(device: Device, fp8: bool, element: int) -> Rates:
    exact = "bf16" if element == 2 else "fp32"
    peak, of = (device.fp8, "fp8") if fp8 else (device.bf16, exact)
    assert peak
    slower = 1.0 if element == 2 else FP32
    return Rates(
        linear=LINEAR[of] * peak,
        experts=EXPERTS[of] * peak,
        half=HALF,
        attention=ATTENTION * slower * device.bf16,
        attention_backward=ATTENTION_BACKWARD * slower * device.bf16,
        head=LINEAR[exact] * device.bf16,
        memory=MEMORY * device.memory_bandwidth,
        optimizer=MEMORY * device.memory_bandwidth,
        node=NODE * device.link_bandwidth,
        network=NETWORK * device.network,
        sending=SENDING,
    )

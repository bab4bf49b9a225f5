"""Which kernels compute FP8 on a device."""

import torch

from model.config import ConfigError
from model.ops.fp8.kernels import Kernels, Reference


def kernels_for(device: torch.device) -> Kernels:
    """The reference on a CPU, which emulates FP8.

    Raises:
        ConfigError: a GPU, whose kernels are not built yet.
    """
    if device.type == "cpu":
        return Reference()
    raise ConfigError("precision.fp8 = true: kernels for a GPU: not built yet")

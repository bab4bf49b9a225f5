"""How a fresh model's parameters are drawn.

| parameter                                             | distribution                                    |
|-------------------------------------------------------|-------------------------------------------------|
| embedding, output head, every linear, gate, experts   | N(0, initializer_range²); 0.006 in V3 (§4.2)    |
| norms                                                 | 1                                               |
| expert bias (a buffer)                                | 0                                               |

Every matrix, and every expert of a stacked tensor, has a generator of its own, seeded from the run's seed and its name: a rank that
holds only a few of them draws the same numbers as one that holds them all, and adding a layer changes no other.
The numbers are those of the device they are drawn on: a GPU's generator is another than a CPU's.
"""

import hashlib

import torch
from torch import Tensor

from model.transformer import Transformer


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """Draw all parameters in place. The model may come from the meta device by `to_empty`."""
    std = model.config.initializer_range
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        elif parameter.dim() == 2:
            _normal(parameter, std, seed, name)
        else:
            for index, expert in enumerate(parameter):
                _normal(expert, std, seed, f"{name}.{index}")
    for buffer in model.buffers():
        buffer.zero_()


def _normal(matrix: Tensor, std: float, seed: int, name: str) -> None:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(matrix.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    matrix.normal_(0.0, std, generator=generator)

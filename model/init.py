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
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from model.hf import state_shapes
from model.transformer import Transformer

Draw = Callable[[], Tensor]
Write = Callable[[str, Tensor, int | None, Draw], None]  # name, parameter, expert or None for all of it, its values


def write_whole(name: str, parameter: Tensor, expert: int | None, draw: Draw) -> None:
    """Put values into a parameter that lies here as a whole."""
    (parameter if expert is None else parameter[expert]).copy_(draw())


@torch.no_grad()
def initialize(
    model: Transformer, seed: int, device: torch.device | str | None = None, write: Write = write_whole
) -> None:
    """Draw all parameters, one matrix at a time. The model may come from the meta device by `to_empty`.

    Args:
        device: that draws, by default the parameters' own.
        write: brings each matrix to its place. Where parameters are spread over ranks it keeps this rank's part, and need not
            draw what lies elsewhere.
    """
    device = torch.device(device or next(model.parameters()).device)
    shapes = state_shapes(model.config)  # a parameter that is spread over ranks may not show its own
    for name, parameter in model.named_parameters():
        draw = partial(_draw, name, shapes[name].shape[-2:], model.config.initializer_range, seed, device)
        if shapes[name].dim() < 3:
            write(name, parameter, None, partial(draw, None))
            continue
        for expert in range(shapes[name].shape[0]):
            write(name, parameter, expert, partial(draw, expert))
    for buffer in model.buffers():
        buffer.zero_()


def _draw(name: str, shape: torch.Size, std: float, seed: int, device: torch.device, expert: int | None) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, device=device)
    key = f"{seed}/{name}" if expert is None else f"{seed}/{name}.{expert}"
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, device=device).normal_(0.0, std, generator=generator)

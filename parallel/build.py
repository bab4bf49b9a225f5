"""From a layout and a model without weights to the engine that trains it."""

import torch

from model.transformer import Transformer
from parallel.context import share_sequences
from parallel.engine import Engine, Fill, MakeOptimizer
from parallel.layout import Layout
from parallel.meshes import Meshes
from parallel.pipeline import Pipeline


def build_engine(
    layout: Layout,
    model: Transformer,
    device: torch.device,
    fill: Fill,
    make_optimizer: MakeOptimizer,
    clip: float | None,
) -> Engine:
    """Spread a model over the ranks of the default process group. Collective.

    Args:
        layout: checked; its world size is that of the group.
        model: on the meta device, with recomputation applied. No rank ever holds more of it than the layout says.
        device: where this rank computes.
        fill: gives the model its first weights: called with the model and with a `write` that keeps this rank's part.
        make_optimizer: called once with (name, tensor) of what this rank updates.
        clip: largest global gradient norm; None does not clip.
    """
    meshes = Meshes(layout, device.type)
    engine = _engine(layout, model, device, fill, make_optimizer, clip, meshes)
    engine.groups = meshes.groups()
    return engine


def _engine(
    layout: Layout,
    model: Transformer,
    device: torch.device,
    fill: Fill,
    make_optimizer: MakeOptimizer,
    clip: float | None,
    meshes: Meshes,
) -> Engine:
    if layout.config.context > 1:
        share_sequences(model, meshes.context)
    pipeline = Pipeline(layout, meshes, model, device) if layout.config.pipeline > 1 else None
    # An engine's library is imported when it is used: DeepSpeed takes seconds, and need not be there for the others.
    if layout.config.engine == "ddp":
        from parallel.ddp import DDPEngine

        return DDPEngine(model, device, fill, make_optimizer, clip, meshes, pipeline)
    if layout.config.engine == "fsdp":
        from parallel.fsdp import FSDPEngine

        return FSDPEngine(layout, model, device, fill, make_optimizer, clip, meshes, pipeline)
    from parallel.deepspeed import ZeroEngine

    return ZeroEngine(layout, model, device, fill, make_optimizer, clip, meshes)

"""What of a model lies on which rank of a pipeline: the parts that its stages compute, and the modules that these ask for."""

from collections.abc import Sequence

from torch import nn

from model.transformer import Part, Transformer
from parallel.layout import Layout

EMBEDDING = "model.embed_tokens.weight"


class Absent(nn.Module):
    """In the place of a module that lies on another rank."""


def parts_of(layout: Layout) -> list[Part]:
    """What each stage computes."""
    placement = layout.placement
    last = len(placement.layers) - 1
    return [Part(layers, stage == 0, stage == last) for stage, layers in enumerate(placement.layers)]


def keep_parts(model: Transformer, parts: Sequence[Part]) -> None:
    """Take out of a model what none of the parts asks for. What stays keeps its name."""
    config, decoder = model.config, model.model
    has_last = any(part.last for part in parts)
    layers = {layer for part in parts for layer in part.layers}
    layers |= set(range(config.num_hidden_layers, len(decoder.layers))) if has_last else set()
    for layer in range(len(decoder.layers)):
        if layer not in layers:
            decoder.layers[layer] = Absent()
    if not any(part.first for part in parts) and not (has_last and config.num_nextn_predict_layers):
        decoder.embed_tokens = Absent()  # type: ignore[assignment]
    if not has_last:
        decoder.norm = Absent()  # type: ignore[assignment]
        model.lm_head = Absent()  # type: ignore[assignment]
    here = dict(model.named_modules())
    model.fp8 = {name: fp8 for name, fp8 in model.fp8.items() if name in here}

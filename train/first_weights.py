"""What a run begins with where it continues from no checkpoint: weights of a run, a checkpoint or a Hugging Face folder."""

import json
from typing import Any

import torch

from model.config import ModelConfig
from model.hf import state_shapes
from model.init import Write
from model.transformer import Transformer
from train.config import Recipe, RecipeError
from train.weights import open_weights


@torch.no_grad()
def start_from(model: Transformer, source: str, write: Write) -> None:
    """Take weights of a run, a checkpoint or a Hugging Face folder that has every tensor of the model."""
    weights = open_weights(source)
    check_start(model.config, weights.config, source)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for name, tensor in weights.tensors():
        if name in buffers:
            buffers[name].copy_(tensor)
        elif name in parameters and tensor.dim() < 3:
            write(name, parameters[name], None, tensor.clone)
        elif name in parameters:
            for expert, matrix in enumerate(tensor):
                write(name, parameters[name], expert, matrix.clone)


def began_extended(recipe: Recipe, record: dict[str, Any]) -> bool:
    """Whether the weights that a run continues with, or else begins with, have read their positions by YaRN already."""
    if record:
        return ModelConfig.from_hf(record["model"]).yarn is not None
    source = recipe.run.initialize_from
    return source is not None and open_weights(source).config.yarn is not None


def check_start(config: ModelConfig, theirs: ModelConfig, source: str) -> None:
    """Refuse weights without a tensor of the model, or with one of another shape; where only MTP layers are missing, say so.
    Refuse weights that have learnt to read positions by another YaRN than the model's."""
    if theirs.yarn is not None and theirs.yarn != config.yarn:
        keys = ("rope_scaling", "max_position_embeddings")
        fix = " ".join(f"model.{key}='{json.dumps(theirs.to_hf()[key])}'" for key in keys)
        raise RecipeError(
            f"run.initialize_from = {source}: YaRN has extended its context by a factor of {theirs.yarn.factor:g}, and the "
            f"model has {'another' if config.yarn else 'none'}; positions must keep their angles; write {fix}"
        )
    found = state_shapes(theirs)

    def unlike(config: ModelConfig) -> tuple[str, torch.Size] | None:
        shapes = ((name, tensor.shape) for name, tensor in state_shapes(config).items())
        return next((own for own in shapes if own[0] not in found or found[own[0]].shape != own[1]), None)

    if (own := unlike(config)) is None:
        return
    name, shape = own
    there = f"is {list(found[name].shape)} there" if name in found else "is not there"
    fix = "give the model section the dimensions of the weights"
    depths = theirs.num_nextn_predict_layers
    if unlike(config.override({"num_nextn_predict_layers": depths})) is None:
        fix = f"{'' if depths else 'export with --mtp, or '}set model.num_nextn_predict_layers={depths}"
    raise RecipeError(
        f"run.initialize_from = {source}: the model's {name} {list(shape)} {there}; the weights must have every tensor of the "
        f"model; {fix}"
    )

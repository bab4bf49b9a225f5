"""What a run amounts to, from its recipe alone: parameters, FLOPs, tokens, steps, memory of one process."""

from typing import Any

import torch

from model.flops import activation_bytes, flops_mfu, flops_scaling, parameter_counts, state_bytes
from train.config import Recipe
from train.schedule import Schedule


def amounts(recipe: Recipe, schedule: Schedule, world_size: int) -> dict[str, Any]:
    """Numbers of a run on `world_size` processes under DDP, where every one holds the whole model.

    The device is the one that the recipe names, or else this machine's.
    Memory counts fp32 parameters and gradients, the two moments, and what one micro-batch keeps for its backward pass; not the
    allocator's slack, nor buffers of single operations.
    """
    config = recipe.model_config_resolved()
    length = recipe.data.sequence_length
    counts = parameter_counts(config)
    state = state_bytes(config, moment_size=4 if recipe.precision.moments == "fp32" else 2)
    on_gpu = recipe.run.device == "cuda" or (recipe.run.device == "auto" and torch.cuda.is_available())
    element = {"fp32": 4, "bf16": 2, "fp16": 2}[recipe.precision.compute or ("bf16" if on_gpu else "fp32")]
    activations = activation_bytes(
        config, recipe.parallel.micro_batch, length, element, recipe.parallel.recompute, "cuda" if on_gpu else "cpu"
    )
    per_token = flops_mfu(config, length)
    return {
        "total_parameters": counts.total,
        "mtp_parameters": counts.mtp,
        "active_parameters": counts.active,
        "tokens": schedule.final_tokens,
        "steps": schedule.total_steps,
        "tokens_per_parameter": schedule.final_tokens / counts.total,
        "flops_per_token": per_token,
        "flops_per_token_for_scaling_laws": flops_scaling(config, length),
        "total_flops": per_token * schedule.final_tokens,
        "bytes_of_parameters_gradients_moments": state,
        "bytes_of_activations": activations,
        "peak_bytes_per_rank": state + activations,
        "world_size": world_size,
    }

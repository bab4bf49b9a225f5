"""What a run amounts to, from its recipe and a number of processes alone: parameters, FLOPs, tokens, steps, memory of a process."""

from typing import Any

import torch

from model.activations import activation_bytes, working_bytes
from model.flops import flops_mfu, flops_scaling, parameter_counts
from parallel.ds_config import ds_config
from parallel.footprint import footprint, peak_bytes
from parallel.layout import Layout
from train.config import Recipe
from train.planning.advice import law_advice
from train.schedule import Schedule, Span

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def amounts(recipe: Recipe, schedule: Schedule, world_size: int) -> dict[str, Any]:
    """Numbers of a run on `world_size` processes, those of memory for the fullest of them in its largest steps.

    The device is the one that the recipe names, or else this machine's. On it lie the parts of parameters, gradients and moments
    that the layout gives a process, what it gathers of others (`parallel.footprint`), what one micro-batch keeps for its
    backward pass, and what a block needs at work; not counted are the allocator's slack and buffers of the communication. On the
    host lie what is offloaded and the average of the weights.

    Raises:
        LayoutError: the layout does not fit the number of processes, the model, or a batch of the schedule, or the user's ds_config
            contradicts the recipe.
    """
    config = recipe.model_config_resolved()
    layout = recipe.layout(world_size)
    schedule.check_layout(layout, recipe.micro_batch)
    if layout.config.deepspeed:
        device = torch.device("cuda" if recipe.on_gpu else "cpu")
        ds_config(layout.config, DTYPES[recipe.compute], recipe.optimizer.clip, device)
    counts = parameter_counts(config)
    first = schedule.spans[0].sequence_length
    flops = sum(flops_mfu(config, span.sequence_length) * (span.end - span.first_token) for span in schedule.spans)
    by_size = sorted(schedule.spans, key=lambda span: span.batch_tokens)
    largest = {(span.sequence_length, recipe.micro_batch(span.first_token)): span for span in by_size}
    memories = [_memory(recipe, layout, span) for span in largest.values()]
    return {
        "total_parameters": counts.total,
        "mtp_parameters": counts.mtp,
        "active_parameters": counts.active,
        "tokens": schedule.final_tokens,
        "steps": schedule.total_steps,
        "tokens_per_parameter": schedule.final_tokens / counts.total,
        "flops_per_token": flops_mfu(config, first),
        "flops_per_token_for_scaling_laws": flops_scaling(config, first),
        "total_flops": flops,
        **_law(recipe),
        **max(memories, key=lambda held: held["peak_bytes_per_rank"]),
        "world_size": world_size,
    }


def _law(recipe: Recipe) -> dict[str, float]:
    """What the recipe's law says, in numbers."""
    advice = law_advice(recipe)
    if advice is None:
        return {}
    said = {"learning_rate_of_the_law": advice.lr, "batch_tokens_of_the_law": advice.batch_tokens}
    numbers = {name: estimate.value for name, estimate in said.items() if estimate is not None}
    return numbers | {"decades_outside_of_the_law": max(advice.distances.values(), default=0.0)}


def _memory(recipe: Recipe, layout: Layout, span: Span) -> dict[str, int]:
    """Bytes of a process that are alive at once, in a step of this kind."""
    config, sequences = recipe.model_config_resolved(), span.sequences
    micro_batch = recipe.micro_batch(span.first_token)
    compute = DTYPES[recipe.compute]
    moment = {"fp32": 4, "bf16": 2}[recipe.precision.moments]
    micro_batches = -(-sequences // (layout.world_size * micro_batch))
    held = footprint(layout, config, compute.itemsize, moment, micro_batches)
    common: dict[str, Any] = {
        "micro_batch": min(micro_batch, sequences // layout.world_size),
        "sequence_length": span.sequence_length,
        "element_size": compute.itemsize,
        "recompute": layout.config.recompute,
        "device": "cuda" if recipe.on_gpu else "cpu",
        "casts_weights": layout.config.engine != "fsdp",  # which gathers them in the compute dtype
        "fp8": layout.config.fp8,
    }
    activations = sum(
        activation_bytes(
            config, **common, spreads_experts=layout.config.expert > 1, fp8_dispatch=layout.config.fp8_dispatch
        ).values()
    )
    working = working_bytes(config, **common)
    holders = layout.world_size if layout.config.engine == "ddp" else layout.shard  # of one average of the weights
    average = 4 * -(-parameter_counts(config).trainable // holders) if recipe.optimizer.ema else 0
    return {
        "bytes_of_parameters": held.parameters,
        "bytes_of_gradients": held.gradients,
        "bytes_of_moments": held.moments,
        "bytes_of_gathered_modules": held.gathered,
        "bytes_of_activations": activations,
        "bytes_of_a_block_at_work": working,
        "peak_bytes_per_rank": peak_bytes(layout, config, held, activations, working, micro_batches),
        "host_bytes_per_rank": held.host + average * (2 if recipe.on_gpu else 1),
    }

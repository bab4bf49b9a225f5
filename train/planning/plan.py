"""What a run amounts to, from its recipe and a number of processes alone: parameters, FLOPs, tokens, steps, memory of a process."""

from typing import Any

import torch

from model.flops import flops_mfu, flops_scaling, parameter_counts
from parallel.ds_config import ds_config
from parallel.footprint import footprint, peak_bytes, shapes_on, under_way
from parallel.layout import Layout
from parallel.placement import Placement, describe
from parallel.timeline import Costs, order_of, timeline
from parallel.traffic import step_traffic
from train.config import Recipe
from train.planning.advice import law_advice
from train.schedule import Schedule, Span

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def amounts(recipe: Recipe, schedule: Schedule, world_size: int) -> dict[str, Any]:
    """Numbers of a run on `world_size` processes, those of memory for the fullest of them in its largest steps, those of a step for
    the largest.

    The device is the one that the recipe names, or else this machine's. On it lie the parts of parameters, gradients and moments
    that the layout gives a process, what it gathers of others (`parallel.footprint`), what a micro-batch, or those under way in a
    pipeline, keep for their backward pass, and what a block needs at work; not counted are the allocator's slack and buffers of the
    communication. On the host lie what is offloaded and the average of the weights.

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
    ranks = range(layout.config.pipeline)
    memories = [_memory(recipe, layout, span, rank) for span in largest.values() for rank in ranks]
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
        **_step(recipe, layout, by_size[-1]),
    }


def _law(recipe: Recipe) -> dict[str, float]:
    """What the recipe's law says, in numbers."""
    advice = law_advice(recipe)
    if advice is None:
        return {}
    said = {"learning_rate_of_the_law": advice.lr, "batch_tokens_of_the_law": advice.batch_tokens}
    numbers = {name: estimate.value for name, estimate in said.items() if estimate is not None}
    return numbers | {"decades_outside_of_the_law": max(advice.distances.values(), default=0.0)}


def _memory(recipe: Recipe, layout: Layout, span: Span, pipeline_rank: int) -> dict[str, int]:
    """Bytes of a process of a pipeline rank that are alive at once, in a step of this kind."""
    config, compute = recipe.model_config_resolved(), DTYPES[recipe.compute]
    micro_batch, micro_batches = micro_batches_of(recipe, layout, span)
    moment = {"fp32": 4, "bf16": 2}[recipe.precision.moments]
    held = footprint(layout, config, compute.itemsize, moment, micro_batches, pipeline_rank)
    activations = under_way(
        layout,
        config,
        pipeline_rank,
        sequence_length=span.sequence_length,
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        element_size=compute.itemsize,
        device="cuda" if recipe.on_gpu else "cpu",
    )
    holders = layout.stage_ranks if layout.config.engine == "ddp" else layout.shard  # of one average of the weights
    here = sum(shape.numel() for shape in shapes_on(layout, config, pipeline_rank).values())
    average = 4 * -(-here // holders) if recipe.optimizer.ema else 0
    return {
        "bytes_of_parameters": held.parameters,
        "bytes_of_gradients": held.gradients,
        "bytes_of_moments": held.moments,
        "bytes_of_gathered_modules": held.gathered,
        "bytes_of_activations": activations.kept,
        "bytes_of_a_block_at_work": activations.working,
        "peak_bytes_per_rank": peak_bytes(layout, config, held, activations.kept, activations.working, micro_batches),
        "host_bytes_per_rank": held.host + average * (2 if recipe.on_gpu else 1),
        **({"fullest_pipeline_rank": pipeline_rank} if layout.config.pipeline > 1 else {}),
    }


def _step(recipe: Recipe, layout: Layout, span: Span) -> dict[str, Any]:
    """What a step costs: FLOPs of the process that has the most to do, bytes that one sends at most, and, in a pipeline, the share
    of the step in which a process waits, in the mean."""
    config, c = recipe.model_config_resolved(), layout.config
    micro_batch, micro_batches = micro_batches_of(recipe, layout, span)
    tokens = micro_batch * micro_batches * span.sequence_length // c.context
    ranks = range(c.pipeline)
    sent = [
        sum(
            flow.sent
            for flow in step_traffic(
                layout,
                config,
                tokens=tokens,
                micro_batches=micro_batches,
                element_size=DTYPES[recipe.compute].itemsize,
                pipeline_rank=rank,
            )
        )
        for rank in ranks
    ]
    flops = flops_mfu(config, span.sequence_length) * span.batch_tokens / layout.stage_ranks
    of_others = _flops_of_others(recipe, layout) * span.batch_tokens / layout.stage_ranks
    numbers = {"micro_batches_per_step": micro_batches, "bytes_sent_per_step": round(max(sent))}
    if c.pipeline == 1:
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        return {"flops_per_step_and_rank": flops + of_others * layers, **numbers}
    placement = layout.placement
    return {
        "flops_per_step_and_rank": max(
            flops * placement.load_of(rank) + of_others * _layers_on(placement, rank) for rank in ranks
        ),
        **numbers,
        "bubble": bubble_share(layout, micro_batches, recipe.compute),
        "placement": describe(placement),
    }


def _flops_of_others(recipe: Recipe, layout: Layout) -> int:
    """FLOPs of a layer, for each token of a rank's own, for tokens of the ranks that share its sequences: it makes the keys and
    values of these too, and again where the backward pass recomputes. No convention of `model.flops` counts them."""
    c = recipe.model_config_resolved()
    once = 2 * c.kv_lora_rank * c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
    return (layout.config.context - 1) * once * (3 if recipe.recompute == "none" else 4)


def _layers_on(placement: Placement, rank: int) -> int:
    """With MTP modules."""
    stages = placement.stages_of(rank)
    has_last = len(placement.layers) - 1 in stages
    return sum(len(placement.layers[stage]) for stage in stages) + (placement.mtp if has_last else 0)


def bubble_share(layout: Layout, micro_batches: int, compute: str) -> float:
    """Share of the time of all pipeline ranks in which they wait. From two numbers of micro-batches that fill the pipeline on, each
    further one takes as long as the one before.

    Forward pass, gradients of inputs and gradients of weights cost the same, as do a forward and a backward pass at the same time
    and one after the other. Where the engine casts weights first (`model.ops.weight_gradient`), both gradients are made at once.
    """
    c, placement = layout.config, layout.placement
    puts_aside = c.engine == "fsdp" or c.fp8 or compute == "fp32"
    costs = Costs() if puts_aside else Costs(1, 2, 0)
    sizes = [cost * c.stages for cost in placement.costs]

    def span(number: int) -> float:
        chunks = timeline(order_of(c.schedule, c.pipeline, c.stages // c.pipeline, number), costs, sizes)
        return max(chunk.end for rank in chunks for chunk in rank)

    few, more = 2 * c.stages, 2 * c.stages + c.pipeline
    if micro_batches <= more:
        whole = span(micro_batches)
    else:
        first = span(few)
        whole = first + (span(more) - first) * (micro_batches - few) / c.pipeline
    work = costs.all * sum(sizes) * micro_batches / c.pipeline  # of a rank, in the mean
    return 1 - work / whole


def micro_batches_of(recipe: Recipe, layout: Layout, span: Span) -> tuple[int, int]:
    """Sequences in a micro-batch, and micro-batches of a rank, in a step of this kind."""
    share = span.sequences // layout.data_ranks
    micro_batch = min(recipe.micro_batch(span.first_token), share)
    return micro_batch, -(-share // micro_batch)

"""From a recipe to the engine that trains it: a model, what computes it on this device, its optimizer, spread over processes."""

from functools import partial
from typing import NamedTuple

import torch

from model.config import ModelConfig
from model.ops.attention import AttentionBackend
from model.ops.attention.choose import Workload
from model.ops.attention.choose import choose as choose_attention
from model.ops.fp8.choose import choose, kernels_for, workloads
from model.ops.grouped_mm import examine as examine_experts
from model.transformer import Transformer
from parallel.build import build_engine
from parallel.compiled import compile_blocks
from parallel.engine import Engine, Fill
from parallel.layout import Layout
from parallel.recompute import apply_recompute
from train.config import Recipe
from train.launch import Process
from train.optimizer import build_optimizer
from train.planning.step import DTYPES
from train.ranks import Ranks


class Assembled(NamedTuple):
    """An engine, and who computes in it."""

    engine: Engine
    attention: AttentionBackend
    told: list[str]  # what was chosen, and how fast it is


def assemble(
    recipe: Recipe, layout: Layout, process: Process, ranks: Ranks, config: ModelConfig, fill: Fill
) -> Assembled:
    """Collective.

    Args:
        ranks: all of the run; the first of them chooses what computes.
        config: of the model as its next step has it.
        fill: gives the model its first weights.
    """
    compute, recompute, context = DTYPES[recipe.compute], layout.config.recompute, layout.config.context
    fp8 = kernels_for(process.device) if recipe.precision.fp8 else None
    of_experts = [] if fp8 else examine_experts(config, compute, process.device)
    masked, length = recipe.data.mask_documents, recipe.data.sequence_length
    pieces = 2 * context if context > 1 else 1
    attends = Workload(config, recipe.micro_batch(0), length, masked, compute, recompute == "selective", pieces)
    attention, who_attends = choose_attention(recipe.run.attention, attends, process.device, ranks.first)
    with torch.device("meta"):
        model = Transformer(config, compute_dtype=compute, attention=attention, mask_documents=masked, fp8=fp8)
    rows = recipe.micro_batch(0) * length // context
    products = partial(workloads, model, rows, rows * config.num_experts_per_tok, recipe.parallel.expert, compute)
    who_multiplies = choose(fp8, process.device, products, ranks.first) if fp8 else []
    if process.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(process.device)  # what was tried is no part of the run
    apply_recompute(model, recompute)
    compile_blocks(model, recipe.run.compile)
    optimizer = partial(build_optimizer, settings=recipe.optimizer, moments=recipe.precision.moments)
    engine = build_engine(layout, model, process.device, fill, optimizer, recipe.optimizer.clip)
    engine.fp8_max_scale = recipe.precision.fp8_max_scale
    return Assembled(engine, attention, who_attends + who_multiplies + of_experts)

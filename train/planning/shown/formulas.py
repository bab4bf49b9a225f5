"""How each figure of a plan is computed: a line, with the functions that hold the equation."""

from textwrap import wrap
from typing import Any

from train.config import RecipeError
from train.planning.plan import Plan
from train.planning.written import duration, figure, share, size, words

WIDTH = 128

# Of `RankMemory`.
_MEMORY = {
    "when": "the moment of a step at which most is alive, of which all bytes are said: `parallel.peak.moments_of`",
    "parameters": "4 bytes for each element that the layout gives the process, and whole routers' biases: "
    "`parallel.footprint.footprint`",
    "gradients": "of those of its part, 4 bytes for each element, what is there at the peak, and of others' until they are sent: "
    "`parallel.peak.moments_of`",
    "moments": "2 · m bytes for each element of its part, m = 4 or, with precision.moments: bf16, 2: "
    "`parallel.footprint.footprint`",
    "gathered": "parameters that others keep, as they arrive and as they are used, at the peak: `parallel.peak.moments_of`",
    "communication": "gradients that are sent, rows of tokens, states, and DeepSpeed's bucket, at the peak: "
    "`parallel.peak.moments_of`",
    "activations": "what forward passes under way leave for their backward passes, bytes a token by operation: "
    "`parallel.peak.moments_of` of `model.activations.layer_bytes`",
    "working": "the tensors of a layer at work at the peak, or a chunk of logits: `model.activations.layer_bytes`, "
    "`model.activations.loss_bytes`",
    "peak": "the sum of these at the moment of a step when it is largest: `parallel.peak.fullest`",
    "host": "what is offloaded, and the average of the weights, 4 bytes an element of the process's part, twice beside a "
    "GPU: `train.planning.memory.memory_of`",
}

# Of `Plan.numbers()`, and before them the fields of `RankMemory`.
FORMULAS = {
    **_MEMORY,
    "pipeline_rank": "whose memory it is",
    "total_parameters": "elements of the main model's tensors, routers' biases among them: `model.flops.parameter_counts`",
    "mtp_parameters": "elements of the MTP modules without the embedding and head that they share: `model.flops.parameter_counts`",
    "active_parameters": "those that one token uses: K of E experts, no embedding: `model.flops.parameter_counts`",
    "tokens": "schedule.tokens, rounded up to whole batches: `train.schedule.Schedule`",
    "steps": "tokens over the batch, stage by stage of a growing batch: `train.schedule.spans`",
    "tokens_per_parameter": "tokens / total_parameters",
    "flops_per_token": "3 · 2 · elements of matrices that a token uses, and causal attention over T/2 keys, at the T of the "
    "largest step: "
    "`model.flops.flops_mfu`",
    "flops_per_token_for_scaling_laws": "the same without head and MTP, attention over T keys, at the same T: "
    "`model.flops.flops_scaling`",
    "total_flops": "Σ of FLOPs a token · tokens over the run's stages, each at its own T: `model.flops.flops_mfu`",
    "learning_rate_of_the_law": "what the recipe's law says for its model and tokens: `train.scaling.apply.advise`",
    "batch_tokens_of_the_law": "likewise: `train.scaling.apply.advise`",
    "decades_outside_of_the_law": "log₁₀ of how far N, D or C is from what the law was measured on: `train.scaling.apply.advise`",
    "bytes_of_parameters": _MEMORY["parameters"],
    "bytes_of_gradients": _MEMORY["gradients"],
    "bytes_of_moments": _MEMORY["moments"],
    "bytes_of_gathered_modules": _MEMORY["gathered"],
    "bytes_of_messages": _MEMORY["communication"],
    "bytes_of_activations": _MEMORY["activations"],
    "bytes_of_a_block_at_work": _MEMORY["working"],
    "peak_bytes_per_rank": _MEMORY["peak"],
    "host_bytes_per_rank": _MEMORY["host"],
    "fullest_pipeline_rank": "the pipeline rank with the largest peak, of which all bytes are said: `train.planning.plan.Plan`",
    "world_size": "processes, one on each device: --gpus, or the launcher's",
    "flops_per_step_and_rank": "flops_per_token · tokens of a process in the largest step, without what is recomputed, and three "
    "passes over the keys and values that it makes of others' tokens of a shared sequence; in a pipeline of the rank whose layers "
    "cost most: `parallel.placement.Placement`",
    "micro_batches_per_step": "⌈sequences of a step / processes that read different ones / micro_batch⌉: "
    "`train.planning.step.PlannedStep`",
    "bytes_sent_per_step": "where no link is known: Σ over collectives on a ring, all-reduce 2(n−1)/n · S, others (n−1)/n · S, "
    "of the pipeline rank that sends most: `parallel.traffic.step_traffic`",
    "bubble": "1 − work of all ranks / (ranks · span), PyTorch's order of the schedule played through with the seconds of each "
    "stage's passes, or with their FLOPs where no device is known: `train.planning.step.bubble_share`",
    "placement": "the least largest rank, then stage, by FLOPs: `parallel.placement.place`",
    "fits": "peak_bytes_per_rank ≤ usable_bytes_per_device; the host is not judged: `train.planning.plan.Plan`",
    "device": "the table's name of it: `train.planning.devices.find_device`",
    "usable_bytes_per_device": "memory as sold, less what context, communicators and allocator take: "
    "`train.planning.devices.Device`",
    "step_seconds": "Σ of the terms below, of the largest step: `train.planning.speed.step_time.step_time`",
    "tokens_per_second_per_device": "tokens of the step / step_seconds / world_size",
    "mfu": "flops_per_token · tokens_per_second_per_device / the device's peak in the recipe's precision",
    "days": "Σ over the run's steps of their seconds / 86,400: `train.planning.plan.Plan`",
    "gpu_hours_per_trillion_tokens": "10¹² / tokens_per_second_per_device / 3,600",
    "imbalance": "rows that arrive at the fullest expert rank over the mean, at most as many as there are such ranks: --imbalance",
    "bytes_sent_in_node_per_step": "Σ over collectives of what goes between devices of a node, tokens to experts · imbalance, of "
    "the process that sends or receives most there: `train.planning.speed.step_time.step_time`",
    "bytes_sent_between_nodes_per_step": "likewise between nodes; it may be another process: "
    "`train.planning.speed.step_time.step_time`",
}


def explain(plan: Plan, key: str) -> list[str]:
    """A number's value and formula, with what it consists of; `all`: of every number.

    Raises:
        RecipeError: the plan has no such number.
    """
    numbers = plan.numbers()
    if key == "all":
        return [line for name, value in numbers.items() for line in _explained(plan, name, value)]
    if key not in numbers:
        raise RecipeError(f"explain = {key!r}: is no number of this plan; give all, or one of {', '.join(numbers)}")
    return _explained(plan, key, numbers[key])


def _explained(plan: Plan, key: str, value: Any) -> list[str]:
    lines = [f"{words(key)} = {figure(key, value)}" if not isinstance(value, list) else words(key)]
    if isinstance(value, list):
        lines += [f"    {line}" for line in value]
    elif "bytes" in key:
        lines[0] += f" ({size(value)})"
    lines += wrap(FORMULAS[key], WIDTH, initial_indent="    ", subsequent_indent="    ")
    if key == "step_seconds" and plan.time:
        for term in plan.time.terms:
            line = f"    {duration(term.seconds):>8} {share(term.seconds, value):>7}  {term.name}: {term.formula}"
            lines += wrap(line, WIDTH, subsequent_indent=" " * 24)
    return lines

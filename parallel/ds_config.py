"""A recipe as DeepSpeed's configuration (ds_config), with a user's own merged in.

What the recipe says is said once. A key of the user's that says the same, or Hugging Face's "auto", is accepted; one that says
otherwise is an error that names both; one that tunes how DeepSpeed works, but not what it computes, passes through.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from parallel.layout import LayoutError, ParallelConfig

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
OFFLOADS = ("offload_optimizer", "offload_param")
AUTO = "auto"

TUNING = {
    "comet", "comms_logger", "csv_monitor", "disable_python_gc", "dump_state", "flops_profiler", "log_level",
    "memory_breakdown", "steps_per_print", "tensorboard", "timers", "wall_clock_breakdown", "wandb",
}  # fmt: skip
ZERO_TUNING = {
    "allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "enable_sanity_checks",
    "log_trace_cache_warnings", "overlap_comm", "parameter_alignment", "reduce_bucket_size", "reduce_scatter",
    "stage3_allgather_sequential", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold", "stage3_module_granularity_threshold", "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size", "stage3_use_all_reduce_for_fetch_params", "sub_group_size",
    "use_multi_rank_bucket_allreduce",
}  # fmt: skip
OFFLOAD_TUNING = {"buffer_count", "buffer_size", "max_in_cpu", "pin_memory"}


def ds_config(
    config: ParallelConfig, compute_dtype: torch.dtype, clip: float | None, device: torch.device
) -> dict[str, Any]:
    """What `deepspeed.initialize` is given. Parameters, gradients and their reduction are fp32; the model casts by itself.

    Args:
        config: its engine is zero1, zero2 or zero3; its `deepspeed` is the user's own ds_config.
        compute_dtype, clip: `precision.compute` and `optimizer.clip`, with which the user's keys are compared.
        device: host memory is pinned beside a GPU only.

    Raises:
        LayoutError: the user's ds_config contradicts the recipe, or has a key that is not for it to say.
    """
    offloads = OFFLOADS[: {"none": 0, "optimizer": 1, "all": 2}[config.offload]]
    zero: dict[str, Any] = {
        "stage": STAGES[config.engine],
        "memory_efficient_linear": False,  # it replaces torch.nn.functional.linear for the whole process
        **{section: {"device": "cpu", "pin_memory": device.type == "cuda"} for section in offloads},
    }
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": 1,  # their number changes; the engine says which micro-batch is a step's last
        "gradient_clipping": 0.0,  # done before DeepSpeed's step
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # AdamW with bf16 moments
        "zero_force_ds_cpu_optimizer": False,  # PyTorch's fused AdamW runs on host memory too, and needs no compiler
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a micro-batch
    }
    said = dict(_said_by_recipe(config, compute_dtype, clip))
    for path, value in _leaves(config.deepspeed):
        key = ".".join(path)
        if value in (AUTO, None):
            continue
        if key in said:
            if value not in said[key].accepted:
                raise LayoutError(f"parallel.deepspeed.{key} = {_show(value)}: {said[key]}")
        elif not _tunes(path):
            raise LayoutError(
                f"parallel.deepspeed.{key} = {_show(value)}: is not passed on to DeepSpeed; what passes is "
                f"{', '.join(sorted(TUNING))}, and of zero_optimization {', '.join(sorted(ZERO_TUNING))}; drop it"
            )
        else:
            _put(derived, path, value)
    for section in OFFLOADS[len(offloads) :]:
        zero.pop(section, None)  # tuned, but not in use
    return derived


def _tunes(path: tuple[str, ...]) -> bool:
    """Whether a key says how DeepSpeed works, not what it computes."""
    match path:
        case ("zero_optimization", "offload_optimizer" | "offload_param", key):
            return key in OFFLOAD_TUNING
        case ("zero_optimization", key):
            return key in ZERO_TUNING
        case (section, *_):
            return section in TUNING
    return False


class _Said(NamedTuple):
    """What the recipe says of a key, and where."""

    accepted: tuple[Any, ...]
    by: str

    def __str__(self) -> str:
        says = f"the recipe says {_show(self.accepted[0])} ({self.by})" if self.accepted else f"is said by {self.by}"
        return f"{says}; drop it, or change the recipe" if self.accepted else f"{says}; drop it"


def _said_by_recipe(
    config: ParallelConfig, compute_dtype: torch.dtype, clip: float | None
) -> Iterator[tuple[str, _Said]]:
    engine = f"parallel.engine = {config.engine}"
    offload = f"parallel.offload = {config.offload}"
    compute = f"precision.compute = {str(compute_dtype).removeprefix('torch.')}"
    reduction = "Rorqual: gradients are summed in fp32"
    yield "zero_optimization.stage", _Said((STAGES[config.engine],), engine)
    yield "zero_optimization.offload_optimizer.device", _Said(("none" if config.offload == "none" else "cpu",), offload)
    yield "zero_optimization.offload_param.device", _Said(("cpu" if config.offload == "all" else "none",), offload)
    yield "zero_optimization.memory_efficient_linear", _Said((False,), "Rorqual")
    yield "train_micro_batch_size_per_gpu", _Said((config.micro_batch,), "parallel.micro_batch")
    yield "train_batch_size", _Said((), "schedule.batch_tokens")
    yield "gradient_accumulation_steps", _Said((), "schedule.batch_tokens and parallel.micro_batch")
    yield "gradient_clipping", _Said((clip or 0.0,), "optimizer.clip")
    yield "bf16.enabled", _Said((compute_dtype is torch.bfloat16,), compute)
    yield "fp16.enabled", _Said((compute_dtype is torch.float16,), compute)
    yield "torch_autocast.enabled", _Said((False,), f"{compute}, the model casts by itself")
    yield "communication_data_type", _Said(("fp32",), reduction)
    yield "data_types.grad_accum_dtype", _Said(("fp32",), reduction)
    yield "gradient_predivide_factor", _Said((1.0,), reduction)
    yield "prescale_gradients", _Said((False,), reduction)
    yield "optimizer.type", _Said(("AdamW", "Adam", "adamw", "adam"), "the section optimizer")
    yield "zero_allow_untested_optimizer", _Said((True,), "Rorqual")
    yield "zero_force_ds_cpu_optimizer", _Said((False,), "Rorqual")
    if config.expert > 1:  # the paths for which DeepSpeed knows experts
        for key in ("contiguous_gradients", "reduce_scatter"):
            yield f"zero_optimization.{key}", _Said((True,), f"parallel.expert = {config.expert}")
    for key in ("optimizer.params.torch_adam", "optimizer.params.adam_w_mode"):
        yield key, _Said((True,), "the section optimizer")
    for key in ("optimizer.params.lr", "scheduler.type"):
        yield key, _Said((), "the section schedule")
    for key in ("optimizer.params.betas", "optimizer.params.eps", "optimizer.params.weight_decay"):
        yield key, _Said((), "the section optimizer")


def _leaves(value: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _leaves(item, (*path, key))
        else:
            yield (*path, key), item


def _put(config: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    *sections, key = path
    for section in sections:
        config = config.setdefault(section, {})
    config[key] = value


def _show(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

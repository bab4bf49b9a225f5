"""The sections of a recipe, one frozen model each. A section checks itself; what spans sections is checked in `train.config`.

Every key is written out with its default.
"""

import dataclasses
import json
from collections import Counter
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationInfo,
    field_validator,
    model_validator,
)

from model.config import ModelConfig, load_preset
from train.fields import (
    BatchTokens,
    CompileMode,
    Count,
    Curve,
    Decay,
    Milestones,
    Name,
    NonNegative,
    Points,
    Positive,
    PositiveCount,
    Rate,
    Share,
    WholePoints,
    mistake,
    whole_number,
)
from train.published import PUBLISHED, published


class Section(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """`preset` or `config`, and any field of `ModelConfig` that shall differ from it."""

    model_config = ConfigDict(extra="allow")

    preset: Name | None = None  # tiny, small, v2-lite, v3
    config: Name | None = None  # path of a Hugging Face config.json

    @model_validator(mode="after")
    def _fields_exist(self) -> Self:
        if (self.preset is None) == (self.config is None):
            given = "neither preset nor config" if self.preset is None else "both preset and config"
            raise mistake(f"has {given}", "give one of model.preset=tiny and model.config=PATH, the other null")
        for name, value in self.overrides.items():
            if name not in self.fields():
                raise mistake("unknown key", "", field=name, value=value, unknown=True)
        return self

    @property
    def overrides(self) -> dict[str, Any]:
        return self.model_extra or {}

    @staticmethod
    def fields() -> dict[str, Any]:
        """Names and types of the fields of a model."""
        return {field.name: field.type for field in dataclasses.fields(ModelConfig)}

    def resolve(self) -> ModelConfig:
        """The model of this section.

        Raises:
            ConfigError: no such preset, or a value that breaks a rule of the model.
            OSError, ValueError: `config` cannot be read, or is not a JSON map.
        """
        return self._resolved

    @cached_property
    def _resolved(self) -> ModelConfig:
        base = load_preset(self.preset) if self.preset else json.loads(Path(str(self.config)).read_text("utf-8"))
        if not isinstance(base, dict):
            raise ValueError(f"its top level is a {type(base).__name__}")
        types = self.fields()
        changes = {
            name: int(value)
            if isinstance(value, float) and value.is_integer() and types[name] in (int, int | None)
            else value
            for name, value in self.overrides.items()
        }
        return ModelConfig.from_hf(base).override(changes)


class Source(Section):
    """A token store in the mixture."""

    path: Name
    weight: Positive = 1.0  # relative to the other sources
    max_epochs: Positive | None = None  # the source is not drawn from beyond this many passes


def _as_sources(value: Any) -> Any:
    """A bare path stands for one source of weight 1, alone or in a list."""
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list | tuple) or not value:
        raise mistake("must be a token store or a list of {path, weight, max_epochs}", "write data.train=STORE")
    return [{"path": source} if isinstance(source, str) else source for source in value]


Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_sources)]


Packing = Literal["concat", "best_fit"]
SampleRanges = tuple[tuple[Count, Count], ...]


class Stage(Section):
    """What changes in the data at a token count; what is left out stays as it was before."""

    from_tokens: PositiveCount  # begins with the first step that starts at or after so many tokens
    train: Sources | None = None
    sequence_length: PositiveCount | None = None
    packing: Packing | None = None
    micro_batch: PositiveCount | None = None  # a longer sequence may want fewer of them at once

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        values = {name: value for name, value in self if name != "from_tokens"}
        if all(value is None for value in values.values()):
            raise mistake(
                f"changes nothing; it may give {', '.join(values)}", "leave the stage out or give one of them"
            )
        return self


@dataclasses.dataclass(frozen=True)
class Consumption:
    """The data of a run from a token count on: what its stages up to there come to."""

    from_tokens: int
    train: tuple[Source, ...]
    sequence_length: int
    packing: Packing
    micro_batch: int | None  # None: that of the section `parallel`


class DataSection(Section):
    train: Sources
    validation: Sources | None = None  # None: the validation split of each store in `train`
    sequence_length: PositiveCount  # T, tokens
    mask_documents: StrictBool = False  # attention stays inside its document; DeepSeek-V3 does not mask
    packing: Packing = (
        "concat"  # best_fit: a document that fits into a sequence is not cut, and some positions are padding
    )
    stages: tuple[Stage, ...] = ()  # what changes during the run: other stores or weights, a longer context
    passed_over: SampleRanges = ()  # [[first, last], …] samples that are not trained on (`train.guard.passed_over`)
    workers: Count = 1  # processes that read ahead; 0: the run reads by itself, between its steps
    seed: Count = 0  # of the sample order

    @field_validator("passed_over")
    @classmethod
    def _ranges_follow_one_another(cls, ranges: SampleRanges) -> SampleRanges:
        if any(last < first for first, last in ranges) or any(
            next_ <= last for (_, last), (next_, _) in pairwise(ranges)
        ):
            raise mistake("must be [first, last] samples, ascending, none twice", "write for example [[96, 103]]")
        return ranges

    @model_validator(mode="after")
    def _stages_follow_one_another(self) -> Self:
        starts = [stage.from_tokens for stage in self.stages]
        if any(later <= earlier for earlier, later in pairwise(starts)):
            raise mistake("must have growing from_tokens", "sort them", field="stages", value=starts)
        return self

    def consumption(self) -> tuple[Consumption, ...]:
        """The data from 0 tokens on, then from each stage on."""
        states = [Consumption(0, self.train, self.sequence_length, self.packing, None)]
        for stage in self.stages:
            given = {name: value for name, value in stage if value is not None}
            states.append(dataclasses.replace(states[-1], **given))
        return tuple(states)

    @property
    def lengths(self) -> WholePoints:
        """The sequence length as [tokens, T], with an entry for every stage."""
        return tuple((state.from_tokens, state.sequence_length) for state in self.consumption())

    def longest(self, tokens: int) -> int:
        """The longest T of the stages that have begun by the step that starts after `tokens` tokens."""
        return max(length for start, length in self.lengths if start <= tokens)


def _as_ds_config(value: Any) -> Any:
    """A map as it is, or what the JSON file of this path has in it: the recipe keeps the content, whatever becomes of the file."""
    if isinstance(value, str):
        fix = "give the path of a ds_config in JSON, or null"
        try:
            value = json.loads(Path(value).read_text("utf-8"), object_pairs_hook=_with_unique_keys)
        except OSError as error:
            raise mistake(f"cannot be read ({error.strerror})", fix) from None
        except ValueError as error:
            raise mistake(f"is not a JSON file ({error})", fix) from None
    if value is not None and not isinstance(value, dict):
        raise mistake("must be a map, or the path of a JSON file that has one", "write null to leave it out")
    return value


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"it has the key {twice[0]} twice")
    return dict(pairs)


class ParallelSection(Section):
    """How the run lies on its processes. Which keys go together: `parallel.layout`; on how many processes, the launcher says."""

    engine: Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] = "ddp"  # fsdp is FSDP2, zero is DeepSpeed's
    replicate: PositiveCount = 1  # fsdp: copies of the model, each sharded over its part of the processes (HSDP)
    expert: PositiveCount = 1  # processes that share the experts of a layer; tokens travel among them
    pipeline: PositiveCount = 1  # processes over which the layers are spread
    schedule: Literal["1f1b", "interleaved", "zbv", "dualpipev"] = "1f1b"  # of the pipeline
    stages_per_rank: PositiveCount | None = None  # of the pipeline; None: 1 under 1f1b, else 2
    context: PositiveCount = 1  # processes that share each sequence
    micro_batch: PositiveCount = 1  # sequences in one forward pass of one process
    reshard_after_forward: StrictBool | None = (
        None  # fsdp: free gathered parameters after forward; None: not in a pipeline
    )
    offload: Literal["none", "optimizer", "all"] = "none"  # to the host: zero, its optimizer; fsdp and zero3, all
    recompute: Literal["none", "selective", "full"] | None = None  # None: selective on a GPU, none on a CPU
    unproven: StrictBool = False  # run a layout that has no row in parallel/PARITY.md
    deepspeed: Annotated[dict[str, Any] | None, BeforeValidator(_as_ds_config)] = None  # zero: a ds_config, or its path


class PrecisionSection(Section):
    compute: Literal["bf16", "fp16", "fp32"] | None = None  # None: bf16 on a GPU, fp32 on a CPU
    fp8: StrictBool = False  # the matrix products of blocks in E4M3, DeepSeek-V3 §3.3; emulated on a CPU
    fp8_max_scale: Positive = 512  # of inputs and weights; beyond it no number is left between 0 and 1
    fp8_dispatch: StrictBool = False  # tokens travel to other ranks' experts in E4M3 too; changes no bit
    moments: Literal["fp32", "bf16"] = "fp32"  # of Adam; DeepSeek-V3 §3.3.3 keeps bf16


class OptimizerSection(Section):
    """AdamW with DeepSeek's values (V3 §4.2)."""

    name: Literal["adamw"] = "adamw"
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1  # on matrices only
    clip: Positive | None = 1.0  # global gradient norm; None: not clipped
    ema: Share | None = None  # decay per step of the weights' average on the host; None: none is kept


class FromLaw(Section):
    """The numbers of a schedule that a law gave, and which law it was."""

    hash: Name  # of the law (`Law.hash`): its file may be another one by now
    lr: Rate | None = None
    batch_tokens: BatchTokens | None = None
    lr_batch_exponent: NonNegative | None = None

    @property
    def numbers(self) -> dict[str, Any]:
        """By the keys of the schedule that have them."""
        return {name: value for name, value in self if name != "hash" and value is not None}


class ScheduleSection(Section):
    """What changes with the tokens consumed; `train.schedule.Schedule` computes it.

    `preset` starts from a published run, moved in proportion where `tokens` differs; keys beside it win. `batch_tokens: ramp` is
    DeepSeek-V3's, and so are gamma, alpha and lambda where they are not given, all in proportion to `tokens`. What a law decides,
    `auto` and `ramp` beside a `law`, needs the whole recipe: `train.automatic`. Once validated the section holds numbers and lists
    only, so that a written recipe says everything; its `law` and `from_law` then tell where they are from.
    """

    preset: Literal["deepseek-v3", "deepseek-v2", "deepseek-v2-lite", "deepseek-llm-7b", "deepseek-llm-67b"] | None = (
        None
    )
    tokens: PositiveCount  # of the whole run; rounded up to whole batches
    lr: Rate  # the peak, or auto
    batch_tokens: BatchTokens  # tokens of a global batch, or [[tokens, batch_tokens], …], or auto, or ramp
    warmup_steps: Count = 2000  # every DeepSeek model from LLM to V3
    shape: Literal["v3", "multistep", "cosine", "wsd"] = "v3"
    milestones: Milestones | None = (
        None  # multistep: [[fraction of tokens, multiple of lr], …]; None: 31.6% at 80%, 10% at 90%
    )
    law: Name | None = None  # of auto and ramp: a shipped law (step-law, deepseek-llm, …) or the path of a law file
    batch_multiple: PositiveCount = 1  # sequences; a batch that is auto, or a law's ramp, is a multiple of so many
    lr_batch_exponent: NonNegative = 0.0  # while the batch grows, lr · (batch / last batch)^this; a law's ramp has 0.5
    gamma: Curve  # speed of the balancing bias
    alpha: Curve  # weight of the sequence-wise balance loss
    lambda_: Curve = Field(alias="lambda")  # weight of the MTP losses
    from_law: FromLaw | None = None  # written where a law has decided, not by hand

    @field_validator("from_law")
    @classmethod
    def _is_in_use(cls, given: FromLaw | None, info: ValidationInfo) -> FromLaw | None:
        """A key that was given another number since is the law's no more."""
        if given is None:
            return None
        numbers = {name: value for name, value in given.numbers.items() if info.data.get(name) == value}
        return FromLaw(hash=given.hash, **numbers) if numbers else None

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        return cls.filled(given) if isinstance(given, dict) else given

    @classmethod
    def filled(cls, given: dict[str, Any]) -> dict[str, Any]:
        """What was given, with the published values of what was not. Filling twice is filling once."""
        name = str(given.get("preset"))
        preset = PUBLISHED.get(name)
        try:
            tokens = whole_number(given.get("tokens", preset["tokens"] if preset else None), 1)
        except ValueError:
            tokens = PUBLISHED["deepseek-v3"]["tokens"]  # the run's own value is reported where it is validated
        v3 = published("deepseek-v3", tokens)
        base = {key: v3[key] for key in ("gamma", "alpha", "lambda")}
        if preset:
            base |= published(name, tokens)
            if given.get("shape", base["shape"]) != base["shape"]:
                base.pop("milestones", None)
        merged = {**base, **given}
        for key in ("gamma", "alpha", "lambda"):
            merged[key] = v3[key] if merged[key] is None else merged[key]
        if merged.get("batch_tokens") == "ramp" and merged.get("law") is None:
            merged["batch_tokens"] = v3["batch_tokens"]
        if merged.get("shape") == "multistep" and merged.get("milestones") is None:
            merged["milestones"] = PUBLISHED["deepseek-llm-7b"]["milestones"]
        return merged

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.milestones is not None and self.shape != "multistep":
            raise mistake(
                f"belong to shape multistep, not to {self.shape}",
                "leave them out or write schedule.shape=multistep",
                field="milestones",
                value=self.milestones,
            )
        curves: dict[str, float | Points | WholePoints] = {
            "batch_tokens": self.batch_tokens,
            "gamma": self.gamma,
            "alpha": self.alpha,
            "lambda": self.lambda_,
        }
        for name, value in curves.items():
            if isinstance(value, tuple) and value[-1][0] >= self.tokens:
                raise mistake(
                    f"changes at {value[-1][0]:,} tokens, and the run ends at {self.tokens:,}",
                    "drop the entry or raise schedule.tokens",
                    field=name,
                    value=value,
                )
        return self


class EvaluateSection(Section):
    every_steps: PositiveCount | None = None  # None: only at the end of the run
    tokens: PositiveCount | None = None  # in all, shared equally among the sources; None: the whole validation split
    sample_prompts: tuple[str, ...] = ()  # continued at every evaluation, into samples/


class CheckpointSection(Section):
    """A run always ends with a checkpoint; `every_*` add more."""

    every_steps: PositiveCount | None = None
    every_minutes: Positive | None = None
    keep: PositiveCount = 3  # the newest ones
    keep_every_steps: PositiveCount | None = None  # checkpoints at multiples of this stay for ever
    asynchronous: StrictBool = True  # written while the next steps run


class SpikesSection(Section):
    """What a run does about a loss that stands out of those before it (`train.guard`)."""

    action: Literal["tell", "skip", "roll_back"] = "tell"  # all of them tell; skip: update nothing in that step
    window: Annotated[int, BeforeValidator(lambda value: whole_number(value, 4))] = 128  # steps before it
    threshold: Positive = 6.0  # robust standard deviations above their median; see benchmarks/spikes.py
    pass_over: PositiveCount = 1  # roll_back: steps whose samples are passed over, the last one that which stands out
    most_roll_backs: PositiveCount = 3  # to one checkpoint; one more would be needed: the run ends with exit code 3


class LoggingSection(Section):
    """`metrics.jsonl` is always written."""

    every_steps: PositiveCount = 1
    tensorboard: StrictBool = False
    wandb: Name | None = None  # project
    trackio: Name | None = None  # project


class RunSection(Section):
    dir: Name  # recipe.yaml, metrics.jsonl, checkpoints/, samples/
    seed: Count = 0  # of the initial weights
    initialize_from: Name | None = None  # a checkpoint whose weights start the run (`rorqual import` makes one)
    stop_at_step: PositiveCount | None = None  # end early; the schedules stay those of the whole run
    max_skipped: PositiveCount = 5  # skipped steps in a row before the run gives up, or rolls back (section spikes)
    compare_replicas_every_steps: PositiveCount | None = None  # what ranks hold alike; before a save it always is
    hang_seconds: Positive | None = 600  # without an answer, or with no rank moving, before the run ends; None: never
    attention: Literal[  # by whom; auto: on a GPU the fastest, measured at start-up
        "auto", "fused", "sdpa", "reference", "cudnn", "cudnn-padded", "sdpa-flash", "sdpa-efficient", "varlen", "flex",
        "flash-attn", "flash-attn-3", "flash-attn-3-padded",
    ] = "auto"  # fmt: skip
    compile: CompileMode = (
        "auto"  # blocks, by torch.compile; graphs: as CUDA graphs; auto: off, see parallel/compiled.py
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"

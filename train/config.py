"""A recipe: the one YAML file that describes a run, its command-line overrides, and its mistakes in one line each.

    load_recipe("tiny", ["schedule.lr=1e-3", "run.dir=runs/a"]).to_yaml()

The sections stand in `train.sections`, the types of their values in `train.fields`. DeepSpeed's and accelerate's configurations
are derived from a recipe, never written beside it.
"""

import dataclasses
import difflib
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.representer import SafeRepresenter

from data.errors import DataError
from data.yaml_io import load_yaml, read_yaml
from model.config import ConfigError, ModelConfig
from model.flops import Recompute
from parallel.layout import Layout, ParallelConfig
from train import named
from train.automatic import decided
from train.fields import as_points, mistake, show, value_at
from train.sections import (
    CheckpointSection,
    DataSection,
    EvaluateSection,
    LoggingSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    PrecisionSection,
    RunSection,
    SampleRanges,
    ScheduleSection,
    Section,
    Source,
    SpikesSection,
    Stage,
)

RECIPES = Path(__file__).parent / "recipes"


class RecipeError(ValueError):
    """A recipe that cannot be run. The message is one line: the field, its value, the rule and the fix."""


class Recipe(Section):
    """A validated recipe. Frozen; two recipes with equal values are equal."""

    model: ModelSection
    data: DataSection
    parallel: ParallelSection = ParallelSection()
    precision: PrecisionSection = PrecisionSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection
    evaluate: EvaluateSection = EvaluateSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    spikes: SpikesSection = SpikesSection()
    run: RunSection

    def model_config_resolved(self) -> ModelConfig:
        """The preset or `config.json` of the model section with the section's own fields on top."""
        return self.model.resolve()

    def passing_over(self, ranges: SampleRanges) -> Self:
        """The same run without these samples."""
        return self.model_copy(update={"data": self.data.model_copy(update={"passed_over": ranges})})

    def layout(self, world_size: int) -> Layout:
        """The parallel section on a number of processes; raises LayoutError if it does not fit them or the model."""
        lengths = tuple(length for _, length in self.data.lengths)
        return Layout(self.parallel_config, world_size, self.model_config_resolved(), lengths)

    @property
    def parallel_config(self) -> ParallelConfig:
        """The parallel section, and what of the others a layout depends on."""
        given = {**dict(self.parallel), "recompute": self.recompute}
        given |= {"fp8": self.precision.fp8, "fp8_dispatch": self.precision.fp8_dispatch}
        values = {field.name: given[field.name] for field in dataclasses.fields(ParallelConfig)}
        values["deepspeed"] = values["deepspeed"] or {}
        return ParallelConfig(**values)

    def spread(self, parallel: Mapping[str, Any], fp8_dispatch: bool) -> Self:
        """The same run with other values, valid ones, in its parallel section.

        Raises:
            RecipeError: they do not go with another section.
        """
        new = self.model_copy(
            update={
                "parallel": self.parallel.model_copy(update=dict(parallel)),
                "precision": self.precision.model_copy(update={"fp8_dispatch": fp8_dispatch}),
            }
        )
        try:
            new._check_fp8()
            new._check_compile()
        except PydanticCustomError as error:
            said = error.context or {}
            raise RecipeError(f"{said['field']} = {show(said['value'])}: {said['rule']}; {said['fix']}") from None
        return new

    @property
    def on_gpu(self) -> bool:
        """Whether the run computes on a GPU: as it says itself, else where this machine has one."""
        if self.run.device != "auto":
            return self.run.device == "cuda"
        import torch  # seconds, which reading a recipe need not take

        return torch.cuda.is_available()

    @property
    def compute(self) -> str:
        """The dtype of activations and products: bf16, fp16 or fp32."""
        return self.precision.compute or ("bf16" if self.on_gpu else "fp32")

    @property
    def recompute(self) -> Recompute:
        """What the backward pass computes again. On a GPU DeepSeek-V3's policy (§3.2.3): memory bounds what fits there, and norms
        and SwiGLU are cheap beside the products; on a CPU memory is plenty, and every operation costs."""
        return self.parallel.recompute or ("selective" if self.on_gpu else "none")

    def micro_batch(self, tokens: int) -> int:
        """Sequences in one forward pass of one process, in the step that starts after `tokens` tokens."""
        stages = tuple(
            (state.from_tokens, state.micro_batch or self.parallel.micro_batch) for state in self.data.consumption()
        )
        return value_at(stages, tokens)

    def to_yaml(self) -> str:
        """The resolved recipe: every key with its value. `load_recipe` of this text gives an equal recipe."""
        yaml = YAML(typ="safe", pure=True)
        yaml.Representer = _Representer
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
        yaml.width = 120
        text = io.StringIO()
        yaml.dump(self.model_dump(mode="json", by_alias=True), text)
        return text.getvalue()

    @model_validator(mode="before")
    @classmethod
    def _allow_empty_sections(cls, given: Any) -> Any:
        """`evaluate:` with nothing below it reads as null, and means the defaults."""
        if not isinstance(given, dict):
            return given
        return {key: {} if value is None and key in cls.model_fields else value for key, value in given.items()}

    @field_validator("schedule", mode="before")
    @classmethod
    def _decide(cls, given: Any, info: ValidationInfo) -> Any:
        """What a law decides, as numbers; sections before this one that are wrong are missing in `info`."""
        return decided(given, info.data.get("model"), info.data.get("data"))

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        try:
            config = self.model_config_resolved()
        except (ConfigError, OSError, ValueError) as error:
            raise _model_mistake(self.model, error) from None
        self._check_fp8()
        self._check_compile()
        lengths = self.data.lengths
        names = ["data.sequence_length", *(f"data.stages.{i}.sequence_length" for i in range(len(self.data.stages)))]
        for name, (_, length) in zip(names, lengths):
            _check_context(config, name, length, lengths[0][1])
        if lengths[-1][0] >= self.schedule.tokens:
            raise mistake(
                f"begins at {lengths[-1][0]:,} tokens, and the run ends at {self.schedule.tokens:,}",
                "drop the stage or raise schedule.tokens",
                field=f"data.stages.{len(lengths) - 2}.from_tokens",
                value=lengths[-1][0],
            )
        batch = self.schedule.batch_tokens
        batches = as_points(batch)
        for start in sorted({start for start, _ in (*batches, *lengths)}):
            tokens, length = value_at(batches, start), value_at(lengths, start)
            if tokens % length:
                near = max(round(tokens / length), 1) * length
                name = names[[length for _, length in lengths].index(length)]
                raise mistake(
                    f"{tokens:,} is not a multiple of {name} = {length}",
                    f"write for example {near}",
                    field="schedule.batch_tokens",
                    value=batch,
                )
        return self

    def _check_compile(self) -> None:
        """What compiled blocks go together with."""
        parallel = self.parallel
        problems = {
            "a pipeline runs its stages in parts, which compiled blocks do not have; write parallel.pipeline=1": (
                parallel.pipeline > 1
            ),
            "nobody has run compiled blocks that exchange latents with other processes; write parallel.context=1": (
                parallel.context > 1
            ),
            "what recomputes watches every operation of a block, and a compiled one shows none; write parallel.recompute=none": (
                self.recompute != "none"
            ),
            "DeepSpeed's hooks are not for compiled blocks; write parallel.engine=ddp or fsdp": parallel.engine.startswith(
                "zero"
            ),
            "where experts lie on several processes each layer asks the host how much will arrive; write parallel.expert=1": (
                parallel.expert > 1
            ),
            "a CUDA graph wants its weights where they were, and fsdp gathers them anew; write parallel.engine=ddp": (
                self.run.compile == "graphs" and parallel.engine == "fsdp"
            ),
        }
        for problem, is_there in problems.items():
            if is_there and self.run.compile not in (False, "auto"):
                rule, fix = problem.split("; ")
                raise mistake(rule, f"{fix}, or run.compile=false", field="run.compile", value=self.run.compile)

    def _check_fp8(self) -> None:
        """What FP8 goes together with."""
        precision = self.precision
        if precision.fp8 and precision.compute == "fp16":
            raise mistake(
                "does not go with precision.fp8: its scales have the range of fp32, and between two products fp16 would overflow",
                "write precision.compute=bf16 (or fp32), or precision.fp8=false",
                field="precision.compute",
                value="fp16",
            )
        if precision.fp8 and self.run.compile not in (False, "auto"):
            raise mistake(
                "does not go with precision.fp8, whose functions have kernels of their own, which torch.compile cannot fuse",
                "write run.compile=false, or precision.fp8=false",
                field="run.compile",
                value=self.run.compile,
            )
        if precision.fp8_dispatch and not (precision.fp8 and self.parallel.expert > 1):
            has = f"precision.fp8 is {show(precision.fp8)} and parallel.expert {self.parallel.expert}"
            raise mistake(
                f"is for experts that compute in FP8 on several processes; here {has}",
                "write precision.fp8=true and a parallel.expert above 1, or precision.fp8_dispatch=false",
                field="precision.fp8_dispatch",
                value=True,
            )


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a built-in recipe or a YAML file, apply `key.sub=value` overrides in order, and validate.

    Args:
        name_or_path: tiny, small, v2-lite, v3 or v3-long; else the path of a file.
        overrides: each `section.key=value`; the value is read as YAML, so that lists and maps work.

    Raises:
        RecipeError: anything that is wrong with the file, an override or a value.
    """
    path = _find(str(name_or_path))
    try:
        values = read_yaml(path)
    except DataError as error:
        raise RecipeError(str(error)) from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: {show(values)} is not a recipe; it must be a map of sections; see train/recipes/")
    for override in overrides:
        _apply(values, override)
    return parse_recipe(values)


def parse_recipe(values: dict[str, Any]) -> Recipe:
    """Validate a recipe that has been read already; raises RecipeError with the first mistake."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_one_line(error)) from None


def builtin_recipes() -> list[str]:
    return named.names(RECIPES, ".yaml")


def _find(name: str) -> Path:
    try:
        return named.find(name, RECIPES, ".yaml", "YAML file")
    except LookupError as error:
        raise RecipeError(f"recipe {name!r}: {error}") from None


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one `key.sub=value` in the nested maps of a recipe, in place."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"override {show(override)}: must be section.key=value; write for example schedule.lr=4e-4")
    try:
        value = load_yaml(text)
    except YAMLError as error:
        reason = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise RecipeError(f"{dotted} = {show(text)}: is not YAML ({reason}); quote it or close its brackets") from None
    for depth, key in enumerate(keys[:-1], 1):
        inside = values.get(key)
        if inside is None:
            inside = values[key] = {}
        if not isinstance(inside, dict):
            parent = ".".join(keys[:depth])
            raise RecipeError(
                f"{dotted} = {show(value)}: {parent} is {show(inside)} and has no keys; give the whole {parent}=…"
            )
        values = inside
    values[keys[-1]] = value


def _check_context(config: ModelConfig, name: str, length: int, first: int) -> None:
    """The model must read sequences of `length` tokens; `first` is the length that the run begins with."""
    context, yarn = config.max_position_embeddings, config.rope_scaling
    if length > context:
        fix = f"lower it or write model.max_position_embeddings={length}"
        if length > first and yarn is None:
            scaling = f"{{type: yarn, factor: {-(-length // context)}, original_max_position_embeddings: {context}}}"
            fix += f", and to extend the context there by YaRN model.rope_scaling='{scaling}'"
        raise mistake(f"is more than model.max_position_embeddings = {context}", fix, field=name, value=length)
    if yarn and length > yarn.factor * yarn.original_max_position_embeddings:
        reach = f"{yarn.factor:g} · {yarn.original_max_position_embeddings}"
        raise mistake(
            f"is more than model.rope_scaling.factor · original_max_position_embeddings = {reach}, as far as YaRN reaches",
            f"lower it or write a factor of {-(-length // yarn.original_max_position_embeddings)}",
            field=name,
            value=length,
        )


def _model_mistake(section: ModelSection, error: Exception) -> Exception:
    if isinstance(error, ConfigError):
        return mistake("", "", line=str(error))
    reason = error.strerror if isinstance(error, OSError) else f"not a JSON file: {error}"
    return mistake(
        f"cannot be read ({reason})", "give the path of a config.json", field="model.config", value=section.config
    )


class _Representer(SafeRepresenter):
    """Lists of plain values on one line, everything else in blocks."""

    def represent_short_list(self, values: list[Any]) -> Any:
        plain = not any(isinstance(value, dict | list) for value in values)
        return self.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=plain)


_Representer.add_representer(list, _Representer.represent_short_list)


# What pydantic's own checks are called, and the rule and the fix they stand for.
_RULES = {
    "string_type": ("must be text", "write it, in quotes where YAML reads something else"),
    "bool_type": ("must be true or false", "write one of them"),
    "tuple_type": ("must be a list", "write it in brackets"),
    "too_short": ("has too few entries", "write [0.9, 0.95]"),
    "too_long": ("has too many entries", "write [0.9, 0.95]"),
    "model_type": ("must be a map of keys", "write key: value pairs below it"),
}


def _one_line(error: ValidationError) -> str:
    """The first mistake as `field = value: rule; fix`, and how many more there are."""
    errors = error.errors(include_url=False)
    line = _explain(errors[0])
    if len(errors) == 1:
        return line
    return f"{line} (and {len(errors) - 1} more)"


def _explain(error: Any) -> str:
    context = error.get("ctx", {})
    if "line" in context:
        return context["line"]
    parts = [*map(str, error["loc"]), *filter(None, [context.get("field")])]
    field, value = ".".join(parts), context.get("value", error["input"])
    if error["type"] == "missing":
        return f"{field}: missing; it has no default; give it in the recipe or as {field}=…"
    if error["type"] == "extra_forbidden" or context.get("unknown"):
        return f"{field} = {show(value)}: unknown key; {_nearest(field)}"
    if error["type"] == "literal_error":
        rule, fix = f"must be {context['expected']}", _nearest_choice(value, context["expected"])
    elif error["type"] == "recipe":
        rule, fix = context["rule"], context["fix"]
    else:
        rule, fix = _RULES.get(error["type"], (error["msg"], "see train/recipes/ for an example"))
    return f"{field} = {show(value)}: {rule}; {fix}"


def _nearest(field: str) -> str:
    """The valid key that was probably meant, or the keys that there are."""
    known = list(_keys(Recipe))
    section, _, leaf = field.rpartition(".")
    if section.startswith(("data.train.", "data.validation.")):
        known += [f"{section}.{name}" for name in Source.model_fields]
    elif section.startswith("data.stages."):
        known += [f"{section}.{name}" for name in (Source if ".train." in section else Stage).model_fields]
    same_leaf = [key for key in known if key.rpartition(".")[2] == leaf]
    siblings = [key for key in known if key.rpartition(".")[0] == section]
    near = same_leaf or difflib.get_close_matches(field, siblings or known, n=1, cutoff=0.75)
    if near and (near == same_leaf or difflib.get_close_matches(leaf, [near[0].rpartition(".")[2]], cutoff=0.5)):
        return f"did you mean {' or '.join(near)}?"
    names = [key.rpartition(".")[2] for key in siblings]
    return f"the keys of {section or 'a recipe'} are {', '.join(names)}" if names else "leave it out"


def _keys(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    """Every valid dotted key of a recipe, sections included."""
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        yield key
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, key + ".")
    if model is ModelSection:
        yield from (prefix + name for name in ModelSection.fields())


def _nearest_choice(value: Any, expected: str) -> str:
    near = difflib.get_close_matches(str(value), expected.replace(" or ", ", ").replace("'", "").split(", "), n=1)
    return f"did you mean {near[0]}?" if near else "write one of them"

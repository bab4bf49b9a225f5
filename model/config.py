"""The shape of a model, with the field names and the meaning of Hugging Face's `DeepseekV3Config`.

A preset is a Hugging Face `config.json` under `presets/`; `ModelConfig.from_hf` reads one and `to_hf` writes one, so that a
configuration travels through Rorqual under one set of names. Every rule a configuration must keep is checked here, once.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

PRESETS = Path(__file__).parent / "presets"

# `quantization_config` of a folder with FP8 weights, as DeepSeek released V3. It says how weights are stored, so `ModelConfig`
# does not carry it.
FP8_STORAGE: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


class ConfigError(ValueError):
    """A model configuration that cannot be built. The message names the field, the value, the rule and the fix."""


@dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension (arXiv 2309.00071) as DeepSeek applies it, to the decoupled rotary part only."""

    factor: float  # s: the context grows from original_max_position_embeddings to s times as many
    original_max_position_embeddings: int
    beta_fast: float = 32.0  # rotations over the original context above which a frequency is kept
    beta_slow: float = 1.0  # rotations below which a frequency is divided by `factor`
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions of a DeepSeek-V3 model. Frozen; derived sizes are properties.

    Raises:
        ConfigError: a value breaks one of the rules of `_check`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # width of the leading dense layers
    moe_intermediate_size: int  # width of one expert
    num_hidden_layers: int
    num_nextn_predict_layers: int  # MTP depth, modules after the main model
    num_attention_heads: int
    n_shared_experts: int
    n_routed_experts: int
    routed_scaling_factor: float
    kv_lora_rank: int
    q_lora_rank: int | None  # None: queries are projected from the hidden state directly
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    n_group: int
    topk_group: int
    num_experts_per_tok: int
    first_k_dense_replace: int
    norm_topk_prob: bool = True
    max_position_embeddings: int = 4096
    initializer_range: float = 0.006  # DeepSeek-V3 §4.2
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: YarnScaling | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | None = 1

    def __post_init__(self) -> None:
        _check(self)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def n_moe_layers(self) -> int:
        return len(self.moe_layers)

    @property
    def moe_layers(self) -> range:
        """The layers with a router, those of the MTP modules included."""
        return range(self.first_k_dense_replace, self.num_hidden_layers + self.num_nextn_predict_layers)

    @property
    def yarn(self) -> YarnScaling | None:
        """The YaRN record when it acts: only where the model's context is longer than the original one."""
        scaling = self.rope_scaling
        if scaling and self.max_position_embeddings > scaling.original_max_position_embeddings:
            return scaling
        return None

    def at_length(self, length: int) -> "ModelConfig":
        """The model while its longest sequences have `length` tokens: plain RoPE up to the original context of YaRN, which is then
        all that it reads; beyond it itself.

        DeepSeek's rule (V3 §4.3, and its inference code, where YaRN acts `if max_seq_len > original_seq_len`): one record for
        every longer context, 32K as 128K.
        """
        scaling = self.rope_scaling
        if scaling is None or length > scaling.original_max_position_embeddings:
            return self
        return replace(
            self, max_position_embeddings=min(self.max_position_embeddings, scaling.original_max_position_embeddings)
        )

    def is_moe(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace

    def override(self, changes: Mapping[str, Any]) -> "ModelConfig":
        """A copy with the given fields changed; an unknown name is an error."""
        known = {field.name for field in fields(self)}
        for name in changes:
            if name not in known:
                raise ConfigError(f"model.{name}: not a field of the model; the fields are {', '.join(sorted(known))}")
        changes = dict(changes)
        if not isinstance(changes.get("rope_scaling"), YarnScaling | None):
            changes["rope_scaling"] = _yarn_as_written(changes["rope_scaling"])
        return replace(self, **changes)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read a `config.json` of a DeepSeek-V3 model, in the released form or in that of transformers 5.

        Its `quantization_config` must be one whose weights `model.hf` reads; the result is the model without it.
        """
        _refuse_unsupported(config)
        values = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        values["num_nextn_predict_layers"] = config.get("num_nextn_predict_layers", config.get("num_mtp_layers", 0))
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        values["rope_scaling"] = _yarn_from_hf(rope)
        if "rope_theta" in rope:
            values["rope_theta"] = rope["rope_theta"]
        missing = [field.name for field in fields(cls) if field.name not in values and field.default is MISSING]
        if missing:
            raise ConfigError(f"model.{missing[0]}: missing; a DeepSeek-V3 config.json must give it; add the field")
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` that transformers 4 and 5, vLLM and SGLang read (the released files have the same keys)."""
        values = asdict(self)
        yarn = asdict(self.yarn) if self.yarn else None
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            **values,
            "rope_scaling": {"type": "yarn", "rope_type": "yarn", **yarn}
            if yarn
            else None,  # absent where it does not act
            "rope_interleave": True,
            "num_key_value_heads": self.num_attention_heads,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "moe_layer_freq": 1,
            "ep_size": 1,
            "use_cache": True,
        }


def load_preset(name: str) -> dict[str, Any]:
    """The Hugging Face configuration of a built-in preset.

    Raises:
        ConfigError: there is no preset of that name.
    """
    path = PRESETS / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.json")))
        raise ConfigError(f"model.preset: {name!r} is not a preset; choose one of {known}, or give model.config: PATH")
    return json.loads(path.read_text())


def _yarn_from_hf(rope: Any) -> YarnScaling | None:
    if not isinstance(rope, Mapping):
        raise ConfigError(f"model.rope_scaling: {rope!r} is not a map; give one with type, factor, … or null")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ConfigError(f"model.rope_scaling.type: {kind!r} is not supported; DeepSeek models use 'yarn' or none")
    values = {field.name: rope[field.name] for field in fields(YarnScaling) if rope.get(field.name) is not None}
    for field in fields(YarnScaling):
        number = values.get(field.name, field.default)
        if number is MISSING or isinstance(number, bool) or not isinstance(number, (int, float)):
            raise ConfigError(
                f"model.rope_scaling.{field.name}: {rope.get(field.name)!r} is not a number; YaRN needs one; give it"
            )
    return YarnScaling(**values)


def _yarn_as_written(rope: Any) -> YarnScaling | None:
    """`_yarn_from_hf` of what somebody wrote: without a type, or with a key that means nothing, it is a mistake."""
    yarn = _yarn_from_hf(rope)
    known = ["type", "rope_type", *(field.name for field in fields(YarnScaling))]
    if unknown := [key for key in rope or () if key not in known]:
        raise ConfigError(f"model.rope_scaling.{unknown[0]}: unknown key; the keys are {', '.join(known)}")
    if rope and yarn is None and not {"type", "rope_type"} & set(rope):
        raise ConfigError(f"model.rope_scaling: {rope!r} has no type; write type: yarn, or null for plain RoPE")
    return yarn


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    """What `DeepseekV3Config` can say and the released models do not use."""
    expected = {
        "model_type": "deepseek_v3",
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_key_value_heads": config.get("num_attention_heads"),
    }
    for name, value in expected.items():
        found = config.get(name, value)
        if found is not None and found != value:
            raise ConfigError(f"model.{name}: {found!r} is not supported; DeepSeek-V3 has {value!r}; change the field")
    if storage := config.get("quantization_config"):
        _refuse_other_storage(storage)


def _refuse_other_storage(storage: Any) -> None:
    """Only `FP8_STORAGE` is read, whatever is said besides it: the scales' format is that of their tensors."""

    def refuse(name: str, rule: str) -> NoReturn:
        raise ConfigError(f"model.quantization_config{name}: {rule}; convert the folder to bf16 first")

    if not isinstance(storage, Mapping):
        refuse("", f"{storage!r} is not a map; DeepSeek-V3 has {FP8_STORAGE}")
    for name, value in FP8_STORAGE.items():
        found = storage.get(name, value if name == "fmt" else None)  # transformers does not write fmt
        if (list(found) if isinstance(found, tuple) else found) != value:
            refuse(f".{name}", f"{found!r} is not supported; DeepSeek-V3 has {value!r}")


def _check(c: ModelConfig) -> None:
    def rule(holds: bool, name: str, text: str) -> None:
        if not holds:
            raise ConfigError(f"model.{name}: {getattr(c, name)!r} {text}")

    may_be_zero = {"num_nextn_predict_layers", "first_k_dense_replace", "bos_token_id", "eos_token_id"}
    for field in fields(c):
        value = getattr(c, field.name)
        optional = field.type == int | None
        if field.type is int or (optional and value is not None):
            is_int = isinstance(value, int) and not isinstance(value, bool)
            rule(is_int, field.name, "is not a whole number; give one")
            least = 0 if field.name in may_be_zero else 1
            rule(value >= least, field.name, f"is too small; it must be at least {least}")
        elif field.type is float:
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            rule(is_number and 0 < value < math.inf, field.name, "is not a positive number; give one")
        elif field.type is bool:
            rule(isinstance(value, bool), field.name, "is not true or false; give one of them")
    rule(c.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "is odd; rotary dimensions come in pairs; make it even")
    rule(c.first_k_dense_replace <= c.num_hidden_layers, "first_k_dense_replace",
         f"is more than num_hidden_layers = {c.num_hidden_layers}; make it at most that")  # fmt: skip
    rule(c.n_routed_experts % c.n_group == 0, "n_group",
         f"does not divide n_routed_experts = {c.n_routed_experts}; choose a divisor")  # fmt: skip
    per_group = c.n_routed_experts // c.n_group
    rule(per_group >= 2, "n_group",
         f"leaves {per_group} expert a group; a group's score is its two best experts; use fewer groups")  # fmt: skip
    rule(c.topk_group <= c.n_group, "topk_group", f"is more than n_group = {c.n_group}; make it at most that")
    rule(c.num_experts_per_tok <= c.topk_group * per_group, "num_experts_per_tok",
         f"is more than the {c.topk_group * per_group} experts in topk_group = {c.topk_group} groups of {per_group}; "
         "lower it or keep more groups")  # fmt: skip
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(c, name)
        rule(token is None or token < c.vocab_size, name, f"is not below vocab_size = {c.vocab_size}; fix either")
    if c.rope_scaling is not None:
        _check_yarn(c.rope_scaling)


def _check_yarn(yarn: YarnScaling) -> None:
    def rule(holds: bool, name: str, text: str) -> None:
        if not holds:
            raise ConfigError(f"model.rope_scaling.{name}: {getattr(yarn, name)!r} {text}")

    for field in fields(yarn):
        rule(math.isfinite(getattr(yarn, field.name)), field.name, "is not finite; give a number")
    rule(yarn.factor >= 1, "factor", "would shrink the context; it must be at least 1")
    rule(yarn.original_max_position_embeddings >= 1, "original_max_position_embeddings",
         "is too small; it must be at least 1")  # fmt: skip
    rule(yarn.beta_slow > 0, "beta_slow", "is not a positive number; give one")
    rule(yarn.beta_fast > yarn.beta_slow, "beta_fast",
         f"is not above beta_slow = {yarn.beta_slow}; fast frequencies turn more often; exchange them")  # fmt: skip

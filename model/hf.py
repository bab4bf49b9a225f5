"""The key map between a `Transformer` and a Hugging Face DeepSeek-V3 checkpoint, as a stream of tensors.

In memory the names are those of transformers 5, which differ from the checkpoint's keys in two places:

| in memory                                             | in a checkpoint                                                      |
|-------------------------------------------------------|----------------------------------------------------------------------|
| `….mlp.experts.gate_up_proj` [E, 2F, D] (gate first)  | `….mlp.experts.e.gate_proj.weight`, `….up_proj.weight`, each [F, D]  |
| `….mlp.experts.down_proj` [E, D, F]                   | `….mlp.experts.e.down_proj.weight` [D, F]                            |
| (MTP modules share the embedding and the output head) | `….embed_tokens.weight`, `….shared_head.head.weight` [V, D], copies  |

The rotary dimensions need no permutation: both sides hold interleaved pairs. Nothing is converted: a tensor leaves in the dtype in
which it came. The map works on one in-memory tensor at a time, so that neither side ever holds a whole model.

A checkpoint may hold the matrices of attention and of feed-forward networks, experts and MTP layers included, as DeepSeek released
them: `<name>` in E4M3, and beside it `<name>_scale_inv` [⌈out/128⌉, ⌈in/128⌉], which multiplies. Embedding, head, norms, gates and
`eh_proj` are never stored so. `quantized` makes such a pair, `from_hf` reads it as data · scale in fp32. What `quantized`
made, read and made again, is the same to the bit.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import Tensor

from model.config import ConfigError, ModelConfig
from model.ops.fp8.quantize import E4M3, TILE, Quantized, dequantize, quantize_blocks
from model.transformer import Transformer

NamedTensor = tuple[str, Tensor]

# What each MTP layer of a checkpoint repeats of the main model.
MTP_COPIES = {"model.embed_tokens.weight": "embed_tokens.weight", "lm_head.weight": "shared_head.head.weight"}
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"

SCALE = "_scale_inv"  # after the name of a matrix in FP8
IN_FP8 = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\..*_proj(_with_mqa)?\.weight")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def to_hf(tensors: Iterable[NamedTensor], config: ModelConfig, mtp: bool) -> Iterator[NamedTensor]:
    """The checkpoint's tensors, in the order in which the model's come.

    Experts are views of their stacked tensor, and the MTP layers' copies are the very tensor they copy.

    Args:
        tensors: in-memory names and tensors, buffers included.
        config: of the model that they belong to.
        mtp: with the MTP layers; else theirs are left out.
    """
    main = config.num_hidden_layers
    for name, tensor in tensors:
        if not mtp and _layer(name) >= main:
            continue
        prefix = name.removesuffix("gate_up_proj").removesuffix("down_proj")
        if name.endswith(GATE_UP):
            for expert, gate_up in enumerate(tensor):
                gate, up = gate_up.chunk(2)  # [F, D] each
                yield f"{prefix}{expert}.gate_proj.weight", gate
                yield f"{prefix}{expert}.up_proj.weight", up
        elif name.endswith(DOWN):
            for expert, down in enumerate(tensor):
                yield f"{prefix}{expert}.down_proj.weight", down
        else:
            yield name, tensor
        if mtp and name in MTP_COPIES:
            for depth in range(config.num_nextn_predict_layers):
                yield f"model.layers.{main + depth}.{MTP_COPIES[name]}", tensor


def quantized(key: str, tensor: Tensor) -> Iterator[NamedTensor]:
    """A matrix as a checkpoint in FP8 holds it: its E4M3 numbers, and their fp32 scales under a name of their own."""
    blocks = quantize_blocks(tensor)
    yield key, blocks.data
    yield key + SCALE, blocks.scale


def from_hf(
    config: ModelConfig, keys: Collection[str], read: Callable[[str], Tensor], fp8: bool = False
) -> Iterator[NamedTensor]:
    """The model's tensors, one at a time, in the order of `state_shapes`.

    Args:
        config: of the checkpoint. Where it has MTP layers, the checkpoint must have them; their copies are not read.
        keys: all keys of the checkpoint.
        read: a key's tensor.
        fp8: the matrices of `IN_FP8` are stored in FP8, with their scales; they come as fp32.

    Raises:
        ConfigError: a key is missing, unknown or of another shape than `config` gives it, or of a dtype that is not read; a matrix
            in FP8 holds NaN, or a scale that is none. Missing and unknown keys are found before anything is read.
    """
    expected = dict(to_hf(state_shapes(config).items(), config, mtp=True))
    if fp8:
        expected |= {key + SCALE: _scales(matrix) for key, matrix in expected.items() if IN_FP8.fullmatch(key)}
    _check_keys(config, expected, set(keys), fp8)

    def checked(key: str, *dtypes: torch.dtype) -> Tensor:
        tensor = read(key)
        _check_tensor(key, tensor, expected[key].shape, dtypes)
        return tensor

    def weight(key: str) -> Tensor:
        if key + SCALE not in expected:
            return checked(key, *FLOATS)
        scale = checked(key + SCALE, *FLOATS, torch.float8_e8m0fnu).float()  # the last are powers of two
        data = checked(key, E4M3)
        _check_numbers(key, data, scale)
        return dequantize(Quantized(data, scale))

    for name, shape in state_shapes(config).items():
        parts = _expert_keys(name, config.n_routed_experts)
        if not parts:
            yield name, weight(name)
            continue
        stacked = torch.empty(shape.shape, dtype=torch.float32 if fp8 else read(parts[0][0]).dtype)
        for out, expert_keys in zip(stacked, parts):
            for rows, key in zip(out.chunk(len(expert_keys)), expert_keys):
                rows.copy_(weight(key))
        yield name, stacked


def state_shapes(config: ModelConfig) -> dict[str, Tensor]:
    """The model's parameters and buffers on the meta device, in the order of the model."""
    with torch.device("meta"):
        return Transformer(config).state_dict()


def _scales(matrix: Tensor) -> Tensor:
    """Of the scales of a matrix, the shape."""
    return torch.empty([-(-size // TILE) for size in matrix.shape], device="meta")


def _expert_keys(name: str, experts: int) -> list[tuple[str, ...]]:
    """Per expert, the keys whose tensors lie one below the other in a stacked one; nothing for other names."""
    parts: tuple[str, ...]
    if name.endswith(GATE_UP):
        prefix, parts = name.removesuffix("gate_up_proj"), ("gate_proj", "up_proj")
    elif name.endswith(DOWN):
        prefix, parts = name.removesuffix("down_proj"), ("down_proj",)
    else:
        return []
    return [tuple(f"{prefix}{expert}.{part}.weight" for part in parts) for expert in range(experts)]


def _check_keys(config: ModelConfig, expected: dict[str, Tensor], found: set[str], fp8: bool) -> None:
    scales = [key for key in found if key.endswith(SCALE)]
    if scales and not fp8:
        raise ConfigError(
            f"weights: {min(scales)}{_more(scales)} belongs to weights in FP8, and config.json has no quantization_config, which "
            "says how they are stored; take the config.json that belongs to these weights"
        )
    main, depths = config.num_hidden_layers, config.num_nextn_predict_layers
    missing = [key for key in expected if key not in found and not (_layer(key) >= main and _is_copy(key))]
    if missing:
        first = missing[0]
        fix = "complete the weights or correct config.json"
        if all(_layer(key) >= main for key in missing):
            fix = "set num_nextn_predict_layers to the MTP layers that the weights have (0 for none) in config.json"
        raise ConfigError(
            f"weights: no {first}{_more(missing)}; config.json makes it {list(expected[first].shape)} "
            f"(num_hidden_layers = {main}, num_nextn_predict_layers = {depths}); {fix}"
        )
    extra = sorted(found - expected.keys())
    if extra:
        fix = "take the config.json that belongs to these weights"
        if all(_layer(key) >= main + depths for key in extra):
            fix = "correct num_hidden_layers or num_nextn_predict_layers in config.json"
        raise ConfigError(
            f"weights: {extra[0]}{_more(extra)} is not in the model of config.json "
            f"(num_hidden_layers = {main}, num_nextn_predict_layers = {depths}); nothing may be left out; {fix}"
        )


def _check_tensor(key: str, tensor: Tensor, shape: torch.Size, dtypes: Collection[torch.dtype]) -> None:
    if tensor.shape != shape:
        raise ConfigError(
            f"weights: {key} has shape {list(tensor.shape)}, config.json makes it {list(shape)}; "
            "the two must agree; take the config.json that belongs to these weights"
        )
    if tensor.dtype not in dtypes:
        raise ConfigError(
            f"weights: {key} {list(shape)} is {tensor.dtype}; config.json, by its quantization_config or for want of one, makes it "
            f"{' or '.join(map(str, dtypes))}; take the config.json that belongs to these weights"
        )


def _check_numbers(key: str, data: Tensor, scale: Tensor) -> None:
    """Refuse what no matrix in FP8 holds: of damage, the numbers show nothing else."""
    none = ~(scale.isfinite() & (scale > 0))
    if none.any():
        at = none.nonzero()[0].tolist()
        raise ConfigError(
            f"weights: {key}{SCALE} {at} is {scale[tuple(at)].item():g}; a scale must be finite and above 0; "
            "fetch the weights again"
        )
    bits = data.view(torch.uint8) & 0x7F  # without the sign; 0x7F is NaN, E4M3 has no infinity
    if bits.max() == 0x7F:
        at = (bits == 0x7F).nonzero()[0].tolist()
        raise ConfigError(f"weights: {key} {at} holds NaN; a weight must be a number; fetch the weights again")


def _layer(name: str) -> int:
    """The layer that a name belongs to, -1 where it belongs to none."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else -1


def _is_copy(key: str) -> bool:
    return key.endswith(tuple(f".{copy}" for copy in MTP_COPIES.values()))


def _more(names: Collection[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""

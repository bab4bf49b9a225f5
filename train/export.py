r"""Weights leave for Hugging Face, and come in from there.

`export` writes a folder for transformers 4 and 5, vLLM and SGLang. What their loaders take from it beyond the dimensions:

| field                            | who reads it, and for what                                                            |
|----------------------------------|---------------------------------------------------------------------------------------|
| `architectures`, `model_type`    | all: the class of the model                                                           |
| `topk_method: noaux_tc`          | vLLM, SGLang: only then does a gate get its `e_score_correction_bias`                 |
| `scoring_func`, `moe_layer_freq` | vLLM, SGLang: sigmoid instead of softmax; which layers are MoE                        |
| `rope_theta`, `rope_scaling`     | all. A scaling has `type` (read by older releases) and `rope_type`; null is plain RoPE |
| `num_nextn_predict_layers`       | all: how many layers from `num_hidden_layers` on are MTP modules                      |
| `torch_dtype`, `dtype`           | all; transformers 5 goes by the second name                                           |

In FP8 (`model.hf` says which matrices) there is also a `quantization_config`. vLLM and SGLang take `quant_method`,
`activation_scheme` and `weight_block_size` from it, and give linear layers and experts a parameter `weight_scale_inv`. They need
no list of what is not FP8: gate and `eh_proj` are never quantised there, embedding and head are no linear layers. Both want
feed-forward widths to be multiples of 128, since they merge gate and up. transformers (5.23) wants accelerate, leaves `lm_head`
alone by itself, and without a GPU dequantises to bf16. Then it takes a block's sides to be the matrix's, divided by the number of
scales along them: right up to 128 and for multiples of 128. For another size it fails if that does not divide (V3's own
`kv_a_proj_with_mqa`, 576 rows), and reads wrong weights if it does (160 rows as two blocks of 80).

`e_score_correction_bias` is fp32 in every export. transformers (5.23) passes over MTP layers by a pattern made for 61 layers.
At another depth, and for `generate(use_mtp=True)` there, give it before loading a pattern for each MTP layer L, the first of which
is num_hidden_layers: `DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected = [r"model\.layers\.L\..*"]`.

`import_folder` turns a folder in Hugging Face's layout into a checkpoint that a run can start from.

Either way the tensors pass in a stream: at most one shard of the output, and what is read at once from the source
(`train.weights`), are in memory. What is written stands under a temporary name until it is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data.files import replace_file, sync
from data.tokenizer import copy_folder
from model.config import FP8_STORAGE, ConfigError, ModelConfig
from model.hf import IN_FP8, NamedTensor, quantized, state_shapes, to_hf
from model.ops.fp8 import TILE
from train.checkpoint import RUN, CheckpointError
from train.marker import File, seal
from train.storage import INDEX, Part, Stored, write_file, write_index
from train.weights import SHARDS, SINGLE, FolderWeights, is_buffer, open_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}  # the last: of what is not in FP8
SHARD_BYTES = 5_000_000_000  # transformers' default for a long time; the hub serves files up to 50 GB


def export(
    source: Path | str,
    out: Path | str,
    dtype: Literal["fp32", "bf16", "fp8"] = "fp32",
    mtp: bool = False,
    ema: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model as a Hugging Face folder.

    Args:
        source: a run folder (its newest checkpoint), a checkpoint, or a Hugging Face folder.
        out: the new folder; it may exist if it is empty.
        dtype: of all weights but the expert biases, which stay fp32. fp8: the matrices that DeepSeek released in FP8, with their
            scales; the rest bf16.
        mtp: with the MTP layers; else `num_nextn_predict_layers` becomes 0.
        ema: the moving average of the weights in place of their last values.
        max_shard_bytes: of tensors in one file, unless a single tensor is larger.

    Raises:
        CheckpointError: `source` holds no weights, or `out` is not empty or cannot be written.
        ConfigError: another dtype; MTP layers are asked for and the model has none; its tokenizer does not fit it.
        DataError: its tokenizer has no `tokenizer.json` or no end token.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: {dtype!r} is not a dtype of an export; choose one of {', '.join(DTYPES)}")
    weights = open_weights(source, ema)
    if mtp and not weights.config.num_nextn_predict_layers:
        raise ConfigError(f"mtp: {source} has no MTP layers, num_nextn_predict_layers = 0; leave mtp out")
    depths = weights.config.num_nextn_predict_layers if mtp else 0
    config = weights.config.override({"num_nextn_predict_layers": depths, **_special_tokens(weights)})
    with _new_folder(Path(out)) as folder:
        named = to_hf(weights.tensors(), weights.config, mtp)
        _write_shards(_converted(named, dtype), folder, max_shard_bytes)
        name = str(DTYPES[dtype]).removeprefix("torch.")
        storage = {"quantization_config": FP8_STORAGE} if dtype == "fp8" else {}
        _write_json(folder / "config.json", config.to_hf() | {"dtype": name, "torch_dtype": name} | storage)
        special = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
        _write_json(folder / "generation_config.json", special | {"do_sample": False})
        if weights.tokenizer:
            copy_folder(weights.tokenizer, folder)


def off_tiles(config: ModelConfig) -> str | None:
    """The first matrix of an FP8 export with a side beyond 128 that is no multiple of it: its key and shape; None without one."""
    for key, matrix in to_hf(state_shapes(config).items(), config, mtp=False):
        if IN_FP8.fullmatch(key) and any(side > TILE and side % TILE for side in matrix.shape):
            return f"{key} {list(matrix.shape)}"
    return None


def import_folder(source: Path | str, out: Path | str) -> None:
    """Write a Hugging Face folder of a DeepSeek-V3 model as a checkpoint with parameters (fp32) and buffers only.

    Its `run.json` holds the model and where it came from, its folder `tokenizer/` the tokenizer if there was one. A run
    starts from it with `run.initialize_from`.

    Args:
        source: config.json, safetensors in bf16, fp16, fp32 or DeepSeek's FP8, and tokenizer files.
        out: the new folder; it may exist if it is empty.

    Raises:
        CheckpointError: `source` holds no weights, or `out` is not empty or cannot be written.
        ConfigError: the configuration is not one that Rorqual builds, or the weights are not those of the configuration.
        DataError: its tokenizer has no `tokenizer.json` or no end token.
    """
    source = Path(source)
    if not (source / "config.json").is_file():
        raise CheckpointError(
            f"import {source}: no config.json in it; give a Hugging Face folder of a DeepSeek-V3 model"
        )
    weights = FolderWeights(source)
    with _new_folder(Path(out)) as folder:
        files = _save_stream(weights.tensors(), state_shapes(weights.config), folder)
        _write_json(folder / RUN, {"imported_from": source.name, "model": weights.config.to_hf()})
        if weights.tokenizer:
            copy_folder(weights.tokenizer, folder / "tokenizer")
        others = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        small = {name: File.of(path.read_bytes()) for name, path in others.items() if name not in files}
        seal(folder, 0, files | small)


def _converted(tensors: Iterator[NamedTensor], dtype: str) -> Iterator[NamedTensor]:
    for key, tensor in tensors:
        if dtype == "fp8" and IN_FP8.fullmatch(key):
            yield from quantized(key, tensor)
        else:
            yield key, tensor.to(torch.float32 if is_buffer(key) else DTYPES[dtype])


def _write_shards(tensors: Iterator[NamedTensor], folder: Path, max_bytes: int) -> None:
    """One file, or shards numbered from 1 and their index: the layout of transformers."""
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = 0

    def write() -> None:
        # Two keys of one tensor, such as a copy of the embedding, need a memory of their own each.
        path = folder / f"{len(shards)}.safetensors"
        save_file(_unshared(shard), path, metadata={"format": "pt"})
        path.chmod(0o777 & folder.stat().st_mode & ~0o111)  # it creates files that only their owner may read
        shards.append(list(shard))
        shard.clear()

    for key, tensor in tensors:
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > max_bytes:
            write()
        shard[key] = tensor
        total += tensor.nbytes
    write()
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / name)
        weight_map |= dict.fromkeys(keys, name)
    _write_json(folder / SHARDS, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _unshared(shard: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    result = {}
    for key, tensor in shard.items():
        result[key] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return result


def _save_stream(tensors: Iterator[NamedTensor], shapes: dict[str, Tensor], folder: Path) -> dict[str, File]:
    """Write a checkpoint's tensors as they come, into one file, and their index."""
    name = "rank-00000.safetensors"
    parts = [
        Part(
            f"{'buffers' if is_buffer(key) else 'parameters'}.{key}",
            shape.dtype,
            (0,) * shape.dim(),
            tuple(shape.shape),
        )
        for key, shape in shapes.items()
    ]

    def in_order() -> Iterator[Tensor]:
        for (key, shape), (came, tensor) in zip(shapes.items(), tensors, strict=True):
            assert key == came, f"{key} is due, {came} came"
            yield tensor.to(shape.dtype)

    index = {part.name: Stored(part.dtype, part.shape, {part.offsets: (name, part.shape)}) for part in parts}
    return {name: write_file(folder / name, parts, in_order()), INDEX: write_index(folder, index)}


def _special_tokens(weights: Any) -> dict[str, int | None]:
    """The ids of bos and eos, of the tokenizer where there is one; raises ConfigError if it does not fit the model."""
    if weights.tokenizer is None:
        return {}
    from train.generate import load_tokenizer

    tokenizer = load_tokenizer(weights.tokenizer)
    config: ModelConfig = weights.config
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"vocab_size: {config.vocab_size}, but the tokenizer in {weights.tokenizer} has {len(tokenizer)} tokens; "
            "every token needs a row; export with the tokenizer that the model was trained with"
        )
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder under a temporary name that becomes `out` when the block ends well, with all of it on the disk."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"output {out}: exists and is not empty; nothing is overwritten; give a new folder")
    out = out.absolute()
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in sorted(temporary.rglob("*"), reverse=True):
            sync(path)
        sync(temporary)
        temporary.replace(out)
        sync(out.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(
            f"output {out}: {reason}; the folder must be writable and its disk large enough; "
            "free space or give another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

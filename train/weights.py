"""Weights to read from: a run, one of its checkpoints, an imported checkpoint or a Hugging Face folder, all seen alike.

`open_weights` tells them apart by what lies in the folder. What it returns knows the model's configuration and its tokenizer, and
streams the tensors under their in-memory names, a bounded part of them in memory at a time.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.tokenizer import fingerprint
from model.config import ConfigError, ModelConfig
from model.hf import NamedTensor, from_hf, state_shapes
from train.checkpoint import Checkpoint, CheckpointError, newest
from train.fields import value_at
from train.sections import DataSection

GROUP_BYTES = 128 << 20  # read at once from a checkpoint, or one tensor where that is larger
SHARDS, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Weights(Protocol):
    """A model's configuration, tokenizer and tensors."""

    config: ModelConfig
    data: Mapping[str, Any]  # the data section that they were trained with; empty where it is not known
    sequence_length: int | None  # T of the last step; None where it is not known
    tokenizer: Path | None  # the folder of its files; None where an imported folder had none

    def tensors(self) -> Iterator[NamedTensor]:
        """Parameters and buffers in the order of the model: parameters fp32 from a checkpoint, as stored from a folder
        (FP8 as fp32)."""
        ...


def open_weights(source: Path | str, ema: bool = False) -> Weights:
    """Find out what `source` is and read its description.

    Args:
        source: a run folder (its newest complete checkpoint is taken), a checkpoint `step-…` or one that `import_folder`
            wrote, or a Hugging Face folder of a DeepSeek-V3 model.

        ema: the moving average of the parameters in place of their last values; a run with `optimizer.ema` has one.

    Raises:
        CheckpointError: it is none of these, is damaged, or has no average.
        ConfigError: its model is not one that Rorqual builds.
    """
    path = Path(source)
    if (path / "config.json").is_file():
        if ema:
            raise CheckpointError(f"weights {path}: a Hugging Face folder has no moving average; leave --ema out")
        return FolderWeights(path)
    if (path / "run.json").is_file():
        return CheckpointWeights(Checkpoint(path), ema)
    if (path / "checkpoints").is_dir():
        found = newest(path / "checkpoints")
        if found is None:
            raise CheckpointError(f"run {path}: has no complete checkpoint; let it train until its first save")
        return CheckpointWeights(found, ema)
    raise CheckpointError(
        f"weights {path}: {'nothing known in it' if path.is_dir() else 'no such folder'}; "
        "give a run folder, a checkpoint step-… or a Hugging Face folder with config.json"
    )


class CheckpointWeights:
    """A checkpoint of a run, or one written by `train.export.import_folder`."""

    def __init__(self, checkpoint: Checkpoint, ema: bool):
        self.checkpoint = checkpoint
        self.parameters = "ema" if ema else "parameters"  # the section of the checkpoint that they are read from
        path, run = checkpoint.path, checkpoint.run
        if ema and not run.get("recipe", {}).get("optimizer", {}).get("ema"):
            raise CheckpointError(
                f"weights {path}: the run kept no average of its weights; set optimizer.ema before training, or leave --ema out"
            )
        self.config = ModelConfig.from_hf(run["model"])
        self.data = run.get("recipe", {}).get("data", {})
        self.sequence_length = _last_length(self.data, run)
        self.tokenizer = _tokenizer_of(path, run)

    def tensors(self) -> Iterator[NamedTensor]:
        for shapes in _groups(state_shapes(self.config)):
            group = self._read(shapes)
            for name in shapes:
                yield name, group.pop(name)

    def _read(self, shapes: dict[str, Tensor]) -> dict[str, Tensor]:
        group = {name: torch.empty(shape.shape, dtype=shape.dtype) for name, shape in shapes.items()}
        sections: dict[str, dict[str, Tensor]] = {self.parameters: {}, "buffers": {}}
        for name, tensor in group.items():
            sections["buffers" if is_buffer(name) else self.parameters][name] = tensor
        self.checkpoint.load(sections, partial=True)
        return group


class FolderWeights:
    """A Hugging Face folder: config.json, safetensors in one file or in shards, tokenizer files if there are any.

    Weights in DeepSeek's FP8, which a `quantization_config` announces, are read as fp32.
    """

    def __init__(self, path: Path):
        self.path = path
        self.data: Mapping[str, Any] = {}
        self.sequence_length: int | None = None
        config = _read_json(path / "config.json")
        self.config = ModelConfig.from_hf(config)
        self.fp8 = bool(config.get("quantization_config"))
        self.tokenizer = path if (path / "tokenizer_config.json").is_file() else None

    def tensors(self) -> Iterator[NamedTensor]:
        files = self._files()
        open_file: tuple[str, Any] = ("", None)  # one at a time: what is read of a mapped file stays in memory with it

        def read(key: str) -> Tensor:
            nonlocal open_file
            if open_file[0] != files[key]:
                open_file = (files[key], self._open(files[key]))
            try:
                return open_file[1].get_tensor(key)
            except SafetensorError:
                raise CheckpointError(
                    f"weights {self.path}: {SHARDS} places {key} in {files[key]}, which has it not; fetch them again"
                ) from None

        return from_hf(self.config, files.keys(), read, self.fp8)

    def _files(self) -> dict[str, str]:
        """The file of each key."""
        if (self.path / SHARDS).is_file():
            weight_map = _read_json(self.path / SHARDS).get("weight_map")
            if not isinstance(weight_map, dict) or not all(map(_is_name, weight_map.values())):
                raise CheckpointError(
                    f"weights {self.path}: {SHARDS} must have a weight_map from each tensor to the name of a file beside it; "
                    "fetch it again"
                )
            return weight_map
        return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)

    def _open(self, name: str) -> Any:
        try:
            return safe_open(self.path / name, framework="pt")
        except FileNotFoundError:
            raise CheckpointError(
                f"weights {self.path}: {name} is missing; the weights must be there as safetensors; fetch them again"
            ) from None
        except (OSError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"weights {self.path}: {name} cannot be read ({reason}); fetch it again") from None


def _is_name(value: Any) -> bool:
    """Whether a value names a file of the folder that it was read in, and none elsewhere."""
    return isinstance(value, str) and value not in ("", "..") and value == Path(value).name and "\0" not in value


def is_buffer(name: str) -> bool:
    """Whether a name of the state is a buffer: the expert bias is the only one."""
    return name.endswith(".e_score_correction_bias")


def _last_length(data: Mapping[str, Any], run: Mapping[str, Any]) -> int | None:
    """T of the stage that the last step of a run belongs to."""
    begun = run.get("data_sections")
    if not begun:
        length: int | None = data.get("sequence_length")
        return length
    return value_at(DataSection.model_validate(data).lengths, begun[-1]["from_tokens"])


def _tokenizer_of(path: Path, run: dict[str, Any]) -> Path | None:
    """An import carries its tokenizer inside, if it has one; a run beside its checkpoints."""
    is_run = "recipe" in run
    folder = (path.absolute().parents[1] if is_run else path) / "tokenizer"
    if folder.is_dir():
        if is_run:  # an import's is covered by its marker
            _check_tokenizer(path, folder, run["tokenizer_fingerprint"])
        return folder
    if is_run:
        raise CheckpointError(
            f"checkpoint {path}: its tokenizer {folder} is missing; it belongs beside the run's checkpoints/; bring it back"
        )
    return None


def _check_tokenizer(path: Path, folder: Path, trained_with: str) -> None:
    try:
        found = fingerprint(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"unreadable ({type(error).__name__})"
    if found != trained_with:
        raise CheckpointError(
            f"checkpoint {path}: its tokenizer {folder} is {found[:30]} and must be {trained_with[:30]}, the one that it was "
            "trained with; bring that back"
        )


def _groups(shapes: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Cut the names into runs of at most GROUP_BYTES: opening a checkpoint costs too much to do it for each tensor."""
    group: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if group and sum(t.nbytes for t in group.values()) + shape.nbytes > GROUP_BYTES:
            yield group
            group = {}
        group[name] = shape
    if group:
        yield group


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"weights {path}: cannot be read ({type(error).__name__}); it must be a JSON file; fetch it again"
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(f"weights {path}: must be a map of keys; fetch it again")
    return content

"""Tensors in a folder, each rank's in a safetensors file of its own: what torch.distributed.checkpoint (DCP) plans, on a disk.

    rank-00000.safetensors …   length of the header (8 bytes), header (JSON), then the bytes, tensor after tensor
    index.json                 {"tensors": {name: {"dtype": "F32", "shape": […], "parts": [[file, offsets, shape], …]}, …}}

A part is what one rank held of a tensor: a box of `shape` at `offsets`, row-major. A file holds at most one part of a tensor, under
the tensor's name, and says where it belongs as torch's `HuggingFaceStorageWriter` does: any reader of safetensors can read it.

DCP's own writer and reader pickle the index and each tensor. Here nothing that is read is code. The writer knows the header from
the plan and then has one tensor at a time on the host; the reader takes from a file the rows that it was asked for, some at a
time. It does not map files: a disk that fails must raise an error, and a mapped page of it kills the process.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from data.files import replace_file
from train.marker import File

INDEX = "index.json"
PIECE = 4 << 20  # bytes hashed and written at a time, while the processor's cache still has them
BLOCK = 64 << 20  # bytes read at a time, or one row of a part where that is larger
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Part(NamedTuple):
    """A box of a tensor."""

    name: str
    dtype: torch.dtype
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Stored:
    """A tensor of the index, and by their offsets the file and the shape of its parts."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Mapping[tuple[int, ...], tuple[str, tuple[int, ...]]]


def write_file(path: Path, parts: Sequence[Part], tensors: Iterable[Tensor]) -> File:
    """Write a file of parts and wait until the disk has it. `tensors` come in the order of `parts`, one at a time."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in _pieces(parts, tensors):
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        return File(file.tell(), digest.hexdigest())


def write_index(folder: Path, index: Mapping[str, Stored]) -> File:
    """Write what lies where; see `read_index`."""
    tensors = {
        name: {
            "dtype": NAMES[stored.dtype],
            "shape": stored.shape,
            "parts": [(file, offsets, shape) for offsets, (file, shape) in stored.parts.items()],
        }
        for name, stored in index.items()
    }
    content = json.dumps({"tensors": tensors}).encode()
    with replace_file(folder / INDEX) as path:
        path.write_bytes(content)
    return File.of(content)


def read_index(folder: Path, files: Collection[str]) -> dict[str, Stored]:
    """The tensors of a folder.

    Args:
        files: those that a part may lie in.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no index, or the parts of a tensor are not the whole of it.
    """
    try:
        content = json.loads((folder / INDEX).read_bytes())["tensors"]
        index = {
            name: Stored(
                DTYPES[entry["dtype"]],
                _sizes(entry["shape"]),
                {_sizes(offsets): (file, _sizes(shape)) for file, offsets, shape in entry["parts"]},
            )
            for name, entry in content.items()
        }
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{INDEX} is no index of tensors: {type(error).__name__} {error}") from None
    for name, stored in index.items():
        _check(name, stored, files)
    return index


class Writer(StorageWriter):
    """DCP's way to the disk: a file a rank. When the save is done, the first rank has in `files` what was written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, File] = {}

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=f"rank-{rank:05d}.safetensors") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        # Widest numbers first, as safetensors orders them: each tensor then lies at a multiple of its numbers' size.
        items = sorted(plan.items, key=lambda item: -item.tensor_data.properties.dtype.itemsize)  # type: ignore[union-attr]
        parts = []
        for item in items:
            data = item.tensor_data
            assert data is not None, f"{item.index.fqn} is no tensor"
            dtype, chunk = data.properties.dtype, data.chunk
            parts.append(Part(item.index.fqn, dtype, tuple(chunk.offsets), tuple(chunk.sizes)))
        results: list[WriteResult] = []
        if parts:
            name: str = plan.storage_data
            file = write_file(self.folder / name, parts, (planner.resolve_data(item) for item in items))  # type: ignore[misc]
            results = [WriteResult(item.index, part.nbytes, (name, file)) for item, part in zip(items, parts)]
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places: dict[MetadataIndex, str] = {}
        for result in (result for of_rank in results for result in of_rank):
            places[result.index], file = result.storage_data
            self.files[places[result.index]] = file
        index = {name: _stored(name, entry, places) for name, entry in metadata.state_dict_metadata.items()}
        self.files[INDEX] = write_index(self.folder, index)

    def reset(self, checkpoint_id: Any = None) -> None: ...
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class Reader(StorageReader):
    """DCP's way back. An OSError or ValueError of a damaged file reaches the caller inside DCP's CheckpointException."""

    def __init__(self, folder: Path, index: Mapping[str, Stored]) -> None:
        self.folder, self.index = folder, index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=stored.dtype),
                    torch.Size(stored.shape),
                    [
                        ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape))
                        for offsets, (_, shape) in stored.parts.items()
                    ],
                )
                for name, stored in self.index.items()
            }
        )

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted: dict[str, list[tuple[ReadItem, Part]]] = defaultdict(list)
        for item in plan.items:
            name, offsets = item.storage_index.fqn, tuple(item.storage_index.offset or ())
            file, shape = self.index[name].parts[offsets]
            wanted[file].append((item, Part(name, self.index[name].dtype, offsets, shape)))
        for name, items in wanted.items():
            with (self.folder / name).open("rb") as opened:
                begins = _begins(opened, name, [part for _, part in items])
                for item, part in items:
                    target = planner.resolve_tensor(item).detach()
                    _read(opened, begins[part.name], part, item.storage_offsets, target)
                    planner.commit_tensor(item, target)
        return _done(None)

    def reset(self, checkpoint_id: Any = None) -> None: ...
    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...
    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _pieces(parts: Sequence[Part], tensors: Iterable[Tensor]) -> Iterator[Any]:
    """The bytes of a file, some at a time."""
    yield _header(parts)
    for part, tensor in zip(parts, tensors, strict=True):
        assert (part.dtype, part.shape) == (tensor.dtype, tuple(tensor.shape)), (
            f"{part} is {tensor.dtype} {tensor.shape}"
        )
        content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        for begin in range(0, len(content), PIECE):
            yield content[begin : begin + PIECE]


def _header(parts: Sequence[Part]) -> bytes:
    offsets = {part.name: {"saved_offsets": part.offsets} for part in parts}
    about = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
    header: dict[str, Any] = {"__metadata__": about}
    end = 0
    for part in parts:
        begin, end = end, end + part.nbytes
        header[part.name] = {"dtype": NAMES[part.dtype], "shape": part.shape, "data_offsets": [begin, end]}
    assert len(header) == len(parts) + 1, "a file holds one part of a tensor"
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _begins(file: BinaryIO, name: str, parts: Sequence[Part]) -> dict[str, int]:
    """Where each part begins in a file; the header must say of it what the index says."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    try:
        if length > size - 8:
            raise ValueError
        header = json.loads(file.read(length))
        begins = {}
        for part in parts:
            entry = header[part.name]
            begin, end = entry["data_offsets"]
            said = (entry["dtype"], tuple(entry["shape"]), end - begin)
            if said != (NAMES[part.dtype], part.shape, part.nbytes) or not 0 <= begin <= end <= size - 8 - length:
                raise ValueError
            begins[part.name] = 8 + length + begin
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"the header of {name} is not the one that {INDEX} speaks of") from None
    return begins


def _read(file: BinaryIO, begin: int, part: Part, offsets: Sequence[int], target: Tensor) -> None:
    """Fill `target` with the box of a part that begins at `offsets` of it."""
    shape = part.shape or (1,)
    offsets, target = (offsets, target) if part.shape else ((0,), target.view(1))
    row = math.prod(shape[1:]) * part.dtype.itemsize
    rows = max(1, BLOCK // max(1, row))
    for first in range(0, len(target), rows):
        taken = min(rows, len(target) - first)
        block = torch.empty((taken, *shape[1:]), dtype=part.dtype)
        content = block.view(-1).view(torch.uint8).numpy().data
        file.seek(begin + (offsets[0] + first) * row)
        if file.readinto(content) != len(content):  # type: ignore[attr-defined]
            raise ValueError(f"{part.name} ends before its {part.nbytes:,} bytes")
        for dim in range(1, target.dim()):
            block = block.narrow(dim, offsets[dim], target.shape[dim])
        target[first : first + taken].copy_(block)


def _stored(name: str, entry: Any, places: Mapping[MetadataIndex, str]) -> Stored:
    assert isinstance(entry, TensorStorageMetadata), f"{name} is no tensor"
    parts = {
        tuple(chunk.offsets): (places[MetadataIndex(name, chunk.offsets)], tuple(chunk.sizes)) for chunk in entry.chunks
    }
    return Stored(entry.properties.dtype, tuple(entry.size), parts)


def _sizes(numbers: Any) -> tuple[int, ...]:
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise TypeError(f"{numbers} are no sizes")
    return tuple(numbers)


def _check(name: str, stored: Stored, files: Collection[str]) -> None:
    """That the parts of a tensor lie in known files, within its bounds and, as far as numbers of elements tell, are all of it."""
    for offsets, (file, shape) in stored.parts.items():
        if file not in files:
            raise ValueError(f"{INDEX} places {name} in {file!r}, which is no file of the checkpoint")
        ends = [offset + size for offset, size in zip(offsets, shape)]
        if not len(offsets) == len(shape) == len(stored.shape) or any(
            end > size for end, size in zip(ends, stored.shape)
        ):
            raise ValueError(f"{INDEX} gives {name} {list(stored.shape)} a part of {list(shape)} at {list(offsets)}")
    if sum(math.prod(shape) for _, shape in stored.parts.values()) != math.prod(stored.shape):
        raise ValueError(f"{INDEX} has not all of {name} {list(stored.shape)}")


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future

"""Checkpoints that survive a kill at any moment and are read under any layout.

A checkpoint is a folder that torch.distributed.checkpoint (DCP) plans and `train.storage` writes, each rank its part:

    checkpoints/step-00001000/
        rank-00000.safetensors …   tensors, keyed by section and parameter name: `parameters.model.norm.weight`
        index.json                 which part of which tensor lies where
        run.json                   what the caller gives: recipe, step, tokens, samples, random state, versions
        COMPLETE                   the files with their sizes and hashes (`train.marker`), written last

It is written as `.step-00001000.tmp`, every file and the folder are synced, then rank 0 renames it and adds the marker. A
folder counts only with a marker, and is used only once all that the marker lists has been read and found as it was written. The
newest that counts is found by looking: there is no pointer file to go stale. What a kill leaves behind is swept before the next
run's first save.

Writing aside. An asynchronous save copies the state to host memory and returns; a thread of ours then runs the same code as a
synchronous save. All its collectives go over a gloo group of its own: on the training's group they would interleave with
the training's in an order that differs between ranks, and deadlock. DCP's `async_save` is not used, because sync, rename
and marker have to follow its last byte in the same thread, and because it stages everything on every rank: what several
ranks hold alike (DDP's tensors, the shards of HSDP's replicas) is copied and written here by one of them, chosen so that the ranks
write equal amounts.

Trust. Nothing in a checkpoint is code: JSON and safetensors, and no path in it may leave its folder.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
import threading
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from data.files import replace_file, sync
from train.marker import (
    ALONE,
    MARKER,
    REMEDY,
    CheckpointError,
    File,
    VersionError,
    read_marker,
    seal,
    verify,
    verify_sizes,
)
from train.ranks import Ranks
from train.storage import Reader, Stored, Writer, read_index

log = logging.getLogger(__name__)

State = Mapping[str, Any]  # {section: {name: Tensor}} or {section: Tensor}, nested as deep as wanted
RUN = "run.json"
PATIENCE = timedelta(hours=2)  # how long ranks wait for the slowest writer; gloo's 30 minutes are short for terabytes


class DiskError(CheckpointError):
    """A checkpoint that the disk did not take: it is full, may not be written, or fails. Complete ones are untouched."""


class Checkpoints:
    """The checkpoints of a run. Every rank constructs it and calls `save`, `wait`, `latest`, `load`, `prune` in the same order.

    Args:
        folder: `run.dir/checkpoints`, on a filesystem that all ranks see.
        keep: complete checkpoints that stay, the newest ones.
        keep_every_steps: checkpoints at multiples of this stay for ever.
        asynchronous: `save` returns once each rank has copied to host memory what it shall write: all ranks together one state.
    """

    def __init__(
        self, folder: Path | str, keep: int = 3, keep_every_steps: int | None = None, asynchronous: bool = True
    ) -> None:
        self.folder = Path(folder)
        self.keep, self.keep_every_steps, self.asynchronous = keep, keep_every_steps, asynchronous
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._ranks = Ranks(self._group)
        self._swept = False
        self._found: Checkpoint | None = None  # by `latest`, until it is loaded
        self._damaged: set[Path] = set()  # what `latest` has stepped over: with its marker, and yet not whole
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, step: int, state: State, run: Mapping[str, Any], copied: AbstractSet[str] = frozenset()) -> None:
        """Write `step-…` and, once it is complete, remove what `keep` does not keep.

        `state` may be changed as soon as this returns. A checkpoint of this step that is complete already is left as it is.

        Args:
            step: optimizer steps taken.
            state: nested dicts of tensors: plain ones, alike on all ranks that hold them, or DTensors. A key may be
                held by some ranks only, if it is a plain tensor.
            run: what `run.json` shall hold.
            copied: sections of `state` that were copied to host memory for this save; an asynchronous one keeps them as they are.

        Raises:
            DiskError: on all ranks alike; the disk is full, may not be written or fails. The unfinished checkpoint is
                removed, complete ones are untouched, and the next save may be tried. Of an asynchronous save it is raised by
                the next `save` or `wait`.
            CheckpointError: the ranks do not write to one folder.
            VersionError: there is a checkpoint of this step that a newer version wrote.
        """
        self.wait()
        run_json = json.dumps(run, indent=1)
        tensors = self._share_out(_flatten(state))
        if not self.asynchronous:
            self._write(step, tensors, run_json)
            return
        snapshot = {
            name: tensor if name.partition(".")[0] in copied else tensor.detach().to("cpu", copy=True)
            for name, tensor in tensors.items()
        }
        # A daemon: when a rank dies of something else, the others must not wait for it at their exit.
        self._thread = threading.Thread(
            target=self._write_aside, args=(step, snapshot, run_json), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when the save under way is complete; raise what went wrong with it. A run calls it before it ends."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    @property
    def failed(self) -> bool:
        """Whether the last asynchronous save has failed, as this rank knows by now. Raised by `wait`, which all ranks must call."""
        return self._failure is not None

    def latest(self) -> Path | None:
        """The newest complete checkpoint as rank 0 sees it, the same on all ranks, which share the reading."""
        self.wait()
        self._found = newest(self.folder, self._ranks)
        path = self._found.path if self._found else None
        self._damaged = {newer for newer in _folders(self.folder) if path is None or _step(newer) > _step(path)}
        return path

    def complete(self) -> list[Path]:
        """The complete checkpoints as this rank sees them, oldest first."""
        return [path for path in _folders(self.folder) if self._counts(path)]

    def load(self, path: Path, state: State) -> dict[str, Any]:
        """`load` with all ranks: an error of one is raised on all, and a tensor counts as asked for if any rank asks for it."""
        self.wait()
        found, self._found = self._found, None
        if found is None or found.path != path:
            found = Checkpoint(path, self._ranks)
        return found.load(state)

    def prune(self) -> None:
        """Remove the complete checkpoints that neither `keep` nor `keep_every_steps` keeps."""
        self.wait()
        self._ranks.first(self._prune)

    def _write_aside(self, step: int, tensors: dict[str, Tensor], run_json: str) -> None:
        try:
            self._write(step, tensors, run_json)
        except BaseException as error:  # DCP's CheckpointException is no Exception
            self._failure = error

    def _write(self, step: int, tensors: dict[str, Tensor], run_json: str) -> None:
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".{final.name}.tmp"
        size = self._ranks.total(sum(_local(tensor).nbytes for tensor in tensors.values()))
        try:
            if self._ranks.first(final.exists) and self._is_whole(final):
                return
            self._ranks.first(lambda: self._prepare(temporary, final))
            writer = Writer(temporary)
            dcp.save(tensors, storage_writer=writer, process_group=self._group)
            self._ranks.first(lambda: self._publish(temporary, final, step, run_json, writer.files))
        except BaseException as error:
            if self._ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                self._swept = not temporary.exists()  # what cannot be removed now is swept by the next save
            cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            if isinstance(cause, OSError):
                raise DiskError(_explain(cause, final, size)) from cause
            raise

    def _is_whole(self, path: Path) -> bool:
        try:
            verify(path, self._ranks)
        except VersionError:
            raise
        except CheckpointError:
            return False
        return True

    def _share_out(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of what several ranks hold alike, plain tensors or the shards of replicas, the part that this rank shall write."""
        shards = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
        held = self._ranks.gather({name: tensor.nbytes for name, tensor in tensors.items() if name not in shards})
        sizes = {name: size for names in held for name, size in names.items()}
        holders = {name: [rank for rank, names in enumerate(held) if name in names] for name in sizes}
        others = {name for name, writer in _writers(sizes, holders).items() if writer != self._ranks.rank}
        others |= _shards_of_other_replicas(shards)
        return {name: tensor for name, tensor in tensors.items() if name not in others}

    def _prepare(self, temporary: Path, final: Path) -> None:
        """Make the temporary folder, on rank 0."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._swept:
            for leftover in [*self.folder.glob(".step-*.tmp"), *_folders(self.folder)]:
                if not (leftover / MARKER).exists():
                    shutil.rmtree(leftover)
            self._swept = True
        if final.exists():
            remove(final)
        temporary.mkdir()

    def _publish(self, temporary: Path, final: Path, step: int, run_json: str, written: dict[str, File]) -> None:
        """Turn the written folder into a checkpoint, on rank 0."""
        unseen = sorted(name for name in written if not (temporary / name).exists())
        if unseen:
            raise CheckpointError(
                f"checkpoint {final}: {unseen[0]}, written by another rank, is not to be seen by rank 0; all ranks must "
                "write to one folder; set run.dir to a filesystem that all nodes share"
            )
        record = run_json.encode()
        with replace_file(temporary / RUN) as path:
            path.write_bytes(record)
        sync(temporary)
        temporary.rename(final)
        try:
            sync(self.folder)
            seal(final, step, written | {RUN: File.of(record)})
        except OSError:
            shutil.rmtree(final, ignore_errors=True)
            raise
        self._damaged.discard(final)
        self._prune()

    def _counts(self, path: Path) -> bool:
        """Whether a folder is a complete checkpoint, as far as that is known without reading all of it."""
        try:
            verify_sizes(path)
        except CheckpointError:
            return False
        return path not in self._damaged

    def _prune(self) -> None:
        """Remove what is not to be kept. Every save calls it, however many checkpoints stay for ever: of those
        it takes the name alone, of what may go the marker, and looks at the files of the newest only."""
        kept = 0
        for path in reversed(_folders(self.folder)):
            if kept < self.keep:
                kept += self._counts(path)
            elif self.keep_every_steps is None or _step(path) % self.keep_every_steps:
                self._remove_old(path)

    def _remove_old(self, path: Path) -> None:
        """Remove a checkpoint, unless it was found damaged or is another version's: about those somebody decides by hand."""
        if path in self._damaged:
            return
        try:
            read_marker(path)
            remove(path)
        except CheckpointError:
            return
        except OSError as error:  # the save that led here is complete; an old one too many does no harm
            log.warning("checkpoint %s: cannot be removed (%s); remove it by hand", path, error.strerror)


class Checkpoint:
    """A checkpoint that has been found whole.

    Args:
        path: the folder `step-…`.
        ranks: that open it together, and share the reading.

    Raises:
        CheckpointError: on all ranks alike; a file is missing or not what was written.
        VersionError: another format, or a newer version wrote it.
    """

    def __init__(self, path: Path | str, ranks: Ranks = ALONE) -> None:
        self.path, self._ranks = Path(path), ranks
        self._files = verify(self.path, ranks)
        self.run = ranks.first(lambda: read_run(self.path))

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """What it holds, by name."""
        try:
            return read_index(self.path, self._files)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"checkpoint {self.path}: {_first_line(error)}; {REMEDY}") from error

    def load(self, state: State, partial: bool = False) -> dict[str, Any]:
        """Read it into `state` in place, whatever layout and world size wrote it.

        Args:
            state: nested dicts of tensors, plain or DTensors, on any device. A value is converted to the tensor's dtype.
            partial: leave alone what the checkpoint holds beyond `state`; else that is an error.

        Returns:
            What `run.json` holds.

        Raises:
            CheckpointError: on all ranks alike; a file is unreadable; a tensor is missing, unasked for or of another shape.
                In the latter cases nothing has been read into `state`.
        """
        tensors = _flatten(state)
        saved = self._ranks.all(lambda: {name: torch.Size(stored.shape) for name, stored in self.tensors.items()})
        asked = self._ranks.union([name in tensors for name in sorted(saved)])
        extra = [name for name, wanted in zip(sorted(saved), asked) if not wanted and not partial]
        self._ranks.all(lambda: _check_match(self.path, saved, tensors, extra))
        self._ranks.all(lambda: self._read(tensors))
        return self.run

    def _read(self, tensors: dict[str, Tensor]) -> None:
        """This rank's part, without the others."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(tensors, storage_reader=Reader(self.path, self.tensors), no_dist=True)
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise CheckpointError(f"checkpoint {self.path}: cannot be read ({_first_line(cause)}); {REMEDY}") from error


def newest(folder: Path | str, ranks: Ranks = ALONE) -> Checkpoint | None:
    """The newest complete checkpoint in a folder; None if there is none. A newer one that is damaged costs a warning.

    Raises:
        VersionError: the newest is of another format, or a newer version wrote it: the run has gone on elsewhere.
    """
    for path in ranks.first(lambda: _folders(Path(folder))[::-1]):
        try:
            return Checkpoint(path, ranks)
        except VersionError:
            raise
        except CheckpointError as error:
            if ranks.rank == 0:
                log.warning("%s; skipped", error)
    return None


def latest(folder: Path | str) -> Path | None:
    """Where the `newest` checkpoint of a folder is."""
    found = newest(folder)
    return found.path if found else None


def load(path: Path | str, state: State, partial: bool = False) -> dict[str, Any]:
    """`Checkpoint.load` without other ranks."""
    return Checkpoint(path).load(state, partial)


def remove(path: Path) -> None:
    """Remove a checkpoint; the marker first, so that a kill in between leaves nothing that looks broken."""
    (path / MARKER).unlink(missing_ok=True)
    sync(path)
    shutil.rmtree(path)


def read_run(path: Path | str) -> dict[str, Any]:
    """What `run.json` of a checkpoint holds."""
    try:
        return json.loads((Path(path) / RUN).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path}: {RUN} cannot be read ({_first_line(error)}); {REMEDY}") from error


def _check_match(path: Path, saved: dict[str, torch.Size], tensors: dict[str, Tensor], extra: list[str]) -> None:
    """Refuse a state that is not the checkpoint's, naming the first difference."""
    fix = "resume with the recipe that wrote it (run.json), or set another run.dir"
    missing = sorted(name for name in tensors if name not in saved)
    if missing:
        raise CheckpointError(
            f"checkpoint {path}: has no {missing[0]} {_shape(tensors[missing[0]].shape)}{_more(missing)}; "
            f"it must hold every tensor of the run; {fix}"
        )
    if extra:
        raise CheckpointError(
            f"checkpoint {path}: holds {extra[0]} {_shape(saved[extra[0]])}{_more(extra)}, "
            f"which the run has not; nothing saved may be dropped; {fix}"
        )
    differing = sorted(name for name, tensor in tensors.items() if tensor.shape != saved[name])
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"checkpoint {path}: {name} has shape {_shape(saved[name])}, the run's has {_shape(tensors[name].shape)}"
            f"{_more(differing)}; shapes must be equal; {fix}"
        )


def _explain(error: OSError, path: Path, size: int) -> str:
    """One line for a failed save."""
    reason = error.strerror or type(error).__name__
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(next(parent for parent in path.parents if parent.exists())).free
        return (
            f"checkpoint {path}: {reason}; it needs {_gigabytes(size)}, {_gigabytes(free)} are free; complete checkpoints "
            "are untouched; free space, lower checkpoint.keep or set run.dir to a larger disk"
        )
    return (
        f"checkpoint {path}: {reason}; the run must be able to write its folder; complete checkpoints are untouched; "
        f"make {path.parent} writable or set another run.dir"
    )


def _writers(sizes: Mapping[str, int], holders: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Each tensor's writer among those that hold it: largest first, to the one that has least to write."""
    load: Counter[int] = Counter()
    writers = {}
    for name in sorted(sizes, key=lambda name: (len(holders[name]) > 1, -sizes[name], name)):
        writers[name] = min(holders[name], key=load.__getitem__)
        load[writers[name]] += sizes[name]
    return writers


def _shards_of_other_replicas(shards: Mapping[str, DTensor]) -> set[str]:
    """Names of the shards that another rank, which holds them too, shall write. Those ranks all find the same, without asking."""
    alike: dict[
        tuple[DeviceMesh, tuple[int, ...]], dict[str, int]
    ] = {}  # by mesh and replicated dimensions: bytes here
    for name, shard in shards.items():
        replicated = tuple(dim for dim, placement in enumerate(shard.placements) if placement.is_replicate())
        alike.setdefault((shard.device_mesh, replicated), {})[name] = shard.to_local().nbytes
    others = set()
    for (mesh, replicated), sizes in alike.items():
        replica, replicas = 0, 1
        for dim in replicated:
            replica = replica * mesh.size(dim) + mesh.get_local_rank(dim)
            replicas *= mesh.size(dim)
        writers = _writers(sizes, dict.fromkeys(sizes, range(replicas)))
        others |= {name for name, writer in writers.items() if writer != replica}
    return others


def _flatten(state: State, prefix: str = "") -> dict[str, Tensor]:
    """{"parameters": {"a.b": t}} → {"parameters.a.b": t}. Numbers belong in `run.json`, where they need no pickle."""
    flat: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            flat[f"{prefix}{key}"] = value
        else:
            raise TypeError(
                f"state[{prefix}{key}] is a {type(value).__name__}; a checkpoint's state holds tensors only"
            )
    return flat


def _folders(folder: Path) -> list[Path]:
    """The folders step-… in it, complete or not, by step."""
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shape(shape: torch.Size) -> str:
    return str(list(shape))


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.3f} GB"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]

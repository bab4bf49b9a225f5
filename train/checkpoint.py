"""Checkpoints that survive a kill at any moment and are read under any layout.

A checkpoint is a folder written by torch.distributed.checkpoint (DCP), each rank its part:

    checkpoints/step-00001000/
        __0_0.distcp …   tensors, keyed by section and parameter name: `parameters.model.norm.weight`
        .metadata        DCP's index: which part of which tensor lies where
        run.json         what the caller gives: recipe, step, tokens, samples, random state, versions
        COMPLETE         {"step": …, "files": {name: bytes}}, written last

It is written as `.step-00001000.tmp`, every file and the folder are synced, then rank 0 renames it and adds the marker. A
folder counts only with a marker whose files are all there with their sizes, and the newest that counts is found by looking:
there is no pointer file to go stale. What a kill leaves behind is swept before the next run's first save.

Writing aside. An asynchronous save copies the state to host memory and returns; a thread of ours then runs the same code as a
synchronous save. All its collectives go over a gloo group of its own: on the training's group they would interleave with
the training's in an order that differs between ranks, and deadlock. DCP's `async_save` is not used, because sync, rename
and marker have to follow its last byte in the same thread, and because it stages everything on every rank: what several
ranks hold alike (DDP's tensors, the shards of HSDP's replicas) is copied and written here by one of them, chosen so that the ranks
write equal amounts.

Trust. `.metadata` is a pickle, the one file here that is unpickled: load only checkpoints that a run of your own wrote.
Tensors are read by `torch.load(weights_only=True)`. Weights from elsewhere come in as safetensors, by the Hugging Face import.
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
from train.ranks import Ranks

log = logging.getLogger(__name__)

State = Mapping[str, Any]  # {section: {name: Tensor}} or {section: Tensor}, nested as deep as wanted
MARKER = "COMPLETE"
PATIENCE = timedelta(hours=2)  # how long ranks wait for the slowest writer; gloo's 30 minutes are short for terabytes


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read. The message is one line: folder, what was found, rule and fix."""


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
            CheckpointError: on all ranks alike; the disk is full or may not be written. The unfinished checkpoint is
                removed, complete ones are untouched. Of an asynchronous save it is raised by the next `save` or `wait`.
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
        """The newest complete checkpoint as rank 0 sees it, the same on all ranks."""
        self.wait()
        return self._ranks.first(lambda: latest(self.folder))

    def load(self, path: Path, state: State) -> dict[str, Any]:
        """`load` with all ranks: an error of one is raised on all, and a tensor counts as asked for if any rank asks for it."""
        self.wait()
        return _load(path, state, self._ranks, partial=False)

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
            if self._ranks.first(lambda: self._prepare(temporary, final)):
                return
            # DCP would copy from the GPU in streams of its own; in a thread that means the first GPU's, whatever this rank's is.
            ahead: dict[str, Any] = {"per_thread_copy_ahead": 0} if self.asynchronous else {}
            metadata = dcp.save(tensors, storage_writer=SyncedWriter(temporary, **ahead), process_group=self._group)
            written = {part.relative_path for part in (metadata.storage_data or {}).values()}
            self._ranks.first(lambda: self._publish(temporary, final, step, run_json, written))
        except BaseException as error:
            if self._ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            if isinstance(cause, OSError):
                raise CheckpointError(_explain(cause, final, size)) from cause
            raise

    def _share_out(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of what several ranks hold alike, plain tensors or the shards of replicas, the part that this rank shall write."""
        shards = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
        held = self._ranks.gather({name: tensor.nbytes for name, tensor in tensors.items() if name not in shards})
        sizes = {name: size for names in held for name, size in names.items()}
        holders = {name: [rank for rank, names in enumerate(held) if name in names] for name in sizes}
        others = {name for name, writer in _writers(sizes, holders).items() if writer != self._ranks.rank}
        others |= _shards_of_other_replicas(shards)
        return {name: tensor for name, tensor in tensors.items() if name not in others}

    def _prepare(self, temporary: Path, final: Path) -> bool:
        """Make the temporary folder, on rank 0; True if there is nothing to write because the checkpoint exists."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._swept:
            for leftover in [*self.folder.glob(".step-*.tmp"), *_folders(self.folder)]:
                if not (leftover / MARKER).exists():
                    shutil.rmtree(leftover)
            self._swept = True
        if _is_complete(final):
            return True
        if final.exists():
            _remove(final)
        temporary.mkdir()
        return False

    def _publish(self, temporary: Path, final: Path, step: int, run_json: str, written: set[str]) -> None:
        """Turn the written folder into a checkpoint, on rank 0."""
        unseen = sorted(name for name in written if not (temporary / name).exists())
        if unseen:
            raise CheckpointError(
                f"checkpoint {final}: {unseen[0]}, written by another rank, is not to be seen by rank 0; all ranks must "
                "write to one folder; set run.dir to a filesystem that all nodes share"
            )
        with replace_file(temporary / "run.json") as path:
            path.write_text(run_json, encoding="utf-8")
        files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        sync(temporary)
        temporary.rename(final)
        try:
            sync(self.folder)
            with replace_file(final / MARKER) as path:
                path.write_text(json.dumps({"step": step, "files": files}, indent=1), encoding="utf-8")
        except OSError:
            shutil.rmtree(final, ignore_errors=True)
            raise
        self._prune()

    def _prune(self) -> None:
        complete = [path for path in _folders(self.folder) if _is_complete(path)]
        for path in complete[: -self.keep]:
            if self.keep_every_steps is None or _step(path) % self.keep_every_steps:
                try:
                    _remove(path)
                except OSError as error:  # the save that led here is complete; an old one too many does no harm
                    log.warning("checkpoint %s: cannot be removed (%s); remove it by hand", path, error.strerror)


def latest(folder: Path | str) -> Path | None:
    """The newest complete checkpoint in a folder; None if there is none. A newer one that is broken costs a warning."""
    for path in reversed(_folders(Path(folder))):
        try:
            verify(path)
        except CheckpointError as error:
            log.warning("%s; skipped", error)
            continue
        return path
    return None


def load(path: Path | str, state: State, partial: bool = False) -> dict[str, Any]:
    """Read a checkpoint into `state` in place, whatever layout and world size wrote it; no other rank takes part.

    Args:
        path: the folder `step-…`.
        state: nested dicts of tensors, plain or DTensors, on any device. A value is converted to the tensor's dtype.
        partial: leave alone what the checkpoint holds beyond `state`; else that is an error.

    Returns:
        What `run.json` holds.

    Raises:
        CheckpointError: a file is missing, of another size or unreadable; a tensor is missing, unasked for or of
            another shape. In the latter cases nothing has been read into `state`.
    """
    return _load(Path(path), state, Ranks(None), partial)


def read_run(path: Path | str) -> dict[str, Any]:
    """What `run.json` of a checkpoint holds."""
    file = Path(path) / "run.json"
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path}: run.json cannot be read ({_first_line(error)}); {REMEDY}") from error


def verify(path: Path | str) -> None:
    """Raise CheckpointError unless the marker is there and every file it lists has its size."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path}: no such folder; give a folder step-… of a run")
    try:
        files: dict[str, int] = json.loads((path / MARKER).read_text("utf-8"))["files"]
    except FileNotFoundError:
        raise CheckpointError(
            f"checkpoint {path}: has no {MARKER} marker, its save was interrupted; {REMEDY}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path}: {MARKER} cannot be read ({_first_line(error)}); {REMEDY}") from None
    for name, expected in files.items():
        try:
            found = f"has {(path / name).stat().st_size:,} bytes"
        except OSError:
            found = "is missing"
        if found != f"has {expected:,} bytes":
            raise CheckpointError(f"checkpoint {path}: {name} {found} and must have {expected:,} bytes; {REMEDY}")


REMEDY = "delete the folder to continue from the checkpoint before it"


def _load(path: Path, state: State, ranks: Ranks, partial: bool) -> dict[str, Any]:
    ranks.first(lambda: verify(path))
    reader = dcp.FileSystemReader(path)
    tensors = _flatten(state)

    def read_index() -> dict[str, torch.Size]:
        try:
            index = reader.read_metadata().state_dict_metadata
        except Exception as error:  # a damaged pickle can raise anything
            raise CheckpointError(
                f"checkpoint {path}: .metadata cannot be read ({_first_line(error)}); {REMEDY}"
            ) from error
        return {name: entry.size for name, entry in index.items()}  # type: ignore[union-attr]

    def read_tensors() -> None:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(tensors, storage_reader=reader, no_dist=True)  # each rank reads its part by itself
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise CheckpointError(f"checkpoint {path}: cannot be read ({_first_line(cause)}); {REMEDY}") from error

    saved = ranks.all(read_index)
    asked = ranks.union([name in tensors for name in sorted(saved)])
    extra = [name for name, wanted in zip(sorted(saved), asked) if not wanted and not partial]
    ranks.all(lambda: _check_match(path, saved, tensors, extra))
    ranks.all(read_tensors)
    return read_run(path)


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


class SyncedWriter(dcp.FileSystemWriter):
    """DCP's writer, which syncs each file; raises the OSError where the zip writer hides it behind 'unexpected pos'.

    A CheckpointError of the tensors' source is raised as it is, whatever OSError it explains.
    """

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            hidden: BaseException | None = error
            while hidden is not None and not isinstance(hidden, OSError | CheckpointError):
                hidden = hidden.__context__
            raise (hidden or error) from None


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


def _is_complete(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def _remove(path: Path) -> None:
    """Remove a checkpoint; the marker first, so that a kill in between leaves nothing that looks broken."""
    (path / MARKER).unlink(missing_ok=True)
    sync(path)
    shutil.rmtree(path)


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

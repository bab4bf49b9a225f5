"""Turns each step's result into its dict of metrics (`train.metrics` names the keys) and gives it to everything that shows it."""

import errno
import fcntl
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import psutil
import torch

from model.flops import flops_mfu
from model.transformer import Transformer
from parallel.engine import StepResult
from train.config import Recipe, RecipeError
from train.evaluate import Evaluation
from train.guard.lost import Lost
from train.launch import Process
from train.loggers import Logger, MetricsError, open_loggers
from train.marker import MARKER
from train.metrics import MetricsLog, TerminalLine, balance_metrics
from train.planning.devices import peak_flops
from train.schedule import Schedule, Step

HANDOVER = (
    120.0  # seconds that a run waits for the end of the one before it; a dead node's locks outlive it for so long
)
TELL = 10.0  # seconds until a line says so
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}  # of a file system that has none

log = logging.getLogger(__name__)


class RunLog:
    """The record of a run, kept by the first rank; on the others every call does nothing.

    Args:
        step: of the checkpoint that the run continues from.

    Raises:
        RecipeError: on the first rank; another run on this machine is at work in the folder.
        Lost: on the first rank; one elsewhere is, or was until now.
        MetricsError: on the first rank; the package of a logger is not installed, or the folder cannot be written.

    Once the run is under way, a disk that fails does not end it: that is told, and what shall be in `metrics.jsonl` waits.
    """

    def __init__(self, recipe: Recipe, process: Process, schedule: Schedule, model: Transformer, step: int):
        self.is_first = process.is_first
        self.device = process.device
        self.model = model
        self._open = ExitStack()
        self._started = time.perf_counter()
        self._loggers: list[Logger] = []
        self._disk_fails = False
        if not self.is_first:
            return
        computes = torch.float8_e4m3fn if model.fp8_names else model.compute_dtype
        self.peak = process.world_size * peak_flops(process.device, computes)
        self.folder = folder = Path(recipe.run.dir)
        with written_into(folder):
            process.watch.at("waiting for run.dir", patience=2 * HANDOVER)
            waited = self._open.enter_context(_alone_in(folder))
            saved = max((path.parent.name for path in folder.glob(f"checkpoints/step-*/{MARKER}")), default="")
            if waited and saved > f"step-{step:08d}":
                raise Lost(f"run.dir = {folder}: another run has saved {saved} meanwhile; start the same command again")
            for logger in open_loggers(recipe.logging, folder, recipe.model_dump(mode="json", by_alias=True), step):
                self._open.callback(logger.close)
                self._loggers.append(logger)
            self._lines = self._open.enter_context(MetricsLog(folder / "metrics.jsonl", step))
        self.terminal = TerminalLine(schedule.total_steps, schedule.final_tokens, recipe.logging.every_steps)
        self._open.enter_context(self.terminal)

    def start_step(self) -> None:
        """A step's clock starts with the wait for its data, or with the result of the step before; it ends with its own result."""
        self._started = time.perf_counter()

    def end_step(
        self,
        number: int,
        step: Step,
        result: StepResult,
        skipped: int,
        waited: float,
        consumed: dict[str, int],
        limit: float,
    ) -> dict[str, Any]:
        """The metrics of a step whose result has just come; the clock of the next one starts.

        `number`, the `skipped` steps and the tokens `consumed` count it in.

        Args:
            waited: seconds of the step in which it had no data.
            consumed: tokens of every source.
            limit: above which its loss stands out; infinite while there is none.
        """
        seconds = time.perf_counter() - self._started
        self.start_step()
        if not self.is_first:
            return {}
        settings = step.settings
        rate = step.tokens / seconds
        metrics: dict[str, Any] = {
            "step": number,
            "tokens": step.first_token + step.tokens,
            "tokens_by_source": consumed,
            "loss": result.losses.main,
            "mtp_loss": result.losses.mtp,
            "balance_loss": result.losses.balance,
            "grad_norm": result.grad_norm,
            "lr": settings.lr,
            "gamma": settings.gamma,
            "alpha": settings.alpha,
            "lambda": settings.lambda_,
            "batch_tokens": step.tokens,
            "sequence_length": step.sequence_length,
            "tokens_per_second": rate,
            "data_seconds": waited,
            "mfu": rate * flops_mfu(self.model.config, step.sequence_length) / self.peak,
            "memory_bytes": self._memory(),
            "skipped": skipped,
        }
        if limit < math.inf:
            metrics["loss_limit"] = limit
        if result.scales:
            metrics |= {"fp8_max_scale": result.scales.largest, "fp8_max_scale_at": result.scales.at}
        if result.expert_counts.numel():
            metrics |= balance_metrics(result.expert_counts, result.expert_biases)
        return metrics

    def write(self, metrics: dict[str, Any], evaluation: Evaluation | None = None) -> None:
        """Show and keep a step's metrics, with the validation that followed it if there was one."""
        if not self.is_first:
            return
        if evaluation is not None:
            metrics |= evaluation.to_dict()
        self.terminal.show(metrics)
        self._keep(metrics)
        for logger in tuple(self._loggers):
            try:
                logger.write(metrics)
            except OSError as error:
                self._disk_fails = True
                self._loggers.remove(logger)
                self.say(
                    f"{type(logger).__name__}: {error.strerror}; it gets no more of this run until it is started again"
                )

    def flush(self) -> None:
        """Write what has waited for a disk that failed; the run is about to end.

        Raises:
            MetricsError: the disk still fails.
        """
        if self.is_first:
            with written_into(self.folder):
                self._lines.flush()

    def _keep(self, metrics: dict[str, Any]) -> None:
        waited = self._lines.waiting
        try:
            self._lines.write(metrics)
        except OSError as error:
            self._disk_fails = True
            if not waited:
                self.say(
                    f"{self._lines.path}: {error.strerror}; training goes on, the lines from step {metrics['step']} on are kept "
                    "and written when it can be written again; free space"
                )
            return
        if waited:
            self.say(f"{self._lines.path}: can be written again; the {waited} lines that waited are in it")

    def say(self, text: str) -> None:
        """One line to the person at the terminal."""
        if self.is_first:
            self.terminal.say(text)

    def _memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return psutil.Process().memory_info().rss

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._open.close()
        except OSError:  # a full disk also fails what is flushed on closing
            if not self._disk_fails:
                raise


@contextmanager
def _alone_in(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock; whether it had to be waited for. It has the host and the process of its holder in it.

    The system lets go of it when the process ends, however it ends; one that was killed may be at it. A file server waits for a
    node that is gone, for a minute or two.
    """
    with (folder / ".lock").open("a+") as file:
        started, told, waited = time.monotonic(), False, 0.0
        while not _locks(file, folder):
            waited = time.monotonic() - started
            host, process = _holder(file)
            holder = f"process {process} on {host}" if process else "another process"
            if waited > HANDOVER and host == socket.gethostname() and psutil.pid_exists(process):
                raise RecipeError(
                    f"run.dir = {folder}: another run is at work in it, {holder}; processes of one run are started by torchrun; "
                    "wait for the other run, or set another run.dir"
                )
            if waited > HANDOVER:
                raise Lost(
                    f"run.dir = {folder}: locked by {holder} for {waited:.0f} s; if it is alive, set another run.dir; if its node "
                    "is gone, start the same command again"
                )
            if waited > TELL and not told:
                told = True
                line = f"run.dir = {folder}: locked by {holder}; waiting for up to {HANDOVER:.0f} s"
                print(f"rorqual: {line}", file=sys.stderr, flush=True)
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"{socket.gethostname()} {os.getpid()}\n")
        file.flush()
        yield waited > 0


def _holder(file: TextIO) -> tuple[str, int]:
    """Host and process of who has the lock; nobody and 0 where they are not known."""
    file.seek(0)
    host, _, process = file.read().strip().partition(" ")
    return host, int(process) if process.isdecimal() else 0


def _locks(file: TextIO, folder: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning(
            "run.dir = %s: its file system has no locks (%s): nothing keeps a second run out of it",
            folder,
            error.strerror,
        )
    return True


@contextmanager
def written_into(folder: Path) -> Iterator[None]:
    """What is written into the run's folder in this block; what stands in the way of it is a user's mistake.

    Raises:
        MetricsError: instead of an OSError, but for EIO: the disk fails, which no recipe can help.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.EIO:
            raise
        raise MetricsError(
            f"run.dir = {folder}: {error.filename or 'a file in it'}: {error.strerror}; a run must be able to write its folder; "
            "make it writable, free space or set another run.dir"
        ) from error

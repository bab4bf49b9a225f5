"""Turns each step's result into its dict of metrics (`train.metrics` names the keys) and gives it to everything that shows it."""

import errno
import fcntl
import math
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
from train.launch import Process
from train.loggers import Logger, MetricsError, open_loggers
from train.metrics import MetricsLog, TerminalLine, balance_metrics
from train.planning.devices import peak_flops
from train.schedule import Schedule, Step

HANDOVER = 10.0  # seconds that a run waits for the end of the one before it


class RunLog:
    """The record of a run, kept by the first rank; on the others every call does nothing.

    Args:
        step: of the checkpoint that the run continues from.

    Raises:
        RecipeError: on the first rank; another run is at work in the folder.
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
            self._open.enter_context(_alone_in(folder))
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
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. The system lets go of it when the process ends, however it ends; one that was killed may be at it."""
    with (folder / ".lock").open("w") as file:
        deadline = time.monotonic() + HANDOVER
        while not _locks(file):
            if time.monotonic() > deadline:
                raise RecipeError(
                    f"run.dir = {folder}: another run is at work in it; processes of one run are started by torchrun; wait for "
                    "the other run, or set another run.dir"
                )
            time.sleep(0.1)
        yield


def _locks(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
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

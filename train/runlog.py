"""Turns each step's result into its dict of metrics (`train.metrics` names the keys) and gives it to everything that shows it."""

import logging
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import torch

from model.flops import flops_mfu
from model.transformer import Transformer
from parallel.engine import StepResult
from train.config import Recipe
from train.evaluate import Evaluation
from train.launch import Process
from train.loggers import open_loggers
from train.metrics import MetricsLog, TerminalLine, balance_metrics
from train.planning.devices import peak_flops
from train.schedule import Schedule, Step

log = logging.getLogger(__name__)


class RunLog:
    """The record of a run, kept by the first rank; on the others every call does nothing.

    Args:
        step: of the checkpoint that the run continues from.
    """

    def __init__(self, recipe: Recipe, process: Process, schedule: Schedule, model: Transformer, step: int):
        self.is_first = process.is_first
        self.length = recipe.data.sequence_length
        self.device = process.device
        self.model = model
        self._open = ExitStack()
        self._started = time.perf_counter()
        self._sinks: list[Any] = []
        if not self.is_first:
            return
        self.flops_per_token = flops_mfu(model.config, self.length)
        self.peak = process.world_size * peak_flops(process.device, model.compute_dtype)
        folder = Path(recipe.run.dir)
        self.terminal = TerminalLine(schedule.total_steps, schedule.final_tokens, recipe.logging.every_steps)
        self._open.enter_context(self.terminal)
        self._file = self._open.enter_context(MetricsLog(folder / "metrics.jsonl", step))
        for logger in open_loggers(recipe.logging, folder, recipe.model_dump(mode="json", by_alias=True), step):
            self._open.callback(logger.close)
            self._sinks.append(logger)

    def start_step(self) -> None:
        """The clock of a step starts with the wait for its data and ends with its result."""
        self._started = time.perf_counter()

    def end_step(self, number: int, tokens: int, skipped: int, step: Step, result: StepResult) -> dict[str, Any]:
        """The metrics of a step that has just been made. `number`, `tokens` and `skipped` steps count it in."""
        seconds = time.perf_counter() - self._started
        if not self.is_first:
            return {}
        settings = step.settings
        rate = settings.batch * self.length / seconds
        metrics: dict[str, Any] = {
            "step": number,
            "tokens": tokens,
            "loss": result.losses.main,
            "mtp_loss": result.losses.mtp,
            "balance_loss": result.losses.balance,
            "grad_norm": result.grad_norm,
            "lr": settings.lr,
            "gamma": settings.gamma,
            "alpha": settings.alpha,
            "lambda": settings.lambda_,
            "batch_tokens": settings.batch * self.length,
            "tokens_per_second": rate,
            "mfu": rate * self.flops_per_token / self.peak,
            "memory_bytes": self._memory(),
            "skipped": skipped,
        }
        if result.expert_counts.numel():
            biases = [bias for _, bias in self.model.named_buffers()]
            metrics |= balance_metrics(result.expert_counts, biases)
        return metrics

    def write(self, metrics: dict[str, Any], evaluation: Evaluation | None = None) -> None:
        """Show and keep a step's metrics, with the validation that followed it if there was one."""
        if not self.is_first:
            return
        if evaluation is not None:
            metrics |= evaluation.to_dict()
        self._file.write(metrics)
        self.terminal.show(metrics)
        for sink in self._sinks:
            sink.write(metrics)

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
        self._open.close()

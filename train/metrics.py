"""What a run says about itself: one dict of numbers a step, kept in a file and shown on a line (and by `train.loggers`).

    step, tokens, tokens_by_source            optimizer steps and tokens so far, this step included; {source: tokens}
    loss, mtp_loss, balance_loss              nats per token over the global batch; mtp_loss has one entry a depth
    loss_limit                                above which it stands out (`train.guard.spikes`); absent while there is none
    grad_norm                                 before clipping
    skipped                                   steps of the run so far that updated nothing: see `parallel.step`
    fp8_max_scale, fp8_max_scale_at           largest scale of the step's inputs and weights in FP8; layer and tensor that have it
    lr, batch_tokens, sequence_length, gamma, alpha, lambda    of this step
    data_seconds                              how long the step waited for its batch, on rank 0
    tokens_per_second, mfu, memory_bytes      of all ranks; a fraction of the devices' peak, in FP8 of that of FP8; of rank 0
    max_vio, max_vio_mean, max_vio_worst, max_vio_worst_layer, bias_min, bias_max      see `balance_metrics`
    validation, validation_max_vio            in steps that validate: {source: {"nats_per_token", "bits_per_byte", …}}

`max_vio` and what follows it are absent where the model has no experts, `fp8_…` without FP8. `train.runlog` makes the dict.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor

from data.files import replace_file
from model.balance import max_violation

log = logging.getLogger(__name__)


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line and step, handed to the system as soon as the step is over.

    The file is strict JSON. NaN and the infinities, which JSON has not, are written as null: a column then holds numbers
    and gaps for every reader, and `skipped` grows in the steps whose gradient was not finite.

    A line that the disk does not take is kept and goes in before the next one; the file never holds half of one.

    Opened after a checkpoint of step N, it keeps the lines up to N and drops the rest, a half-written last line
    included. The file of an interrupted run is then line by line that of an uninterrupted one, but for what clocks say.

    Args:
        path: the file, created where it is missing.
        step: of the checkpoint that the run continues from; 0 for a new run.
    """

    def __init__(self, path: Path | str, step: int = 0) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._keep_until(step)
        self._file = self.path.open("ab", buffering=0)
        self._size = self._file.tell()  # of the whole lines in it
        self._waiting: list[bytes] = []

    @property
    def waiting(self) -> int:
        """Lines that the disk has not taken yet."""
        return len(self._waiting)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append the line of a step. Raises an OSError if it has to wait."""
        self._waiting.append(f"{json.dumps(_finite(metrics), allow_nan=False)}\n".encode())
        self.flush()

    def flush(self) -> None:
        """Write the lines that wait. Raises an OSError if the disk does not take them all."""
        while self._waiting:
            line = self._waiting[0]
            try:
                if os.fstat(self._file.fileno()).st_size != self._size:
                    self._file.truncate(self._size)
                while line:
                    line = line[self._file.write(line) :]
            except OSError:
                with suppress(OSError):
                    self._file.truncate(self._size)
                raise
            self._size += len(self._waiting.pop(0))

    def close(self) -> None:
        with suppress(OSError):
            self.flush()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _keep_until(self, step: int) -> None:
        lines = self.path.read_text("utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) <= step]
        unreadable = sum(_step_of(line) == math.inf for line in lines[:-1])
        if unreadable:
            log.warning("%s: %d lines are no JSON objects with a step; they are dropped", self.path, unreadable)
        if len(kept) < len(lines):
            with replace_file(self.path) as temporary:
                temporary.write_text("".join(kept), encoding="utf-8")


class TerminalLine:
    """The run on one line: a live one on a terminal, a printed one now and then where the output is a file.

    Args:
        total_steps, total_tokens: of the whole schedule; the tokens give the time that is left.
        every_steps: how often a line is printed where the output is no terminal.
        console: where to; standard error by default, so that standard output stays free.
    """

    def __init__(
        self, total_steps: int, total_tokens: int, every_steps: int = 1, console: Console | None = None
    ) -> None:
        self.total_steps, self.total_tokens, self.every_steps = total_steps, total_tokens, every_steps
        self._console = console or Console(stderr=True)
        self._live = Live(console=self._console) if self._console.is_terminal else None
        if self._live:
            self._live.start()

    def show(self, metrics: Mapping[str, Any]) -> None:
        """Show a step, and what it validated, which stays on the screen."""
        if self._live:
            self._live.update(Text(self.line(metrics)))
        elif metrics["step"] % self.every_steps == 0 or metrics["step"] == self.total_steps:
            self.say(self.line(metrics))
        if "validation" in metrics:
            self.say(_validation_line(metrics))

    def say(self, text: str) -> None:
        """Print a line, above the live one if there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def line(self, metrics: Mapping[str, Any]) -> str:
        """A step in words."""
        parts = [f"step {metrics['step']}/{self.total_steps}", f"loss {metrics['loss']:.4f}"]
        if metrics["mtp_loss"]:
            parts.append("mtp " + " ".join(f"{loss:.4f}" for loss in metrics["mtp_loss"]))
        if metrics["skipped"]:
            parts.append(f"skipped {metrics['skipped']}")
        parts += [
            f"grad {metrics['grad_norm']:.2f}",
            f"lr {metrics['lr']:.2e}",
            f"batch {_short(metrics['batch_tokens'])}",
            f"{_short(metrics['tokens_per_second'])} tok/s",
            f"data {1000 * metrics['data_seconds']:.0f} ms",
            f"mfu {metrics['mfu']:.1%}",
            f"mem {metrics['memory_bytes'] / 2**30:.1f} GiB",
        ]
        if "max_vio" in metrics:
            parts.append(
                f"maxvio {metrics['max_vio_mean']:.2f}, worst {metrics['max_vio_worst']:.2f} "
                f"in MoE layer {metrics['max_vio_worst_layer']}"
            )
            parts.append(f"bias {metrics['bias_min']:+.3f} to {metrics['bias_max']:+.3f}")
        left = (self.total_tokens - metrics["tokens"]) / metrics["tokens_per_second"]
        parts.append(f"eta {_duration(left)}")
        return " · ".join(parts)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._live:
            self._live.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def balance_metrics(counts: Tensor, biases: Tensor) -> dict[str, Any]:
    """The keys of a step that tell how evenly the experts are used.

    Args:
        counts: [L, E] tokens routed to each expert over the global batch, of each MoE layer, then of each MTP depth.
        biases: [L, E] balancing bias of each expert.

    Returns:
        max_vio, max_vio_mean, max_vio_worst, max_vio_worst_layer: MaxVio_batch of each layer, and over the layers; the
            layer is an index into `max_vio`.
        bias_min, bias_max: over all layers.
    """
    violation = max_violation(counts)
    worst = int(violation.argmax())
    return {
        "max_vio": violation.tolist(),
        "max_vio_mean": float(violation.mean()),
        "max_vio_worst": float(violation[worst]),
        "max_vio_worst_layer": worst,
        "bias_min": float(biases.min()),
        "bias_max": float(biases.max()),
    }


def _step_of(line: str) -> float:
    """The step of a line of the file; infinite if the line is not whole."""
    if not line.endswith("\n"):
        return math.inf
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(value: Any) -> Any:
    """The value with null where a float is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _validation_line(metrics: Mapping[str, Any]) -> str:
    costs = [
        f"{source} {result['nats_per_token']:.4f} nats/token, {result['bits_per_byte']:.4f} bits/byte"
        for source, result in metrics["validation"].items()
    ]
    return " · ".join([f"validation at step {metrics['step']}", *costs])


def _short(number: float) -> str:
    """Three digits: 12345 → 12.3k."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    """3 d 04:05, 4:05:06 or 5:06."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

"""TensorBoard, Weights & Biases and trackio, opened when the recipe names them. All get the dicts that `metrics.jsonl` gets."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

Metrics = Mapping[str, Any]


class MetricsError(ValueError):
    """Metrics that cannot be shown as the recipe wants. The message is one line: field, value, rule and fix."""


class LoggingSettings(Protocol):
    """What is read of the recipe's section `logging`."""

    @property
    def tensorboard(self) -> bool: ...
    @property
    def wandb(self) -> str | None: ...
    @property
    def trackio(self) -> str | None: ...


class Logger(Protocol):
    def write(self, metrics: Metrics) -> None:
        """Take the metrics of a step."""

    def close(self) -> None:
        """Send what is left; the run is over."""


def open_loggers(
    settings: LoggingSettings, run_dir: Path | str, recipe: Mapping[str, Any], step: int = 0
) -> list[Logger]:
    """The loggers that the recipe names; on rank 0 only.

    Args:
        settings: the recipe's section `logging`.
        run_dir: `run.dir`; its name names the run, its absolute path tells runs apart, so that a resumed run continues its curves.
        recipe: the resolved recipe, kept beside the curves.
        step: of the checkpoint that the run continues from.

    Raises:
        MetricsError: a named package is not installed.
    """
    run_dir = Path(run_dir).absolute()
    loggers: list[Logger] = []
    if settings.tensorboard:
        loggers.append(TensorBoard(run_dir / "tensorboard", step))
    if settings.wandb:
        loggers.append(WandB(settings.wandb, run_dir, recipe))
    if settings.trackio:
        loggers.append(Trackio(settings.trackio, run_dir, recipe))
    return loggers


class TensorBoard:
    """Event files in `run.dir/tensorboard`; what was logged after the checkpoint of `step` is hidden by what follows."""

    def __init__(self, folder: Path, step: int) -> None:
        module = _package("torch.utils.tensorboard", "tensorboard", "true")
        self._writer = module.SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, metrics: Metrics) -> None:
        for key, value in scalars(metrics).items():
            self._writer.add_scalar(key, value, metrics["step"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of a Weights & Biases project. Its own settings (offline mode, entity) are wandb's, from its login and environment."""

    def __init__(self, project: str, run_dir: Path, recipe: Mapping[str, Any]) -> None:
        wandb = _package("wandb", "wandb", project)
        self._run = wandb.init(
            project=project,
            name=run_dir.name,
            id=_run_id(run_dir),
            resume="allow",
            config=dict(recipe),
            dir=str(run_dir),
        )

    def write(self, metrics: Metrics) -> None:
        self._run.log(scalars(metrics), step=metrics["step"])

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of a trackio project, kept on this machine unless trackio is set up otherwise."""

    def __init__(self, project: str, run_dir: Path, recipe: Mapping[str, Any]) -> None:
        trackio = _package("trackio", "trackio", project)
        self._run = trackio.init(project=project, name=_run_id(run_dir), resume="allow", config=dict(recipe))

    def write(self, metrics: Metrics) -> None:
        self._run.log(scalars(metrics), step=metrics["step"])

    def close(self) -> None:
        self._run.finish()


def scalars(metrics: Metrics, prefix: str = "") -> dict[str, float]:
    """A step's numbers with flat names, without the step: {"mtp_loss": [2.0]} → {"mtp_loss/0": 2.0}, maps likewise."""
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, list | tuple):
            flat |= scalars({str(index): entry for index, entry in enumerate(value)}, f"{prefix}{key}/")
        elif key != "step" and not isinstance(value, str):
            flat[f"{prefix}{key}"] = float(value)
    return flat


def _package(module: str, name: str, value: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MetricsError(
            f"logging.{name} = {value}: the package {name} is not installed; run `pip install {name}` or leave logging.{name} out"
        ) from None


def _run_id(run_dir: Path) -> str:
    """The same for every start of a run, another for every run folder."""
    return f"{run_dir.name}-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]}"

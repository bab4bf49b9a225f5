"""What is needed to look at a step that went wrong, in the run's folder: its batches, its settings, where it went wrong."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save

from data.files import replace_file
from train.late import Launched
from train.launch import Process
from train.runlog import written_into


def save_evidence(run: Path, folder: Path, process: Process, launched: Launched, **more: Any) -> None:
    """Write this rank's batches of a step and, on the first rank, `report.json`.

    Args:
        run: its folder.
        folder: where to, in the folder of the run.
        more: entries of the report.
    """
    step, result = launched.step, launched.pending.result()
    tensors = {f"{name}.{i}": part for i, b in enumerate(launched.batches) for name, part in b._asdict().items()}
    report: Mapping[str, Any] = {
        "step": launched.number,
        "first_sample": step.first_sample,
        "settings": {name: value for name, value in asdict(step.settings).items() if value != math.inf},
        "losses": {name: repr(value) for name, value in asdict(result.losses).items()},
        "parameters_with_non_finite_gradients": result.non_finite,
        "exploded": result.exploded,
        **more,
    }
    with written_into(run):
        folder.mkdir(parents=True, exist_ok=True)
        with replace_file(folder / f"batches-rank{process.rank}.safetensors") as path:
            path.write_bytes(save(tensors))  # an OSError where the disk fails
        if process.is_first:
            with replace_file(folder / "report.json") as path:
                path.write_text(json.dumps(report, indent=1), encoding="utf-8")

"""What only a run would show, found before anything is trained: by the trainer's own checks, in the words of a ladder's file."""

import tempfile
from pathlib import Path

import torch

from data.errors import DataError
from model.config import ConfigError
from parallel.layout import LayoutError
from train.config import Recipe, RecipeError
from train.corpus import Corpus
from train.scaling.errors import ScalingError
from train.scaling.ladder.cells import Cells
from train.scaling.ladder.ladder import Ladder, in_ladder
from train.scaling.ladder.wanted import wanted
from train.schedule import Schedule

# What the ladder decides in place of its recipe, and the key by which it does.
OWN_KEYS = {
    "recipe.schedule.batch_tokens": "hyperparameters.batch_tokens",
    "recipe.schedule.tokens": "budgets",
    "recipe.schedule.lr": "hyperparameters.lr",
    "recipe.run.dir": "dir",
}


def preflight(path: Path, ladder: Ladder, processes: int) -> None:
    """See that the cells which the results so far ask for can be trained here, and their results be written.

    Args:
        path: of the ladder's file, for people.
        processes: of each cell.

    Raises:
        ScalingError: they cannot; the line names the file and the key.
    """
    _check_folder(path, ladder)
    _check_devices(path, ladder.template(), processes)
    try:
        cells = Cells(ladder)
        losses = {cell: result.loss for cell, result in cells.results().items()}
        asked = wanted(ladder, losses, cells.sequence_length)
        for cell in asked:
            recipe = cells.recipe(cell)
            _schedule(recipe).check_layout(recipe.layout(processes), recipe.micro_batch)
        longest = cells.recipe(max(asked, key=cells.tokens))  # it needs the most text
        Corpus(longest, _schedule(longest))
    except (RecipeError, LayoutError, ConfigError) as error:
        text = in_ladder(str(error))
        for key, own in OWN_KEYS.items():
            text = text.replace(key, own)
        raise ScalingError(f"{path}: {text}") from None
    except DataError as error:
        text = in_ladder(str(error))
        raise ScalingError(f"{path}: {text if text.startswith('recipe.') else f'recipe.data: {text}'}") from None


def _schedule(recipe: Recipe) -> Schedule:
    return Schedule(recipe.schedule, recipe.data.lengths)


def _check_folder(path: Path, ladder: Ladder) -> None:
    """The ladder's folder is there, or can be made, and takes files."""
    cells = (Path(ladder.dir) / "cells").absolute()
    nearest = next(place for place in (cells, *cells.parents) if place.exists())
    if not nearest.is_dir():
        raise ScalingError(f"{path}: dir = {ladder.dir!r}: {nearest} is a file; give another folder")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ScalingError(
            f"{path}: dir = {ladder.dir!r}: nothing can be written in {nearest} ({error.strerror}); give another folder"
        ) from None


def _check_devices(path: Path, template: Recipe, processes: int) -> None:
    """The GPUs that are asked for are there, one for each process of a cell."""
    device, has_gpu = template.run.device, torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ScalingError(f"{path}: recipe.run.device = 'cuda': this machine shows no CUDA device; write auto or cpu")
    if device != "cpu" and has_gpu and processes > (count := torch.cuda.device_count()):
        gpus = f"{count} GPU{'s' * (count > 1)}"
        raise ScalingError(
            f"--processes {processes}: each needs a GPU of its own and this machine has {gpus}; give fewer, or write "
            "recipe.run.device: cpu"
        )

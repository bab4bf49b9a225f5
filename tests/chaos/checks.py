"""What must hold after every disturbance, and at the end of a run. What does not hold is an AssertionError that says so."""

import json
import math
from pathlib import Path
from typing import Any

from tests.chaos.layouts import KEEP
from tests.small_run import Run, assert_same_bits
from train.checkpoint import CheckpointError, verify

TOLERANCE = 1e-5  # relative, of losses where the layout has changed; they were measured within 1e-7


def complete(run: Run) -> list[int]:
    """The steps of all checkpoints that are whole, in order."""
    steps = []
    for path in (run.folder / "checkpoints").glob("step-*"):
        try:
            verify(path)
        except CheckpointError:
            continue
        steps.append(int(path.name.removeprefix("step-")))
    return sorted(steps)


def check_kept(before: list[int], after: list[int]) -> None:
    """No complete checkpoint is lost but those that newer ones replace, and the newest is never an older one."""
    newest = max(after, default=0)
    assert newest >= max(before, default=0), f"the newest checkpoint was of step {max(before)} and is of step {newest}"
    for step in before:
        newer = [other for other in after if other > step]
        assert step in after or len(newer) >= KEEP, f"the checkpoint of step {step} is gone, with {after} in its place"


def check_whole(run: Run, reference: Run | None) -> None:
    """What looks whole can be read; where there is a reference, it holds the bits of the same step there."""
    for path in (run.folder / "checkpoints").glob("step-*"):
        if not (path / "COMPLETE").exists():
            continue
        step = int(path.name.removeprefix("step-"))
        tensors = run.tensors(step)  # verified and read
        assert run.record(step)["step"] == step
        if reference is not None:
            assert_same_bits(tensors, reference.tensors(step))


def check_end(run: Run, reference: Run, same_layout: bool) -> float:
    """The run ended as one that nothing disturbed. Returns the largest relative difference of a loss."""
    found, expected = lines(run.folder), lines(reference.folder)
    steps = [line["step"] for line in expected]
    assert [line["step"] for line in found] == steps, "steps are missing in metrics.jsonl, or twice there"
    gaps = [abs(line["loss"] - same["loss"]) / same["loss"] for line, same in zip(found, expected, strict=True)]
    if same_layout:
        assert run.metrics() == reference.metrics(), f"metrics differ; losses by {max(gaps):.1e}"
        assert_same_bits(run.tensors(steps[-1]), reference.tensors(steps[-1]))
    assert all(math.isfinite(gap) and gap <= TOLERANCE for gap in gaps), f"losses differ by {max(gaps):.1e}"
    return max(gaps)


def lines(folder: Path) -> list[dict[str, Any]]:
    """The objects of `metrics.jsonl`."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]

"""What went wrong in a run and was survived, in its folder: `incidents.jsonl`, one object a line.

    {"step": 12, "reason": "…", "first_sample": 88, "samples": 8, "located": {…} or null, "passed_over": [88, 95] or null}

The lines with `passed_over` decide what the run reads from then on: such a line is on the disk before the run rolls back, and
whoever starts the run again, after a kill in that very moment too, finds it, and not the checkpoints that have read these samples.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.files import replace_file
from train.checkpoint import CheckpointError, Checkpoints, read_run, remove
from train.config import Recipe
from train.guard.passed_over import SampleRange, union
from train.sections import SampleRanges

NAME = "incidents.jsonl"


@dataclass(frozen=True)
class Incident:
    """A step that went wrong."""

    step: int
    reason: str
    first_sample: int
    samples: int
    located: Mapping[str, Any] | None  # `train.guard.locate.Located`; None: it was not looked for
    passed_over: SampleRange | None = None  # the run rolled back and goes on without these

    def is_read_by(self, record: Mapping[str, Any]) -> bool:
        """Whether a checkpoint, by its `run.json`, has read what was passed over."""
        if self.passed_over is None:
            return False
        ranges = record["recipe"]["data"].get("passed_over", [])
        inside = any(first <= self.passed_over[0] and self.passed_over[1] <= last for first, last in ranges)
        return record["samples"] > self.passed_over[0] and not inside


def read_incidents(run: Path) -> list[Incident]:
    """Of a run's folder, in the order in which they were written.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = run / NAME
    if not path.exists():
        return []
    try:
        found = [Incident(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]
        return [Incident(**{**asdict(one), "passed_over": _range(one.passed_over)}) for one in found]
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"run.dir = {run}: {NAME} cannot be read ({error}); what the run has passed over stands in it; bring it back, or set "
            "another run.dir"
        ) from None


def write_incident(run: Path, incident: Incident) -> None:
    """Keep an incident, durably. A resumed run comes to the same one again: it is kept once."""
    kept = [one for one in read_incidents(run) if one.passed_over or one.step < incident.step]
    with replace_file(run / NAME) as path:
        path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in [*kept, incident]), encoding="utf-8")


def roll_backs(run: Path, checkpoints: Checkpoints) -> list[Incident]:
    """The incidents after which the run rolled back. Checkpoints that have read what it passed over are no more when it returns."""
    found = [incident for incident in read_incidents(run) if incident.passed_over]
    for path in checkpoints.complete() if found else ():
        record = read_run(path)
        if any(incident.is_read_by(record) for incident in found):
            remove(path)
    return found


def all_passed_over(recipe: Recipe, record: Mapping[str, Any], rolled_back: Sequence[Incident]) -> SampleRanges:
    """What a recipe passes over, its run did so far, and has put down since its checkpoint with this `run.json`."""
    so_far = record["recipe"]["data"].get("passed_over", []) if record else []
    since = [incident.passed_over for incident in rolled_back if incident.passed_over]
    return union(recipe.data.passed_over, so_far, since)


def _range(given: Any) -> SampleRange | None:
    if given is None:
        return None
    first, last = given
    return int(first), int(last)

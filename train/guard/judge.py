"""What a run does about steps that went wrong: it tells, looks where, and rolls back or gives up from what it cannot go on from.

All ranks ask together, and come to the same answers: what is judged, the losses of the global batch, is the same on all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from enum import Enum, auto
from pathlib import Path
from typing import Any

from data.errors import DataError
from parallel.engine import StepSettings
from train.checkpoint import Checkpoints, read_run
from train.config import Recipe
from train.corpus import Corpus
from train.guard.incidents import Incident, write_incident
from train.guard.locate import Located
from train.guard.passed_over import SampleRange, to_pass_over, union
from train.guard.spikes import SpikeDetector
from train.guard.wrong import Wrong, what_went_wrong
from train.late import Launched
from train.ranks import Ranks
from train.runlog import written_into
from train.schedule import Schedule, Step


class Answer(Enum):
    """To what a run cannot simply go on from."""

    GO_ON = auto()  # after all
    ROLL_BACK = auto()
    GIVE_UP = auto()


class Judge:
    """The steps of a run, from where it stands until it ends or rolls back.

    Args:
        record: `run.json` of the checkpoint that the run continues from; empty for a new one.
        rolled_back: the incidents after which the run has done so.
        locate: looks where a step went wrong whose loss was to stay below a limit.
    """

    def __init__(
        self,
        recipe: Recipe,
        corpus: Corpus,
        checkpoints: Checkpoints,
        ranks: Ranks,
        record: Mapping[str, Any],
        rolled_back: Sequence[Incident],
        locate: Callable[[Launched, float], Located],
    ) -> None:
        self.recipe, self.corpus, self.checkpoints, self.ranks = recipe, corpus, checkpoints, ranks
        self.rolled_back_from = [incident.passed_over for incident in rolled_back if incident.passed_over]
        self.spikes = SpikeDetector(recipe.spikes, record.get("losses", ()))
        self.skipped_in_a_row: int = record.get("skipped_in_a_row", 0)
        self.wrong_in_a_row = 0
        self.located: Located | None = None  # of those
        self._locate = locate
        self._replayed: int | None = None  # the last step that was

    def with_limit(self, number: int, step: Step) -> StepSettings:
        """The settings of the next step. One that stands out updates nothing, unless nobody minds."""
        if self.recipe.spikes.action == "tell":
            return step.settings
        return replace(step.settings, max_loss=self.spikes.limit(number, self.corpus.stage_at(step.first_token)))

    def see(self, launched: Launched) -> tuple[Wrong | None, float]:
        """Count a step that has its result: what went wrong, if anything did, and the loss above which it would have stood out."""
        result, step, number = launched.pending.result(), launched.step, launched.number
        stage = self.corpus.stage_at(step.first_token)
        limit = self.spikes.limit(number, stage)
        self.spikes.see(number, stage, step.first_sample, result.losses.main)
        wrong = what_went_wrong(result, limit)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if wrong and result.skipped else 0
        self.wrong_in_a_row = self.wrong_in_a_row + 1 if wrong else 0
        if wrong is None:
            self.located = None
        return wrong, limit

    def tell(self, launched: Launched, wrong: Wrong, limit: float, say: Callable[[str], None]) -> None:
        """Say what went wrong, and where: of the first step in a row, and at most once in a window, for a replay takes its time.

        What the run cannot go on from is always looked for.
        """
        is_first, number = self.wrong_in_a_row == 1, launched.number
        is_due = self._replayed is None or number - self._replayed >= self.recipe.spikes.window
        where = ""
        if self.located is None and ((is_first and is_due) or self.is_too_much(wrong)):
            self.located, self._replayed = self._locate(launched, limit), number
            where = f": {self.located}"
        elif is_first:
            where = f"; not replayed, so soon after step {self._replayed}"
        if is_first:
            self._keep(launched, wrong)
        if where or wrong.skipped:
            say(f"{wrong.of(number)}{where}")

    @property
    def is_next_too_much(self) -> bool:
        """Whether the run could not go on if the next step were skipped."""
        return self.skipped_in_a_row + 1 >= self.recipe.run.max_skipped

    def is_too_much(self, wrong: Wrong) -> bool:
        """Whether the run cannot go on from what went wrong."""
        is_answered = wrong.is_spike and self.recipe.spikes.action == "roll_back"
        return is_answered or self.skipped_in_a_row >= self.recipe.run.max_skipped

    def answer(self, launched: Launched, wrong: Wrong, say: Callable[[str], None]) -> tuple[Answer, str]:
        """Whether the run rolls back, and why it does not. What it then passes over is on the disk before anything else happens."""
        spikes = self.recipe.spikes
        if spikes.action != "roll_back":
            return Answer.GIVE_UP, ""
        records = self.ranks.first(lambda: [read_run(path) for path in self.checkpoints.complete()])
        checkpointed = [record["samples"] for record in records]
        first = self.spikes.first_sample(launched.number, max(spikes.pass_over, self.skipped_in_a_row))
        wanted = first, launched.step.end_sample - 1
        found = to_pass_over(wanted, checkpointed, self.rolled_back_from, spikes.most_roll_backs)
        if found is None:
            often = f"the run has rolled back here {spikes.most_roll_backs} times (spikes.most_roll_backs)"
            return Answer.GIVE_UP, f", and {often}"
        lacking = self._lacks(found, next(record for record in records[::-1] if record["samples"] <= found[0]))
        if lacking:
            say(f"step {launched.number} is skipped and nothing is passed over: {lacking}")
            is_end = self.skipped_in_a_row >= self.recipe.run.max_skipped
            return Answer.GIVE_UP if is_end else Answer.GO_ON, ", and there is no data to read in their place"
        self._keep(launched, wrong, found)
        say(f"rolling back from step {launched.number}; samples {found[0]} to {found[1]} are passed over")
        return Answer.ROLL_BACK, ""

    def _lacks(self, passed_over: SampleRange, record: Mapping[str, Any]) -> str:
        """What the stores lack for the run to go on from a checkpoint without these samples; nothing as a rule.

        Asked before they are put down: from then on every start of the run passes over them.
        """
        recipe = self.recipe.passing_over(union(self.recipe.data.passed_over, [passed_over]))
        try:
            Corpus(recipe, Schedule(recipe.schedule, recipe.data.lengths, recipe.data.passed_over), record, self.ranks)
        except DataError as error:
            return str(error)
        return ""

    def _keep(self, launched: Launched, wrong: Wrong, passed_over: SampleRange | None = None) -> None:
        """A line in the run's incidents."""
        step, located = launched.step, asdict(self.located) if self.located else None
        incident = Incident(launched.number, wrong.reason, step.first_sample, step.settings.batch, located, passed_over)
        run = Path(self.recipe.run.dir)

        def write() -> None:
            # What is passed over must be on the disk; the rest has been said.
            with written_into(run) if passed_over else suppress(OSError):
                write_incident(run, incident)

        self.ranks.first(write)

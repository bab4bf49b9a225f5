"""Many small runs, each disturbed again and again until it ends; after every disturbance everything is checked."""

import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.checks import check_end, check_kept, check_whole, complete
from tests.chaos.disturbance import Disturbance, saves_under_way
from tests.chaos.layouts import CHANGING, KEEP, LAYOUTS, STEPS, Layout, next_layout
from tests.small_run import Run
from train.guard.lost import LOST


class SomethingLost(Exception):
    """Something was lost. The message says what, where, and where the run's folder is."""


@dataclass
class Counts:
    kills: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    in_saves: int = 0  # left a half-written checkpoint behind
    runs: int = 0  # that came to their end
    layouts: set[str] = field(default_factory=set)
    largest_gap: float = 0.0  # of a loss, relative


class Campaign:
    """`run` disturbs runs until it has done so `kills` times, or for `minutes`.

    Args:
        store: what the runs read.
        folder: for the runs; what is lost stays there to be looked at.
        say: gets a line for every disturbance.
    """

    def __init__(
        self, store: Path, folder: Path, layouts: Sequence[str], seed: int, say: Callable[[str], None]
    ) -> None:
        self.store, self.folder, self.layouts, self.say = store, folder, layouts, say
        self.pick = random.Random(seed)
        self.counts = Counts()
        self.references: dict[str, Run] = {}

    def run(self, kills: int, minutes: float) -> Counts:
        """
        Raises:
            SomethingLost: at the first thing that is.
        """
        self.deadline = time.monotonic() + 60 * minutes
        while self._has_time and self.counts.kills < kills:
            for place, layout in enumerate(self.layouts):
                left = kills - self.counts.kills
                if left and self._has_time:
                    self._live(layout, most=-(-left // (len(self.layouts) - place)))
        return self.counts

    @property
    def _has_time(self) -> bool:
        return time.monotonic() < self.deadline

    def _live(self, layout: str, most: int) -> None:
        """One run, from its first start to its end."""
        run = Run(self.store, Path(tempfile.mkdtemp(prefix=f"{layout}-", dir=self.folder)) / "run")
        self.counts.layouts.add(layout)
        last = self.counts.kills + most
        try:
            reference = self._reference("alone" if layout == CHANGING else layout)
            while self.counts.kills < last and self._has_time and max(complete(run), default=0) < STEPS:
                self._disturb(run, layout, reference)
            train_to_the_end(run, next_layout(layout, self.pick), KEEP)
            gap = check_end(run, reference, same_layout=layout != CHANGING)
        except AssertionError as failure:
            raise SomethingLost(
                f"{layout}, after {self.counts.kills} kills: {failure}\n{run.said[:2000]}\nfolder {run.folder}"
            ) from failure
        self.counts.runs += 1
        self.counts.largest_gap = max(self.counts.largest_gap, gap)
        self.say(f"{layout}: ended as the run that nothing disturbed, losses within {gap:.0e}")

    def _disturb(self, run: Run, layout: str, reference: Run) -> None:
        """One start, its disturbance, and all that must hold after it."""
        start, before = next_layout(layout, self.pick), complete(run)
        folder = run.folder / "checkpoints"
        unfinished = saves_under_way(folder)
        wanted = 2 * self.counts.in_saves <= self.counts.kills  # so that half of all hit a save
        disturbance = Disturbance.draw(self.pick, start.processes, wanted)
        processes = run.start(*start.changes, f"checkpoint.keep={KEEP}", processes=start.processes)
        struck = disturbance.strike(run, processes)
        codes = disturbance.end(processes) if struck else processes.wait()
        after = complete(run)
        is_at_end = max(after, default=0) == STEPS  # then a rank may have ended before it was killed
        for rank, code in enumerate(codes):
            allowed = {disturbance.expects(rank)} if struck else {0, LOST}
            assert code in allowed or (is_at_end and code == 0), f"{disturbance}: rank {rank} ended with {code}"
        if before and "continuing" in run.said:
            assert f"continuing after step {before[-1]} of {STEPS}" in run.said
        check_kept(before, after)
        check_whole(run, None if layout == CHANGING else reference)
        if not struck:
            return
        self.counts.kills += 1
        self.counts.by_kind[disturbance.kind] += 1
        in_save = bool(saves_under_way(folder) - unfinished)
        self.counts.in_saves += in_save
        hit = ", which is half written" if in_save else ""
        self.say(f"{self.counts.kills:4} {layout} on {start.processes}: {disturbance}{hit}; complete: {after}")

    def _reference(self, layout: str) -> Run:
        """A run that nothing disturbs, with all of its checkpoints."""
        if layout not in self.references:
            run = Run(self.store, self.folder / f"undisturbed-{layout}")
            train_to_the_end(run, LAYOUTS[layout], keep=1000)
            self.references[layout] = run
        return self.references[layout]


def train_to_the_end(run: Run, layout: Layout, keep: int) -> None:
    """Start a run, and again where something else on this machine disturbed it: another program may have taken its port."""
    for _ in range(3):
        codes = run.train(*layout.changes, f"checkpoint.keep={keep}", processes=layout.processes)
        if LOST not in codes:
            break
    assert codes == [0] * layout.processes, f"a run that nobody disturbed ended with {codes}"

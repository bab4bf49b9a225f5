"""`python -m tests.chaos --kills 100 [--minutes 30] [--seed 0] [--layouts ddp,expert]`

A line for every disturbance; the last line is a verdict with the counts, and the exit code is 0 only if nothing was lost.
Layouts, kinds and moments follow from the seed; what a process does at that moment does not.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from data.prepare import prepare
from tests.chaos.campaign import Campaign, SomethingLost
from tests.chaos.layouts import NAMES
from tests.conftest import write_tiny_recipe


def main(words: Sequence[str] | None = None) -> int:
    """0 if nothing was lost, 1 if anything was."""
    asked = parse(words)
    folder, started = Path(tempfile.mkdtemp(prefix="chaos-")), time.monotonic()
    store = asked.store or prepare(write_tiny_recipe(folder), folder / "store").path
    campaign = Campaign(store, folder, asked.layouts, asked.seed, lambda line: print(line, flush=True))
    failure = None
    try:
        campaign.run(asked.kills, asked.minutes)
    except SomethingLost as error:
        failure = error
        print(error)
    c, kinds = campaign.counts, campaign.counts.by_kind
    print(
        f"{'LOST' if failure else 'nothing lost'}: seed {asked.seed}, {c.kills} of {asked.kills} disturbances, "
        f"{c.in_saves} of them in a save ({kinds['one']} of one rank, {kinds['all']} of all, {kinds['stop']} stopped), under "
        f"{len(c.layouts)} layouts; {c.runs} runs ended as undisturbed ones, losses within {c.largest_gap:.0e}; "
        f"{time.monotonic() - started:.0f} s"
    )
    if failure:
        return 1
    shutil.rmtree(folder)  # of what was lost the folder stays, to be looked at
    return 0


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--kills", type=int, default=100, help="disturbances, in all runs together")
    parser.add_argument("--minutes", type=float, default=60, help="after which no more begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", type=lambda names: names.split(","), default=list(NAMES), help=",".join(NAMES))
    parser.add_argument("--store", type=Path, help="what the runs read; default: one made for them")
    asked = parser.parse_args(words)
    if unknown := set(asked.layouts) - set(NAMES):
        parser.error(f"--layouts {','.join(sorted(unknown))}: choose from {','.join(NAMES)}")
    return asked


if __name__ == "__main__":
    sys.exit(main())

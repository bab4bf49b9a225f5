"""The commands `rorqual scaling …`: their arguments, and what they print."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

scaling = typer.Typer(no_args_is_help=True, help="Scaling laws: measure, fit, forecast.")

INTERRUPTED = 130  # exit code, as a shell gives it after Ctrl-C

LadderFile = Annotated[Path, typer.Argument(metavar="LADDER", help="A ladder's YAML file.")]


@scaling.command()
def run(
    ladder: LadderFile,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Cells at once on this machine; default: one a GPU, or one a core.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes of each cell (torchrun).")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it amounts to, and stop.")] = False,
) -> None:
    """Run a ladder's cells, or those that are left. Several machines may run the same ladder in one folder."""
    import torch

    from train.scaling.execute import Execution
    from train.scaling.ladder import load_ladder

    places = torch.cuda.device_count() if torch.cuda.is_available() else len(os.sched_getaffinity(0))
    execution = Execution(load_ladder(ladder), jobs or max(1, places // processes), processes, _say)
    for line in execution.describe():
        _say(line)
    if dry_run:
        return
    try:
        execution.run()
    except KeyboardInterrupt:
        print("stopped; what is finished is kept: start the same command again to go on", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def _say(line: str) -> None:
    print(line, flush=True)

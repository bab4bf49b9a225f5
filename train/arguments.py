"""Arguments that several commands take."""

import os
from typing import Annotated

import typer

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="tiny, small, v2-lite, v3, v3-long, or a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="key.sub=value …", help="Changes to the recipe.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def started_processes() -> int:
    """As many as the launcher started, or 1: what a command counts for where nobody says."""
    return int(os.environ.get("WORLD_SIZE", "1"))

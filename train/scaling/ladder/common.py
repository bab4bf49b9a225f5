"""What all runs of a ladder have in common: the law that is fitted to them holds for this and is silent about the rest."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from data.files import replace_file
from train.scaling.errors import ScalingError

COMMON = "common.json"


class Common(BaseModel):
    """What all runs of a ladder have in common, for the law that is fitted to them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: dict[str, Any]  # of a run, without what the ladder varies
    data: list[str]  # stores with their sources
    tokenizer: str  # fingerprint
    warmup_tokens: int | None = None  # of every run; None: the recipe's steps, or not known

    def write(self, folder: Path) -> None:
        with replace_file(folder / COMMON) as path:
            path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_common(folder: Path) -> Common:
    """Of a folder that `write` and `keep` made.

    Raises:
        ScalingError: it is none.
    """
    try:
        return Common.model_validate_json((folder / COMMON).read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "damaged"
        raise ScalingError(
            f"{folder / COMMON}: cannot be read ({reason}); give a folder of `rorqual scaling run`"
        ) from None

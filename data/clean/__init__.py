"""What is done to each document before it counts: mended, looked at, and kept or rejected with a reason.

A recipe lists steps, each by its `kind`; `build()` makes the step itself, once in every process that cleans.
"""

from typing import Annotated

from pydantic import Field

from data.clean.custom import Custom
from data.clean.decontaminate import Decontaminate
from data.clean.language import Language
from data.clean.normalise import Normalise
from data.clean.pii import Pii
from data.clean.quality import C4, FineWeb, GopherQuality, GopherRepetition
from data.clean.step import Step, StepRecord

StepConfig = Annotated[
    Normalise | Language | GopherQuality | GopherRepetition | C4 | FineWeb | Pii | Decontaminate | Custom,
    Field(discriminator="kind"),
]

__all__ = [
    "C4",
    "Custom",
    "Decontaminate",
    "FineWeb",
    "GopherQuality",
    "GopherRepetition",
    "Language",
    "Normalise",
    "Pii",
    "Step",
    "StepConfig",
    "StepRecord",
]

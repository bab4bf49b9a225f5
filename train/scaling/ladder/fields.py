"""The types of a ladder's values: what is accepted, and what a wrong value is answered with (`train.fields.mistake`)."""

from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator

from train.fields import PositiveCount, mistake, number, show, whole_number
from train.scaling.family import STEP

MOST_FLOPS = 1e28  # of a budget
MOST_SEEDS = 100
SPACINGS = (1.1, 10.0)  # closer cells are hardly apart, farther ones step over a basin

V = TypeVar("V", int, float)


def _listed(example: str) -> BeforeValidator:
    """A list, and not an empty one."""

    def check(value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise mistake("must be a list", f"write for example {example}")
        if not value:
            raise mistake("has no entry", f"write for example {example}")
        return value

    return BeforeValidator(check)


def _distinct_values(values: tuple[V, ...]) -> tuple[V, ...]:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise mistake(f"has {show(value)} twice", "drop one of them")
    return values


def _growing(values: tuple[V, ...]) -> tuple[V, ...]:
    if list(_distinct_values(values)) != sorted(values):
        raise mistake("must grow", f"write {show(sorted(values))}")
    return values


def _budget(value: Any) -> float:
    if (flops := number(value, open_below=True)) > MOST_FLOPS:
        raise mistake(f"must be more than 0 and at most {MOST_FLOPS:g}", "write it like 1e12")
    return flops


def _lr(value: Any) -> float:
    if (lr := number(value, open_below=True)) > 1:
        raise mistake("is more than 1", "write it like 4e-3")
    return lr


def _width(value: Any) -> int:
    if (width := whole_number(value, 1)) % STEP:
        raise mistake(f"must be a multiple of {STEP}", f"write for example {-(-width // STEP) * STEP}")
    return width


def _spacing(value: Any) -> float:
    least, most = SPACINGS
    if not least <= (ratio := number(value)) <= most:
        raise mistake(f"is the ratio of two neighbours, at least {least:g} and at most {most:g}", "write for example 2")
    return ratio


def _seeds(value: Any) -> int:
    if (seeds := whole_number(value, 1)) > MOST_SEEDS:
        raise mistake(f"must be at most {MOST_SEEDS}", "write for example 3")
    return seeds


def _name_or_sections(value: Any) -> Any:
    if not isinstance(value, str | dict) or not value:
        raise mistake("must be a recipe's name or path, or a map of its sections", "write for example recipe: small")
    return value


Budgets = Annotated[
    tuple[Annotated[float, BeforeValidator(_budget)], ...], _listed("[1e11, 2e11, 4e11]"), AfterValidator(_growing)
]
Rates = Annotated[
    tuple[Annotated[float, BeforeValidator(_lr)], ...], _listed("[4e-3, 8e-3]"), AfterValidator(_distinct_values)
]
Batches = Annotated[tuple[PositiveCount, ...], _listed("[1024, 2048]"), AfterValidator(_distinct_values)]
Widths = Annotated[tuple[Annotated[int, BeforeValidator(_width)], ...], _listed("[64, 128]")]
Row = Annotated[Widths, AfterValidator(_growing)]
Spacing = Annotated[float, BeforeValidator(_spacing)]
Seeds = Annotated[int, BeforeValidator(_seeds)]
RecipeOrName = Annotated[str | dict[str, Any], BeforeValidator(_name_or_sections)]

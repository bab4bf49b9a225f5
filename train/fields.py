"""The types of a recipe's values: what is accepted, and what a wrong value is answered with.

YAML is read by its 1.2 rules, where `1e7` is a float; every whole number here therefore takes a float without a fractional part.
Text is never read as a number, and true is never read as 1. A rejected value raises `mistake(rule, fix)`; `train.config` adds
the field and the value and makes one line of it.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, PlainValidator
from pydantic_core import PydanticCustomError

V = TypeVar("V", int, float)


def mistake(rule: str, fix: str, **where: Any) -> PydanticCustomError:
    """The error of a broken rule. Where a whole section is checked, `where` gives the `field` in it and its `value`."""
    return PydanticCustomError("recipe", "{rule}; {fix}", {"rule": rule, "fix": fix, **where})


def show(value: Any) -> str:
    """A value as it stands in a recipe, in at most 60 characters of one line."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…" + text[-2:]


def whole_number(value: Any, least: int = 0) -> int:
    """An int from 100, 1_000 or 1e7; neither text nor a truth value."""
    if not _is_number(value) or value != int(value) or value < least:
        raise mistake(f"must be a whole number, at least {least}", "write it like 100, 1_000 or 1e7")
    return int(value)


def number(value: Any, least: float = 0.0, below: float = math.inf, open_below: bool = False) -> float:
    """A float in [least, below), or in (least, below) with `open_below`."""
    if not _is_number(value) or value < least or (open_below and value == least) or value >= below:
        low = f"more than {least:g}" if open_below else f"at least {least:g}"
        high = f" and less than {below:g}" if below < math.inf else ""
        kind = "finite number" if isinstance(value, float) and not math.isfinite(value) else "number"
        raise mistake(f"must be a {kind} {low}{high}", "write it like 0.1 or 4e-4")
    return float(value)


def curve(value: Any, parse: Callable[[Any], Any], example: str) -> Any:
    """A number, or a list of [tokens, value]: the value holds from that many tokens until the next entry."""
    if not isinstance(value, list | tuple):
        return parse(value)
    if not value or any(not isinstance(point, list | tuple) or len(point) != 2 for point in value):
        raise mistake("must be a number or a list of [tokens, value]", f"write it like {example}")
    points = tuple((whole_number(start), parse(held)) for start, held in value)
    starts = [start for start, _ in points]
    if starts[0] != 0 or any(later <= earlier for earlier, later in pairwise(starts)):
        raise mistake("must start at 0 tokens, with growing token counts", f"write it like {example}")
    return points


def as_points(value: V | tuple[tuple[int, V], ...]) -> tuple[tuple[int, V], ...]:
    """A constant as a list of one [tokens, value]."""
    return value if isinstance(value, tuple) else ((0, value),)


def value_at(points: tuple[tuple[int, V], ...], tokens: int) -> V:
    """The value of the last point at or before `tokens`."""
    return points[bisect_right(points, tokens, key=lambda point: point[0]) - 1][1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rate(value: Any) -> float:
    if isinstance(value, str):
        raise mistake("must be a number more than 0, or auto", "write it like 4e-4")
    return number(value, open_below=True)


def _batch_tokens(value: Any) -> Any:
    example = "65536, auto, ramp or [[0, 65536], [1e9, 131072]]"
    if isinstance(value, str):
        raise mistake("must be a number, auto, ramp or a list of [tokens, batch_tokens]", f"write it like {example}")
    return curve(value, _positive_int, example)


def _compile(value: Any) -> Any:
    if value is True or value is False or value in ("auto", "graphs"):
        return value
    raise mistake("must be auto, true, false or graphs", "write one of them")


def _milestones(value: Any) -> Any:
    """[[fraction of the tokens, multiple of the peak], …] with growing fractions between 0 and 1."""
    example = "write it like [[0.8, 0.316], [0.9, 0.1]]"
    if not isinstance(value, list | tuple) or any(
        not isinstance(pair, list | tuple) or len(pair) != 2 for pair in value
    ):
        raise mistake("must be a list of [fraction of the tokens, multiple of lr]", example)
    pairs = tuple((number(fraction, 0, 1, open_below=True), number(factor)) for fraction, factor in value)
    fractions = [fraction for fraction, _ in pairs]
    if not pairs or fractions != sorted(set(fractions)):
        raise mistake("must have growing fractions", example)
    return pairs


def _positive_int(value: Any) -> int:
    return whole_number(value, 1)


def _positive(value: Any) -> float:
    return number(value, open_below=True)


def _share(value: Any) -> float:
    return number(value, 0, 1, open_below=True)


def _from_zero_below_one(value: Any) -> float:
    return number(value, 0, 1)


def _non_empty(value: str) -> str:
    if not value.strip():
        raise mistake("must not be empty", "give a text or leave the key out")
    return value


_AS_IS = PlainSerializer(lambda value: value, return_type=Any)  # pydantic does not know what a PlainValidator returns

Points = tuple[tuple[int, float], ...]
WholePoints = tuple[tuple[int, int], ...]

Count = Annotated[int, BeforeValidator(whole_number)]  # 0, 1, 2 …
PositiveCount = Annotated[int, BeforeValidator(_positive_int)]  # 1, 2 …
NonNegative = Annotated[float, BeforeValidator(number)]
Positive = Annotated[float, BeforeValidator(_positive)]
Share = Annotated[float, BeforeValidator(_share)]  # in (0, 1)
Decay = Annotated[float, BeforeValidator(_from_zero_below_one)]  # in [0, 1)
Name = Annotated[str, AfterValidator(_non_empty)]
CompileMode = Annotated[bool | str, PlainValidator(_compile), _AS_IS]
Rate = Annotated[float, BeforeValidator(_rate)]
Curve = Annotated[float | Points, PlainValidator(lambda value: curve(value, number, "[[0, 0.001], [1e9, 0]]")), _AS_IS]
BatchTokens = Annotated[int | WholePoints, PlainValidator(_batch_tokens), _AS_IS]
Milestones = Annotated[tuple[tuple[float, float], ...], PlainValidator(_milestones), _AS_IS]

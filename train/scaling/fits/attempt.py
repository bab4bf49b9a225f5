"""Fits that a table of runs may not allow: each is tried, and what cannot be fitted is noted in words."""

from collections.abc import Callable
from typing import Any, TypeVar

from train.scaling.errors import ScalingError

T = TypeVar("T")


class Attempt:
    """Does a fit, or notes in `problems` why it cannot be done."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def __call__(self, what: str, fit: Callable[..., T], *arguments: Any, **settings: Any) -> T | None:
        try:
            return fit(*arguments, **settings)
        except ScalingError as error:
            self.problems.append(f"{what}: not fitted: {error}")
            return None

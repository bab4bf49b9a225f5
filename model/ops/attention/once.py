"""What attention makes of the documents of a micro-batch, made by its first layer for all of them."""

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import ref

import torch
from torch import Tensor

T = TypeVar("T")
P = ParamSpec("P")
FEW = 4  # results; under context parallelism layers ask for those of two pieces in turn


def once_per_batch(make: Callable[Concatenate[Tensor, P], T]) -> Callable[Concatenate[Tensor, P], T]:
    """`make`, which remembers its last few results, each for as long as the tensor that it made it of is there, and the same.

    A tensor is known by its identity: one that is written into afterwards would be taken for what it was. Compiled code
    remembers nothing.
    """
    known: list[tuple[ref[Tensor], Any, T]] = []

    def forget(gone: ref[Tensor]) -> None:
        known[:] = [one for one in known if one[0] is not gone]

    def of_last(starts: Tensor, *how: P.args, **named: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return make(starts, *how, **named)
        for of, its_how, made in tuple(known):
            if of() is starts and its_how == (how, named):
                return made
        made = make(starts, *how, **named)
        known[:] = [*known[1 - FEW :], (ref(starts, forget), (how, named), made)]
        return made

    return of_last

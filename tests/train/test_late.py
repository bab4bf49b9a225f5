"""A step is read once and in order: late where its result takes time, at once where something depends on it."""

from typing import Any, cast

from parallel.engine import Pending
from train.late import Late, Launched


class Slow:
    """A result that is never there by itself, as of a GPU."""

    is_here = False


class Quick:
    is_here = True


def launched(number: int, pending: type) -> Launched:
    return Launched(number, cast(Any, None), [], cast(Pending, pending()), 0.0, {})


def read(late: Late, at_once: bool = False) -> list[int]:
    return [step.number for step in late.due(lambda: at_once)]


def test_on_a_gpu_the_last_step_is_not_waited_for() -> None:
    late, found = Late(), []
    for number in range(1, 5):
        late.add(launched(number, Slow))
        found.append(read(late))
    assert found == [[], [1], [2], [3]]
    assert read(late, at_once=True) == [4] and read(late, at_once=True) == []


def test_on_a_cpu_every_step_is_read_when_it_was_made() -> None:
    late = Late()
    for number in range(1, 4):
        late.add(launched(number, Quick))
        assert read(late) == [number]


def test_what_must_be_known_at_once_is_asked_after_the_steps_before_are_read() -> None:
    """The second skipped step in a row makes the third one decide over the run."""
    late = Late()
    late.add(launched(1, Slow))
    late.add(launched(2, Slow))
    found: list[int] = []
    for step in late.due(lambda: found == [1]):
        found.append(step.number)
    assert found == [1, 2]

"""A plan as lines of text: the answer, bars of memory and time, links, layers, the pipeline's timeline, all numbers."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from parallel.timeline import Chunk
from train.planning.memory import RankMemory
from train.planning.plan import Plan
from train.planning.shown.contents import (
    KINDS,
    Room,
    Timeline,
    answer,
    beside,
    kind_of,
    layout_in_words,
    links_of,
    parts_of,
    room_of,
    timeline_of,
    title,
)
from train.planning.written import counted, duration, figure, share, size, words

if TYPE_CHECKING:
    from train.planning.simulation.simulate import Simulation

WIDTH = 72  # of a bar, in characters
FILL = dict(zip(KINDS, "█▓▒░▌▄▂"))
COLUMNS = 108  # of the timeline, in two halves where it is cut


def in_words(plan: Plan, simulation: "Simulation | None" = None) -> list[str]:
    """What `rorqual plan` prints: up to 132 characters a line, and nothing is said by colour."""
    numbers = plan.numbers()
    sections = [_answer(plan, numbers), _memory(plan), _time(plan), _links(plan)]
    if plan.layout.config.pipeline > 1:
        sections += [
            ["layers", *numbers.pop("placement")],
            list(_pipeline(timeline_of(plan.step, plan.time))),
        ]
    if simulation:
        sections.append(_simulation(plan, simulation))
    sections.append(table(numbers))
    return [line.rstrip() for section in sections if section for line in [*section, ""]][:-1]


def table(numbers: Mapping[str, Any]) -> list[str]:
    """A line for each, and for each line of a list."""
    lines = []
    for name, value in numbers.items():
        if isinstance(value, list):
            lines += [words(name), *(f"    {line}" for line in value)]
        else:
            lines.append(f"{words(name):32} {figure(name, value)}")
    return lines


def _answer(plan: Plan, numbers: Mapping[str, Any]) -> list[str]:
    return [
        f"{title(plan)}: {layout_in_words(plan)}",
        *(f"    {fact.name:20} {fact.value:>9}   {fact.note}" for fact in answer(plan, numbers)),
    ]


def _memory(plan: Plan) -> list[str]:
    room, fullest = room_of(plan), plan.fullest
    several, digits = len(plan.memory) > 1, len(str(len(plan.memory) - 1))
    label = 5 + digits if several else 0
    mark = "│ is" if room.usable else "off the picture:"
    usable = f"; {mark} what {plan.device.name} has for a run: {size(plan.device.usable)}" if plan.device else ""
    lines = [f"memory of the fullest process{' of each pipeline rank' * several}{usable}"]
    for held in plan.memory:
        name = f"rank {held.pipeline_rank:{digits}} " if several else ""
        over = " too much" if room.usable and held.peak > room.usable else ""
        lines.append(f"{name}{_stacked(held, room)} {size(held.peak):>7}{over}")
    of = f" of rank {fullest.pipeline_rank}" if several else ""
    legend = [f"{FILL[kind]} {KINDS[kind]} {size(count)}" for kind, count in parts_of(fullest).items() if count]
    lines += [f"{'':{label}} {line}" for line in _wrapped([*legend, f"= {size(fullest.peak)}{of}, {fullest.when}"])]
    if fullest.host:
        lines.append(f"{'':{label}} and {size(fullest.host)} on the host")
    return lines


def _stacked(held: RankMemory, room: Room) -> str:
    parts, scale = parts_of(held), room.bytes / WIDTH
    ends = [round(end / scale) for end in accumulate(parts.values(), initial=0)]
    bar = "".join(FILL[kind] * (end - start) for kind, (start, end) in zip(parts, pairwise(ends))).ljust(WIDTH)
    if room.usable is None:
        return bar
    place = round(room.usable / scale)
    return f"{bar[:place]}│{bar[place:]}"


def _time(plan: Plan) -> list[str]:
    if plan.time is None:
        return []
    terms, whole = plan.time.terms, plan.time.seconds
    ends = list(accumulate((term.seconds for term in terms), initial=0.0))
    label, width = max(len(term.name) for term in terms), WIDTH - 12
    lines = [f"time of a step, {duration(whole)}"]
    for term, (start, end) in zip(terms, pairwise(round(end / whole * width) for end in ends)):
        bar = " " * start + ("█" * (end - start) or "▏" * (term.seconds > 0))
        lines.append(
            f"{term.name:{label}} {bar:{width + 1}} {duration(term.seconds):>8} {share(term.seconds, whole):>7}"
        )
    return lines


def _links(plan: Plan) -> list[str]:
    lines = [
        f"{link.name:30} {size(link.bytes):>8}   at {size(link.speed)}/s {duration(link.seconds)} in all, hidden or not"
        for link in links_of(plan)
    ]
    return ["what a process sends in a step", *lines] if lines else []


def _pipeline(course: Timeline) -> Iterator[str]:
    """A row for each rank; a column is what a forward chunk takes, in the mean."""
    windows = course.windows(COLUMNS)
    column = max(sum(end - start for start, end in windows) / COLUMNS, course.unit)
    measure = "" if course.in_seconds else ", by FLOPs"
    small = "; small letters: a later stage of the rank" if course.stages > len(course.chunks) else ""
    yield f"pipeline: ranks wait {share(course.waits)} of the time in the mean{measure}; a column is {course.length(column)}"
    yield f"F forward, B backward, W gradients of weights, & forward beside backward, · waits{small}"
    digits = len(str(len(course.chunks) - 1))
    for rank, chunks in enumerate(course.chunks):
        pictures = [_row(chunks, start, end, column) for start, end in windows]
        yield f"rank {rank:{digits}} {' ⋯ '.join(pictures)}"
    if course.skipped:
        yield f"{'':{digits + 5}} ⋯ and {counted(course.skipped, 'micro-batch')} more, each as those beside the cut"


def _row(chunks: Sequence[Chunk], start: float, end: float, column: float) -> str:
    """A letter for what is done in the middle of each column."""
    first = min(work.stage for chunk in chunks for work in chunk.action)
    letters, at = [], 0
    for number in range(round((end - start) / column)):
        time = start + (number + 0.5) * column
        while at < len(chunks) and chunks[at].end <= time:
            at += 1
        if at == len(chunks) or chunks[at].start > time:
            letters.append("·")
            continue
        letter = kind_of(chunks[at].action)
        letters.append(letter if chunks[at].action[0].stage == first else letter.lower())
    return "".join(letters)


def _simulation(plan: Plan, simulation: "Simulation") -> list[str]:
    lines = [f"{'formula beside simulation':28} {'formula':>10} {'simulation':>10} formula / simulation"]
    for name, formula, found in beside(plan, simulation):
        ratio = f"{formula / found:20.3f}" if found else f"{'–':>20}"
        lines.append(f"{name:28} {size(formula):>10} {size(found):>10} {ratio}")
    return lines


def _wrapped(parts: list[str], width: int = 118) -> list[str]:
    lines = [""]
    for part in parts:
        if lines[-1] and len(lines[-1]) + len(part) + 2 > width:
            lines.append("")
        lines[-1] += f"{'  ' if lines[-1] else ''}{part}"
    return lines

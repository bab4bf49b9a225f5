"""The pictures of a plan's page, as SVG that lies in it: bars of memory, the terms of the time, the timeline of the pipeline.

Each is WIDTH units wide, and lengths are in them. Every mark says what it is where one points at it. Equal plans give equal bytes.
"""

from collections.abc import Iterable, Sequence
from html import escape
from itertools import accumulate, pairwise

from data.report.figures import PALETTE
from parallel.timeline import Action
from train.planning.plan import Plan
from train.planning.shown.contents import KINDS, Timeline, parts_of, room_of
from train.planning.shown.formulas import FORMULAS
from train.planning.speed.step_time import Term
from train.planning.written import duration, share, size

WIDTH = 1080
ROW, BAR = 24, 16
COLOURS = dict(zip(KINDS, PALETTE))
LABEL, RIGHT = 84, 132  # left and right of bars of memory
NAME, VALUE = 250, 150  # of terms
# Forward, backward, gradients of weights; of a rank's first stage, its second …
STAGES = (
    ("#2f5bc9", "#84a3ef", "#c3d2fa"),
    ("#d9730d", "#f5ad62", "#fbd9b3"),
    ("#2b8a3e", "#7cc68a", "#bfe5c6"),
    ("#8b45c1", "#c196e3", "#e3cff2"),
)


def memory(plan: Plan) -> str:
    """A stacked bar for each pipeline rank, and the line of what the device has to use."""
    room = room_of(plan)
    scale = (WIDTH - LABEL - RIGHT) / room.bytes
    top = 26 if room.usable else 4
    height = top + ROW * len(plan.memory) + 4
    drawn = []
    for row, held in enumerate(plan.memory):
        y = top + ROW * row
        name = f"rank {held.pipeline_rank}" if len(plan.memory) > 1 else "process"
        drawn.append(_text(LABEL - 10, y + 13, name, "end"))
        parts = parts_of(held)
        ends = [LABEL + scale * end for end in accumulate(parts.values(), initial=0)]
        for (kind, count), (start, end) in zip(parts.items(), pairwise(ends)):
            if count:
                about = f"{name}, {KINDS[kind]}: {count:,} bytes ({size(count)})\n{FORMULAS[kind]}"
                drawn.append(_box(start, y, end - start, BAR, f'class="part" fill="{COLOURS[kind]}"', about))
        over = room.usable is not None and held.peak > room.usable
        drawn.append(
            _text(WIDTH - RIGHT + 10, y + 13, size(held.peak) + " too much" * over, kind="over" if over else "")
        )
    if plan.device and room.usable:
        x = LABEL + scale * room.usable
        drawn.append(_line(x, top - 8, height, "usable", f"{room.usable:,.0f} bytes of {plan.device.memory:,.0f}"))
        drawn.append(_text(x, 12, f"usable {size(room.usable)}", "end" if x > WIDTH / 2 else "start"))
    return _svg(height, drawn, "memory of each pipeline rank by kind")


def terms(found: Sequence[Term]) -> str:
    """The terms of the time of a step, each beginning where the one before ends."""
    whole = sum(term.seconds for term in found)
    scale = (WIDTH - NAME - VALUE) / whole
    ends = [NAME + scale * end for end in accumulate((term.seconds for term in found), initial=0.0)]
    drawn = []
    for row, (term, (start, end)) in enumerate(zip(found, pairwise(ends))):
        y = 4 + ROW * row
        drawn.append(_text(NAME - 10, y + 13, term.name, "end"))
        drawn.append(_box(start, y, end - start, BAR, f'fill="{PALETTE[0]}"', f"{term.name}: {term.formula}"))
        drawn.append(_line(end, y + BAR, y + ROW, "step"))
        drawn.append(_text(WIDTH - VALUE + 10, y + 13, f"{duration(term.seconds)} · {share(term.seconds, whole)}"))
    y = 4 + ROW * len(found)
    drawn.append(_text(NAME - 10, y + 13, "step", "end", "over"))
    drawn.append(_box(NAME, y, ends[-1] - NAME, BAR, 'class="whole"', f"the step: {whole:,.6g} s"))
    drawn.append(_text(WIDTH - VALUE + 10, y + 13, duration(whole), kind="over"))
    return _svg(y + ROW, drawn, "terms of the time of a step")


def pipeline(course: Timeline) -> str:
    """A row for each rank: what it does when. Of a long step its beginning and its end."""
    gap, left = 34, 64
    windows = course.windows(120)
    scale = (WIDTH - left - gap * (len(windows) - 1)) / sum(end - start for start, end in windows)
    height = ROW * len(course.chunks) + 26
    drawn, x = [], float(left)
    for start, end in windows:
        for rank, chunks in enumerate(course.chunks):
            y = ROW * rank + 2
            drawn.append(_box(x, y, scale * (end - start), BAR + 4, 'class="wait"', f"rank {rank} waits"))
            stages = sorted({work.stage for chunk in chunks for work in chunk.action})
            for chunk in chunks:
                if chunk.end > start and chunk.start < end and chunk.end > chunk.start:
                    begin, stop = (
                        x + scale * (min(max(time, start), end) - start) for time in (chunk.start, chunk.end)
                    )
                    drawn += _chunk(begin, y, stop - begin, chunk.action, stages, course.skipped if start else 0)
        for time, anchor in ((start, "start"), (end, "end")):
            since = course.length(time + (course.pause if start else 0))
            drawn.append(_text(x + scale * (time - start), height - 6, since, anchor, "soft"))
        x += scale * (end - start) + gap
    drawn += [_text(left - 10, ROW * rank + 17, f"rank {rank}", "end") for rank in range(len(course.chunks))]
    if len(windows) > 1:
        drawn.append(_text(WIDTH / 2 + left / 2, height / 2 - 8, "⋯", "middle", "over"))
    return _svg(height, drawn, "timeline of the pipeline")


def _chunk(x: float, y: float, width: float, action: Action, stages: Sequence[int], skipped: int) -> list[str]:
    """One colour, or where a forward pass overlaps a backward pass, one above the other."""
    kinds = {"F": 0, "B": 1, "W": 2}
    shown = [work for work in action if work.kind != "W" or len(action) == 1]  # a full backward pass is a B
    height = (BAR + 4) / len(shown)
    names = {"F": "forward", "B": "backward" if len(action) > 1 else "gradients of inputs", "W": "gradients of weights"}
    about = ", beside ".join(
        f"{names[w.kind]} of stage {w.stage}, micro-batch {w.micro_batch + skipped}" for w in shown
    )
    drawn = []
    for place, work in enumerate(shown):
        colour = STAGES[stages.index(work.stage) % len(STAGES)][kinds[work.kind]]
        drawn.append(_box(x, y + place * height, width, height, f'class="chunk" fill="{colour}"', about))
    return drawn


def _box(x: float, y: float, width: float, height: float, how: str, about: str) -> str:
    place = f'x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"'
    return f"<rect {place} {how}><title>{escape(about, quote=False)}</title></rect>"


def _line(x: float, top: float, bottom: float, kind: str, about: str = "") -> str:
    title = f"<title>{escape(about, quote=False)}</title>" if about else ""
    return f'<line x1="{_n(x)}" x2="{_n(x)}" y1="{_n(top)}" y2="{_n(bottom)}" class="{kind}">{title}</line>'


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    how = f' class="{kind}"' if kind else ""
    return f'<text x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}"{how}>{escape(text, quote=False)}</text>'


def _svg(height: float, drawn: Iterable[str], label: str) -> str:
    inner = "\n".join(drawn)
    return f'<svg viewBox="0 0 {WIDTH} {_n(height)}" role="img" aria-label="{label}">\n{inner}\n</svg>'


def _n(value: float) -> str:
    """To a hundredth of a unit."""
    return f"{value:.2f}".rstrip("0").rstrip(".")

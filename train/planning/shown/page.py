"""A plan as one HTML page that asks for nothing from elsewhere: the answer, its pictures, and every number with its formula."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from data.errors import DataError
from data.report import html
from train.config import RecipeError
from train.planning.plan import Plan
from train.planning.shown import pictures
from train.planning.shown.contents import (
    KINDS,
    answer,
    beside,
    layout_in_words,
    links_of,
    parts_of,
    room_of,
    timeline_of,
    title,
)
from train.planning.shown.formulas import FORMULAS
from train.planning.written import amount, counted, duration, figure, share, size, words

if TYPE_CHECKING:
    from train.planning.search import Search
    from train.planning.simulation.simulate import Simulation

TEMPLATE = "page.html"
BEST = 12  # layouts of a search that are seen at once


def write_page(
    plan: Plan, path: str | Path, *, search: "Search | None" = None, simulation: "Simulation | None" = None
) -> None:
    """Write the page. Equal plans give equal bytes.

    Args:
        search: of the same recipe, on as many devices.
        simulation: of the fullest pipeline rank.

    Raises:
        RecipeError: there is no place for a file at `path`.
    """
    try:
        html.write(render(plan, search=search, simulation=simulation), Path(path))
    except DataError as error:
        raise RecipeError(str(error).replace("html = ", "plot = ", 1)) from None


def render(plan: Plan, *, search: "Search | None" = None, simulation: "Simulation | None" = None) -> str:
    """The page as text."""
    environment = html.environment(Path(__file__).parent)
    environment.filters |= {
        "size": size,
        "duration": duration,
        "amount": amount,
        "share": share,
        "words": words,
        "code": code,
        "counted": counted,
    }
    numbers = plan.numbers()
    course = timeline_of(plan.step, plan.time) if len(plan.memory) > 1 else None
    return environment.get_template(TEMPLATE).render(
        plan=plan,
        title=title(plan),
        facts=answer(plan, numbers),
        formulas=FORMULAS,
        layout=layout_in_words(plan),
        kinds=KINDS,
        colours=pictures.COLOURS,
        parts_of=parts_of,
        stages=pictures.STAGES[: plan.layout.config.stages // plan.layout.config.pipeline],
        room=room_of(plan),
        memory=Markup(pictures.memory(plan)),
        terms=Markup(pictures.terms(plan.time.terms)) if plan.time else "",
        course=course,
        pipeline=Markup(pictures.pipeline(course)) if course else "",
        links=links_of(plan),
        placement=numbers.get("placement", []),
        search=search,
        best=BEST,
        beside=beside(plan, simulation) if simulation else [],
        simulation=simulation,
        numbers=[(name, _lines(name, value), FORMULAS[name]) for name, value in numbers.items()],
        recipe=plan.recipe.to_yaml(),
    )


def code(formula: str) -> Markup:
    """Names of functions, between back-ticks, as a page sets them."""
    parts = [
        Markup("<code>{}</code>" if place % 2 else "{}").format(part) for place, part in enumerate(formula.split("`"))
    ]
    return Markup("").join(parts)


def _lines(name: str, value: Any) -> list[str]:
    return value if isinstance(value, list) else [figure(name, value)]

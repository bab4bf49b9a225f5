"""The command `rorqual plan`: its options, and what it prints."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from train.arguments import AsJson, Overrides, RecipeName, started_processes
from train.config import Recipe, RecipeError, load_recipe

if TYPE_CHECKING:
    from train.planning.devices import Device
    from train.planning.plan import Plan
    from train.planning.search import Fallen, Search
    from train.planning.simulation.simulate import Simulation
    from train.schedule import Schedule

IMBALANCE = 1.2  # of experts on several processes, where nobody says
PLOTS = (".html", ".png", ".svg", ".pdf")
SHOWN = 10  # of the layouts that a search found


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option(help="On so many devices; default: as many as the launcher started, or 1.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="H100, H800, cpu … or a driver's name; default: this machine's.")
    ] = None,
    imbalance: Annotated[
        float | None,
        typer.Option(help="Rows of the fullest of the processes that share experts, over their mean; default: 1.2."),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="The fastest layouts that fit, and why the others fall out.")
    ] = False,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Run a step of the fullest process on fake tensors, and compare.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Write it all as a page (.html), or the schedules (.png, .svg, .pdf).")
    ] = None,
    explain: Annotated[
        str | None, typer.Option(metavar="KEY", help="How a number of the plan is computed; all: each of them.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run amounts to before it starts: with --gpus or --device also whether it fits, and how long it takes."""
    if search and (simulate or explain):
        option = "simulate" if simulate else "explain"
        raise RecipeError(f"{option}: is for one layout, and --search looks at many; leave one of the two out")
    for option, given in {"plot": plot, "json": as_json, "simulate": simulate}.items():
        if explain and given:
            raise RecipeError(f"{option}: --explain prints a number and how it is computed; leave one of the two out")
    _check(gpus, imbalance, plot)
    number = gpus or started_processes()
    on = _device(device, number) if search or device is not None or gpus is not None else None
    where = [f"run.device={'cpu' if on.name == 'cpu' else 'cuda'}"] if on else []
    loaded = load_recipe(recipe, [*(overrides or []), *where])
    if search:
        if on is None:
            raise RecipeError("device: is not given, and this machine has no GPU; write --device H100, or cpu")
        _check_imbalance(imbalance, min(number, loaded.model_config_resolved().n_routed_experts))
        _search(loaded, number, on, imbalance or IMBALANCE, plot, as_json)
    else:
        _check_imbalance(imbalance, loaded.parallel.expert)
        _plan(loaded, number, on, imbalance, simulate, plot, explain, as_json)


def schedule_of(recipe: Recipe) -> "Schedule":
    from train.schedule import Schedule

    return Schedule(recipe.schedule, recipe.data.lengths)


def print_advice(recipe: Recipe) -> None:
    """What the recipe's law says of this run."""
    from train.planning.advice import law_in_words

    for line in law_in_words(recipe):
        print(line)


def _check(gpus: int | None, imbalance: float | None, plot: Path | None) -> None:
    if gpus is not None and gpus < 1:
        raise RecipeError(f"gpus = {gpus}: must be a whole number, at least 1; write --gpus 1")
    if imbalance is not None and not 1 <= imbalance < math.inf:
        raise RecipeError(
            f"imbalance = {imbalance:g}: is what the fullest process has over the mean, 1 or more; write --imbalance 1"
        )
    if plot and plot.suffix.lower() not in PLOTS:
        raise RecipeError(f"plot = {str(plot)!r}: must end in .html, .png, .svg or .pdf; write for example plan.html")
    if plot and plot.is_dir():
        raise RecipeError(
            f"plot = {str(plot)!r}: is a folder; give the name of a file, for example {plot / 'plan.html'}"
        )
    if plot and not plot.absolute().parent.is_dir():
        raise RecipeError(f"plot = {str(plot)!r}: there is no folder {plot.parent}; make it or give another place")


def _check_imbalance(imbalance: float | None, ranks: int) -> None:
    """Where experts lie on so many processes."""
    if imbalance is None or imbalance <= ranks:
        return
    if ranks == 1:
        raise RecipeError(
            f"imbalance = {imbalance:g}: parallel.expert = 1, every process has all experts; leave it out, or spread them"
        )
    raise RecipeError(
        f"imbalance = {imbalance:g}: the fullest of {ranks} processes that share experts has at most all rows, {ranks} times the "
        f"mean; write --imbalance {ranks} or less"
    )


def _device(name: str | None, processes: int) -> "Device | None":
    """The device of this name, or this machine's; of several processes on a machine without a GPU nobody knows it."""
    import torch

    from train.planning.devices import find_device

    if name is None and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    if name is None and processes > 1:
        return None
    return find_device(name or "cpu", processes)


def _plan(
    recipe: Recipe,
    gpus: int,
    device: "Device | None",
    imbalance: float | None,
    simulate: bool,
    plot: Path | None,
    explain: str | None,
    as_json: bool,
) -> None:
    from parallel.layout import LayoutError
    from train.planning.plan import Plan
    from train.planning.search import nearest_that_fits
    from train.planning.shown.text import in_words

    schedule = schedule_of(recipe)
    layout = recipe.layout(gpus)
    try:
        schedule.check_layout(layout, recipe.micro_batch)
    except LayoutError as error:
        if device is None:
            raise
        with _waiting("looking for the nearest layout that can be"):
            nearest = nearest_that_fits(recipe, schedule, gpus, device, imbalance or IMBALANCE)
        raise LayoutError(f"{error}; {_nearest_in_words(recipe, gpus, nearest)}" if nearest else str(error)) from None
    planned = Plan.of(recipe, schedule, gpus, device, imbalance or IMBALANCE)
    if explain:
        from train.planning.shown.formulas import explain as explained

        print("\n".join(explained(planned, explain)))
        return
    simulation = _simulated(planned) if simulate else None
    if plot:
        _draw(planned, plot, simulation=simulation)
    nearest = None
    if planned.fits is False and device:
        with _waiting("looking for the nearest layout that fits"):
            nearest = nearest_that_fits(recipe, schedule, gpus, device, imbalance or IMBALANCE)
    if as_json:
        numbers = planned.numbers()
        if planned.fits is False:
            numbers["nearest_that_fits"] = nearest and _found(recipe, nearest)
        if simulation:
            numbers["simulation"] = _of_simulation(planned, simulation)
        print(json.dumps(numbers))
        return
    print("\n".join(in_words(planned, simulation)))
    if planned.fits is False:
        print(f"\nit does not fit; {_nearest_in_words(recipe, gpus, nearest)}")
    if device is None and gpus > 1:
        print("\nwhether it fits, and how long it takes: with --device, for example --device H100")
    print_advice(recipe)


def _simulated(planned: "Plan") -> "Simulation":
    """Of the fullest process, in the step that takes most of its memory."""
    from train.planning.memory import memory_of
    from train.planning.simulation.simulate import simulate

    rank = planned.fullest.pipeline_rank
    step = max(planned.kinds, key=lambda step: memory_of(step, rank).peak)
    with _waiting(f"simulating a step of pipeline rank {rank}"):
        return simulate(step, rank)


def _of_simulation(planned: "Plan", simulation: "Simulation") -> dict[str, Any]:
    return {
        "pipeline_rank": planned.fullest.pipeline_rank,
        "peak_bytes": simulation.peak,
        "bytes_at_peak": simulation.at_peak,
        "formula_over_simulation": planned.fullest.peak / simulation.peak,
        "micro_batches": simulation.micro_batches,
        "seconds": simulation.seconds,
    }


def _draw(planned: "Plan", path: Path, search: "Search | None" = None, simulation: "Simulation | None" = None) -> None:
    if path.suffix.lower() == ".html":
        from train.planning.shown.page import write_page

        write_page(planned, path, search=search, simulation=simulation)
        return
    from train.planning.advice import law_in_words
    from train.planning.shown.plot import plot_schedule

    plot_schedule(planned.schedule, path, law_in_words(planned.recipe))


# The search -------------------------------------------------------------------------------------------------------------


def _search(recipe: Recipe, gpus: int, device: "Device", imbalance: float, plot: Path | None, as_json: bool) -> None:
    """Print what was found. Where nothing fits, why, and how many devices it takes.

    Raises:
        RecipeError: nothing fits.
    """
    from train.planning.search import nearest_that_fits, search

    schedule = schedule_of(recipe)
    with _progress("layouts") as progress:
        result = search(recipe, schedule, gpus, device, imbalance, progress)
    nearest = None
    if not result.found:
        with _waiting("looking for the number of devices on which it fits"):
            nearest = nearest_that_fits(recipe, schedule, gpus, device, imbalance)
    best = result.found[0] if result.found else result.own.plan
    if plot and best:
        _draw(best, plot, search=result)
    if as_json:
        print(json.dumps(_as_json(result, nearest)))
    else:
        print("\n".join(_lines(result)))
    if not result.found:
        raise RecipeError(
            f"gpus = {gpus}: of {result.candidates:,} layouts none fits on {gpus:,} × {device.name} and runs as it is; "
            f"{_nearest_in_words(recipe, gpus, nearest, result.fallen[0] if result.fallen else None)}"
        )


def _lines(result: "Search") -> Iterator[str]:
    from train.planning.written import amount, duration, share, size

    on = f"{result.world_size:,} × {result.device.name}, {size(result.device.usable)} each to use"
    yield f"{on}: {result.candidates:,} layouts, of which {result.fit:,} fit and run as they are"
    head = f"{'':>4} {'step':>9} {'tok/s each':>11} {'MFU':>7} {'peak':>8}   layout, as it is written behind the recipe"

    def row(place: int, plan: "Plan") -> str:
        assert plan.time
        time, rate = duration(plan.time.seconds), amount(plan.tokens_per_second)
        numbers = f"{place:>4} {time:>9} {rate:>11} {share(plan.time.mfu):>7} {size(plan.fullest.peak):>8}"
        return f"{numbers}   {' '.join(result.overrides(plan))}"

    if result.found:
        yield head
        yield from (row(place, plan) for place, plan in enumerate(result.found[:SHOWN], start=1))
    if result.unproven:
        yield "not proven by a row of parallel/PARITY.md, so refused by a run without parallel.unproven=true:"
        yield from (row(place, plan) for place, plan in enumerate(result.unproven[: SHOWN // 2], start=1))
    own = result.own
    if own.place:
        yield f"the recipe's own: number {own.place}, {own.times:.2f} × the time of the best"
    else:
        yield f"the recipe's own is not among them: {own.why_not}"
    if result.fallen:
        yield "why the others fall out:"
    for fallen in result.fallen:
        yield f"{fallen.how_many:>9,} {fallen.why}"
        if fallen.example:
            yield f"{'':>9} {fallen.example}"


def _as_json(result: "Search", nearest: "Plan | None") -> dict[str, Any]:
    recipe, own = result.recipe, result.own
    return {
        "device": result.device.name,
        "world_size": result.world_size,
        "usable_bytes_per_device": round(result.device.usable),
        "candidates": result.candidates,
        "fit": result.fit,
        "found": [_found(recipe, plan) for plan in result.found],
        "unproven": [_found(recipe, plan) for plan in result.unproven],
        "fallen": [fallen._asdict() for fallen in result.fallen],
        "own": {"place": own.place, "times_the_best": own.times} if own.place else {"place": None, "why": own.why_not},
        "nearest_that_fits": nearest and _found(recipe, nearest),
    }


def _found(recipe: Recipe, plan: "Plan") -> dict[str, Any]:
    """A layout of a search, for a program to read."""
    from train.planning.search import overrides

    assert plan.time
    return {
        "overrides": overrides(recipe, plan.recipe),
        "world_size": plan.layout.world_size,
        "fits": plan.fits,
        "peak_bytes_per_rank": plan.fullest.peak,
        "step_seconds": plan.time.seconds,
        "tokens_per_second_per_device": plan.tokens_per_second,
        "mfu": plan.time.mfu,
        "gpu_hours_per_trillion_tokens": plan.gpu_hours_per_trillion_tokens,
    }


def _nearest_in_words(recipe: Recipe, gpus: int, nearest: "Plan | None", most: "Fallen | None" = None) -> str:
    """What to write instead; or, where nothing is known, why: by what most candidates of a search fell out."""
    from train.planning.search import MOST_DEVICES, overrides
    from train.planning.written import size

    if nearest is None and most and most.what != "memory":
        return f"for most of them {most.why}; take another number of devices, or another batch"
    if nearest is None:
        return f"nor on a power of two up to {MOST_DEVICES:,}; take a device with more memory or a smaller model"
    number = nearest.layout.world_size
    on = f" --gpus {number}" if number != gpus else ""
    return f"what fits, with {size(nearest.fullest.peak)}: {' '.join(overrides(recipe, nearest.recipe))}{on}"


# While somebody waits ---------------------------------------------------------------------------------------------------


@contextmanager
def _waiting(what: str) -> Iterator[None]:
    """Says so on a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(f"{what} …"):
        yield


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal: to be called with what is done and all there is."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)

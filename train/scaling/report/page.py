"""A fit as one HTML file that asks for nothing from elsewhere, or as a folder of pictures.

The page says first what limits the fit and how its forecast of a held-out budget came out, then the laws, then shows them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from markupsafe import Markup

from data.errors import DataError
from data.files import replace_file
from data.report import html
from data.report.figures import STYLE, svg
from train.scaling.errors import ScalingError
from train.scaling.estimate import Estimate
from train.scaling.fits.basins import Basin
from train.scaling.fits.bootstrap import percentile_interval
from train.scaling.fits.fit import Fit
from train.scaling.fits.regret import Regret, regret
from train.scaling.fits.runs import Array
from train.scaling.law import PowerLaw
from train.scaling.report.basin_plot import choice, draw_basin, draw_key, on_a_line
from train.scaling.report.drawing import amount, power
from train.scaling.report.plots import SYMBOLS, figures, over_compute

TEMPLATE = "page.html"
GREEK = {"alpha": "α", "beta": "β", "gamma": "γ"}


def write_page(fit: Fit, path: Path, title: str) -> None:
    """Write the page. Equal fits give equal bytes.

    Raises:
        ScalingError: there is no place for a file at `path`.
    """
    try:
        html.write(render(fit, title), path)
    except DataError as error:
        raise ScalingError(str(error)) from None
    except OSError as error:
        raise ScalingError(f"html = {str(path)!r}: cannot be written ({error.strerror}); give another place") from None


def write_pictures(fit: Fit, folder: Path) -> list[Path]:
    """Write every picture as PNG on white.

    Raises:
        ScalingError: there is no place for files in `folder`.
    """
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(STYLE):
            for name, figure in figures(fit):
                path = folder / f"{name}.png"
                with replace_file(path) as temporary:
                    figure.savefig(temporary, format="png", dpi=200, facecolor="white")
                written.append(path)
    except OSError as error:
        problem = f"pictures = {str(folder)!r}: cannot be written ({error.strerror})"
        raise ScalingError(f"{problem}; give a folder that can") from None
    return written


def render(fit: Fit, title: str) -> str:
    """The page as text."""
    environment = html.environment(Path(__file__).parent)
    environment.filters |= {
        "power": typeset,
        "amount": amount,
        "written": written,
        "estimate": estimate,
        "percent": percent,
    }
    with matplotlib.rc_context(STYLE):
        drawn = {name: Markup(svg(figure)) for name, figure in over_compute(fit).items() if figure}
        key = Markup(svg(draw_key(100 * fit.basins[0].band))) if fit.basins else ""
        basins = [_panel(fit, basin) for basin in fit.basins]
    return environment.get_template(TEMPLATE).render(
        fit=fit,
        title=title,
        drawn=drawn,
        key=key,
        basins=basins,
        forecasts=list(_forecasts(fit)),
        laws=list(_laws(fit)),
        formula=formula,
    )


@dataclass(frozen=True)
class Forecast:
    """One quantity of a held-out budget; `write` says how its numbers are written."""

    flops: float
    quantity: str
    forecast: Estimate
    measured: float
    write: str


@dataclass(frozen=True)
class Panel:
    """One basin of the page."""

    basin: Basin
    picture: Markup
    lr: Estimate | None
    batch: Estimate | None
    regret: Regret | None


@dataclass(frozen=True)
class Row:
    """One method's law.

    Attributes:
        used: whether it is what the law file has.
        quality: what the method minimised or leaves over, and of how much.
    """

    quantity: str
    method: str
    form: Markup
    coefficients: dict[str, Estimate]
    quality: str
    used: bool


def typeset(value: float, digits: int = 3) -> str:
    """2.2e-4 with a real minus."""
    return power(value, digits).replace("-", "−")


def written(value: float, how: str) -> str:
    """As a "power" of ten, as an "amount", or as a "loss", with the digits in which losses differ."""
    return f"{value:.4f}" if how == "loss" else amount(value) if how == "amount" else typeset(value)


def estimate(value: Estimate, how: str = "power") -> str:
    """A value with its interval."""
    if value.low is None or value.high is None:
        return written(value.value, how)
    return f"{written(value.value, how)} ({written(value.low, how)} to {written(value.high, how)})"


def percent(share: float, signed: bool = False) -> str:
    """0.0123 as 1.23 %, with the digits that matter."""
    digits = 2 if abs(share) < 0.1 else 1
    return f"{100 * share:{'+' if signed else ''}.{digits}f}\u202f%".replace("-", "−")


def formula(law: PowerLaw) -> Markup:
    """0.312 · C^−0.125, typeset."""
    factors = [
        Markup("{}<sup>{}</sup>").format(_symbol(name), typeset(round(exponent, 3)))
        for name, exponent in law.exponents.items()
    ]
    return Markup(" · ").join([Markup(typeset(law.coefficient)), *factors])


def _symbol(variable: str) -> Markup:
    letter, _, index = SYMBOLS[variable].partition("_")
    return Markup("<var>{}</var>").format(letter) + (Markup("<sub>{}</sub>").format(index) if index else "")


def _panel(fit: Fit, basin: Basin) -> Panel:
    lr, batch = choice(fit.law.lr, basin), choice(fit.law.batch_tokens, basin)
    cost = None
    if lr and batch and not on_a_line(basin.lr, basin.batch):
        cost = regret(basin, lr.value, batch.value)
    return Panel(basin, Markup(svg(draw_basin(basin, fit.law.lr, fit.law.batch_tokens))), lr, batch, cost)


def _forecasts(fit: Fit) -> Iterator[Forecast]:
    for held in fit.held_out:
        found = (
            (f"loss, {fit.law.loss_unit}", held.loss, held.measured_loss, "loss"),
            ("peak learning rate", held.lr, held.measured_lr, "power"),
            ("batch, tokens", held.batch, held.measured_batch, "amount"),
        )
        for quantity, forecast, measured, how in found:
            if forecast and measured:
                yield Forecast(held.flops, quantity, forecast, measured, how)


def _laws(fit: Fit) -> Iterator[Row]:
    """Every method's law, quantity by quantity."""
    for key, hyper in fit.hyper.items():
        quality = f"{hyper.cells} cells" + ("" if hyper.residual is None else f", residual {percent(hyper.residual)}")
        yield _power_row("learning rate", key, hyper.lr, quality, hyper.lr == fit.law.lr)
        yield _power_row("batch, tokens", key, hyper.batch, quality, hyper.batch == fit.law.batch_tokens)
    if fit.allocation:
        rows = f"{sum(row.edge is None for row in fit.rows)} rows"
        yield _power_row(
            "M, FLOPs per token", "IsoFLOP", fit.allocation.M, rows, fit.law.flops_per_token == fit.allocation.M
        )
        yield _power_row("D, tokens", "IsoFLOP", fit.allocation.D, rows, fit.law.tokens == fit.allocation.D)
        if best := fit.allocation.best_loss:
            form = Markup("<var>E</var> + <var>k</var>/<var>C</var><sup>γ</sup>")
            draws = np.array(best.draws).reshape(-1, 3).T
            found = {
                GREEK.get(name, name): _interval(getattr(best, name), drawn)
                for name, drawn in zip(("E", "k", "gamma"), draws)
            }
            yield Row("best loss", "IsoFLOP", form, found, rows, best == fit.law.best_loss)
    form = Markup("<var>E</var> + <var>A</var>/<var>N</var><sup>α</sup> + <var>B</var>/<var>D</var><sup>β</sup>")
    for key, fitted in fit.losses.items():
        found = {GREEK.get(name, name): value for name, value in fitted.intervals.items()}
        quality = f"{len(fitted.residuals)} runs, objective {typeset(fitted.objective, 8)}"
        yield Row(f"loss, N = {fitted.law.size}", key, form, found, quality, fitted.law == fit.law.loss)


def _power_row(quantity: str, method: str, law: PowerLaw, quality: str, used: bool) -> Row:
    names = ["k", *"abc"[: len(law.exponents)]]
    draws = np.array(law.draws).reshape(-1, len(names)).T
    values = [law.coefficient, *law.exponents.values()]
    found = {name: _interval(value, drawn) for name, value, drawn in zip(names, values, [np.exp(draws[0]), *draws[1:]])}
    form = Markup("<var>k</var> · ") + Markup(" · ").join(
        Markup("{}<sup><var>{}</var></sup>").format(_symbol(variable), name)
        for variable, name in zip(law.exponents, names[1:])
    )
    return Row(quantity, method, form, found, quality, used)


def _interval(value: float, draws: Array) -> Estimate:
    return percentile_interval(value, draws) if len(draws) else Estimate(value)

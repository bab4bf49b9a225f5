"""Which form of the laws of learning rate and batch is chosen."""

import pytest

from benchmarks.coverage_hyper import Ladder
from train.scaling.fits import compare
from train.scaling.fits.attempt import Attempt
from train.scaling.fits.basins import Basin, basins
from train.scaling.fits.compare import FORMS, choose
from train.scaling.fits.hyperparameters import HyperFit, fit_hyperparameters
from train.scaling.fits.regret import Regret

FOUND = basins(Ladder(("params", "tokens"), "surface", noise=0.0005).runs(seed=0), noise=0.0005)


def fits(found: list[Basin]) -> dict[str, HyperFit]:
    return {
        f"surface {form}": fit_hyperparameters(found, FORMS[form], method="surface", draws=0) for form in ("C", "N, D")
    }


def chosen(monkeypatch: pytest.MonkeyPatch, simple: list[float | None], rich: list[float | None]) -> str:
    """The form for these regrets of left-out basins; None is outside of the grid."""

    def left_out(found: list[Basin], variables: tuple[str, ...], method: str) -> list[Regret]:
        costs = simple if variables == ("flops",) else rich
        return [Regret(found[0], 1.0, 1.0, 0.9 if c is None else c, inside=c is not None) for c in costs]

    monkeypatch.setattr(compare, "cross_validated", left_out)
    fit, why = choose(FOUND, fits(FOUND), Attempt())
    assert fit is not None and why.startswith("surface in " + ("C" if fit.variables == ("flops",) else "N, D"))
    return why


def test_the_simpler_form_stays_within_one_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # Differences of 1, 1, 1 and -2 tenths of a per cent: 0.025 % ± 0.075 %.
    why = chosen(monkeypatch, [0.002, 0.002, 0.002, 0.001], [0.001, 0.001, 0.001, 0.003])
    assert why.startswith("surface in C; ") and "difference 0.025% ± 0.075% over 4 of 4" in why
    assert chosen(monkeypatch, [0.002] * 4, [0.001] * 4).startswith("surface in N, D; ")


def test_a_choice_outside_of_the_grid_is_counted_and_not_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    # What the edge costs there, 90 %, would decide every mean.
    why = chosen(monkeypatch, [0.001] * 4 + [None], [0.001] * 4 + [0.002])
    assert why.startswith("surface in C; ") and "over 4 of 5; outside of the grid: 1 and 0" in why
    assert chosen(monkeypatch, [0.001] * 4 + [None] * 3, [0.001] * 7).startswith("surface in N, D; ")
    assert chosen(monkeypatch, [0.002] * 7, [0.001] * 4 + [None] * 3).startswith("surface in C; ")


def test_a_form_needs_two_degrees_of_freedom_in_every_fold() -> None:
    five = FOUND[:3] + FOUND[4:6]  # four in a fold, three parameters
    fit, why = choose(five, fits(five), Attempt())
    assert fit is not None and fit.variables == ("flops",) and "5 basins are too few for folds of N, D" in why


def test_a_law_of_two_variables_is_found_where_they_matter() -> None:
    fit, why = choose(FOUND, fits(FOUND), Attempt())
    assert fit is not None and fit.variables == ("params", "tokens"), why

"""What a table of runs comes to, by the command that users run."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.train.scaling.steplaw import steplaw
from train.cli import main
from train.scaling.fits.basins import best_runs
from train.scaling.fits.fit import fit_runs
from train.scaling.fits.runs import COLUMNS, Runs
from train.scaling.ladder.table import read_runs
from train.scaling.law import load_law

PUBLISHED = Path(__file__).parents[4] / "shared" / "scaling_data"
LADDER = Path(__file__).parents[3] / "train" / "scaling" / "ladders" / "cpu"
CHINCHILLA = PUBLISHED / "chinchilla_epoch" / "points.csv"
GOLDEN = {"A": 477.83, "B": 2143.4, "E": 1.81722, "alpha": 0.34731, "beta": 0.36717, "a": 0.5139}
needs_published = pytest.mark.skipif(not CHINCHILLA.exists(), reason="the published runs are not beside the repository")


def a_ladder(budgets: int = 5, noise: float = 0.001, seed: int = 0) -> Runs:
    """Runs of L(N, D) with a basin around lr* = 0.3·C^-0.12 and B* = 0.3·C^0.33, five sizes a budget."""
    draw = np.random.default_rng(seed)
    rows = []
    for c in 1e15 * 2.0 ** np.arange(budgets):
        n_opt = (c / 120) ** 0.5
        best_lr, best_batch = 0.3 * c**-0.12, 0.3 * c**0.33
        for ratio in (0.25, 0.5, 1, 2, 4):
            n = n_opt * ratio
            d = c / (6 * n)
            base = 1.7 + 400 / n**0.34 + 2000 / d**0.36
            for i in range(-2, 3) if ratio == 1 else (0,):
                for j in range(-2, 3) if ratio == 1 else (0,):
                    lr, batch = 2.0 ** (round(np.log2(best_lr)) + i), 2.0 ** (round(np.log2(best_batch)) + j)
                    rise = 0.006 * np.log(lr / best_lr) ** 2 + 0.004 * np.log(batch / best_batch) ** 2
                    rows.append((base * np.exp(rise + noise * draw.normal()), n, n, c, d, lr, batch, 0))
    columns = ("loss", "params", "active", "flops", "tokens", "lr", "batch", "seed")
    return Runs.of(**dict(zip(columns, np.array(rows).T)))


def write(runs: Runs, path: Path) -> str:
    """As a CSV file; returns what its columns are."""
    names = [name for name in COLUMNS if getattr(runs, name) is not None]
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(names)
        table.writerows(np.stack([getattr(runs, name) for name in names], axis=1).tolist())
    return ",".join(f"{name}={name}" for name in names)


@needs_published
def test_the_chinchilla_points_give_the_published_refit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    columns = "params=Model Size,flops=Training FLOP,loss=loss"
    out = tmp_path / "law.json"
    arguments = [
        "--columns",
        columns,
        "--drop-highest",
        "5",
        "--draws",
        "200",
        "--json",
        "--out",
        str(out),
        "--name",
        "refit",
    ]
    assert main(["scaling", "fit", "--points", str(CHINCHILLA), *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    huber = next(fit for fit in found["fits"] if fit["method"] == "huber")
    assert huber["objective"] <= 0.0010182741
    for name, value in GOLDEN.items():
        assert huber["coefficients"][name]["value"] == pytest.approx(value, rel=0.005)
    assert any("the methods disagree on beta: huber 0.367" in warning for warning in found["warnings"])  # squares pull
    law = load_law(out)
    assert (
        law.name == "refit"
        and law.loss is not None
        and huber["coefficients"]["E"]["value"] == law.loss.E
        and law.lr is None
    )


def test_a_made_ladder_gives_its_laws_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    columns = write(a_ladder(), tmp_path / "runs.csv")
    assert main(["scaling", "fit", "--points", str(tmp_path / "runs.csv"), "--columns", columns, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    fits = {fit["method"]: fit["coefficients"] for fit in found["fits"]}
    truth = {"lr ln k": np.log(0.3), "lr flops": -0.12, "batch ln k": np.log(0.3), "batch flops": 0.33}
    for name, value in truth.items():
        estimate = fits["surface C"][name]
        assert estimate["low"] <= value <= estimate["high"]
    held = found["held_out"][0]
    assert held["flops"] == pytest.approx(16e15, rel=0.01) and held["regret"] < 0.002
    assert held["loss"]["low"] <= held["measured_loss"] <= held["loss"]["high"]
    assert set(found["law"]) >= {"lr", "batch_tokens", "loss", "flops_per_token", "tokens", "best_loss", "measured"}


def test_a_law_knows_what_its_compute_and_its_loss_are() -> None:
    runs = a_ladder(budgets=2)
    counted = fit_runs(runs, draws=0, hold_out=False)
    derived = fit_runs(
        Runs.of(loss=runs.loss, params=runs.params, tokens=runs.tokens),
        draws=0,
        hold_out=False,
        loss_unit="bits per byte",
    )
    assert (counted.law.compute, counted.law.loss_unit) == ("M*D", "nats per token")
    assert (derived.law.compute, derived.law.loss_unit) == ("6*N*D", "bits per byte")


def test_an_moe_is_fitted_in_both_sizes_and_the_one_that_describes_it_is_the_law() -> None:
    runs = a_ladder(noise=0.0005)
    share = 2.0 ** -(np.arange(len(runs)) % 3 + 1.0)  # models that use a half to an eighth of their parameters
    moe = replace(runs, params=runs.active / share)  # type: ignore[operator]
    fit = fit_runs(moe, draws=20, hold_out=False)
    assert {"huber", "vpnls", "huber active", "vpnls active"} <= set(fit.losses)
    assert (
        fit.law.loss is not None
        and fit.law.loss.size == "active"
        and "of N = active; runs lie" in fit.law.notes["loss"]
    )
    proportional = fit_runs(replace(runs, params=10 * runs.active), draws=0, hold_out=False)  # type: ignore[operator]
    assert set(proportional.losses) == {"huber", "vpnls"} and proportional.law.loss.size == "params"  # type: ignore[union-attr]


@needs_published
def test_dense_and_moe_grids_of_step_law_have_laws_of_both_sizes() -> None:
    dense, moe = steplaw("dense"), steplaw("moe")
    columns = {name: [*getattr(dense, name), *getattr(moe, name)] for name in COLUMNS if name != "seed"}
    fit = fit_runs(Runs.of(**columns), draws=0, hold_out=False)
    assert len(fit.basins) == 17 + 16
    assert {"surface N, D", "surface active, D", "band N, D", "band active, D"} <= set(fit.hyper)
    assert fit.law.lr is not None and set(fit.law.lr.exponents) == {"params", "tokens"}, fit.law.notes


def test_what_was_measured_at_the_held_out_budget_is_one_run() -> None:
    runs = a_ladder()
    (held,) = fit_runs(runs, draws=20).held_out
    at = int(np.flatnonzero(np.isclose(runs.loss, held.measured_loss))[0])
    of_it = {name: getattr(runs, name)[at] for name in ("params", "tokens", "lr", "batch")}
    assert of_it == pytest.approx(
        {"params": held.params, "tokens": held.tokens, "lr": held.measured_lr, "batch": held.measured_batch}
    )


def test_a_forecast_outside_of_the_held_out_grid_has_no_regret() -> None:
    runs = a_ladder()
    moved = replace(runs, lr=np.where(runs.flops > 1e16, 64 * runs.lr, runs.lr))  # type: ignore[operator]
    fit = fit_runs(moved, draws=20)
    (held,) = fit.held_out
    assert held.inside is False and held.regret is None
    assert fit.to_dict()["held_out"][0]["inside"] is False
    assert any("lie outside of the grid, so that what they cost is unknown" in warning for warning in fit.warnings)


def test_a_budget_of_one_says_what_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    columns = write(a_ladder(budgets=1), tmp_path / "runs.csv")
    assert main(["scaling", "fit", "--points", str(tmp_path / "runs.csv"), "--columns", columns]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "add" in err and "budget" in err


def test_runs_that_all_diverged_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    runs = a_ladder()
    columns = write(runs.take(np.arange(3)), tmp_path / "few.csv")
    assert main(["scaling", "fit", "--points", str(tmp_path / "few.csv"), "--columns", columns]) == 2
    assert "add" in capsys.readouterr().err
    path = tmp_path / "diverged.csv"
    path.write_text("loss,lr,batch,flops\nnan,1,64,1e15\nnan,2,64,1e15\n")
    arguments = ["--points", str(path), "--columns", "loss=loss,lr=lr,batch=batch,flops=flops"]
    assert main(["scaling", "fit", *arguments]) == 2
    assert "all diverged" in capsys.readouterr().err


def test_runs_far_off_the_law_are_named_and_left_out_when_asked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    runs = a_ladder()
    columns = "loss=loss,params=params,tokens=tokens"
    spoilt = Runs.of(
        loss=np.where(np.arange(len(runs)) == 40, 1.3, 1.0) * runs.loss, params=runs.params, tokens=runs.tokens
    )
    write(spoilt, tmp_path / "runs.csv")
    command = [
        "scaling",
        "fit",
        "--points",
        str(tmp_path / "runs.csv"),
        "--columns",
        columns,
        "--draws",
        "20",
        "--json",
    ]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert any("runs lie more than 5 robust standard deviations off" in warning for warning in found["warnings"])
    assert main([*command, "--drop-outliers"]) == 0
    without = json.loads(capsys.readouterr().out)
    assert any("far off the law of the loss" in what for what in without["dropped"])
    objectives = [next(f["objective"] for f in r["fits"] if f["method"] == "vpnls") for r in (found, without)]
    assert objectives[1] < 0.1 * objectives[0]


def test_the_best_repeated_cell_of_a_size_stands_for_it_with_the_mean_of_its_seeds() -> None:
    runs = Runs.of(
        loss=[3.0, 3.2, 3.09, 4.0, 3.9], params=[1, 1, 1, 2, 2], tokens=[5] * 5, lr=[1, 1, 2, 1, 2], batch=[8] * 5
    )
    assert best_runs(runs).loss.tolist() == [3.1, 3.9]


def test_the_shipped_law_of_the_ladder_is_what_its_runs_give() -> None:
    shipped, fitted = load_law("ladder-cpu"), fit_runs(read_runs(LADDER), draws=0, hold_out=False).law
    for part in ("lr", "batch_tokens", "flops_per_token"):
        ours, theirs = getattr(fitted, part), getattr(shipped, part)
        assert ours.exponents == pytest.approx(theirs.exponents, rel=1e-3)
        assert ours.coefficient == pytest.approx(theirs.coefficient, rel=1e-2)
    assert shipped.runs == len(read_runs(LADDER)) and shipped.name == "ladder-cpu"

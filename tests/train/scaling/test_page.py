"""The page and the pictures of a fit: what is on them for a full one, and for poor ones."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.train.scaling.chinchilla import chinchilla
from train.scaling.errors import ScalingError
from train.scaling.estimate import Estimate
from train.scaling.fits.basins import Basin
from train.scaling.fits.fit import Fit, fit_runs
from train.scaling.fits.loss_law import optimum
from train.scaling.fits.runs import Runs
from train.scaling.law import LossLaw, PowerLaw, load_law
from train.scaling.report.basin_plot import choice
from train.scaling.report.drawing import amount, power, ticks
from train.scaling.report.loss_plots import frontier
from train.scaling.report.page import render, write_page, write_pictures
from train.scaling.report.plots import figures

BUDGETS = (2e15, 4e15, 8e15, 1.6e16)


def a_ladder(budgets: tuple[float, ...] = BUDGETS, rates: tuple[float, ...] = (0.25, 0.5, 1, 2, 64)) -> Runs:
    """Basins around lr* = 0.3·C^-0.12 and B* = 0.3·C^0.33, where 64 times the rate diverges; five sizes a budget, three seeds."""
    draw, rows = np.random.default_rng(0), []
    for c in budgets:
        n_opt = (c / 120) ** 0.5
        cells = [(1.0, lr, batch, 0) for lr in rates for batch in (0.25, 0.5, 1, 2, 4)]
        cells += [(1.0, 1.0, 1.0, seed) for seed in (1, 2)] + [(ratio, 1.0, 1.0, 0) for ratio in (0.25, 0.5, 2, 4)]
        for ratio, lr, batch, seed in cells:
            n = n_opt * ratio
            d = c / (6 * n)
            rise = 0.006 * np.log(lr * 1.2) ** 2 + 0.004 * np.log(batch * 1.2) ** 2 + 0.0005 * draw.normal()
            loss = np.nan if lr == 64 else (1.7 + 400 / n**0.34 + 2000 / d**0.36) * np.exp(rise)
            rows.append((loss, n, c, d, lr * 0.25 * c**-0.12, batch * 0.25 * c**0.33, seed))
    return Runs.of(**dict(zip(("loss", "params", "flops", "tokens", "lr", "batch", "seed"), np.array(rows).T)))


@pytest.fixture(scope="module")
def full() -> Fit:
    return fit_runs(a_ladder(), draws=50)


@pytest.fixture(scope="module")
def bare(full: Fit) -> Fit:
    """The same with nothing to draw, which is quick."""
    parts = ("lr", "batch_tokens", "flops_per_token", "tokens", "loss", "best_loss")
    law = full.law.model_copy(update=dict.fromkeys(parts))
    return replace(full, basins=[], rows=[], hyper={}, allocation=None, losses={}, held_out=[], warnings=[], law=law)


@pytest.fixture(scope="module")
def page(full: Fit) -> str:
    return render(full, "A ladder")


def text_of(page: str) -> str:
    """What a reader sees, in one line; of pictures too."""
    body = page[page.index("<body>") :]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def test_a_page_asks_for_nothing_from_elsewhere(page: str) -> None:
    asked = re.findall(r"""(?:src|href)=["'](?!#)[^"']*|url\((?!#)[^)]*|@import|<script""", page)
    assert asked == []


def test_a_page_is_well_formed(page: str) -> None:
    void, unclosed = {"meta", "use", "path", "line", "rect", "circle", "br"}, []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attributes: object) -> None:
            if tag not in void:
                unclosed.append(tag)

        def handle_startendtag(self, tag: str, attributes: object) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            if tag not in void:
                assert unclosed.pop() == tag

    Checker().feed(page)
    assert unclosed == []


def test_equal_fits_give_equal_pages(full: Fit, bare: Fit, tmp_path: Path) -> None:
    for name in ("here.html", "there.html"):
        write_page(replace(bare, basins=full.basins[:1], rows=full.rows), tmp_path / name, "A ladder")
    assert (tmp_path / "here.html").read_bytes() == (tmp_path / "there.html").read_bytes()


def test_warnings_come_before_everything_else(bare: Fit) -> None:
    text = text_of(render(replace(bare, warnings=["the methods disagree", "add runs"]), "A ladder"))
    assert text.startswith(" A ladder 2 warnings the methods disagree add runs Runs ")


def test_a_page_has_every_method_with_its_coefficients_and_intervals(full: Fit, page: str) -> None:
    text = text_of(page)
    for method in ("surface C", "band C", "IsoFLOP", "huber", "vpnls"):
        assert f" {method} " in text
    law = full.hyper["surface C"].lr
    found = re.search(r"learning rate surface C k · C a k = (\S+) \((\S+) to (\S+)\) a = −(\S+) \(", text)
    assert found and float(found[1]) == pytest.approx(law.coefficient, rel=0.005)
    assert float(found[2]) < law.coefficient < float(found[3])
    assert float(found[4]) == pytest.approx(-law.exponents["flops"], abs=0.0005)
    assert f"objective {power(full.losses['huber'].objective, 8).replace('-', '−')}" in text


def test_the_forecast_of_the_held_out_budget_stands_beside_what_was_measured(full: Fit, bare: Fit, page: str) -> None:
    (held,) = full.held_out
    assert held.loss and held.regret is not None
    text = text_of(page)
    inside = "yes" if held.measured_loss in held.loss else "no"
    assert re.search(
        rf"loss, nats per token {held.loss.value:.4f} \(.*?\) {held.measured_loss:.4f} \S+ % {inside} ", text
    )
    assert f"{held.regret * 100:.2f} % (seeds differ by " in text.replace("\u202f", " ")
    assert f"D = {amount(held.tokens)}, 3 seeds." in text
    beyond = text_of(render(replace(bare, held_out=[replace(held, inside=False, regret=None)]), "A ladder"))
    assert "regret outside of the grid: unknown" in beyond and "near-optimal" not in beyond
    missed = replace(bare, held_out=[replace(held, loss=Estimate(1.0, 0.9, 1.1), regret=0.02)])
    text = text_of(render(missed, "A ladder"))
    assert re.search(r"1\.0000 \(0\.9000 to 1\.1000\) \S+ −\S+ % no ", text)


def test_a_basin_shows_its_cells_its_edges_and_what_the_law_costs(full: Fit, page: str) -> None:
    text = text_of(page)
    for basin in full.basins:
        assert f"{basin.label} " in text and f"loss {basin.minimum[2]:.4f}" in text
    assert text.count(" 25 cells ") == len(BUDGETS)
    assert len(re.findall(r"Law: lr \S+, batch \S+, \+0\.\d\d %", text)) == len(BUDGETS)


def test_a_basin_that_is_cut_off_says_where(bare: Fit) -> None:
    cut = fit_runs(a_ladder(BUDGETS[:2], rates=(0.25, 0.5, 1)), draws=20)
    assert "Not covered: lr high" in text_of(render(replace(bare, basins=cut.basins[:1]), "Cut off"))


def test_cells_on_a_line_are_drawn_without_what_lies_between(full: Fit, bare: Fit) -> None:
    """Nine cells whose batch rises with the learning rate: no triangles, and no regret."""
    at, law = 10.0 ** np.arange(-4, 5), full.law
    line = Basin(1e15, None, None, None, lr=1e-3 * at, batch=1e4 * at, loss=2 + at, seeds=at, band=0.0025)
    fit = replace(bare, basins=[line], law=bare.law.model_copy(update={"lr": law.lr, "batch_tokens": law.batch_tokens}))
    assert re.search(r" Law: lr \S+, batch [^ ,]+\. ", text_of(render(fit, "A line")))


def test_what_users_write_is_text(bare: Fit) -> None:
    law = bare.law.model_copy(update={"data": "<script>", "notes": {"N": "a < b"}})
    page = render(replace(bare, law=law, warnings=["lr < 1 & <b>"]), "<script>alert(1)</script>")
    assert "<script" not in page and "lr &lt; 1 &amp; &lt;b&gt;" in page and "a &lt; b" in page


def test_points_without_learning_rates_have_a_page_of_the_loss_alone() -> None:
    fit = fit_runs(chinchilla(without=0), highest=5, draws=50, hold_out=False)
    text = text_of(render(fit, "Chinchilla"))
    assert "learning rate not fitted" in text.lower() and "Not fitted: there is no grid" in text
    assert "240 runs, objective 1.01827" in text and "Left out: the 5 highest losses" in text
    assert {name for name, _ in figures(fit)} == {"allocation", "isoflop", "loss", "loss-fitted", "loss-residuals"}


def test_parts_that_are_missing_leave_a_sentence(bare: Fit, tmp_path: Path) -> None:
    text = text_of(render(bare, "Nothing"))
    assert "No warnings." in text and "No law could be fitted" in text and text.count("Not fitted: ") == 3
    assert "Held out" not in text and write_pictures(bare, tmp_path) == []


def test_pictures_are_png_files_with_the_names_of_what_they_show(full: Fit, tmp_path: Path) -> None:
    written = write_pictures(full, tmp_path / "new" / "pictures")
    names = [path.name for path in written]
    assert names[: len(BUDGETS)] == [f"basin-{n:02}-{power(c)}.png" for n, c in enumerate(BUDGETS, start=1)]
    assert {"lr.png", "batch.png", "isoflop.png", "allocation.png", "loss.png"} <= set(names)
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in written)


@pytest.mark.parametrize(("place", "said"), [("", "is a folder"), ("none/fit.html", "there is no folder .*none")])
def test_a_page_without_a_place_is_a_mistake_in_one_line(bare: Fit, tmp_path: Path, place: str, said: str) -> None:
    with pytest.raises(ScalingError, match=rf"^html = '.*': .*{said}; give the page a file's name") as error:
        write_page(bare, tmp_path / place, "A ladder")
    assert "\n" not in str(error.value)


def test_pictures_in_the_place_of_a_file_are_a_mistake_in_one_line(full: Fit, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ScalingError, match=r"^pictures = '.*taken': cannot be written \(.+\); give a folder"):
        write_pictures(full, tmp_path / "taken")


def test_the_frontier_of_dense_runs_is_the_closed_form() -> None:
    """M = 6·N in the runs, so that the best M of C is 6·N_opt of Hoffmann et al., eq. 4."""
    law = LossLaw(E=1.8, A=480, B=2100, alpha=0.35, beta=0.37)
    runs = Runs.of(loss=np.ones(9), params=np.geomspace(1e7, 1e11, 9), tokens=np.full(9, 1e10))
    inside, outside = frontier(law, runs, np.array([1e20, 1e28]), points=2000)
    best = optimum(law, 1e20)
    assert inside and inside.loss.value == pytest.approx(best.loss, rel=1e-6)
    assert inside.flops_per_token.value == pytest.approx(6 * best.params, rel=0.01)
    assert outside is None  # its best size is larger than any that was run


def test_a_law_chooses_only_where_its_variables_are_known() -> None:
    one = np.ones(1)
    basin = Basin(1e18, None, None, 1e9, lr=one, batch=one, loss=one, seeds=one, band=0.0025)
    of_tokens = choice(load_law("step-law").batch_tokens, basin)
    assert of_tokens and of_tokens.value == pytest.approx(0.58 * 1e9**0.571)
    assert choice(PowerLaw(coefficient=1, exponents={"params": 1}), basin) is None
    assert choice(None, basin) is None


def test_numbers_on_axes_are_round_and_few() -> None:
    assert ticks(1.5e13, 6e14) == [2e13, 5e13, 1e14, 2e14, 5e14]
    assert len(ticks(1e10, 1e30)) <= 7
    assert all(2 <= len(ticks(low, 1.7 * low)) <= 7 for low in np.geomspace(1e-4, 1e-3, 50))
    assert [power(x) for x in (0.00022, 0.25, 2e13, 1350, 1e-20)] == ["2.2e-4", "0.25", "2e13", "1.35e3", "0"]
    assert [amount(x) for x in (512, 20480, 999_999, 2.1e9)] == ["512", "20.5k", "1M", "2.1B"]

"""Law files: what is shipped, what is read back, what is refused; and how far from what was measured a place is."""

import json
from pathlib import Path

import numpy as np
import pytest

from train.scaling.errors import ScalingError
from train.scaling.law import LAWS, BestLoss, Family, Law, LossLaw, PowerLaw, load_law, save_law, shipped_laws


def fitted() -> Law:
    """A law as a ladder's fit writes it."""
    generator = np.random.default_rng(0)
    draws = [tuple(row) for row in (np.log(0.3), -0.125) + 0.01 * generator.standard_normal((50, 2))]
    return Law(
        name="ours",
        source="a ladder",
        lr=PowerLaw(coefficient=0.3, exponents={"flops": -0.125}, draws=tuple(draws)),
        loss=LossLaw(E=2.0, A=10.0, B=100.0, alpha=0.3, beta=0.3, draws=((2.0, 10.0, 100.0, 0.3, 0.3),)),
        best_loss=BestLoss(E=2.0, k=50.0, gamma=0.1, draws=((2.0, 50.0, 0.1), (2.1, 50.0, 0.1))),
        measured={"flops": (1e14, 1.6e15), "batch": (1024, 65536)},
        tokenizer="ab" * 32,
        family=Family(recipe={"model": {"preset": "tiny", "hidden_size": 64}, "data": {"sequence_length": 256}}),
        runs=80,
    )


@pytest.mark.parametrize("name", shipped_laws())
def test_every_shipped_law_has_the_name_of_its_file_and_says_where_it_was_measured(name: str) -> None:
    law = load_law(name)
    assert law.name == name and law.source and law.measured


@pytest.mark.parametrize("name", ["chinchilla", "deepseek-llm", "ling-moe", "step-law"])
def test_a_published_law_comes_with_its_definitions(name: str) -> None:
    assert load_law(name).notes


def test_the_hash_of_a_law_is_of_what_it_says_and_not_of_how_its_file_is_laid_out(tmp_path: Path) -> None:
    law, path = fitted(), tmp_path / "law.json"
    path.write_text(json.dumps(dict(reversed(law.model_dump(mode="json").items()))))
    assert load_law(path).hash == law.hash != law.model_copy(update={"runs": 81}).hash


@pytest.mark.parametrize(
    ("name", "at", "lr", "batch", "used_lr", "used_batch"),
    [
        # DeepSeek LLM table 2: 7B is 8.46e22 FLOPs by M·D, 2,304 sequences of 4,096 and 4.2e-4
        ("deepseek-llm", {"flops": 8.46e22}, 4.25e-4, 9.22e6, 4.2e-4, 2304 * 4096),
        # Ling table 7: 8 layers of 384, at 2e18 FLOPs
        ("ling-moe", {"flops": 2e18}, 1.84e-3, 79 * 4096, 1.52e-3, 98 * 4096),
    ],
)
def test_a_shipped_law_gives_what_its_paper_used(
    name: str, at: dict[str, float], lr: float, batch: float, used_lr: float, used_batch: float
) -> None:
    law = load_law(name)
    assert law.lr and law.batch_tokens
    assert law.lr(**at) == pytest.approx(lr, rel=0.01) and law.batch_tokens(**at) == pytest.approx(batch, rel=0.01)
    assert law.lr(**at) == pytest.approx(used_lr, rel=0.25) and law.batch_tokens(**at) == pytest.approx(
        used_batch, rel=0.25
    )


@pytest.mark.parametrize("name", ["deepseek-llm", "ling-moe"])
def test_an_allocation_spends_its_budget(name: str) -> None:
    law = load_law(name)
    assert law.flops_per_token and law.tokens
    for flops in (1e17, 1e20, 1e23):
        assert law.flops_per_token(flops=flops) * law.tokens(flops=flops) == pytest.approx(flops, rel=1e-3)


def test_a_law_that_was_written_is_read_back_equal_with_a_row_of_numbers_on_a_line(tmp_path: Path) -> None:
    path = tmp_path / "law.json"
    save_law(fitted(), path)
    assert load_law(path) == load_law(str(path)) == fitted()
    assert '"batch": [1024.0, 65536.0]' in path.read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["law.json"]


@pytest.mark.parametrize("name", ["chinchilla", "deepseek-llm", "ling-moe", "step-law"])
def test_a_shipped_file_is_as_the_code_would_write_it(name: str, tmp_path: Path) -> None:
    save_law(load_law(name), tmp_path / "law.json")
    assert (tmp_path / "law.json").read_text() == (LAWS / f"{name}.json").read_text()


def test_distance_is_in_decades_outside_of_what_was_measured() -> None:
    law = fitted()
    assert law.distance(flops=1e14) == law.distance(flops=1e15) == law.distance(tokens=1.0) == 0.0
    assert law.distance(flops=1e12) == pytest.approx(2)
    assert law.distance(flops=1.6e16, batch=2**19) == pytest.approx(1)  # of 1 and 0.9 decades
    assert law.distances(flops=1e12, batch=2048, params=1.0) == pytest.approx({"flops": 2, "batch": 0})


def test_draws_make_the_interval_of_an_estimate() -> None:
    law = fitted()
    assert law.lr and law.best_loss
    estimate = law.lr.estimate(flops=1e15)
    assert law.lr.estimate(flops=10**15) == estimate and law.lr.estimate(flops=10**25).low is not None  # beyond 64 bits
    assert estimate.low is not None and estimate.low < estimate.value < (estimate.high or 0)
    best = law.best_loss.estimate(1e10)  # 2 + 50 · 0.1 = 7, and 7.1 by the other draw
    assert (best.value, best.low, best.high) == pytest.approx((7, 7, 7.1))  # two draws know no more than their ends


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"version": 2}, "version = 2: must be 1, the only one that this code reads; fit the law again"),
        ({"version": None}, "version = None: must be 1"),
        ({"lr": {"coefficient": -1, "exponents": {"flops": 1}}}, "lr.coefficient = -1: "),
        ({"lr": {"coefficient": float("nan"), "exponents": {"flops": 1}}}, "lr.coefficient = nan: "),
        ({"lr": {"coefficient": 1, "exponents": {"width": 1}}}, "lr.exponents.width"),
        ({"lr": {"coefficient": 1, "exponents": {"flops": 1}, "draws": [[1]]}}, "draws must be rows of 2 numbers"),
        ({"tokens": {"coefficient": 1, "exponents": {"params": 1}}}, "tokens must be a power law of flops alone"),
        ({"measured": {"flops": [2, 1]}}, "measured.flops must be lowest and highest"),
        ({"learning_rate": 1}, "learning_rate = 1: unknown key; leave it out"),
        ({"lr": {"exponents": {"flops": 1}}}, "lr.coefficient: missing; give a law.json"),
    ],
)
def test_a_file_that_is_no_law_is_refused_in_one_line(tmp_path: Path, change: dict[str, object], line: str) -> None:
    path = tmp_path / "law.json"
    path.write_text(json.dumps({"version": 1, "name": "a", "source": "b", **change}))
    with pytest.raises(ScalingError) as caught:
        load_law(path)
    said = str(caught.value)
    assert said.startswith(f"law = '{path}': ") and line in said and "\n" not in said


def test_a_file_without_a_version_is_no_law(tmp_path: Path) -> None:
    path = tmp_path / "law.json"
    path.write_text(json.dumps({"name": "a", "source": "b"}))
    with pytest.raises(ScalingError, match=r"version: missing, so that it is no law; give a law.json"):
        load_law(path)


def test_a_law_is_not_written_where_no_file_can_be(tmp_path: Path) -> None:
    for place, rule in ((tmp_path, "is a folder"), (tmp_path / "none" / "law.json", "there is no folder")):
        with pytest.raises(ScalingError, match=f"^out = '{place}': {rule}.*; "):
            save_law(fitted(), place)
    with pytest.raises(ScalingError, match=r"^out = '/proc/law.json': cannot be written \(.*; give another place$"):
        save_law(fitted(), "/proc/law.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"[" * 100_000])
def test_a_file_of_anything_else_is_refused_too(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "law.json"
    path.write_bytes(content)
    with pytest.raises(ScalingError, match=r"^law = .*give a law.json"):
        load_law(path)


def test_a_law_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(
        ScalingError, match=r"^law = 'deepseek': must be a file or one of .*; did you mean deepseek-llm\?$"
    ):
        load_law("deepseek")

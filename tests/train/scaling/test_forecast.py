"""A budget in, a run out: the law's allocation is kept, the whole cost is told, and the recipe can be trained as it is."""

from pathlib import Path
from typing import Any

import pytest

from data.store import Store
from model.flops import flops_mfu, flops_scaling, flops_training
from tests.small_run import LENGTH, Run
from train.cli import main
from train.config import load_recipe
from train.planning.advice import law_in_words
from train.scaling.errors import ScalingError
from train.scaling.forecast import forecast, gpu_hours
from train.scaling.law import BestLoss, Family, Law, LossLaw, PowerLaw, load_law
from train.scaling.recipes import recipe_of, run_of, template_of
from train.schedule import Schedule

POWER = {"lr": (0.5, -0.15), "batch_tokens": (0.05, 0.33), "flops_per_token": (0.3, 0.5)}

COMMON: dict[str, Any] = {
    "model": {"preset": "tiny", "vocab_size": 512},
    "data": {"train": "stores/ladder", "sequence_length": 128},
    "optimizer": {"weight_decay": 0.05},
    "schedule": {"shape": "wsd", "gamma": 0.002, "alpha": 0.0003, "lambda": [[0, 0.3], [5e11, 0.1]]},
    "evaluate": {"tokens": 4096},
}


def ours(**changes: Any) -> Law:
    """A law of models of some 10^5 parameters at contexts of 128, with everything in it."""
    laws = {name: PowerLaw(coefficient=k, exponents={"flops": a}) for name, (k, a) in POWER.items()}
    values: dict[str, Any] = {
        "name": "ours",
        "source": "a ladder",
        "measured": {"flops": (1e12, 1.6e13)},
        "tokenizer": "ab" * 32,
        "family": Family(recipe=COMMON),
        **laws,
    }
    return Law.model_validate(values | changes)


def test_deepseek_llms_allocation_of_1e20_flops() -> None:
    # M = 0.1715 · C^0.5243 = 5.25e9, D = 5.8316 · C^0.4757 = 1.905e10
    # lr = 0.3118 · C^-0.125 = 9.86e-4, batch = 0.292 · C^0.3271 = 1.017e6
    found = forecast(load_law("deepseek-llm"), flops=1e20)
    assert found.best_flops_per_token and found.best_tokens
    assert found.best_flops_per_token.value == pytest.approx(5.25e9, rel=1e-3)
    assert found.best_tokens.value == pytest.approx(1.905e10, rel=1e-3)
    assert (found.lr.value, found.batch_tokens.value) == pytest.approx((9.86e-4, 1.0171e6), rel=1e-3)
    assert found.size.flops_per_token == pytest.approx(5.25e9, rel=0.1)  # the nearest member of the family
    assert found.size.flops_per_token * found.tokens == pytest.approx(1e20)  # whose tokens keep the budget
    assert found.loss is None and any("has no loss" in warning for warning in found.warnings)
    assert found.distance == pytest.approx(0.699, abs=1e-3)  # measured to 2e19


def test_the_whole_cost_stands_beside_c() -> None:
    found = forecast(load_law("deepseek-llm"), flops=1e18)
    assert found.flops == pytest.approx(1e18)
    assert found.flops == pytest.approx(flops_scaling(found.model, 2048) * found.tokens)
    assert found.all_flops == pytest.approx(flops_training(found.model, 2048) * found.tokens) and found.all_flops > 1e18


def test_gpu_hours_pay_for_head_and_mtp_too() -> None:
    # 100 hours at 989.4e12 FLOP/s and an MFU of 0.4: 1.4247e20 FLOPs
    budget = gpu_hours("h200", 100)
    assert budget == pytest.approx(1.4247e20, rel=1e-3)
    found = forecast(load_law("deepseek-llm"), device_flops=budget)
    assert flops_mfu(found.model, 2048) * found.tokens == pytest.approx(budget)
    assert found.flops < budget
    assert found.best_flops_per_token and found.size.flops_per_token == pytest.approx(
        found.best_flops_per_token.value, rel=0.1
    )


def test_a_law_of_the_loss_alone_divides_a_budget_in_closed_form_and_takes_step_laws_rates() -> None:
    # Hoffmann's 70B by 1.4T tokens, 5.88e23 FLOPs: the re-fit agrees about the allocation.
    found = forecast(load_law("chinchilla"), flops=5.88e23)
    assert found.best_flops_per_token and found.best_tokens
    assert found.best_flops_per_token.value / 6 == pytest.approx(7.4e10, rel=0.02)
    assert found.best_flops_per_token.value * found.best_tokens.value == pytest.approx(5.88e23)
    assert 6 * found.size.active * found.tokens == pytest.approx(5.88e23)
    assert found.loss and 1.96 < found.loss.value < 1.99
    assert (found.lr_law.name, found.batch_law.name) == ("step-law", "step-law")
    assert recipe_of(found, law="laws/chinchilla.json").schedule.law == "step-law"
    assert "law chinchilla has no learning rate and no batch: taken from step-law" in found.warnings
    assert set(found.distances) == {"chinchilla", "step-law"}
    assert found.distance == max(max(of.values()) for of in found.distances.values()) > 0
    assert any("another text has another" in warning for warning in found.warnings)


def test_params_and_tokens_are_taken_as_they_are() -> None:
    found = forecast(load_law("step-law"), params=1e9, tokens=2e10)
    assert found.size.params == pytest.approx(1e9, rel=0.1) and found.tokens == 2e10
    assert found.lr.value == pytest.approx(1.79 * found.size.params**-0.713 * 2e10**0.307)
    assert found.distance == 0 and found.best_tokens is None


def test_draws_give_every_forecast_its_interval() -> None:
    loss = LossLaw(E=2, A=40, B=400, alpha=0.3, beta=0.3, size="active")
    drawn = [(2.0, 40 * f, 400 / f, 0.3, 0.3) for f in (0.8, 0.9, 1.0, 1.1, 1.25)]
    law = ours(flops_per_token=None, loss=loss.model_copy(update={"draws": tuple(drawn)}))
    found = forecast(law, flops=1e13)
    for estimate in (found.best_flops_per_token, found.best_tokens, found.loss):
        assert estimate and estimate.low and estimate.high
        assert estimate.low < estimate.value < estimate.high


def test_two_forecasts_of_the_loss_that_disagree_are_both_told() -> None:
    loss = LossLaw(E=2, A=40, B=400, alpha=0.3, beta=0.3, draws=((2.0, 40, 400, 0.3, 0.3), (2.01, 40, 400, 0.3, 0.3)))
    value = forecast(ours(loss=loss), flops=1e13).loss
    assert value
    draws = ((1.0, 1.0, 0.1), (1.01, 1.0, 0.1))
    found = forecast(ours(loss=loss, best_loss=BestLoss(E=1, k=1, gamma=0.1, draws=draws)), flops=1e13)
    assert any("two forecasts of the loss disagree" in warning for warning in found.warnings)
    assert not any("disagree" in warning for warning in forecast(ours(loss=loss), flops=1e13).warnings)


def test_the_template_is_the_laws_own_family() -> None:
    recipe = template_of(ours())
    assert (recipe.model_config_resolved().vocab_size, recipe.data.sequence_length) == (512, 128)
    assert (recipe.schedule.shape, recipe.evaluate.tokens, recipe.optimizer.weight_decay) == ("wsd", 4096, 0.05)
    assert template_of(load_law("step-law")) == load_recipe("small")


def test_the_recipe_of_a_forecast_is_the_forecast() -> None:
    found = forecast(ours(), flops=1e13)
    recipe = recipe_of(found, law="ladder/law.json")
    assert recipe.model_config_resolved() == found.model
    schedule = recipe.schedule
    assert isinstance(schedule.batch_tokens, int)
    assert schedule.tokens == pytest.approx(found.tokens, rel=0.01) and schedule.tokens % schedule.batch_tokens == 0
    assert schedule.lr == pytest.approx(found.lr.value, rel=1e-3)
    assert 0.7 < schedule.batch_tokens / found.batch_tokens.value < 1.42
    assert schedule.warmup_steps <= Schedule(schedule, recipe.data.lengths).total_steps / 10
    assert (schedule.shape, schedule.gamma, schedule.alpha) == ("wsd", 0.002, 0.0003)
    assert schedule.lambda_ == ((0, 0.3), (schedule.tokens // 2, 0.1))  # half way, as in the law's own runs
    assert recipe.evaluate == template_of(ours()).evaluate and recipe.optimizer == template_of(ours()).optimizer
    assert schedule.law == "ladder/law.json" and recipe.run.dir == "runs/ours-1e13"
    used = run_of(recipe)
    assert used["steps"] * used["batch_tokens"] == used["tokens"] == schedule.tokens and used["lr"] == schedule.lr


def test_positions_of_a_laws_curves_move_from_the_tokens_that_its_recipe_has() -> None:
    schedule = {**COMMON["schedule"], "tokens": 2e9, "gamma": [[0, 0.001], [1.5e9, 0.0]], "lambda": 0}
    made = recipe_of(forecast(ours(family=Family(recipe={**COMMON, "schedule": schedule})), flops=1e13)).schedule
    assert made.gamma == ((0, 0.001), (made.tokens * 3 // 4, 0.0))


def test_the_warm_up_keeps_its_share_of_the_middle_of_the_laws_runs() -> None:
    measured = {"flops": (1e12, 1.6e13), "tokens": (1e6, 4e6)}  # 2e6 in the middle
    law = ours(measured=measured, family=Family(recipe=COMMON, warmup_tokens=100_000))
    recipe = recipe_of(forecast(law, flops=1e13))
    assert recipe.schedule.warmup_steps == round(0.05 * run_of(recipe)["steps"])
    theirs = recipe_of(forecast(law, flops=1e13, template=load_recipe("tiny")))  # another recipe's is its own
    assert theirs.schedule.warmup_steps == min(
        load_recipe("tiny").schedule.warmup_steps, max(1, run_of(theirs)["steps"] // 10)
    )


def test_the_law_of_our_ladder_is_trained_by_as_it_was_measured() -> None:
    recipe = recipe_of(forecast(load_law("ladder-cpu"), flops=1e13))
    schedule = recipe.schedule
    assert (schedule.shape, schedule.gamma, schedule.alpha, schedule.lambda_) == ("wsd", 0.001, 1e-4, 0)
    assert (recipe.evaluate.tokens, recipe.evaluate.sample_prompts) == (131072, ())
    assert recipe.data.train[0].path == "stores/ladder" and recipe.run.dir == "runs/ladder-cpu-1e13"


def test_a_store_that_is_not_here_is_warned_of_with_what_to_give(tiny_store: Store) -> None:
    said = [line for line in forecast(ours(data="ladder: code"), flops=1e13).warnings if "no token store" in line]
    assert len(said) == 1 and "stores/ladder, the text of law ours (ladder: code)" in said[0]
    assert "data.train=STORE" in said[0] and "--recipe" in said[0]
    base = load_recipe("tiny", [f"data.train={tiny_store.path}"])
    assert not any("no token store" in line for line in forecast(ours(), flops=1e13, template=base).warnings)


def test_a_law_whose_recipe_is_none_is_refused_in_one_line() -> None:
    with pytest.raises(
        ScalingError, match=r"^law = 'ours': family.recipe: optimiser = .*unknown key.*give the forecast"
    ):
        template_of(ours(family=Family(recipe={**COMMON, "optimiser": 1})))


def test_a_size_that_the_family_has_not_is_named_beside_what_was_asked() -> None:
    found = forecast(load_law("ladder-cpu"), params=1, tokens=1e5)
    assert any(line.startswith("params = 1: the nearest model of the family has N = 3840") for line in found.warnings)
    near = forecast(load_law("ladder-cpu"), params=found.size.params, tokens=1e6)
    assert not any(line.startswith("params = ") for line in near.warnings)
    small = forecast(load_law("ladder-cpu"), flops=1e8)  # below the smallest model
    assert any("does not divide its budget" in line and "(width 8) has 7.72e+04" in line for line in small.warnings)


def test_a_law_whose_interval_spans_everything_does_not_tell_a_size() -> None:
    loss = LossLaw(E=2, A=40, B=400, alpha=0.3, beta=0.3, size="active")

    def told(*draws: tuple[float, ...]) -> bool:
        law = ours(flops_per_token=None, loss=loss.model_copy(update={"draws": draws}))
        return not any("does not tell the size" in line for line in forecast(law, flops=1e13).warnings)

    assert told(*((2.0, 40 * f, 400 / f, 0.3, 0.3) for f in (0.8, 1.0, 1.25)))
    assert not told(*((2.0, 40 * f, 400 / f, 0.3, 0.3) for f in (0.02, 1.0, 50.0)))
    assert not told((2.0, 40, 400, 0.3, 0.3), (2.0, 0.0, 400, 0.3, 0.3))  # a half of them has no best division


@pytest.mark.parametrize("exponents", [(20.0, 0.3), (0.3, 20.0), (1e-3, 0.3)])
def test_an_exponent_at_the_end_of_the_search_does_not_tell_a_size(exponents: tuple[float, float]) -> None:
    loss = LossLaw(E=2, A=40, B=400, alpha=exponents[0], beta=exponents[1], size="active")
    found = forecast(ours(flops_per_token=None, loss=loss), params=1e5, tokens=1e7)
    assert any("does not tell the size: alpha = " in line and "inside 0.03 to 2;" in line for line in found.warnings)


def test_a_law_that_divides_no_budget_still_answers_for_a_size_that_is_given() -> None:
    flat = ours(flops_per_token=None, loss=LossLaw(E=2, A=0, B=400, alpha=0.3, beta=0.3))
    found = forecast(flat, params=1e5, tokens=1e7)
    assert found.best_tokens is None and any("has no minimum on a budget: A = 0" in line for line in found.warnings)
    steep = ours(flops_per_token=PowerLaw(coefficient=1e9, exponents={"flops": 1}))
    with pytest.raises(
        ScalingError, match=r"its best model for C = 1e\+13 has 1e\+22 FLOPs per token, which is no run; give"
    ):
        forecast(steep, flops=1e13)


def test_a_law_without_a_learning_rate_keeps_its_own_batch() -> None:
    found = forecast(ours(lr=None), flops=1e13)
    assert found.batch_tokens == forecast(ours(), flops=1e13).batch_tokens
    assert (found.lr_law.name, found.batch_law.name) == ("step-law", "ours")
    assert "law ours has no learning rate: taken from step-law" in found.warnings
    assert set(found.distances) == {"ours", "step-law"} and found.distance == max(found.distances["step-law"].values())
    schedule = recipe_of(found).schedule
    assert schedule.law == "ours" and schedule.from_law and set(schedule.from_law.numbers) == {"batch_tokens"}


def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["scaling", "forecast", "no-such-law", "--flops", "1e13", "--out"]
    for place, rule in (
        (tmp_path, "is a folder"),
        (tmp_path / "none/a.yaml", "there is no folder"),
        ("/proc/a", "cannot be"),
    ):
        assert main([*command, str(place)]) == 2
        said = capsys.readouterr().err
        assert f"out = '{place}': {rule}" in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_what_the_run_will_use_and_where_its_recipe_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "forecast.yaml"
    assert main(["scaling", "forecast", "ladder-cpu", "--flops", "1e13", "--out", str(path)]) == 0
    said, schedule = capsys.readouterr().out, load_recipe(path).schedule
    assert f"{schedule.tokens:,} in {schedule.tokens // schedule.batch_tokens:,} steps" in said  # type: ignore[operator]
    assert f"{schedule.batch_tokens:,} tokens" in said and f"{schedule.lr:.4g}\n" in said
    assert "M of the best allocation at C" in said and "decades (factors of 10) outside of what law ladder-cpu" in said
    assert said.endswith(f"written to {path}\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--flops", "1e12", "--mfu", "0.3"], "mfu = 0.3: goes with gpu_hours and device; "),
        (["--tokens", "1e6"], "tokens = 1e+06: is no budget without params; "),
        (["--gpu-hours", "10"], "gpu_hours, device: go together; "),
    ],
)
def test_options_that_do_not_go_alone_are_refused(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scaling", "forecast", "ladder-cpu", *arguments]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1


def test_a_forecasts_recipe_says_the_same_of_its_law(tmp_path: Path) -> None:
    recipe = recipe_of(forecast(load_law("ling-moe"), flops=1e18))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    again = load_recipe(tmp_path / "recipe.yaml", ["schedule.lr=auto", "schedule.batch_tokens=auto"])
    assert again == recipe
    assert law_in_words(again)[0].startswith("law ling-moe")


def train_a_file(_: list[str], path: Path) -> int:
    return main(["train", str(path)])


def test_the_recipe_of_a_forecast_trains_to_its_end(tiny_store: Store, tmp_path: Path) -> None:
    """The smallest of models for 2,048 tokens: size, batch and learning rate are the law's, and so is what the run has done."""
    run = Run(tiny_store, tmp_path / "run")
    base = load_recipe("tiny", run.arguments("parallel.micro_batch=2")[1:])
    rate = flops_scaling(base.model_config_resolved(), LENGTH)
    law = ours(
        flops_per_token=PowerLaw(coefficient=rate, exponents={"flops": 0}),
        batch_tokens=PowerLaw(coefficient=4 * LENGTH, exponents={"flops": 0}),
        lr=PowerLaw(coefficient=5e-3, exponents={"flops": 0}),
    )
    found = forecast(law, flops=2048 * rate, template=base)
    recipe = recipe_of(found)
    assert recipe.schedule.from_law and recipe.schedule.from_law.hash == law.hash
    assert recipe.schedule.from_law.numbers == {"lr": 5e-3, "batch_tokens": 4 * LENGTH}
    (tmp_path / "forecast.yaml").write_text(recipe.to_yaml())
    assert run.start(work=train_a_file, extra=(tmp_path / "forecast.yaml",)).wait() == [0], run.said
    run.folder = Path(recipe.run.dir)
    lines, record = run.metrics(), run.record(16)
    assert len(lines) == 16 and lines[-1]["tokens"] == found.tokens == 2048
    assert lines[4]["lr"] == pytest.approx(5e-3) and {line["batch_tokens"] for line in lines} == {128}
    assert (record["law"], record["law_hash"]) == ("ours", law.hash)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_store_cut_by_another_tokenizer_is_warned_of(tiny_store: Store) -> None:
    base = load_recipe("tiny", [f"data.train={tiny_store.path}"])
    found = forecast(ours(), flops=1e13, template=base)
    assert any("another tokenizer cut (abababababab…" in warning for warning in found.warnings)
    own = ours(tokenizer=tiny_store.manifest.tokenizer_fingerprint)
    assert not any("another tokenizer" in warning for warning in forecast(own, flops=1e13, template=base).warnings)


@pytest.mark.parametrize(
    ("budget", "line"),
    [
        ({}, "forecast of nothing: must have one budget; give flops, or GPU hours and a device, or params together with tokens"),
        ({"flops": 1e20, "tokens": 1e9}, "forecast of flops, tokens: must have one budget"),
        ({"params": 1e9}, "params = 1e+09: is no budget without tokens; give it too, for example tokens=2e10"),
        ({"flops": -1.0}, "flops = -1: must be more than 0 and at most 1e+28; write it like 1e20"),
        ({"flops": float("nan")}, "flops = nan: must be more than 0"),
        ({"flops": 1e40}, "flops = 1e+40: must be more than 0 and at most 1e+28"),
        ({"flops": 1.0}, "tokens = "),
    ],
)  # fmt: skip
def test_a_budget_that_is_none_is_refused_in_one_line(budget: dict[str, Any], line: str) -> None:
    with pytest.raises(ScalingError) as caught:
        forecast(load_law("deepseek-llm"), **budget)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_what_a_law_lacks_for_a_budget_is_named() -> None:
    with pytest.raises(
        ScalingError,
        match=r"^law = 'step-law': has neither an allocation .* give params and tokens, or use another law",
    ):
        forecast(load_law("step-law"), flops=1e20)
    flat = LossLaw(E=2, A=0, B=400, alpha=0.3, beta=0.3)
    with pytest.raises(
        ScalingError, match=r"^law = 'ours': its L\(N, D\) has no minimum on a budget: A = 0, .* fit it to runs of more"
    ):
        forecast(ours(flops_per_token=None, loss=flat), flops=1e13)
    with pytest.raises(ScalingError, match=r"^mfu = 40: must be in \(0, 1\]; give for example 0.4"):
        gpu_hours("h200", 10, 40)
    with pytest.raises(ScalingError, match=r"^gpu_hours = 0: must be more than 0"):
        gpu_hours("h200", 0)

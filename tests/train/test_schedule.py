"""The published schedules, reproduced number by number."""

import itertools
import math

import pytest

from train.config import RecipeError, load_recipe
from train.planning.advice import law_in_words
from train.planning.shown.plot import plot_schedule
from train.published import PUBLISHED, ramp
from train.schedule import Schedule, Span, cosine, spans, wsd
from train.sections import ScheduleSection

T = 10**12
B = 10**9


def schedule(sequence_length: int = 4096, **section) -> Schedule:
    return Schedule(ScheduleSection(**section), sequence_length)


def small(**section) -> Schedule:
    """100 sequences of 8 tokens, in batches of 2 sequences: 50 steps."""
    return schedule(
        8, **{"tokens": 800, "lr": 1.0, "batch_tokens": 16, "warmup_steps": 4, "shape": "cosine", **section}
    )


@pytest.mark.parametrize(
    ("tokens", "lr"),
    [
        (0, 2.2e-4 / 2000),  # the first of 2,000 warm-up steps
        (
            999 * 3072 * 4096,
            1.1e-4,
        ),  # step 1,000 of 2,000: half; the ramp's first stage of 39B tokens holds 3,107 steps
        (1999 * 3072 * 4096, 2.2e-4),
        (5 * T, 2.2e-4),
        (10 * T, 2.2e-4),
        (12_150 * B, 1.21e-4),  # half of the 4.3T of cosine: (2.2e-4 + 2.2e-5) / 2
        (14_300 * B, 2.2e-5),
        (14_632 * B, 2.2e-5),
        (14_633 * B, 7.3e-6),  # 14.8T less the last 167B
        (14_799 * B, 7.3e-6),
    ],
)
def test_deepseek_v3_has_the_learning_rate_of_its_report(tokens, lr):
    assert schedule(preset="deepseek-v3").settings(tokens).lr == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize(
    ("tokens", "gamma", "lambda_", "batch"),
    [
        (0, 0.001, 0.3, 3072),
        (10 * T - 1, 0.001, 0.3, 15360),
        (10 * T, 0.001, 0.1, 15360),
        (14_300 * B - 1, 0.001, 0.1, 15360),
        (14_300 * B, 0.0, 0.1, 15360),  # 500B before the end
    ],
)
def test_deepseek_v3_has_the_balancing_and_mtp_weights_of_its_report(tokens, gamma, lambda_, batch):
    settings = schedule(preset="deepseek-v3").settings(tokens)
    assert (settings.gamma, settings.alpha, settings.lambda_, settings.batch) == (gamma, 1e-4, lambda_, batch)


def test_deepseek_v3_batch_grows_in_twelve_equal_stages_to_469_billion_tokens():
    run = schedule(preset="deepseek-v3")
    assert run.batches() == list(range(3072, 15361, 1024))
    assert run.settings(469 * B - 1).batch == 14336
    assert run.settings(469 * B).batch == 15360
    assert run.settings(469 * B // 2).batch == 9216  # halfway: (3072 + 15360) / 2


def test_a_ramp_names_every_stage_in_tokens():
    # (12 - 6) / 2 = 3 stages of 100 tokens, each 2 sequences more
    assert ramp(6, 12, over=300) == [[0, 6 * 4096], [100, 8 * 4096], [200, 10 * 4096], [300, 12 * 4096]]


@pytest.mark.parametrize(
    ("preset", "tokens", "lr", "batch"),
    [
        ("deepseek-v2", 4_859 * B, 2.4e-4, 9216),
        ("deepseek-v2", 4_860 * B, 2.4e-4 * 0.316, 9216),  # 60 % of 8.1T
        ("deepseek-v2", 7_289 * B, 2.4e-4 * 0.316, 9216),
        ("deepseek-v2", 7_290 * B, 2.4e-4 * 0.316 * 0.316, 9216),  # 90 %
        ("deepseek-v2-lite", 4_559 * B, 4.2e-4, 4608),
        ("deepseek-v2-lite", 4_560 * B, 4.2e-4 * 0.316, 4608),  # 80 % of 5.7T
        ("deepseek-v2-lite", 5_130 * B, 4.2e-4 * 0.316 * 0.316, 4608),
        ("deepseek-llm-7b", 1_599 * B, 4.2e-4, 2304),
        ("deepseek-llm-7b", 1_600 * B, 4.2e-4 * 0.316, 2304),  # 80 % of 2.0T
        ("deepseek-llm-7b", 1_800 * B, 4.2e-5, 2304),  # 90 %
        ("deepseek-llm-67b", 1_600 * B, 3.2e-4 * 0.316, 4608),
        ("deepseek-llm-67b", 1_999 * B, 3.2e-5, 4608),
    ],
)
def test_multistep_models_drop_where_their_papers_say(preset, tokens, lr, batch):
    settings = schedule(preset=preset).settings(tokens)
    assert settings.lr == pytest.approx(lr, rel=1e-12)
    assert settings.batch == batch


def test_deepseek_v2_batch_grows_from_2304_to_9216_over_225_billion_tokens():
    run = schedule(preset="deepseek-v2")
    assert run.batches() == list(range(2304, 9217, 768))
    assert (run.settings(0).batch, run.settings(225 * B - 1).batch, run.settings(225 * B).batch) == (2304, 8448, 9216)


def test_a_preset_moves_in_proportion_to_another_number_of_tokens():
    run = schedule(preset="deepseek-v3", tokens=148 * B)  # a hundredth
    assert run.settings(100 * B - 1).lambda_ == 0.3
    assert run.settings(100 * B).lambda_ == 0.1
    assert run.settings(143 * B).gamma == 0.0
    assert run.settings(4_690_000_000).batch == 15360
    assert run.settings(143 * B).lr == pytest.approx(2.2e-5)


def test_keys_beside_a_preset_win():
    section = ScheduleSection(preset="deepseek-v2", lr=1e-4, shape="cosine", gamma=None)
    assert (section.lr, section.warmup_steps, section.milestones) == (1e-4, 2000, None)
    assert section.gamma == ((0, 0.001), (8_100 * B * 143 // 148, 0.0))  # null is DeepSeek-V3's, in proportion
    assert section.alpha == 0.003


def test_without_a_preset_gamma_alpha_and_lambda_are_deepseek_v3s_in_proportion():
    section = ScheduleSection(tokens=1480, lr=1.0, batch_tokens=16)
    assert section.gamma == ((0, 0.001), (1430, 0.0))
    assert section.alpha == 1e-4
    assert section.lambda_ == ((0, 0.3), (1000, 0.1))


def test_warm_up_starts_above_zero_and_reaches_the_peak_at_its_last_step():
    run = small(shape="wsd")
    # 16 tokens a step, 4 steps: 1/4, 2/4, 3/4, 4/4
    assert [run.settings(16 * step).lr for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_warm_up_in_steps_is_exact_under_a_growing_batch():
    # Steps start at 0, 16, 32 | 48, 80, 112 …: three of 16 tokens, since the stage at 40 begins with the next whole
    # step, then 32 each.
    run = small(shape="wsd", batch_tokens=[[0, 16], [40, 32]], warmup_steps=5)
    taken = [(step.settings.batch, step.settings.lr) for step in itertools.islice(run.steps(), 6)]
    assert taken == [(2, 0.2), (2, 0.4), (2, pytest.approx(0.6)), (4, 0.8), (4, 1.0), (4, 1.0)]


def test_while_the_batch_grows_the_learning_rate_goes_with_a_power_of_it():
    # Batches of 16, 32 and 64 tokens, the last at the peak: √¼, √½, 1; the warm-up multiplies.
    grows = {"shape": "wsd", "batch_tokens": [[0, 16], [160, 32], [320, 64]], "lr": 1.0}
    run = small(**grows, warmup_steps=2, lr_batch_exponent=0.5)
    rates = [run.settings(tokens).lr for tokens in (0, 16, 159, 160, 319, 320, 700)]
    assert rates == pytest.approx([0.25, 0.5, 0.5, 0.5**0.5, 0.5**0.5, 1.0, 1.0])
    assert small(**grows, warmup_steps=0).settings(0).lr == 1.0  # published ramps leave it


def test_no_warm_up_means_the_peak_at_once():
    assert small(shape="wsd", warmup_steps=0).settings(0).lr == 1.0


def test_the_run_ends_with_the_first_whole_batch_that_reaches_its_tokens():
    # 100 tokens in batches of 16: 6 steps make 96, so a seventh is needed and 112 are consumed.
    run = small(tokens=100)
    steps = list(run.steps())
    assert (run.total_steps, run.final_tokens, len(steps)) == (7, 112, 7)
    assert [step.first_sample for step in steps] == [0, 2, 4, 6, 8, 10, 12]
    assert small(tokens=96).total_steps == 6


def test_counted_steps_are_the_steps_that_are_walked():
    run = small(tokens=997, batch_tokens=[[0, 8], [50, 24], [60, 104], [100, 40], [500, 16]], lr=0.1)
    walked = list(run.steps())
    assert len(walked) == run.total_steps
    assert sorted({step.settings.batch for step in walked}) == run.batches()
    assert [run.step_at(step.first_sample * 8) for step in walked] == list(range(len(walked)))
    assert walked[-1].first_sample * 8 + walked[-1].settings.batch * 8 == run.final_tokens


def test_a_stage_that_the_batch_before_it_steps_over_has_no_steps():
    # The third batch of 40 ends at 120, beyond the stage from 100 to 110.
    assert spans(((0, 40), (100, 8), (110, 16)), ((0, 8),), 152) == [Span(0, 0, 3, 40, 8), Span(120, 3, 2, 16, 8)]


def test_steps_from_the_middle_are_the_rest_of_the_steps():
    run = small(batch_tokens=[[0, 16], [400, 32]])
    every = list(run.steps())
    for done in (0, 10, 25, 30, run.total_steps - 1):
        assert list(run.steps(every[done].first_token, every[done].first_sample)) == every[done:]
    assert list(run.steps(run.final_tokens)) == []


def test_a_stage_of_the_data_begins_with_the_first_step_at_or_after_it():
    # Batches of 16 tokens, from 100 tokens on of 32: windows of 8 until 40 tokens, then of 16; the step at 32 ends at 48.
    run = Schedule(small(batch_tokens=[[0, 16], [100, 32]]).config, ((0, 8), (40, 16), (60, 16)))
    steps = list(run.steps())
    assert [(step.first_token, step.sequence_length, step.settings.batch) for step in steps[:9]] == [
        *((0, 8, 2), (16, 8, 2), (32, 8, 2), (48, 16, 1), (64, 16, 1), (80, 16, 1), (96, 16, 1), (112, 16, 2), (144, 16, 2)),
    ]  # fmt: skip
    assert [step.first_sample for step in steps[:9]] == [0, 2, 4, 6, 7, 8, 9, 10, 12]
    assert [(span.first_token, span.sequence_length, span.sequences) for span in run.spans] == [
        *((0, 8, 2), (48, 16, 1), (64, 16, 1), (112, 16, 2)),
    ]  # fmt: skip
    assert len(steps) == run.total_steps and steps[-1].first_token + steps[-1].tokens == run.final_tokens
    assert run.batches() == [1, 2]
    for done in (2, 3, 7, len(steps) - 1):
        assert list(run.steps(steps[done].first_token, steps[done].first_sample)) == steps[done:]
        assert run.step_at(steps[done].first_token) == done
        rest = run.spans_from(steps[done].first_token)
        assert rest[0].first_token == steps[done].first_token and rest[-1].end == run.final_tokens


def test_settings_do_not_depend_on_how_a_place_was_reached():
    # A run resumed with another batch may stand between the steps of its new schedule.
    run = small(warmup_steps=10)
    assert run.step_at(24) == 1.5
    assert run.settings(16).lr < run.settings(24).lr < run.settings(32).lr


def test_fifteen_trillion_tokens_are_counted_without_walking():
    run = schedule(preset="deepseek-v3")
    # 14.331T tokens after the ramp are 14.331e12 / (15360 · 4096) = 227,785 steps, the ramp itself 16,323.
    # Its stages of 39.08e9 tokens: 39.08e9 / 4096 / 1024 = 9,318 steps of 1,024 sequences, over 3, 4 … 14:
    # 9,318 · (1/3 + 1/4 + … + 1/14) = 9,318 · 1.7516 = 16,321, and up to one more a stage for whole batches.
    ramp_steps = run.step_at(run.spans[-1].first_token)
    assert 16_321 <= ramp_steps <= 16_321 + 12
    assert run.total_steps - ramp_steps == math.ceil((14_800 * B - run.spans[-1].first_token) / (15360 * 4096))


def test_cosine_falls_from_the_peak_to_a_tenth():
    assert cosine(0) == 1
    assert cosine(0.5) == pytest.approx(0.55)  # (1 + 0.1) / 2
    assert cosine(1) == pytest.approx(0.1)


def test_wsd_decays_as_one_minus_the_root_over_the_last_tenth():
    assert wsd(0.9 - 1e-9) == 1
    assert wsd(0.925) == pytest.approx(0.5)  # a quarter of the decay: 1 - √0.25
    assert wsd(1.0) == pytest.approx(0)
    assert min(step.settings.lr for step in small(shape="wsd").steps()) > 0


def test_a_ramp_by_a_law_is_drawn_with_what_the_law_says(tmp_path):
    recipe = load_recipe("tiny", ["schedule.lr=auto", "schedule.batch_tokens=ramp", "schedule.law=ling-moe"])
    plot_schedule(Schedule(recipe.schedule, recipe.data.lengths), tmp_path / "a.svg", law_in_words(recipe))
    assert "shape v3, law ling-moe" in (text := (tmp_path / "a.svg").read_text())
    assert "learning rate · (batch / last batch)^0.5" in text and "far outside of what it was measured on" in text


@pytest.mark.parametrize("preset", PUBLISHED)
def test_every_preset_is_drawn(preset, tmp_path):
    plot_schedule(schedule(preset=preset), tmp_path / "schedule.svg")
    assert "<svg" in (tmp_path / "schedule.svg").read_text()


def test_a_picture_is_a_png_too_and_nothing_else_is_left(tmp_path):
    recipe = load_recipe("tiny")
    plot_schedule(Schedule(recipe.schedule, recipe.data.lengths), tmp_path / "tiny.png")
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.png"]
    with pytest.raises(RecipeError, match=r"must end in \.png"):
        plot_schedule(Schedule(recipe.schedule, recipe.data.lengths), tmp_path / "tiny.docx")

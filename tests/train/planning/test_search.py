"""What `rorqual plan --search` finds: layouts that fit, the fastest first, and a reason for each of the others."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from parallel.layout import cell
from parallel.proven import PROVEN
from train.config import load_recipe
from train.planning.devices import DeviceError, find_device
from train.planning.plan import Plan
from train.planning.search import RECOMPUTE, Search, _Space, nearest_that_fits, overrides, search
from train.schedule import Schedule

H100 = find_device("H100")


def searched(name: str, gpus: int, *changes: str, device=H100, progress=None) -> Search:
    recipe = load_recipe(name, [*changes, "run.device=cuda"])
    return search(recipe, Schedule(recipe.schedule, recipe.data.lengths), gpus, device, 1.2, progress)


@pytest.fixture(scope="module")
def tiny() -> Search:
    return searched("tiny", 4)


def test_the_fastest_come_first_and_all_of_them_fit(tiny: Search) -> None:
    seconds = [plan.time.seconds for plan in tiny.found if plan.time]
    assert len(seconds) == 20 and seconds == sorted(seconds)
    assert all(plan.fits and plan.fullest.peak <= H100.usable for plan in tiny.found)
    assert all(cell(plan.layout.config) in PROVEN for plan in tiny.found)
    assert {"fsdp", "zero3"} <= {plan.layout.config.engine for plan in tiny.found}  # zero too on one node


def test_all_that_were_tried_are_found_or_have_a_reason(tiny: Search) -> None:
    assert tiny.candidates == len(tiny.found) + len(tiny.unproven) + sum(one.how_many for one in tiny.fallen)
    assert all(one.how_many > 0 and one.why and one.example for one in tiny.fallen)
    assert len({one.what for one in tiny.fallen}) == len(tiny.fallen)
    assert [one.how_many for one in tiny.fallen] == sorted((one.how_many for one in tiny.fallen), reverse=True)


def test_what_is_proposed_is_a_recipe_with_the_same_figures(tiny: Search) -> None:
    for found in tiny.found:
        recipe = load_recipe("tiny", [*tiny.overrides(found), "run.device=cuda"])
        plan = Plan.of(recipe, Schedule(recipe.schedule, recipe.data.lengths), 4, H100, found.imbalance)
        assert plan.layout == found.layout
        assert plan.memory == found.memory and plan.time == found.time


def test_the_recipes_own_layout_has_its_place(tiny: Search) -> None:
    """Also where it is one that nobody would try."""
    assert tiny.own.plan and tiny.found[0].time and tiny.own.plan.time
    assert tiny.own.times == tiny.own.plan.time.seconds / tiny.found[0].time.seconds
    best = searched("tiny", 4, *tiny.overrides(tiny.found[0]))
    assert (best.own.place, best.own.times) == (1, 1.0)
    refused = searched("tiny", 4, "parallel.pipeline=3", "parallel.engine=fsdp")
    assert refused.own.place == 0 and refused.own.why_not.startswith("parallel.pipeline = 3: does not divide")


def test_a_search_says_how_far_it_is() -> None:
    said: list[tuple[int, int]] = []
    found = searched("tiny", 2, progress=lambda done, total: said.append((done, total)))
    assert said == sorted(said) and said[-1] == (found.candidates, found.candidates)


def test_what_is_concluded_is_what_would_be_computed() -> None:
    """On devices with room for some of the candidates."""
    small = replace(H100, memory=130e6, reserve=0)
    found = searched("tiny", 2, device=small)
    space = _Space(found.recipe, Schedule(found.recipe.schedule, found.recipe.data.lengths), 2, small, 1.2)
    kinds = {"fits": 0, "memory": 0, "recompute": 0, "refused": 0}
    for group in space.groups():
        for micro_batch in group.sizes:
            fits = False
            for recompute in RECOMPUTE:
                plan = space.plan({**group.parallel, "micro_batch": micro_batch, "recompute": recompute})
                kind = (
                    "refused" if isinstance(plan, str) else "recompute" if fits else "fits" if plan.fits else "memory"
                )
                fits = fits or kind == "fits"
                kinds[kind] += 1
    fallen = {one.what: one.how_many for one in found.fallen}
    assert kinds["fits"] == found.fit + len(found.unproven) > 10
    assert (fallen.pop("memory"), fallen.pop("recompute")) == (kinds["memory"], kinds["recompute"])
    assert fallen.pop("time", 0) == found.fit - len(found.found)
    assert sum(fallen.values()) == kinds["refused"]


def test_what_no_test_has_compared_stands_apart() -> None:
    """FP8 with copies of the model in a pipeline has no row in PARITY.md."""
    changes = ["precision.fp8=true", "schedule.tokens=1e6", "schedule.batch_tokens=4096"]
    found = searched("tiny", 8, *changes)
    assert all(cell(plan.layout.config) in PROVEN for plan in found.found)
    assert found.unproven and all(cell(plan.layout.config) not in PROVEN for plan in found.unproven)
    assert all("parallel.unproven=true" in found.overrides(plan) for plan in found.unproven)
    assert all(
        ("precision.fp8_dispatch=true" in found.overrides(plan)) == (plan.layout.config.expert > 1)
        for plan in (*found.found, *found.unproven)
    )
    allowed = searched("tiny", 8, *changes, "parallel.unproven=true")
    assert not allowed.unproven and allowed.fit > found.fit


def test_every_batch_of_the_run_divides() -> None:
    """8 sequences, then 16, on 16 devices: a pipeline, or sequences of two micro-batches, would have too few of the first."""
    found = searched("tiny", 16, "schedule.batch_tokens=[[0, 2048], [5e5, 4096]]")
    assert found.found and all(8 % plan.layout.data_ranks == 0 for plan in found.found)
    by_what = {one.what: one for one in found.fallen}
    assert by_what["schedule.batch_tokens"].example == (
        "schedule.batch_tokens: a global batch of 8 sequences does not divide over 16 processes (the batch at "
        "the run's beginning)"
    )


def test_an_example_is_near_to_the_recipes_own_layout() -> None:
    """V3's own, on 8 devices: what does not fit is this very layout, but for what an example must say."""
    found = searched("v3", 8, "model.num_hidden_layers=12", "schedule.batch_tokens=16777216")
    does_not_fit = next(one for one in found.fallen if one.what == "memory")
    assert does_not_fit.example.endswith(": parallel.engine=fsdp parallel.micro_batch=1 parallel.recompute=selective")


def nearest(name: str, gpus: int, *changes: str) -> tuple[int, Sequence[str]]:
    recipe = load_recipe(name, [*changes, "run.device=cuda"])
    plan = nearest_that_fits(recipe, Schedule(recipe.schedule, recipe.data.lengths), gpus, H100, 1.2)
    assert plan and plan.fits
    return plan.layout.world_size, overrides(recipe, plan.recipe)


def test_a_layout_that_is_too_much_has_a_nearest_one_that_fits() -> None:
    """V3 on 1,024 devices of 80 GB with 64 expert ranks: with rows that travel, and are kept, in E4M3."""
    gpus, changes = nearest("v3", 1024, "parallel.expert=64")
    assert gpus == 1024
    assert changes == [
        "parallel.engine=fsdp",
        "parallel.expert=64",
        "parallel.micro_batch=1",
        "parallel.recompute=selective",
        "precision.fp8_dispatch=true",
    ]


def test_where_nothing_fits_the_number_of_devices_is_named_on_which_something_does() -> None:
    """12 bytes for each of 119e9 parameters, V3 with 12 layers, are 178 GB on each of 8 devices and 45 GB on each of 32, beside
    gathered layers and activations; and of tiny's 16 sequences 7 devices cannot have equal shares."""
    found = searched("v3", 8, "model.num_hidden_layers=12")
    assert found.found == found.unproven == [] and found.fallen[0].what == "memory"
    assert found.fallen[0].why == "do not fit in 74.8 GB" and found.fallen[0].example.startswith("308 GB: ")
    assert nearest("v3", 8, "model.num_hidden_layers=12")[0] == 32
    seven = searched("tiny", 7)
    assert not seven.found and "16 sequences does not divide over 7" in seven.own.why_not
    assert nearest("tiny", 7)[0] == 8


def test_a_device_without_fp8_is_refused_for_a_recipe_in_fp8() -> None:
    with pytest.raises(DeviceError, match="fp8"):
        searched("tiny", 1, "precision.fp8=true", device=find_device("A100"))

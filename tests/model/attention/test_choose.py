"""Candidates are compared, timed and chosen by what they do. Real ones, on the CPU."""

from typing import get_args

import pytest
import torch

from model.config import ConfigError
from model.ops import measure
from model.ops.attention import BACKENDS, choose, reference_attention
from model.ops.attention.assembled import Assembled
from model.ops.attention.choose import CANDIDATES, Workload, agrees, both_ways, by_reference, draw, fastest
from model.rope import Rotation
from tests.small_model import small_config
from train.sections import RunSection

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16]


def work(documents=False, dtype=torch.float32, length=150, pieces=1):
    return Workload(small_config(), 2, length, documents, dtype, pieces=pieces)


def sees_one_key_more(q, kv, k_rope, rotation, scale, starts):
    return reference_attention(q, kv, k_rope, rotation, scale, (starts - 1).clamp_min(0))


def does_not_rotate(q, kv, k_rope, rotation, scale, starts):
    still = Rotation(torch.ones_like(rotation.cos), torch.zeros_like(rotation.sin))
    return reference_attention(q, kv, k_rope, still, scale, starts)


def loses_a_gradient(q, kv, k_rope, rotation, scale, starts):
    return reference_attention(q, kv, torch.cat((k_rope[:1], k_rope[1:].detach())), rotation, scale, starts)


def fails(*given):
    raise ValueError("no such shape\nand more")


WRONG = {f.__name__: lambda f=f: f for f in (sees_one_key_more, does_not_rotate, loses_a_gradient)}
RIGHT = {"slow": lambda: reference_attention, "reference": lambda: reference_attention}


@pytest.fixture(autouse=True)
def _documents_of_a_few_tokens(monkeypatch):
    monkeypatch.setattr(choose, "DOCUMENT", 20)
    monkeypatch.setattr(measure, "ROUNDS", 2)


def test_the_fastest_of_those_that_are_right_is_chosen_and_the_log_says_why(monkeypatch):
    clock = {"slow": 5e-3, "reference": 1e-3}
    monkeypatch.setattr(choose, "times", lambda runs, device: {name: clock[name] for name in runs})
    candidates = WRONG | RIGHT | {"fails": lambda: fails, "flash-attn": CANDIDATES["flash-attn"]}
    name, line = fastest(work(documents=True), candidates, CPU)
    assert name == "reference"
    assert line.startswith("attention [2×150], 4 heads of 24 and 12, within documents, forward and backward: ")
    assert "slow 5, reference 1, " in line and line.endswith(" ms → reference")
    for wrong in WRONG:
        assert f"{wrong} – (wrong)" in line
    assert "fails – (ValueError: no such shape)" in line
    assert "flash-attn – (flash_attn is not installed: pip install 'rorqual[flash]')" in line


def test_what_recomputation_cannot_keep_is_timed_with_its_second_run(monkeypatch):
    runs = []
    unseen = Assembled(lambda q, k, v, *_: runs.append(1) or v, is_kept=False)
    monkeypatch.setattr(choose, "agrees", lambda *_: True)
    monkeypatch.setattr(choose, "times", lambda given, device: {name: run() and 1.0 for name, run in given.items()})
    for keeps_outputs, forward in ((False, 3), (True, 5)):  # compared, tried, timed
        runs.clear()
        choose.try_all(work()._replace(keeps_outputs=keeps_outputs), {"unseen": unseen}, CPU)
        assert len(runs) == forward


def test_attention_that_nobody_computes_is_refused_with_every_reason():
    with pytest.raises(ConfigError, match=r"attention \[2×150\].*fails: ValueError: no such shape"):
        fastest(work(), {"fails": lambda: fails}, CPU)


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_no_error(dtype, documents, pieces):
    given, upstream = draw(work(documents, dtype, pieces=pieces), CPU)
    assert agrees(both_ways(BACKENDS["sdpa"], given, upstream), by_reference(given, upstream))


def test_the_reference_by_heads_is_the_reference():
    given, upstream = draw(work(documents=True), CPU)
    for a, b in zip(by_reference(given, upstream), both_ways(reference_attention, given, upstream)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_candidates_are_tried_on_what_the_model_hands_them():
    given, upstream = draw(work(documents=True), CPU)
    assert not given.k_rope.is_contiguous() and upstream.shape == (2, 150, 4, 12)
    assert given.starts.dtype == torch.int32 and (given.starts.diff() >= 0).all() and given.starts.max() > 0
    assert draw(work(), CPU)[0].starts is None


def test_of_sequences_that_are_cut_the_last_piece_is_measured(monkeypatch):
    given, upstream = draw(work(documents=True, pieces=4), CPU)
    whole, _ = draw(work(documents=True), CPU)
    assert given.q.shape[:2] == given.starts.shape == upstream.shape[:2] == (2, 37)
    assert given.kv.shape[:2] == given.k_rope.shape[:2] == (2, 150) and len(given.rotation.cos) == 150
    assert whole.q.shape[:2] == (2, 150) and (given.starts > 150 - 37).any() and (given.starts <= 150 - 37).any()
    name, line = fastest(work(documents=True, pieces=4), {**WRONG, "sdpa": CANDIDATES["sdpa"]}, CPU)
    assert name == "sdpa" and line.startswith("attention [2×37 of 150], ") and line.count("(wrong)") == len(WRONG)


def alone(action):
    return action()


def test_nothing_is_measured_on_a_cpu():
    assert choose.choose("auto", work(), CPU, alone) == (BACKENDS["fused"], [])
    assert choose.choose("reference", work(), CPU, alone) == (reference_attention, [])
    with pytest.raises(ConfigError, match=r"run\.attention = cudnn: runs on a GPU only; leave it at auto"):
        choose.choose("cudnn", work(), CPU, alone)


def test_a_recipe_can_name_each_of_them():
    names = get_args(RunSection.model_fields["attention"].annotation)
    assert set(names) == {"auto"} | BACKENDS.keys() | CANDIDATES.keys()


def test_the_one_that_the_recipe_names_is_the_only_one_tried(monkeypatch):
    tried = {}
    monkeypatch.setattr(
        choose, "fastest", lambda work, candidates, device: (tried.update(candidates) or "flex", "a line")
    )
    backend, lines = choose.choose("flex", work(), GPU, alone)
    assert list(tried) == ["flex"] and lines == ["a line"] and backend.attend is choose.flex
    assert choose.choose("reference", work(), GPU, alone) == (reference_attention, [])


def test_flash_attention_that_is_named_and_not_installed_names_the_extra():
    with pytest.raises(ConfigError, match=r"pip install 'rorqual\[flash\]'"):
        choose.choose("flash-attn", work(), GPU, lambda action: fastest(work(), action.args[1], CPU))


def test_the_first_rank_measures_for_all(monkeypatch):
    monkeypatch.setattr(choose, "fastest", lambda *_: pytest.fail("this rank measured"))
    backend, lines = choose.choose("auto", work(), GPU, lambda action: ("cudnn", "a line"))
    assert backend.attend.args and lines == ["a line"]
    with pytest.raises(
        ConfigError, match=r"first rank computes attention by flash-attn, and on this one flash_attn is not"
    ):
        choose.choose("auto", work(), GPU, lambda action: ("flash-attn", "a line"))

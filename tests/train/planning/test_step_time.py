"""The time of a step: what its terms say, and that they say it with numbers."""

import os
import re
from dataclasses import fields, replace
from functools import cache
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from model.config import PRESETS, ModelConfig, load_preset
from model.flops import flops_by_part
from parallel.layout import ParallelConfig
from parallel.placement import Schedule
from parallel.timeline import Costs, bubble, order_of, timeline
from tests.train.planning.plans import FIXED, plan_of, v3
from train.planning.devices import DEVICES, Device, DeviceError, find_device, this_machine
from train.planning.plan import Plan
from train.planning.speed import measured, rates
from train.planning.speed.rates import BEST, rates_of
from train.planning.speed.step_time import StepTime, step_time
from train.planning.speed.work import How
from train.planning.step import PlannedStep, play

H100 = find_device("h100")
LAYOUTS = {
    "one": (1, "{engine: ddp, recompute: none}"),
    "ddp": (16, "{engine: ddp, micro_batch: 1, recompute: selective}"),
    "fsdp, experts": (16, "{engine: fsdp, expert: 16, micro_batch: 1, recompute: full}"),
    "HSDP": (16, "{engine: fsdp, replicate: 2, micro_batch: 1, recompute: none}"),
    "kept gathered": (16, "{engine: fsdp, reshard_after_forward: false, micro_batch: 1, recompute: none}"),
    "zero2": (2, "{engine: zero2, micro_batch: 2, recompute: none}"),
    "zero3, offloaded": (2, "{engine: zero3, micro_batch: 2, offload: all, recompute: none}"),
    "context": (4, "{engine: fsdp, context: 4, recompute: none}"),
    "1f1b": (16, "{engine: fsdp, pipeline: 4, micro_batch: 1, recompute: selective}"),
    "dualpipev": (
        8,
        "{engine: fsdp, pipeline: 2, expert: 4, schedule: dualpipev, micro_batch: 1, recompute: selective}",
    ),
}


def plan(name: str, *changes: str) -> Plan:
    processes, parallel = LAYOUTS[name]
    return plan_of("tiny", processes, "H100", *FIXED, f"parallel={parallel}", "parallel.unproven=true", *changes)


def seconds(time: StepTime) -> dict[str, float]:
    return {term.name: term.seconds for term in time.terms}


def test_products_are_the_models_flops_over_published_rates() -> None:
    """One H100 and bf16: 0.8 of 0.8 of 989.4 TFLOP/s for linear maps and head; attention a third forward, the rest backward."""
    alone = plan("one")
    parts = flops_by_part(alone.step.config, alone.step.span.sequence_length)
    found, tokens = seconds(step_time(alone.step, H100)), 16384
    best = 0.8 * H100.bf16
    rate = 0.8 * best
    assert found["linear maps"] == pytest.approx(tokens * parts["linear maps"] / rate)
    assert found["head"] == pytest.approx(tokens * parts["head"] / rate)
    forward = tokens * parts["attention"] / 3 / best
    assert found["attention"] == pytest.approx(forward / 0.74 + 2 * forward / 0.44)
    assert not found.keys() & {"tokens to experts", "weights", "gradients", "bubble", "recomputation"}


def test_every_best_product_is_of_a_device_of_the_table() -> None:
    assert BEST.keys() <= {device.name for device in DEVICES}


def test_experts_with_few_rows_are_slow() -> None:
    """Half of the rate with 110 rows each."""
    reached = rates_of(H100, plan("one").step.config, How.simple(1, 1, 2))
    assert reached.of_experts(110) == reached.experts / 2
    assert reached.of_experts(1) < reached.of_experts(1000) < reached.experts


@pytest.mark.parametrize("name", LAYOUTS)
def test_terms_add_up_and_no_faster_part_makes_a_step_slower(name: str) -> None:
    step = plan(name).step
    time = step_time(step, H100)
    assert time.seconds == sum(term.seconds for term in time.terms) and all(term.seconds > 0 for term in time.terms)
    assert time.mfu == pytest.approx(
        sum(flops_by_part(step.config, step.span.sequence_length).values())
        * 16384
        / (time.seconds * step.layout.world_size * H100.bf16)
    )
    for field in ("bf16", "memory_bandwidth", "link_bandwidth", "network"):
        faster = step_time(step, replace(H100, **{field: 2 * getattr(H100, field)}))
        assert faster.seconds <= time.seconds * (1 + 1e-9), field
    assert time.reached == {"node": rates.NODE * H100.link_bandwidth, "network": rates.NETWORK * H100.network}
    assert step_time(step, replace(H100, node=16)).sent["network"] <= time.sent["network"]


@pytest.mark.parametrize("name", ["fsdp, experts", "dualpipev"])
def test_uneven_experts_are_slower_and_send_more(name: str) -> None:
    step = plan(name).step
    even, uneven = (step_time(replace(step, imbalance=number), H100) for number in (1.0, 1.5))
    assert seconds(uneven)["experts"] > seconds(even)["experts"]
    assert seconds(uneven)["tokens to experts"] > seconds(even)["tokens to experts"]
    assert uneven.sent["network"] >= even.sent["network"] and uneven.sent["node"] > even.sent["node"]


def test_experts_are_no_fuller_than_all_rows_make_them() -> None:
    """Two ranks that share experts: twice the mean at most; one process: nothing is uneven."""
    shared = plan_of("tiny", 2, "H100", *FIXED, "parallel={engine: fsdp, expert: 2, unproven: true}").step
    for step, most in ((shared, 2.0), (plan("one").step, 1.0)):
        fuller = replace(step, imbalance=100.0)
        assert fuller.skew == most
        assert seconds(step_time(fuller, H100)) == seconds(step_time(replace(step, imbalance=most), H100))


@pytest.mark.parametrize("name", ["fsdp", "zero3", "kept gathered", "ddp"])
@pytest.mark.parametrize("slow", [1, 20, 10_000])
def test_no_more_is_hidden_than_is_computed_meanwhile(name: str, slow: int) -> None:
    engine, *others = {
        "fsdp": ["fsdp"],
        "zero3": ["zero3"],
        "kept gathered": ["fsdp", "reshard_after_forward: false"],
        "ddp": ["ddp"],
    }[name]
    parallel = ", ".join([f"engine: {engine}", *others, "micro_batch: 2, recompute: none"])
    step = plan_of("tiny", 2, "H100", *FIXED, f"parallel={{{parallel}}}").step
    device = replace(H100, link_bandwidth=H100.link_bandwidth / slow)
    found = {term.name: term for term in step_time(step, device).terms}
    travels = sum(
        float(re.findall(r"= ([\d.e+-]+) s", found[of].formula)[0]) for of in ("weights", "gradients") if of in found
    )
    waits = sum(found[of].seconds for of in ("weights", "gradients") if of in found)
    computes = sum(found[of].seconds for of in ("linear maps", "experts", "attention", "head", "memory"))
    assert 0 <= travels - waits <= computes * (1 + 1e-6)
    assert waits >= travels * rates.SENDING * (1 - 1e-3)


@pytest.mark.parametrize("compute, peak", [("fp32", 67e12), ("bf16", 989.4e12), ("fp16", 989.4e12)])
def test_mfu_divides_by_the_peak_of_what_is_computed_in(compute: str, peak: float) -> None:
    step = plan("one", f"precision.compute={compute}").step
    time = step_time(step, H100)
    assert (time.peak, time.peak_name) == (peak, compute) and peak == H100.peak(step.compute)
    flops = sum(flops_by_part(step.config, step.span.sequence_length).values()) * 16384
    assert time.mfu == pytest.approx(flops / (time.seconds * peak)) and time.mfu < 0.8


def test_a_formula_has_the_numbers_that_give_its_term() -> None:
    for term in step_time(v3().step, find_device("h800")).terms:
        if term.name in ("linear maps", "experts", "attention", "memory"):
            tokens, count, amount, rate = re.findall(r"[\d,.]+(?: [PTGM](?:FLOP|B))?", term.formula)[:4]
            assert number(tokens) * number(count) * number(amount) / number(rate) == pytest.approx(
                term.seconds, rel=1e-3
            )
        assert re.search(r"\d", term.formula)


def number(text: str) -> float:
    digits, _, unit = text.replace(",", "").partition(" ")
    return float(digits) * {"": 1, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}[unit[:1]]


def test_v3_as_published_takes_about_as_many_hours() -> None:
    """180,000 GPU-hours for 10¹² tokens (arXiv 2412.19437 Table 1); 185,700 were predicted when nothing had been fitted."""
    time, tokens = step_time(v3().step, find_device("h800")), 15360 * 4096
    hours = time.seconds * 2048 / 3600 * 1e12 / tokens
    assert v3().step.skew == 1 and hours == pytest.approx(184.0e3, rel=0.1)
    assert (time.peak_name, time.peak) == ("FP8", 1978.9e12)
    assert time.mfu == pytest.approx(260.64e9 * tokens / (time.seconds * 2048 * 1978.9e12), rel=1e-3)


@pytest.mark.parametrize("schedule, stages", [("1f1b", 1), ("interleaved", 2), ("zbv", 2), ("dualpipev", 2)])
@pytest.mark.parametrize("micro_batches", [8, 40])
def test_a_pipeline_is_played_as_the_timeline_has_it(schedule: Schedule, stages: int, micro_batches: int) -> None:
    costs, ranks = Costs(1.0, 1.25, 0.75, 2.5), 4
    sizes = [1 + 0.1 * (stage % 3) for stage in range(ranks * stages)]
    parallel = ParallelConfig("fsdp", pipeline=ranks, schedule=schedule, unproven=True)
    step: Any = Mock(spec=PlannedStep, layout=Mock(config=parallel), micro_batches=micro_batches)
    played = play(step, costs, sizes)
    chunks = timeline(order_of(schedule, ranks, stages, micro_batches), costs, sizes)
    assert played.seconds == pytest.approx(max(chunk.end for line in chunks for chunk in line))
    waits = [played.seconds - work for work in played.works]
    assert waits == pytest.approx(bubble(chunks))


def test_a_device_is_known_with_its_node_and_what_of_its_memory_is_usable() -> None:
    for device in DEVICES:
        assert device.node >= 1 and 1e9 <= device.network <= 1e11 and 0.75 < device.usable / device.memory < 0.97
    assert (find_device("GB200").node, find_device("h800").network, find_device("a100").network) == (72, 50e9, 25e9)
    with pytest.raises(
        DeviceError, match=r"^device 'h10': is not in the table of devices; did you mean H100\? .*, or cpu$"
    ):
        find_device("h10")


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.json")))
def test_the_head_of_every_model_can_be_measured_with_fewer_words(preset: str) -> None:
    assert measured._of_words(ModelConfig.from_hf(load_preset(preset)), 256).vocab_size == 256


def test_this_machine_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = find_device("CPU")
    assert cpu is this_machine() and isinstance(cpu, Device)
    for field in fields(cpu):
        assert getattr(cpu, field.name)
    assert cpu.node > 1000 and 0 < cpu.usable < cpu.memory
    quarter = find_device("cpu", 4)
    for field_name in ("memory", "usable", "memory_bandwidth", "link_bandwidth"):
        assert getattr(quarter, field_name) == pytest.approx(getattr(cpu, field_name) / 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: len(os.sched_getaffinity(0)))
    shared = find_device("cpu", 4)
    assert shared.shared == 4 and shared.bf16 == cpu.bf16 / 4
    for name, value in {"SECONDS": 0.0, "FLOPS": 1e8, "ELEMENTS": 1 << 18}.items():  # quick, and of no use
        monkeypatch.setattr(measured, name, value)
    monkeypatch.setattr(measured, "_measured", cache(measured._measured.__wrapped__))
    step = plan_of("tiny", 1, None, *FIXED).step
    time = step_time(step, cpu)
    assert {"linear maps", "experts", "attention", "head", "memory", "optimizer"} <= seconds(time).keys()
    assert 0 < time.mfu < 1
    together = seconds(step_time(step, shared))
    for term in ("linear maps", "experts", "attention", "head", "memory", "optimizer"):
        assert together[term] == pytest.approx(4 * seconds(time)[term])
    with pytest.raises(DeviceError, match=r"^device cpu: emulates FP8"):
        step_time(plan_of("tiny", 1, None, *FIXED, "precision.fp8=true").step, cpu)
    with pytest.raises(DeviceError, match=r"^device A100: has no fp8 rate"):
        step_time(v3().step, find_device("A100"))

import importlib.util
import io
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from train.loggers import MetricsError, open_loggers, scalars
from train.metrics import MetricsLog, TerminalLine, balance_metrics
from train.planning.devices import DEVICES, DeviceError, lookup, measured_gemm_peak, peak_flops


def step(number: int, **more: Any) -> dict[str, Any]:
    return {
        "step": number,
        "tokens": 1000 * number,
        "loss": 2.5,
        "mtp_loss": [2.75, 3.0],
        "balance_loss": 0.01,
        "grad_norm": 1.25,
        "lr": 4.2e-4,
        "batch_tokens": 1000,
        "tokens_per_second": 12_345.0,
        "data_seconds": 0.0123,
        "mfu": 0.4321,
        "memory_bytes": 3 * 2**30,
        "skipped": 0,
        **more,
    }


BALANCE = {
    "max_vio": [0.5, 1.0],
    "max_vio_mean": 0.75,
    "max_vio_worst": 1.0,
    "max_vio_worst_layer": 1,
    "bias_min": -0.012,
    "bias_max": 0.034,
}


def test_balance_metrics_name_the_worst_layer_and_the_range_of_the_bias() -> None:
    counts = torch.tensor([[2, 2], [4, 0], [3, 1]])
    biases = torch.tensor([[0.0, 0.002], [-0.003, 0.0], [0.0, 0.0]])
    metrics = balance_metrics(counts, biases)
    assert metrics["max_vio"] == [0.0, 1.0, 0.5] and metrics["max_vio_mean"] == 0.5
    assert metrics["max_vio_worst"] == 1.0 and metrics["max_vio_worst_layer"] == 1
    assert metrics["bias_min"] == pytest.approx(-0.003) and metrics["bias_max"] == pytest.approx(0.002)
    assert json.dumps(metrics)


def test_the_file_is_strict_json_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "run" / "metrics.jsonl") as metrics:
        metrics.write(step(1, grad_norm=math.inf, mtp_loss=[math.nan, 1.0], validation={"a\u2028b": {"x": -math.inf}}))
        (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()  # there before the file is closed

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(line, parse_constant=refuse)
    assert found["grad_norm"] is None and found["mtp_loss"] == [None, 1.0]
    assert found["validation"] == {"a\u2028b": {"x": None}}


def test_a_resumed_file_is_that_of_a_run_that_was_never_interrupted(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    with MetricsLog(whole) as metrics:
        for number in range(1, 7):
            metrics.write(step(number))
    with MetricsLog(resumed) as metrics:
        for number in range(1, 5):
            metrics.write(step(number))
    with resumed.open("a") as file:
        file.write(json.dumps(step(5))[:40])  # killed while it wrote step 5; the last checkpoint is of step 3
    with MetricsLog(resumed, step=3) as metrics:
        for number in range(4, 7):
            metrics.write(step(number))
    assert resumed.read_bytes() == whole.read_bytes()
    with MetricsLog(resumed):
        pass
    assert resumed.read_bytes() == b"", "a run without a checkpoint starts again"


def test_a_damaged_line_in_the_middle_is_dropped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\x00\x00\x00\n{"step": 2}\n')
    with caplog.at_level(logging.WARNING), MetricsLog(path, step=2):
        pass
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert "1 lines are no JSON objects" in caplog.text


def test_a_log_file_gets_a_line_every_so_many_steps_and_one_at_the_end() -> None:
    screen = io.StringIO()
    with TerminalLine(7, 7000, every_steps=3, console=Console(file=screen, width=40)) as terminal:
        for number in range(1, 8):
            terminal.show(step(number, **BALANCE))
    lines = screen.getvalue().splitlines()
    assert [line.split(" · ")[0] for line in lines] == ["step 3/7", "step 6/7", "step 7/7"]
    assert lines[0] == (
        "step 3/7 · loss 2.5000 · mtp 2.7500 3.0000 · grad 1.25 · lr 4.20e-04 · batch 1k · 12.3k tok/s · data 12 ms · mfu 43.2% · "
        "mem 3.0 GiB · maxvio 0.75, worst 1.00 in MoE layer 1 · bias -0.012 to +0.034 · eta 0:00"
    )


def test_a_line_tells_skipped_steps_validation_and_a_long_way_to_go() -> None:
    screen = io.StringIO()
    terminal = TerminalLine(10**6, 12_345 * (3 * 86_400 + 4 * 3600 + 300) + 2000, console=Console(file=screen))
    validation = {"web": {"nats_per_token": 2.0, "bits_per_byte": 0.75}}
    terminal.show(step(2, skipped=4, loss=math.nan, validation=validation))
    first, second = screen.getvalue().splitlines()
    assert "loss nan" in first and "skipped 4" in first and "maxvio" not in first and first.endswith("eta 3 d 04:05")
    assert second == "validation at step 2 · web 2.0000 nats/token, 0.7500 bits/byte"


def test_a_terminal_shows_one_live_line() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=200)
    with TerminalLine(9, 9000, every_steps=100, console=console) as terminal:
        for number in (1, 2, 3):
            terminal.show(step(number))
        terminal.say("a message")
    assert "a message" in screen.getvalue() and "step 3/9" in screen.getvalue()


def test_loggers_get_flat_names() -> None:
    flat = scalars(step(1, validation={"web": {"bits_per_byte": 0.5, "accuracy": [0.25]}}))
    assert flat["mtp_loss/1"] == 3.0 and flat["validation/web/bits_per_byte"] == 0.5
    assert flat["validation/web/accuracy/0"] == 0.25 and "step" not in flat


def test_tensorboard_hides_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = SimpleNamespace(tensorboard=True, wandb=None, trackio=None)
    for first, last, loss in ((1, 5, 1.0), (3, 6, 2.0)):  # killed after step 4, resumed from the checkpoint of step 2
        (logger,) = open_loggers(settings, tmp_path, {}, step=first - 1)
        for number in range(first, last):
            logger.write(step(number, loss=loss))
        logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_logger_that_is_not_installed_is_an_error_that_names_the_command(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed here")
    settings = SimpleNamespace(**{"tensorboard": False, "wandb": None, "trackio": None, name: "whales"})
    with pytest.raises(MetricsError) as refused:
        open_loggers(settings, tmp_path, {})
    assert str(refused.value) == (
        f"logging.{name} = whales: the package {name} is not installed; run `pip install {name}` or leave logging.{name} out"
    )
    assert open_loggers(SimpleNamespace(tensorboard=False, wandb=None, trackio=None), tmp_path, {}) == []


@pytest.mark.parametrize(
    ("driver", "name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", "H100", 989.4e12),
        ("NVIDIA H100 PCIe", "H100-PCIe", 756e12),
        ("NVIDIA H200", "H200", 989.4e12),
        ("NVIDIA GH200 480GB", "GH200", 989.4e12),
        ("NVIDIA H20", "H20", 148e12),
        ("NVIDIA H800", "H800", 989.4e12),
        ("NVIDIA B200", "B200", 2250e12),
        ("NVIDIA GB200", "GB200", 2500e12),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", "A100", 312e12),
        ("NVIDIA L40S", "L40S", 362e12),
        ("NVIDIA L4", "L4", 121e12),
        ("NVIDIA GeForce RTX 4090", "RTX-4090", 165.2e12),
        ("AMD Instinct MI300X", "MI300X", 1307.4e12),
        ("h100-pcie", "H100-PCIe", 756e12),
    ],
)
def test_a_device_is_found_by_its_drivers_name_or_its_own(driver: str, name: str, bf16: float) -> None:
    assert lookup(driver).name == name and lookup(driver).bf16 == bf16


def test_every_device_is_found_by_its_own_name_and_its_fp8_is_twice_its_bf16() -> None:
    for device in DEVICES:
        assert lookup(device.name) is device
        assert device.fp8 is None or 1.99 < device.fp8 / device.bf16 < 2.04
    with pytest.raises(DeviceError, match=r"^device 'Abacus': is not in the table of devices; give one of GB300, "):
        lookup("Abacus")


@pytest.mark.parametrize(
    "driver", ["NVIDIA RTX A1000", "NVIDIA H1000", "NVIDIA A10G", "NVIDIA L400", "RTX 4090 Laptop GPU", "RTX 3090 Ti"]
)
def test_a_device_is_found_by_whole_words(driver: str) -> None:
    with pytest.raises(DeviceError, match="is not in the table of devices"):
        lookup(driver)


def test_a_run_and_a_plan_divide_by_one_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    device = lookup("H100")
    for dtype, peak in ((torch.float32, 67e12), (torch.bfloat16, 989.4e12), (torch.float16, 989.4e12)):
        assert peak_flops("cuda", dtype) == device.peak(dtype) == peak


def test_a_cpus_peak_is_measured_once() -> None:
    before = torch.get_num_threads()
    peak = peak_flops("cpu", torch.float32)
    assert peak == measured_gemm_peak(torch.float32, "cpu", before) > 1e9
    assert torch.get_num_threads() == before
    assert peak_flops("cpu", torch.float8_e4m3fn) == peak  # which emulates it


@pytest.mark.parametrize(
    ("driver", "peak"), [("NVIDIA H200", 1979e12), ("NVIDIA A100-SXM4-80GB", None), ("Abacus", None)]
)
def test_fp8_is_measured_by_the_peak_of_fp8_and_a_gpu_without_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, driver: str, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: driver)
    if peak:
        assert peak_flops("cuda", torch.float8_e4m3fn) == pytest.approx(peak, rel=1e-3)
    else:
        with pytest.raises(DeviceError, match=r"has no fp8 rate in the table of devices; set precision\.fp8 to false"):
            peak_flops("cuda", torch.float8_e4m3fn)

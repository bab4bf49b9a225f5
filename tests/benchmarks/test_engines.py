"""The programs that put the engines beside each other run on a shape of a few thousand parameters."""

import json

import pytest

from tests.benchmarks.commands import command, run
from tests.benchmarks.test_recompute import SHAPE


def result(tmp_path, program, *more):
    """What the program writes for the small shape."""
    (tmp_path / "micro.json").write_text(json.dumps(SHAPE))
    values = {"--json": str(tmp_path / "out.json")}
    words = command(program, values, "--shape", str(tmp_path / "micro.json"), *more)
    run(words, CUDA_VISIBLE_DEVICES="")
    return json.loads((tmp_path / "out.json").read_text())


@pytest.mark.slow
def test_engines_take_the_same_steps_side_by_side(tmp_path):
    only = ["fsdp", "zero2", "transformers under FSDP2"]
    found = result(tmp_path, "engines.py", "--rounds", "1", "--warmup", "1", "--only", *only)
    assert found["engines"].keys() == {"ddp", *only}
    assert found["engines"]["ddp"]["speed_ratio"] == 1
    assert all(engine["tokens_per_second"] > 0 for engine in found["engines"].values())
    sent = {name: engine["bytes_sent_by_a_rank"] for name, engine in found["engines"].items()}
    assert sent["ddp"] < sent["fsdp"] and sent["ddp"] < sent["zero2"]


def test_every_engine_of_one_process_has_the_losses_of_ddp(tmp_path):
    found = result(tmp_path, "same_losses.py", "--steps", "2", "--engines", "fsdp", "zero3")
    assert found["runs"].keys() == {"ddp on the CPU", "fsdp", "zero3"}
    for engine in found["runs"].values():
        assert engine["loss_error_against_the_cpu"] <= 1e-3
        assert 0 < engine["loss_error_against_fp32"] <= 0.1

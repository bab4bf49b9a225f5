"""The planner's account of a step's memory is what a step has, part by part and at its peak."""

import json

import pytest

from model import activations
from model.ops import cross_entropy
from tests.benchmarks.commands import ROOT, command, run
from tests.benchmarks.test_recompute import SHAPE


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_peak_is_within_a_tenth_of_the_account(tmp_path, micro_batches):
    shape = {**SHAPE, "batch": 8, "micro_batch": 8 // micro_batches}
    (tmp_path / "micro.json").write_text(json.dumps(shape))
    values = {"--shape": str(tmp_path / "micro.json"), "--json": str(tmp_path / "out.json")}
    said = run(command("memory.py", values, "--mtp", "1"), CUDA_VISIBLE_DEVICES="")
    modes = json.loads((tmp_path / "out.json").read_text())["modes"]
    assert modes.keys() == {"none", "selective", "full"}
    for mode, found in modes.items():
        account, measured = found["account"], found["measured"]
        assert measured["peak"] == pytest.approx(account["peak"], rel=0.1), mode
        for state in ("parameters", "gradients", "moments"):
            assert measured[state] == pytest.approx(account[state], rel=0.01)
        assert f"| {mode} | peak | " in said


@pytest.mark.parametrize("name", ["v2-lite", "v3-layers"])
def test_the_shapes_for_one_gpu_fit_into_an_h200_with_their_optimizer(tmp_path, name):
    values = {"--shape": str(ROOT / f"benchmarks/shapes/{name}.json"), "--json": str(tmp_path / "out.json")}
    run(command("memory.py", values, "--account", "--device", "cuda", "--mtp", "1"))
    modes = json.loads((tmp_path / "out.json").read_text())["modes"]
    peak = modes["selective"]["account"]["peak"]
    assert 0.7 < peak / (139 << 30) < 0.9  # what is left is the allocator's


def test_the_account_knows_the_chunks_of_the_loss():
    assert cross_entropy.CHUNK_BYTES == activations.CHUNK_BYTES
    assert {"cpu": cross_entropy.CPU_ROWS, "cuda": cross_entropy.GPU_ROWS} == activations.CHUNK_ROWS

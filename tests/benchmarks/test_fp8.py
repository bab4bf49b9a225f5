"""The comparison of losses counts as it says, and square tiles lose what the report says they lose."""

import pytest
import torch

from benchmarks import fp8, gradient_tiles
from benchmarks.gradient_tiles import Product, as_table, by_map, by_outlier, draw, errors_of
from tests.small_model import small_model


def record(factor: float, steps: int = 300) -> fp8.Record:
    validation = {
        "text": {"tokens": 10, "nats_per_token": 2.0 * factor},
        "code": {"tokens": 30, "nats_per_token": factor},
    }
    return [
        {"step": n, "loss": (5 - n / 100) * (factor if n > 250 else 1), "validation": validation}
        for n in range(1, steps + 1)
    ]


def test_the_difference_is_that_of_means_over_a_hundred_steps() -> None:
    found = fp8.difference(record(1.0), record(1.01))
    losses = [5 - n / 100 for n in range(201, 301)]
    expected = 0.01 * sum(losses[50:]) / sum(losses)
    assert found.summary["difference at the end"] == pytest.approx(expected)
    assert found.summary["largest difference of a step"] == pytest.approx(0.01)
    assert found.summary["validation, fp32"] == pytest.approx(1.25)
    assert found.summary["difference of validation"] == pytest.approx(0.01)
    assert found.steps[0] == 200 and found.relative[0] == 0


def test_a_token_far_below_its_neighbours_is_lost_in_square_tiles_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    grad, weight = torch.randn(256, 256, generator=generator), torch.randn(256, 384, generator=generator)
    grad[7] *= 1e6
    found = errors_of(Product("", grad, weight))
    beside, apart = torch.arange(256) < 128, torch.arange(256) >= 128
    beside[7] = False
    assert (found.blocks[beside] == 1).all() and (found.outlier[beside] > 1e5).all()
    assert found.blocks[7] < 0.06 and (found.blocks[apart] < 0.06).all() and (found.rows < 0.06).all()
    assert (found.weight < found.rows).float().mean() > 0.95


def test_every_product_of_a_backward_pass_is_looked_at(tiny_store, tmp_path) -> None:
    errors = [errors_of(p) for p in gradient_tiles.products(small_model(vocab_size=512), tiny_store.path, 2048, 32)]
    result = {"by_map": by_map(errors), "by_outlier": by_outlier(errors)}
    maps = {row["map"] for row in result["by_map"]}
    assert {"self_attn.q_a_proj", "mlp.experts.gate_up", "mlp.experts.down", "mlp.shared_experts.up_proj"} <= maps
    assert not any("eh_proj" in name for name in maps)
    assert sum(row["tokens"] for row in result["by_outlier"]) == sum(row["tokens"] for row in result["by_map"])
    assert all(row["weight_alone"] < row["rows"] < 0.06 for row in result["by_map"])
    draw(result, tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 10_000
    assert "1×128" in as_table(result)

"""The comparison of losses counts as it says, and square tiles lose what the report says they lose."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import fp8, gradient_tiles
from benchmarks.gradient_tiles import Product, as_table, by_map, by_outlier, draw, errors_of
from data.store import Store
from tests.small_model import small_model


def test_differences_are_those_of_means_over_a_hundred_steps(tmp_path: Path) -> None:
    plain = 5 - np.arange(300) / 100
    late = np.where(np.arange(300) >= 250, 1.01, 1.0)
    losses = {"fp32-0": plain, "fp8-0": plain * late, "fp32-1": plain * 1.02, "fp8-1": plain * 0.99}
    found = fp8.compare(losses)
    assert found["fp8 against fp32, seed 0"][:50] == pytest.approx(0)
    assert found["fp8 against fp32, seed 0"][-1] == pytest.approx(0.01 * plain[250:].sum() / plain[200:].sum())
    assert fp8.summary(found["fp8 against fp32, seed 1"])["mean"] == pytest.approx(0.99 / 1.02 - 1)
    assert fp8.summary(found["fp32, seed 1 against seed 0"])["largest"] == pytest.approx(0.02)
    fp8.draw(losses, found, tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_products_in_fp8_cost_the_same_weights_little(tiny_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "LENGTH", 32)
    monkeypatch.setattr(fp8, "TOKENS", 512)
    assert 0 < abs(fp8.cost_of_products(small_model(vocab_size=512), tiny_store.path)) < 0.05


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

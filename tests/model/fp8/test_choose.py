"""Implementations of the products are compared, timed and chosen by what they do. Real ones, on the CPU."""

import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model.config import ConfigError, ModelConfig
from model.ops import measure
from model.ops.fp8 import choose
from model.ops.fp8.choose import CANDIDATES, Workload, agrees, choices, draw, kernels_for, workloads
from model.ops.fp8.kernels import Reference, multiply_by_tiles
from model.ops.fp8.products import (
    COLUMNS,
    EMULATION,
    GROUPS,
    IMPLEMENTATIONS,
    ROWS,
    WITHIN_GROUPS,
    Products,
    Shape,
    multiply,
)
from model.ops.fp8.quantize import E4M3, TILE, Quantized
from model.ops.fp8.vendor import scaled_mm
from model.transformer import Transformer
from tests.triton import NO_TRITON

CPU = torch.device("cpu")
WORK = Workload(Shape(ROWS, 144, 264, torch.float32), rows=40)
PRODUCTS = (ROWS, COLUMNS, GROUPS, WITHIN_GROUPS)

emulated = IMPLEMENTATIONS[EMULATION]


def by_tiles(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    return multiply_by_tiles(a, b).to(dtype)


def slow(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    time.sleep(0.01)
    return by_tiles(a, b, dtype)


def last_row_forgotten(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    product = by_tiles(a, b, dtype)
    product[-1] = 0
    return product


def not_a_number(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    return by_tiles(a, b, dtype) * float("nan")


def fails(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    raise ValueError("no such shape\nand more")


@pytest.fixture
def implementations(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (by_tiles, slow, last_row_forgotten, not_a_number, fails):
        monkeypatch.setitem(IMPLEMENTATIONS, function.__name__, Products(function, None, None))


def test_the_fastest_of_those_that_are_right_is_chosen_and_the_log_says_why(implementations: None) -> None:
    names = ("last_row_forgotten", "slow", "by_tiles", "not_a_number", "fails", "deep_gemm")
    choice, (line,) = choices([WORK], names, CPU)
    assert choice == {WORK.shape: "by_tiles"}
    assert line.startswith("fp8 rows × blocks [40×144×264] to float32: last_row_forgotten – (wrong), slow 0.000")
    assert line.endswith("→ by_tiles")
    for name, why in {"not_a_number": "wrong", "fails": "ValueError: no such shape", "deep_gemm": "not here"}.items():
        assert f"{name} – ({why})" in line


def test_a_product_that_nobody_computes_is_refused_with_every_reason(implementations: None) -> None:
    with pytest.raises(
        ConfigError, match=r"rows × blocks \[40×144×264\].*fails: ValueError: no such.*deep_gemm: not here"
    ):
        choices([WORK], ("fails", "deep_gemm"), CPU)


@pytest.mark.parametrize("product", PRODUCTS)
def test_every_product_can_be_measured(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROUNDS", 1)
    work = Workload(Shape(product, 40, 48, torch.bfloat16), rows=50, groups=3 if "grouped" in product else 1)
    choice, (line,) = choices([work], (EMULATION,), CPU)
    assert choice == {work.shape: EMULATION} and product in line
    counts = draw(work, CPU)[2:]
    assert not counts or counts[0].tolist() == [17, 17, 16]


def test_rounding_to_bf16_is_no_error_and_one_wrong_row_is() -> None:
    product = torch.randn(30, 200, generator=torch.Generator().manual_seed(0))
    assert agrees(product.bfloat16(), product)
    wrong = product.clone()
    wrong[7] *= 1.02
    assert not agrees(wrong, product)
    assert not agrees(product[:-1], product)
    assert agrees(torch.zeros(2, 3), torch.zeros(2, 3)) and not agrees(torch.ones(2, 3), torch.zeros(2, 3))


def last_tile_with_its_neighbours_scale(x: Quantized) -> Quantized:
    return Quantized(x.data, torch.cat((x.scale[..., :-1], x.scale[..., -2:-1]), -1))


@pytest.mark.parametrize("product", [ROWS, COLUMNS])
@pytest.mark.parametrize("of_a", [True, False])
def test_one_wrong_scale_of_a_long_sum_is_no_rounding(
    of_a: bool, product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = 128 * TILE
    shape = Shape(product, 256, 192 if product == COLUMNS else length, torch.bfloat16)
    a, b = draw(Workload(shape, rows=length if product == COLUMNS else 64), CPU)
    expected = multiply(a, b, torch.float32, EMULATION)
    assert agrees(multiply(a, b, torch.bfloat16, EMULATION), expected)
    monkeypatch.setattr(choose, "LARGEST_ERROR", 3 * choose.LARGEST_ERROR)  # and seen by far
    wrong = (last_tile_with_its_neighbours_scale(a), b) if of_a else (a, last_tile_with_its_neighbours_scale(b))
    assert not agrees(multiply(*wrong, torch.bfloat16, EMULATION), expected)


def test_chosen_products_compute_what_was_chosen_and_others_the_default(
    implementations: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, (a, b) = Reference(), draw(WORK, CPU)
    kernels.choice = {WORK.shape: "fails"}
    with pytest.raises(ValueError, match="no such shape"):
        kernels.multiply(a, b, torch.float32)
    expected = multiply(a, b, torch.bfloat16, EMULATION)
    assert kernels.multiply(a, b, torch.bfloat16).equal(expected)  # another dtype, another shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("q_lora_rank", [40, None])
def test_every_product_of_a_step_is_measured_before_it(
    q_lora_rank: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a model multiplies by is what `workloads` says, and nothing else is."""
    config = ModelConfig(
        vocab_size=32, hidden_size=48, intermediate_size=80, moe_intermediate_size=24, num_hidden_layers=2,
        num_nextn_predict_layers=0, num_attention_heads=2, n_shared_experts=1, n_routed_experts=4, routed_scaling_factor=2.5,
        kv_lora_rank=16, q_lora_rank=q_lora_rank, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, n_group=1, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=1, max_position_embeddings=64,
    )  # fmt: skip
    kernels = Reference()
    model = Transformer(config, compute_dtype=dtype, fp8=kernels)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    work = workloads(model, 64, 128, parts=2, dtype=dtype)
    assert {(w.rows, w.groups) for w in work} == {(64, 1), (128, 2)}
    asked = set()
    for name, product in {"multiply": ROWS, "multiply_groups": GROUPS, "multiply_within_groups": WITHIN_GROUPS}.items():
        monkeypatch.setattr(kernels, name, partial(record, asked, product, getattr(kernels, name)))
    tokens = torch.zeros(1, 65, dtype=torch.int64)
    losses = model(tokens, torch.zeros_like(tokens)).losses
    losses.objective(losses.counts, 1, 0.3, 1e-2).backward()
    assert asked == {w.shape for w in work} and len(work) == len(asked)


def record(asked: set, product: str, run, a: Quantized, b: Quantized, *rest):
    in_columns = product == ROWS and len(b.scale) == len(b.data)
    if in_columns or product == WITHIN_GROUPS:
        asked.add(Shape(COLUMNS if in_columns else product, len(a.data), len(b.data), rest[-1]))
    else:
        asked.add(Shape(product, b.data.shape[-2], b.data.shape[-1], rest[-1]))
    return run(a, b, *rest)


def test_a_cpu_emulates_and_a_gpu_without_triton_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = kernels_for(CPU)
    assert isinstance(kernels, Reference)
    said = choose.choose(kernels, CPU, list, lambda action: action())
    assert said == ["fp8: emulated in plain PyTorch on this CPU"]
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"precision\.fp8 = true: needs Triton.*pip install 'rorqual\[kernels\]'"):
        kernels_for(torch.device("cuda"))


def test_the_first_rank_measures_for_all(implementations: None, monkeypatch: pytest.MonkeyPatch) -> None:
    there = ({WORK.shape: "by_tiles"}, ["a line"])  # what the first rank found
    monkeypatch.setattr(choose, "choices", lambda *_: pytest.fail("this rank measured"))
    kernels = Reference()
    assert choose.choose(kernels, torch.device("cuda"), lambda: [WORK], lambda action: there) == ["a line"]
    assert kernels.choice == there[0]
    monkeypatch.delitem(IMPLEMENTATIONS, "by_tiles")
    with pytest.raises(ConfigError, match="first rank multiplies by by_tiles, which is not installed on this one"):
        choose.choose(kernels, torch.device("cuda"), lambda: [WORK], lambda action: there)


def test_candidates_are_implementations_by_their_names() -> None:
    pytest.importorskip("triton", reason=NO_TRITON)
    from model.ops.fp8.triton import TritonKernels

    assert TritonKernels().default in CANDIDATES
    assert IMPLEMENTATIONS.keys() - {EMULATION} >= set(CANDIDATES) - {"deep_gemm"}  # which may not be installed


@pytest.mark.parametrize(("m", "k"), [(256, 512), (255, 640), (3, 128)])
@pytest.mark.parametrize("product", [ROWS, COLUMNS])
def test_scaled_mm_takes_the_layouts_that_it_is_given(
    m: int, k: int, product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch checks shapes and strides of a GPU's product also where there is no GPU."""
    n, on_gpu = 384, F.scaled_mm
    rows = k if product == COLUMNS else m
    a, b = draw(
        Workload(Shape(product, m if product == COLUMNS else n, n if product == COLUMNS else k, E4M3), rows), CPU
    )

    def check(*given: Any, output_dtype: torch.dtype) -> Tensor:
        with FakeTensorMode():
            as_there = [
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") if isinstance(x, Tensor) else x
                for x in given
            ]
            shape = on_gpu(*as_there, output_dtype=output_dtype).shape
        return torch.empty(shape, dtype=output_dtype)

    monkeypatch.setattr(F, "scaled_mm", check)
    found = scaled_mm(a, b, torch.bfloat16)
    assert found.shape == (m, n) and found.dtype == torch.bfloat16

"""The experts' products, SwiGLU and the sums of rows, and the function made of them, against plain references."""

import pytest
import torch
from torch import Tensor

from model.ops.experts import experts, reference_experts
from model.ops.grouped_mm import multiply_groups, multiply_within_groups, reference_grouped_mm
from model.ops.routing import sort_by_expert
from model.ops.rows import reference_spread_rows, reference_sum_rows, spread_rows, sum_rows
from model.ops.swiglu import reference_swiglu, swiglu, swiglu_linear
from tests.devices import DEVICES

# name: rows of each expert, in, out
GROUPS = {
    "all busy": ([5, 3, 40, 2], 12, 8),
    "odd widths": ([5, 13, 4], 37, 75),
    "one takes all": ([0, 130, 0, 0], 16, 33),
    "empty in front and behind": ([0, 7, 0, 7, 0], 20, 5),
    "more than a block of terms and columns": ([3, 300], 530, 70),
    "no rows": ([0, 0], 8, 12),
}


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def agree(ours: Tensor, exact: Tensor) -> None:
    """fp32 against fp64, to roundings of the largest number."""
    size = float(exact.abs().max()) if exact.numel() else 0.0
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2e-6 * size)


@pytest.mark.parametrize("indexed", [False, True], ids=["rows", "rows by index"])
@pytest.mark.parametrize("name", GROUPS)
def test_the_three_products_of_a_grouped_map_are_those_of_each_expert(name, indexed, threads):
    counts, width, out = GROUPS[name]
    n = torch.tensor(counts)
    index = torch.randint(0, 9, (sum(counts),)) if indexed else None
    x = torch.randn(9, width) if indexed else torch.randn(sum(counts), width)
    dy, w = torch.randn(sum(counts), out), torch.randn(len(counts), out, width)
    rows = x if index is None else x[index]
    exact = [t.double().requires_grad_() for t in (rows, w)]
    y = reference_grouped_mm(*exact, n)
    agree(multiply_groups(x, index, w, n), y.detach())
    dx, dw = torch.autograd.grad(y, exact, dy.double())
    agree(multiply_groups(dy, None, w.mT, n), dx)
    agree(multiply_within_groups(dy, None, x, index, n), dw)
    agree(multiply_within_groups(x, index, dy, None, n), dw.mT)


def test_products_take_rows_that_lie_apart_and_write_the_same_bits_with_any_number_of_threads():
    x, dy, w = torch.randn(300, 100)[:, 3:80], torch.randn(300, 90)[:, :70], torch.randn(4, 70, 77)
    counts, found = torch.tensor([20, 0, 249, 31]), []
    before = torch.get_num_threads()
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        found.append((multiply_groups(x, None, w, counts), multiply_within_groups(dy, None, x, None, counts)))
    torch.set_num_threads(before)
    agree(found[0][0], reference_grouped_mm(x.double(), w.double(), counts))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_reference_grouped_mm_gives_each_row_its_own_expert():
    x, weight = torch.randn(5, 4), torch.randn(3, 8, 4)
    out = reference_grouped_mm(x, weight, torch.tensor([2, 0, 3]))
    for row, expert in enumerate([0, 0, 2, 2, 2]):
        torch.testing.assert_close(out[row], weight[expert] @ x[row])


def with_gradients(function, inputs, upstream):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def compare(function, reference, inputs, shape):
    """Values and gradients: fp32 against the reference in fp64; and the function itself in fp64."""
    upstream = torch.randn(shape)
    in_double = [t.double() for t in inputs]
    exact = with_gradients(reference, in_double, upstream)
    for ours, expected in zip(with_gradients(function, inputs, upstream), exact):
        agree(ours, expected)
    for ours, expected in zip(with_gradients(function, in_double, upstream), exact):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("weighted", [False, True], ids=["no weights", "weights"])
@pytest.mark.parametrize("joined", [False, True], ids=["two", "one"])
def test_swiglu_equals_the_reference_in_values_and_gradients(joined, weighted, threads):
    inputs = [5 * torch.randn(7, 38)] if joined else [5 * torch.randn(7, 19), torch.randn(7, 19)]
    given = [*inputs, torch.rand(7)] if weighted else inputs

    def call(function):
        return lambda *a: function(a[0], None if joined else a[1], a[-1] if weighted else None)

    compare(call(swiglu), call(reference_swiglu), given, (7, 19))


def test_swiglu_stays_finite_where_the_gate_is_large():
    gate = torch.tensor([[-1e4, -100.0, -88.0, 0.0, 88.0, 100.0, 1e4]])
    found = with_gradients(swiglu, (gate, torch.ones_like(gate)), torch.ones_like(gate))
    for ours, expected in zip(found, with_gradients(reference_swiglu, (gate, torch.ones_like(gate)), torch.ones(1, 7))):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)


def test_swiglu_before_a_linear_map_is_both():
    inputs = torch.randn(2, 5, 19), torch.randn(2, 5, 19), torch.randn(6, 19)
    compare(swiglu_linear, lambda g, u, w: reference_swiglu(g, u) @ w.T, inputs, (2, 5, 6))


@pytest.mark.parametrize("k", [1, 3])
def test_sums_of_rows_equal_the_reference_in_values_and_gradients(k, threads):
    place = torch.randperm(11 * k).view(11, k)
    compare(lambda r: sum_rows(r, place), lambda r: reference_sum_rows(r, place), [torch.randn(11 * k, 21)], (11, 21))
    compare(
        lambda t: spread_rows(t, place), lambda t: reference_spread_rows(t, place), [torch.randn(11, 21)], (11 * k, 21)
    )


@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize(
    ("tokens", "k", "count", "used"), [(50, 3, 8, 8), (40, 2, 6, 2), (7, 1, 5, 1), (1, 4, 4, 4)],
    ids=["all busy", "some idle", "one takes all", "one token"],
)  # fmt: skip
def test_experts_equal_the_reference_in_values_and_gradients(tokens, k, count, used, weighted):
    dim, width = 37, 19
    ids = torch.rand(tokens, used).argsort(-1)[:, :k]
    order, place, counts = sort_by_expert(ids, count)
    weights = [torch.rand(tokens * k)] if weighted else []
    inputs = [torch.randn(tokens, dim), torch.randn(count, 2 * width, dim), torch.randn(count, dim, width), *weights]

    def call(function):
        return lambda x, gate_up, down, *w: function(x, order // k, place, counts, w[0] if w else None, gate_up, down)

    compare(call(experts), call(reference_experts), inputs, (tokens, dim))


@pytest.mark.parametrize("place", DEVICES)
def test_experts_in_bf16_equal_the_reference_and_an_idle_one_has_no_gradient(place):
    tokens, k, count, dim, width = 50, 3, 6, 32, 16
    ids = torch.rand(tokens, count - 1).argsort(-1)[:, :k].to(place)  # nobody goes to the last
    order, pairs, counts = sort_by_expert(ids, count)
    shapes = ((tokens, dim), (count, 2 * width, dim), (count, dim, width))
    inputs = [torch.randn(shape).bfloat16().to(place) for shape in shapes]
    weights, dy = torch.rand(tokens * k, device=place), torch.randn(tokens, dim, device=place)

    def call(function):
        return lambda x, gate_up, down, w: function(x, order // k, pairs, counts, w, gate_up, down)

    found = with_gradients(call(experts), [*inputs, weights], dy)
    exact = with_gradients(call(reference_experts), [t.double() for t in (*inputs, weights)], dy.bfloat16())
    for ours, expected in zip(found, exact):
        assert (ours.double() - expected).norm() < 0.02 * expected.norm()
    _, _, d_gate_up, d_down, _ = found
    assert not d_gate_up[-1].any() and not d_down[-1].any()


def test_experts_keep_their_input_and_what_gate_and_up_gave_out():
    order, place, counts = sort_by_expert(torch.rand(50, 8).argsort(-1)[:, :3], 8)
    x, weights = torch.randn(50, 32, requires_grad=True), torch.rand(150)
    index, gate_up, down = order // 3, torch.randn(8, 2 * 16, 32), torch.randn(8, 32, 16)
    given = {t.untyped_storage().data_ptr() for t in (x, index, place, counts, weights, gate_up, down)}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        experts(x, index, place, counts, weights, gate_up, down)
    new = [t for t in kept if t.untyped_storage().data_ptr() not in given]
    assert [t.shape for t in new] == [(150, 32)]

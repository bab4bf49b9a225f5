"""Each fast operation against its plain reference: values and gradients, and what it must not allocate."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import ConfigError
from model.ops import cross_entropy
from model.ops.cross_entropy import linear_cross_entropy, reference_cross_entropy
from model.ops.grouped_mm import check_widths, fused_grouped_mm, reference_grouped_mm
from model.ops.rms_norm import reference_rms_norm, rms_norm
from model.ops.swiglu import reference_swiglu, swiglu


def leaves(*shapes):
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def gradients(output, inputs, seed=1):
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
    return torch.autograd.grad(output, inputs, upstream.to(output.dtype))


# grouped matrix product -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counts",
    [[5, 3, 4, 2], [0, 14, 0, 0], [7, 0, 0, 7], [0, 0, 0, 14], [0, 0, 0, 0]],
    ids=["all busy", "one busy", "two empty", "last only", "no rows"],
)
def test_grouped_mm_equals_the_loop_in_values_and_gradients(counts):
    x, weight = leaves((sum(counts), 12), (4, 8, 12))
    n = torch.tensor(counts)
    fast, slow = fused_grouped_mm(x, weight, n), reference_grouped_mm(x, weight, n)
    torch.testing.assert_close(fast, slow)
    for a, b in zip(gradients(fast, (x, weight)), gradients(slow, (x, weight))):
        torch.testing.assert_close(a, b)


def test_reference_grouped_mm_gives_each_row_its_own_expert():
    x, weight = torch.randn(5, 4), torch.randn(3, 8, 4)
    out = reference_grouped_mm(x, weight, torch.tensor([2, 0, 3]))
    for row, expert in enumerate([0, 0, 2, 2, 2]):
        torch.testing.assert_close(out[row], weight[expert] @ x[row])


# cross-entropy --------------------------------------------------------------------------------------------------------

TOKENS, WIDTH, VOCABULARY = 23, 16, 40


@pytest.fixture
def head():
    """hidden [N, D], weight [V, D], labels [N] with some −100."""
    hidden, weight = leaves((TOKENS, WIDTH), (VOCABULARY, WIDTH))
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    labels[::5] = -100
    return hidden, weight, labels


def full_cross_entropy(hidden, weight, labels):
    return F.cross_entropy(hidden @ weight.T, labels, reduction="sum")


@pytest.mark.parametrize("rows", [1, 7, 23, 100])
@pytest.mark.parametrize("loss", [linear_cross_entropy, reference_cross_entropy])
def test_cross_entropy_equals_torch_for_any_chunk(head, monkeypatch, loss, rows):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * VOCABULARY * rows)  # 7 and 100 do not divide 23
    hidden, weight, _ = head
    ours, torchs = loss(*head), full_cross_entropy(*head)
    torch.testing.assert_close(ours, torchs)
    # a non-1 gradient from above must scale both
    for a, b in zip(
        torch.autograd.grad(-2.5 * ours, (hidden, weight)), torch.autograd.grad(-2.5 * torchs, (hidden, weight))
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("which", [0, 1], ids=["hidden", "weight"])
def test_cross_entropy_serves_one_input_alone(head, which):
    expected = torch.autograd.grad(full_cross_entropy(*head), head[which])[0]
    inputs = [tensor if index == which else tensor.detach() for index, tensor in enumerate(head)]
    torch.testing.assert_close(torch.autograd.grad(linear_cross_entropy(*inputs), inputs[which])[0], expected)


def test_cross_entropy_of_no_target_is_zero_with_zero_gradients(head):
    hidden, weight, labels = head
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


def test_cross_entropy_survives_large_logits(head):
    hidden, weight, labels = head
    hidden = (1e3 * hidden).detach().requires_grad_()
    ours, torchs = linear_cross_entropy(hidden, weight, labels), full_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(ours, torchs)
    torch.testing.assert_close(torch.autograd.grad(ours, hidden), torch.autograd.grad(torchs, hidden))


def test_cross_entropy_in_bf16_keeps_fp32_sums_and_fp32_head_gradients(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * VOCABULARY * 6)
    hidden = torch.randn(TOKENS, WIDTH).bfloat16().requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH).bfloat16().float().requires_grad_()  # an fp32 master weight
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    share = 1 / 300  # not a bf16 number: rounding it would scale the gradient of the hidden states by 1.0016
    ours = linear_cross_entropy(hidden, weight, labels)
    exact = full_cross_entropy(hidden.float(), weight, labels)
    reference = reference_cross_entropy(hidden, weight, labels)
    d_ours, d_exact = (torch.autograd.grad(share * loss, (hidden, weight)) for loss in (ours, exact))
    assert [d.dtype for d in d_ours] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours, exact, rtol=2e-3, atol=0)
    for a, b in zip(d_ours, d_exact):
        assert (a.float() - b).norm() < 5e-3 * b.norm()
        projection = (a.float() * b).sum() / b.square().sum()  # 1 where errors are rounding and not a common factor
        assert abs(projection - 1) < 7e-4


class Allocations(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_the_full_logits_never_exist(monkeypatch):
    tokens, vocabulary, width = 256, 512, 8
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * vocabulary * 32)
    hidden, weight = leaves((tokens, width), (vocabulary, width))
    labels = torch.randint(0, vocabulary, (tokens,))
    largest = {}
    for loss in (linear_cross_entropy, reference_cross_entropy):
        with Allocations() as seen:
            loss(hidden, weight, labels).backward()
        largest[loss] = seen.largest
    assert largest[linear_cross_entropy] == 32 * vocabulary  # one chunk
    assert largest[reference_cross_entropy] == tokens * vocabulary  # the recorder would have seen them


def test_cross_entropy_without_gradients_computes_none():
    """Evaluation must not pay for the head's gradient, [V, D] in fp32."""
    hidden, weight = torch.randn(8, 4), torch.randn(1000, 4, requires_grad=True)
    with torch.no_grad(), Allocations() as seen:
        linear_cross_entropy(hidden, weight, torch.zeros(8, dtype=torch.int64))
    assert seen.largest == 8 * 1000  # the logits of the chunk: with a gradient, dz.T @ h would be there too
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            products.append(func.name())
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Products():
        linear_cross_entropy(hidden, weight, torch.zeros(8, dtype=torch.int64))
    assert sum(name.startswith(("aten::mm", "aten::addmm")) for name in products) == 1  # the logits


@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 4), (torch.bfloat16, 8)])
def test_a_width_that_the_grouped_product_cannot_read_is_refused(dtype, step):
    """Rows of 16 bytes: multiples of 4 numbers in fp32, of 8 in bf16."""
    check_widths(8 * step, 3 * step, dtype)
    with pytest.raises(ConfigError, match=rf"moe_intermediate_size: {3 * step + 2} .* write {4 * step}$"):
        check_widths(8 * step, 3 * step + 2, dtype)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])  # at 1e-3 eps is as large as the mean square
def test_rms_norm_equals_the_reference_in_values_and_gradients(scale):
    x = (scale * torch.randn(3, 5, 24)).requires_grad_()
    weight = torch.randn(24, requires_grad=True)
    upstream = torch.randn(3, 5, 24)
    _assert_equal_with_gradients(rms_norm, reference_rms_norm, (x, weight), upstream, eps=1e-6)


def test_swiglu_equals_the_reference_in_values_and_gradients():
    gate, up = (4 * torch.randn(7, 2 * 12, requires_grad=True)).chunk(
        2, dim=-1
    )  # halves of one product, as in the experts
    _assert_equal_with_gradients(swiglu, reference_swiglu, (gate, up), torch.randn(7, 12))


def _assert_equal_with_gradients(op, reference, inputs, upstream, **options):
    values, gradients = [], []
    for function in (op, reference):
        values.append(function(*inputs, **options))
        gradients.append(torch.autograd.grad(values[-1], inputs, upstream, retain_graph=True))
    torch.testing.assert_close(*values)
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))

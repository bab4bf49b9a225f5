"""The head's loss in chunks: values and gradients of the full logits', in every way that it is computed."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model.ops import cpu, cross_entropy
from model.ops.cross_entropy import (
    heads_cross_entropy,
    linear_cross_entropy,
    reference_cross_entropy,
    reference_softmax_loss_,
)
from tests.devices import DEVICES

TOKENS, WIDTH, VOCABULARY = 23, 16, 40


@pytest.fixture
def head():
    """hidden [N, D], weight [V, D], labels [N] with some −100."""
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    labels[::5] = -100
    return hidden, weight, labels


@pytest.fixture(params=["C++", "PyTorch"], autouse=True)
def compiled(request, monkeypatch):
    """On a CPU the whole of it is one kernel, where there is a compiler."""
    if request.param == "PyTorch":
        monkeypatch.setattr(cpu, "library", lambda _: None)
    return request.param == "C++"


def chunks_of(rows, vocabulary, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * vocabulary * rows)
    monkeypatch.setattr(cross_entropy, "CPU_ROWS", 1)
    monkeypatch.setattr(cross_entropy, "GPU_ROWS", 1)


def full_cross_entropy(hidden, weight, labels):
    return F.cross_entropy(hidden @ weight.T, labels, reduction="sum")


@pytest.mark.parametrize("rows", [1, 7, 23, 100])
@pytest.mark.parametrize("loss", [linear_cross_entropy, reference_cross_entropy])
def test_cross_entropy_equals_torch_for_any_chunk(head, monkeypatch, loss, rows):
    chunks_of(rows, VOCABULARY, monkeypatch)  # 7 and 100 do not divide 23
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


@pytest.mark.parametrize("place", DEVICES)
def test_cross_entropy_in_bf16_keeps_fp32_sums_and_fp32_head_gradients(monkeypatch, place):
    chunks_of(6, VOCABULARY, monkeypatch)
    hidden = torch.randn(TOKENS, WIDTH).bfloat16().to(place).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH).bfloat16().float().to(place).requires_grad_()  # an fp32 master weight
    labels = torch.randint(0, VOCABULARY, (TOKENS,), device=place)
    share = 1 / 300  # not a bf16 number: rounding it would scale the gradient of the hidden states by 1.0016
    ours = linear_cross_entropy(hidden, weight, labels)
    exact = full_cross_entropy(hidden.float(), weight, labels)
    reference = reference_cross_entropy(hidden, weight, labels)
    d_ours, d_exact = (torch.autograd.grad(share * loss, (hidden, weight)) for loss in (ours, exact))
    assert [d.dtype for d in d_ours] == [torch.bfloat16, torch.float32]
    # on a GPU the product of a chunk may add in another order than that of all tokens, and round otherwise
    torch.testing.assert_close(ours, reference, rtol=1e-6 if place == "cpu" else 1e-3, atol=0)
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


def test_the_full_logits_never_exist(monkeypatch, compiled):
    tokens, vocabulary, width = 256, 512, 8
    chunks_of(32, vocabulary, monkeypatch)
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    labels = torch.randint(0, vocabulary, (tokens,))
    largest = {}
    for loss in (linear_cross_entropy, reference_cross_entropy):
        with Allocations() as seen:
            loss(hidden, weight, labels).backward()
        largest[loss] = seen.largest
    chunk = 32 * vocabulary
    # The kernel's logits lie 16 numbers further apart; beside them lie two copies of the chunk's hidden states, 32 wide, and sums.
    assert largest[linear_cross_entropy] <= (chunk if not compiled else 48 * vocabulary + 32 * (width + 32 + 2 * 4 + 1))
    assert largest[reference_cross_entropy] == tokens * vocabulary  # the recorder would have seen them


def test_without_gradients_none_is_computed(compiled):
    """Evaluation must not pay for the head's gradient, [V, D] in fp32."""
    hidden, weight = torch.randn(8, 4), torch.randn(1000, 4, requires_grad=True)
    products = []

    class Products(Allocations):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            products.append(func.name())
            return super().__torch_dispatch__(func, types, args, kwargs)

    with torch.no_grad(), Products() as seen:
        linear_cross_entropy(hidden, weight, torch.zeros(8, dtype=torch.int64))
    if compiled:
        assert "rorqual::head_with_loss" in products
        return
    assert seen.largest == 8 * 1000  # the logits of the chunk: with a gradient, dz.T @ h would be there too
    assert sum(name.startswith(("aten::mm", "aten::addmm")) for name in products) == 1  # the logits


def heads(dtype=torch.float32):
    """Hidden states and labels of a main head and two MTP depths, the second without any target, and a weight."""
    hidden = [torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_() for _ in range(3)]
    labels = [torch.randint(0, VOCABULARY, (TOKENS,)) for _ in range(3)]
    labels[1][::3] = -100
    labels[2][:] = -100
    return hidden, torch.randn(VOCABULARY, WIDTH, requires_grad=True), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_share_one_gradient_and_each_counts_what_the_objective_says(dtype):
    hidden, weight, labels = heads(dtype)
    coefficients = torch.tensor([1 / 23, 0.15 / 15, 0.15])
    ours = heads_cross_entropy(hidden, weight, labels, coefficients)
    each = torch.stack([reference_cross_entropy(h, weight, y) for h, y in zip(hidden, labels)])
    torch.testing.assert_close(ours, each)
    upstream = 64 * coefficients  # any common factor
    found = torch.autograd.grad(ours, (weight, *hidden), upstream)
    expected = torch.autograd.grad(each, (weight, *hidden), upstream)
    rounding = 1e-6 if dtype == torch.float32 else 1e-2
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=10 * rounding, atol=float(rounding * b.abs().max()))


def test_heads_that_count_something_else_than_was_said_have_no_gradient():
    hidden, weight, labels = heads()
    ours = heads_cross_entropy(hidden, weight, labels, torch.tensor([1.0, 0.3, 0.3]))
    found = torch.autograd.grad(ours, (weight, *hidden), torch.tensor([1.0, 0.3, 0.2]))
    assert all(gradient.isnan().all() for gradient in found)


def test_one_chunk_of_many_blocks_of_the_vocabulary_equals_float64():
    """300 words are two blocks of the kernel and a part of one, 40 columns and 70 rows a panel and a part."""
    hidden, weight = torch.randn(70, 40, requires_grad=True), torch.randn(300, 40, requires_grad=True)
    labels = torch.randint(0, 300, (70,))
    labels[3] = -100
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    ours, theirs = linear_cross_entropy(hidden, weight, labels), full_cross_entropy(*exact, labels)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0)
    for a, b in zip(torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(theirs, exact)):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=float(1e-6 * b.abs().max()))


@pytest.mark.parametrize("compiled", [True], indirect=True)
def test_the_number_of_threads_changes_no_bit(compiled):
    hidden, weight = torch.randn(70, 40, requires_grad=True), torch.randn(1000, 40, requires_grad=True)
    labels, found = torch.randint(0, 1000, (70,)), []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        loss = linear_cross_entropy(hidden, weight, labels)
        found.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("compiled", [False], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_the_triton_kernel_equals_its_twin(device, monkeypatch, dtype, with_gradient, compiled):
    """300 logits in blocks of 128: two and a part."""
    from model.ops.triton import cross_entropy as kernel

    monkeypatch.setattr(kernel, "BLOCK", 128)
    logits = (10 * torch.randn(9, 300, device=device)).to(dtype)
    labels = torch.randint(0, 300, (9,), device=device)
    labels[4] = -100
    ratio = torch.tensor(0.3, device=device)
    ours, theirs = logits.clone(), logits.clone()
    found = kernel.softmax_loss_(ours, labels, ratio, with_gradient)
    torch.testing.assert_close(found, reference_softmax_loss_(theirs, labels, ratio, with_gradient))
    if with_gradient:
        torch.testing.assert_close(ours, theirs)
    else:
        assert torch.equal(ours, logits)

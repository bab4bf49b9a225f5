"""The reference against the equation, and PyTorch's kernels against the reference."""

import pytest
import torch

from model.ops.attention import document_starts, reference_attention, sdpa_attention
from model.rope import Rotation, rotate
from tests.model.attention.inputs import make_inputs, of_last, starts_of

PACKED = pytest.mark.parametrize("starts", [None, starts_of([5, 1, 7, 4], [17])], ids=["causal", "documents"])


def test_the_reference_is_the_equation():
    q, kv, k_rope, rotation = make_inputs(B=1, T=5, H=2, requires_grad=False)
    out = reference_attention(q, kv, k_rope, rotation, 0.5)
    for head in range(2):
        for i in range(5):

            def turned(x, t):
                return rotate(x, Rotation(rotation.cos[t], rotation.sin[t]))

            query = torch.cat((q[0, i, head, :8], turned(q[0, i, head, 8:], i)))
            keys = [torch.cat((kv[0, j, head, :8], turned(k_rope[0, j], j))) for j in range(i + 1)]
            weights = torch.stack([torch.exp(0.5 * query @ key) for key in keys])
            expected = sum(w * kv[0, j, head, 8:] for j, w in enumerate(weights)) / weights.sum()
            torch.testing.assert_close(out[0, i, head], expected)


@pytest.mark.parametrize("queries", [1, 8, 16])
@PACKED
def test_fewer_queries_are_the_last_ones_and_have_the_gradients_of_the_last_rows(starts, queries):
    *inputs, rotation = make_inputs()
    q, *others = inputs
    upstream = torch.randn(2, queries, 3, 6)
    out = reference_attention(q[:, -queries:], *others, rotation, 0.3, of_last(starts, queries))
    rows = reference_attention(*inputs, rotation, 0.3, starts)[:, -queries:]
    torch.testing.assert_close(out, rows)
    for a, b in zip(torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(rows, inputs, upstream)):
        torch.testing.assert_close(a, b)


def test_a_document_is_a_run_of_equal_numbers():
    documents = torch.tensor([[7, 7, 9, -1, -1], [3, 3, 3, 3, 3]])
    starts = document_starts(documents)
    assert starts.dtype == torch.int32
    assert starts.tolist() == [[0, 0, 2, 3, 3], [0] * 5]


@pytest.mark.parametrize("queries", [17, 8, 1])
@pytest.mark.parametrize("width", [6, 12, 16], ids=["v narrower", "v equal", "v wider"])
@PACKED
def test_sdpa_equals_the_reference_in_values_and_gradients(starts, width, queries):
    *inputs, rotation = make_inputs(v=width, queries=queries)
    given = (*inputs, rotation, 0.3, of_last(starts, queries))
    fast, slow = (backend(*given) for backend in (sdpa_attention, reference_attention))
    assert fast.shape == (2, queries, 3, width)
    torch.testing.assert_close(fast, slow, atol=2e-6, rtol=1e-5)
    upstream = torch.randn_like(slow)
    for a, b in zip(torch.autograd.grad(fast, inputs, upstream), torch.autograd.grad(slow, inputs, upstream)):
        torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-5)


def test_packed_documents_are_what_each_is_alone():
    """Rotary positions are relative, so that a document need not begin at position 0."""
    q, kv, k_rope, rotation = make_inputs(B=1, T=9, requires_grad=False)
    packed = reference_attention(q, kv, k_rope, rotation, 0.5, starts_of([4, 2, 3]))
    for first, last in ((0, 4), (4, 6), (6, 9)):
        there = Rotation(rotation.cos[: last - first], rotation.sin[: last - first])
        part = slice(first, last)
        alone = reference_attention(q[:, part], kv[:, part], k_rope[:, part], there, 0.5)
        torch.testing.assert_close(packed[:, part], alone)

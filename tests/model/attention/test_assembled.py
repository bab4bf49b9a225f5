"""Kernels of assembled queries, keys and values against the reference: values and every gradient."""

from weakref import ref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

from model.ops.attention import reference_attention
from model.ops.attention.assembled import (
    Assembled,
    additive_mask,
    assemble,
    assemble_backward_operation,
    assemble_operation,
    sdpa,
)
from model.ops.attention.choose import CANDIDATES
from model.ops.attention.once import once_per_batch
from model.ops.attention.reference import assemble as reference_assemble
from model.rope import Rotation
from tests.model.attention.inputs import make_inputs, of_last, starts_of
from tests.triton import NO_TRITON

# B, T, H, nope, rope, v: powers of two as V3's, and none; more heads than a program takes at a time, and fewer; queries
SHAPES = [((2, 5, 3, 8, 4, 8), 5), ((2, 5, 3, 8, 4, 8), 2), ((1, 3, 19, 6, 10, 5), 3), ((2, 2, 16, 16, 8, 12), 1)]
PIECES = pytest.mark.parametrize("queries", [17, 8, 1])


def heads_first(x):
    """[B, T, H, …] as some kernels of attention hand it out."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def gradients(outputs, inputs, upstream):
    return torch.autograd.grad(outputs, inputs, upstream)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape, queries", SHAPES)
def test_assembling_is_the_reference_with_gradients(shape, queries, padded):
    *inputs, rotation = make_inputs(*shape, queries=queries)
    expected = [x.transpose(1, 2) for x in reference_assemble(*inputs, rotation)]
    width = expected[0].shape[-1] if padded else 0
    found = assemble(*inputs, rotation, width)
    v = shape[-1]
    assert found[2].shape[-1] == (width or v) and not found[2][..., v:].any()
    assert padded or found[2].untyped_storage().data_ptr() == inputs[1].untyped_storage().data_ptr()  # as it lies in kv
    found = (*found[:2], found[2][..., :v])
    upstream = [torch.randn_like(x) for x in expected]
    for a, b in zip(found, expected):
        assert torch.equal(a, b)
    for a, b in zip(gradients(found, inputs, upstream), gradients(expected, inputs, upstream)):
        torch.testing.assert_close(a, b)


def test_the_gradient_of_assembling_is_its_derivative():
    *inputs, rotation = make_inputs(1, 2, 2, 2, 4, 3, dtype=torch.float64, queries=1)
    # It turns in fp32, and is linear: a wide step loses nothing.
    assert torch.autograd.gradcheck(lambda *x: assemble(*x, rotation, 6), inputs, eps=0.1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, queries", SHAPES)
def test_triton_assembles_as_the_operations_do(shape, queries, dtype, padded, device):
    pytest.importorskip("triton", reason=NO_TRITON)
    from model.ops.triton import assemble as kernels

    *inputs, rotation = make_inputs(*shape, dtype=dtype, requires_grad=False, queries=queries)
    rope, v = shape[-2:]
    width = inputs[0].shape[-1] if padded else 0
    inputs[0] = heads_first(inputs[0])
    expected = assemble_operation(*inputs, *rotation, width)
    on_device = [x.to(device) for x in (*inputs, *rotation)]
    for a, b in zip(kernels.assemble(*on_device, width), expected):
        torch.testing.assert_close(a.cpu(), b)
    grads = [torch.randn(x.shape).to(dtype) for x in expected]
    grads[2] = torch.randn(*grads[1].shape[:-1], width or v).to(dtype)
    grads[1:] = map(heads_first, grads[1:])
    assert all(kernels.readable(x) is x for x in (*inputs, *grads))  # none is copied
    expected = assemble_backward_operation(*grads, *rotation, rope, v)
    found = kernels.assemble_backward(*(x.to(device) for x in grads), *on_device[3:], rope, v)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.cpu(), b)


@PIECES
@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("starts", [None, starts_of([5, 1, 7, 4], [17])], ids=["causal", "documents"])
def test_an_assembled_backend_equals_the_reference_in_values_and_gradients(starts, pads, queries):
    *inputs, rotation = make_inputs(queries=queries)
    starts = of_last(starts, queries)
    backend = Assembled(lambda *given: sdpa([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], *given), pads)
    fast, slow = (run(*inputs, rotation, 0.3, starts) for run in (backend, reference_attention))
    torch.testing.assert_close(fast, slow, atol=2e-6, rtol=1e-5)
    upstream = torch.randn_like(slow)
    for a, b in zip(gradients(fast, inputs, upstream), gradients(slow, inputs, upstream)):
        torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("starts, queries", [(None, 17), (None, 8), (starts_of([5, 1, 7, 4], [17]), 8)])
def test_the_compiler_takes_an_assembled_backend_whole(starts, pads, queries):
    *inputs, rotation = make_inputs(queries=queries)
    starts = of_last(starts, queries)
    backend = Assembled(lambda *given: sdpa([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], *given), pads)
    compiled = torch.compile(
        lambda q, kv, k_rope, *angles: backend(q, kv, k_rope, Rotation(*angles), 0.3, starts),
        backend="aot_eager",
        fullgraph=True,
    )
    found, expected = compiled(*inputs, *rotation), backend(*inputs, rotation, 0.3, starts)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    for a, b in zip(gradients(found, inputs, upstream), gradients(expected, inputs, upstream)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("queries", [4096, 1024])
@pytest.mark.parametrize("name", ["cudnn", "cudnn-padded", "sdpa-flash", "sdpa-efficient"])
def test_shapes_hold_on_a_gpu_at_the_sizes_of_v3(name, queries):
    """By PyTorch's check of shapes, without a GPU: neither which kernel it would take there, nor gradients."""
    with FakeTensorMode():
        q, kv, k_rope = (
            torch.empty(2, *width, device="cuda", dtype=torch.bfloat16)
            for width in ((queries, 128, 192), (4096, 128, 256), (4096, 64))
        )
        rotation = Rotation(*(torch.empty(4096, 32, device="cuda") for _ in range(2)))
        if queries < 4096 and "cudnn" in name:
            with pytest.raises(ValueError, match="it aligns queries with the first keys"):
                CANDIDATES[name]()(q, kv, k_rope, rotation, 0.1)
        else:
            assert CANDIDATES[name]()(q, kv, k_rope, rotation, 0.1).shape == (2, queries, 128, 128)
        turned, keys, values = assemble(q, kv, k_rope, rotation)
        assert turned.is_contiguous() and keys.is_contiguous() and values.stride() == kv.stride()
        grads = assemble_backward_operation(turned, keys, values, *rotation, 64, 128)
        assert [x.shape for x in grads] == [x.shape for x in (q, kv, k_rope)]


def test_the_mask_of_a_batch_is_made_once():
    starts = starts_of([2, 3])
    first = additive_mask(starts, 5, torch.float32)
    assert additive_mask(starts, 5, torch.float32) is first
    assert additive_mask(starts.clone(), 5, torch.float32) is not first
    assert additive_mask(starts, 5, torch.float64).dtype == torch.float64
    assert additive_mask(starts, 6, torch.float32).shape == (1, 1, 5, 6)


def test_what_is_made_of_two_pieces_is_kept_as_long_as_they_are_and_of_a_few_alone():
    made = []
    once = once_per_batch(lambda starts, how: made.append(how) or torch.ones(1))
    pieces = [starts_of([2, 3]) for _ in range(2)]
    for _ in range(3):  # layers
        results = [once(starts, how) for how, starts in enumerate(pieces)]
    assert made == [0, 1]
    gone = [ref(x) for x in (*pieces, *results)]
    del pieces, results
    assert [x() for x in gone] == [None] * 4
    many = [starts_of([5]) for _ in range(9)]
    of_many = [ref(once(x, 2)) for x in many]
    assert [x() is not None for x in of_many] == [False] * 5 + [True] * 4

"""Attention's kernel for a CPU against the reference: values and gradients, shapes that fill no block, documents anywhere."""

import pytest
import torch

from model.ops import cpu
from model.ops.attention import reference_attention, sdpa_attention
from model.ops.attention.cpu import attention, attention_backward, fused_attention
from model.ops.attention.reference import assemble, visible
from tests.model.attention.inputs import make_inputs, of_last, starts_of

WIDTHS = {
    "a number in each part": {"H": 1, "nope": 1, "rope": 2, "v": 1},
    "v narrower": {"H": 3, "nope": 8, "rope": 6, "v": 5},
    "the reference shape": {"H": 2, "nope": 32, "rope": 16, "v": 32},
    "v wider": {"H": 1, "nope": 4, "rope": 2, "v": 40},
    "V3's": {"H": 1, "nope": 128, "rope": 64, "v": 128},
}
DOCUMENTS = {
    1: [[1]],
    7: [[3, 4], [1] * 7],
    65: [[64, 1], [20, 1, 1, 43]],
    130: [[96, 34], [31, 1, 65, 1, 32]],  # a block has 96 queries, a panel 32 keys
    300: [[1] * 100 + [200], [150, 97, 53]],
}
PIECES = {
    7: 1,
    65: 33,
    130: 35,
    300: 101,
}  # queries: fewer than keys; the last document begins before them, and among them


def run(backend, inputs, rotation, starts, upstream):
    out = backend(*inputs, rotation, 0.3, starts)
    return [out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]


@pytest.mark.parametrize("packed", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("T, queries", [*((T, T) for T in DOCUMENTS), *PIECES.items()])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_the_kernel_equals_the_reference_in_values_and_gradients(widths, T, queries, packed):
    starts = of_last(starts_of(*DOCUMENTS[T]), queries) if packed else None
    *inputs, rotation = make_inputs(B=len(DOCUMENTS[T]), T=T, queries=queries, **widths)
    upstream = torch.randn(*inputs[0].shape[:3], widths["v"])
    exact = [x.detach().double().requires_grad_() for x in inputs]
    results = zip(
        run(fused_attention, inputs, rotation, starts, upstream),
        run(reference_attention, inputs, rotation, starts, upstream),
        run(reference_attention, exact, rotation, starts, upstream),
    )
    for ours, same, wide in results:
        assert ours.shape == wide.shape and ours.is_contiguous()
        size = wide.abs().max().item()
        torch.testing.assert_close(ours, same, rtol=0, atol=1e-5 * size + 1e-5)
        torch.testing.assert_close(ours, wide.float(), rtol=0, atol=4e-6 * size + 4e-6)


def test_the_log_sum_exp_is_that_of_the_scores():
    *inputs, rotation = make_inputs(T=70, requires_grad=False)
    q, kv, k_rope = inputs
    _, lse = attention(q, kv, k_rope, *rotation, 0.3, None)
    queries, keys, _ = assemble(q, kv, k_rope, rotation)
    scores = 0.3 * (queries @ keys.mT).masked_fill(~visible(None, 70, 70), float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1))


@pytest.mark.parametrize("shape", [{"T": 130}, {"T": 130, "queries": 50}, {"T": 40, "H": 5, "v": 20}])
def test_any_number_of_threads_gives_the_same_bits(shape):
    *inputs, rotation = make_inputs(**shape)
    upstream = torch.randn(*inputs[0].shape[:3], shape.get("v", 6))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(fused_attention, inputs, rotation, None, upstream))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


def test_it_reads_its_inputs_with_their_strides():
    *inputs, rotation = make_inputs(T=50, v=9)
    q, kv, k_rope = (x.detach() for x in inputs)
    upstream = torch.randn(2, 50, 3, 9)
    odd = [
        q.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat((kv, kv), -1)[..., : kv.shape[-1]],
        k_rope.mT.contiguous().mT,
    ]
    straight = [x.contiguous() for x in (q, kv, k_rope)]
    results = [
        run(fused_attention, [x.requires_grad_() for x in given], rotation, None, above)
        for given, above in ((odd, upstream.transpose(1, 2).contiguous().transpose(1, 2)), (straight, upstream))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("T", [60, 330])
def test_keys_of_the_future_and_of_other_documents_do_not_matter_at_all(T):
    """Nor do their values and the gradients from above: of two documents the second one's numbers grow a millionfold."""
    *inputs, rotation = make_inputs(T=T, requires_grad=False)
    upstream = torch.randn(*inputs[0].shape[:3], 6)
    for starts, same in (
        (starts_of([T // 2, T - T // 2], [T // 2, T - T // 2]), slice(None)),  # forward and backward
        (None, slice(1)),  # the future has gradients of its own: forward alone
    ):
        results = []
        for size in (1, 1e6):
            changed = [x.clone() for x in (*inputs, upstream)]
            for x in changed:
                x[:, T // 2 :] *= size
            leaves = [x.requires_grad_() for x in changed[:3]]
            results.append([x[:, : T // 2] for x in run(fused_attention, leaves, rotation, starts, changed[3])[same]])
        assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "kv", "k_rope"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_queries_that_see_it(which, bad):
    *inputs, rotation = make_inputs(B=1, T=100, requires_grad=False)
    inputs[which][0, 40, ..., 0] = bad
    expected = reference_attention(*inputs, rotation, 0.3)
    ours = fused_attention(*inputs, rotation, 0.3)
    lost = ~expected.isfinite()
    assert lost.any() and not ours[lost].isfinite().any()


def test_without_a_compiler_pytorchs_kernel_takes_its_place(monkeypatch):
    *inputs, rotation = make_inputs(T=40, queries=30)
    starts, upstream = of_last(starts_of([15, 25], [40]), 30), torch.randn(2, 30, 3, 6)
    expected = run(fused_attention, inputs, rotation, starts, upstream)
    monkeypatch.setattr(cpu, "library", lambda name: None)
    for a, b in zip(run(fused_attention, inputs, rotation, starts, upstream), expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_other_dtypes_are_left_to_pytorch():
    *inputs, rotation = make_inputs(dtype=torch.bfloat16, requires_grad=False)
    assert torch.equal(fused_attention(*inputs, rotation, 0.3), sdpa_attention(*inputs, rotation, 0.3))


def test_for_the_backward_pass_it_keeps_its_inputs_its_output_and_a_number_a_query_and_head():
    *inputs, rotation = make_inputs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = fused_attention(*inputs, rotation, 0.3)
    known = {x.data_ptr() for x in (*inputs, *rotation, out)}
    (lse,) = (x for x in kept if x is not None and x.data_ptr() not in known)
    assert lse.shape == (2, 3, 17)


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_the_operations_are_what_pytorch_asks_of_operations(which):
    *inputs, rotation = make_inputs(requires_grad=False, queries=9)
    starts, arguments = of_last(starts_of([5, 12], [17]), 9), (*inputs, *rotation, 0.3)
    out, lse = attention(*arguments, starts)
    checks = ("test_schema", "test_faketensor")
    if which == "forward":
        torch.library.opcheck(attention, (*arguments, starts), test_utils=checks)
    else:
        torch.library.opcheck(
            attention_backward, (*arguments, starts, out, lse, torch.randn_like(out)), test_utils=checks
        )

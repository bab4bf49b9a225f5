"""`flex_attention`'s blocks and its forward pass. It has no backward pass on a CPU: gradients wait for a GPU."""

from functools import cache, partial

import pytest
import torch

from model.ops.attention import document_starts, reference_attention
from model.ops.attention import flex as module
from model.ops.attention.assembled import Assembled
from model.ops.attention.flex import causal_blocks, document_blocks, flex
from model.ops.attention.reference import visible
from tests.model.attention.inputs import make_inputs, of_last, starts_of

PATTERNS = {
    "documents": starts_of([5, 1, 7, 4], [17]),
    "ends of blocks": starts_of([4, 4, 9], [8, 8, 1]),
    "one token each": starts_of([1] * 17, [16, 1]),
}


@pytest.mark.parametrize("queries", [17, 8, 6, 1])
@pytest.mark.parametrize("starts", PATTERNS.values(), ids=PATTERNS)
def test_blocks_are_seen_wholly_in_part_or_not_at_all(starts, queries):
    block, n, n_q = 4, 5, -(-queries // 4)
    starts = of_last(starts, queries)
    mask = document_blocks(starts, 17, block)
    padded = torch.zeros(2, n_q * block, n * block, dtype=torch.bool)
    padded[:, :queries, :17] = visible(starts, queries, 17).squeeze(1)
    seen = padded.unflatten(2, (n, block)).unflatten(1, (n_q, block))  # [B, n_q, block, n, block]
    assert torch.equal(mask.to_dense().squeeze(1).bool(), seen.any((2, 4)))
    for b, i in ((b, i) for b in range(2) for i in range(n_q)):
        whole = mask.full_kv_indices[b, 0, i, : mask.full_kv_num_blocks[b, 0, i]].tolist()
        in_part = mask.kv_indices[b, 0, i, : mask.kv_num_blocks[b, 0, i]].tolist()
        rows = min(block, queries - i * block)
        assert whole == [j for j in range(n) if seen[b, i, :rows, j].all()]
        assert sorted(whole + in_part) == seen[b, i].any((0, 2)).nonzero().flatten().tolist()


def test_half_of_the_blocks_are_skipped_without_documents_and_most_with_them():
    causal = causal_blocks(32 * 128, 32 * 128, torch.device("cpu"))
    assert causal.sparsity() == pytest.approx(100 * (1 - 33 / 64))
    last = causal_blocks(8 * 128, 32 * 128, torch.device("cpu"))  # 8 blocks of queries see 25 to 32
    assert last.sparsity() == pytest.approx(100 * (1 - 28.5 / 32))
    within = document_blocks(document_starts(torch.arange(32 * 128).unsqueeze(0) // 512), 32 * 128, 128)
    assert within.sparsity() == pytest.approx(100 * (1 - 8 * 10 / 32**2))  # 8 documents, each 1 + 2 + 3 + 4 blocks


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("queries", [17, 6])
@pytest.mark.parametrize("starts", [None, PATTERNS["documents"]], ids=["causal", "documents"])
def test_flex_attention_gives_the_reference(starts, queries, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 4)
    monkeypatch.setattr(module, "compiled", lambda *key: module.attend)
    monkeypatch.setattr(module, "_causal", {})
    inputs, starts = make_inputs(requires_grad=False, queries=queries), of_last(starts, queries)
    found = Assembled(flex)(*inputs, 0.3, starts)
    torch.testing.assert_close(found, reference_attention(*inputs, 0.3, starts), atol=2e-6, rtol=1e-5)


def test_shapes_and_modes_may_be_more_than_the_compiler_takes_of_one_function(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 4)
    monkeypatch.setattr(module, "_causal", {})
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled = cache(module.compiled.__wrapped__)
    monkeypatch.setattr(module, "compiled", compiled)
    with torch._dynamo.config.patch(recompile_limit=1):  # each case is compiled once
        for length, is_training in ((5, True), (6, True), (6, False)):
            inputs = make_inputs(T=length, requires_grad=False)
            for starts in (None, starts_of([3, length - 3], [length]), starts_of([length], [1, length - 1])):
                with torch.set_grad_enabled(is_training):
                    found = Assembled(flex)(*inputs, 0.3, starts)
                torch.testing.assert_close(found, reference_attention(*inputs, 0.3, starts), atol=2e-6, rtol=1e-5)
    assert compiled.cache_info().currsize == 6

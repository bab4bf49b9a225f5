"""FlashAttention's path, against a stand-in: flash-attn itself was never run.

The stand-in has the functions that are called, with the arguments of their documentation, and computes in plain PyTorch what they
promise. It refuses whatever the packages refuse: dtypes, strides, sizes, places of documents.
"""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model.config import ConfigError
from model.ops.attention import flash as module
from model.ops.attention import reference_attention
from model.ops.attention.assembled import Assembled
from model.ops.attention.choose import expect
from model.ops.attention.flash import Flash, Flash3, VariableLength, rounded, sequences
from model.rope import Rotation
from parallel.recompute import ATTENTION_ELSEWHERE
from tests.model.attention.inputs import make_inputs, of_last, starts_of

DOCUMENTS = starts_of([5, 1, 7, 4], [17])


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal, [T, H, …], of queries at the last positions."""
    scores = torch.einsum("qhd,khd->hqk", q, k).float() * scale
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + len(k) - len(q))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1).to(v.dtype), v)


class Package(ModuleType):
    """`flash_attn` 2.8, or with `unequal` head sizes `flash_attn_interface`, some versions of which return more than the output."""

    def __init__(self, name: str, unequal: bool):
        super().__init__(name)
        self.unequal = unequal
        self.rooms: list[int] = []

    def check(self, q: Tensor, k: Tensor, v: Tensor, *, tokens: int) -> None:
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        assert q.dim() == k.dim() == v.dim() == tokens + 2
        assert q.shape[tokens:] == k.shape[tokens:] and k.shape[:-1] == v.shape[:-1] and len(q) <= len(k)
        assert self.unequal or q.shape[-1] == v.shape[-1]
        assert all(x.shape[-1] % 8 == 0 and x.shape[-1] <= 256 and x.stride(-1) == 1 for x in (q, k, v))

    def flash_attn_func(self, q, k, v, *, softmax_scale=None, causal=False):
        self.check(q, k, v, tokens=2)
        assert causal
        out = torch.stack([attention(*one, softmax_scale) for one in zip(q, k, v)])
        return (out, None) if self.unequal else out

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale=None, causal=False
    ):
        self.check(q, k, v, tokens=1)
        assert causal and len(cu_seqlens_q) == len(cu_seqlens_k)
        for places, longest, total in ((cu_seqlens_q, max_seqlen_q, len(q)), (cu_seqlens_k, max_seqlen_k, len(k))):
            assert type(longest) is int and places.dtype == torch.int32 and places.dim() == 1 and places.is_contiguous()
            lengths = places.diff()
            assert places[0] == 0 and places[-1] == total and lengths.min() >= 0 and lengths.max() <= longest
        self.rooms.append(len(cu_seqlens_q) - 1)
        lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert all(a <= b for a, b in zip(lengths_q, lengths_k))
        parts = (q.split(lengths_q), k.split(lengths_k), v.split(lengths_k))
        out = torch.cat([attention(*one, softmax_scale) for one in zip(*parts) if len(one[0])])
        return (out, None) if self.unequal else out

    def varlen_attn(self, q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        assert window_size == (-1, 0)
        return self.flash_attn_varlen_func(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, softmax_scale=scale, causal=True)


BACKENDS = {
    "2": lambda: Assembled(Flash(), pads=True),
    "3": lambda: Assembled(Flash3()),
    "3, padded": lambda: Assembled(Flash3(), pads=True),
    "PyTorch's": lambda: Assembled(VariableLength(), pads=True),
}


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Package]:
    found = {name: Package(name, unequal=name.endswith("interface")) for name in ("flash_attn", "flash_attn_interface")}
    found["torch.nn.attention.varlen"] = Package("torch.nn.attention.varlen", unequal=False)
    for name, package in found.items():
        package.__spec__ = object()  # what says that a module is installed
        monkeypatch.setitem(sys.modules, name, package)
    return found


@pytest.mark.parametrize("queries", [17, 8, 1])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("starts", [None, DOCUMENTS], ids=["causal", "documents"])
@pytest.mark.parametrize("version", BACKENDS)
def test_flash_attention_is_called_as_it_wants_and_gives_the_reference(version, starts, told, queries, packages):
    inputs = make_inputs(nope=8, rope=8, v=8, dtype=torch.bfloat16, queries=queries)
    backend = BACKENDS[version]()
    if told and starts is not None:
        expect(backend, starts)
    starts = of_last(starts, queries)
    out = backend(*inputs, 0.3, starts)
    exact = [x.detach().float().requires_grad_() for x in inputs[:3]]
    expected = reference_attention(*exact, inputs[3], 0.3, starts)
    assert out.shape == expected.shape and (out - expected).norm() < 0.01 * expected.norm()
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs[:3], upstream)
    for grad, of in zip(grads, torch.autograd.grad(expected, exact, upstream.float())):
        assert grad.shape == of.shape and (grad - of).norm() < 0.02 * of.norm()


def test_documents_are_sequences_one_after_another_and_the_rest_are_empty():
    # the first row has documents of 5, 1, 7 and 4 tokens, the second one of 17
    for room, empty in ((7, [34, 34]), (5, [])):
        for places in sequences(DOCUMENTS, 17, room):
            assert places.tolist() == [0, 5, 6, 13, 17, 34, *empty]
    one_each = torch.arange(3, dtype=torch.int32).unsqueeze(0)
    assert sequences(one_each, 3, 3)[0].tolist() == [0, 1, 2, 3]


def test_of_fewer_queries_a_document_has_those_that_are_its_own_and_keys_that_nobody_sees_have_none():
    # The last 8 of 17: first row, 6 keys that nobody sees, then documents with 4 of its 7 queries and all 4; second row, 8 of 17.
    of_queries, of_keys = sequences(of_last(DOCUMENTS, 8), 17, 5)
    assert of_queries.diff().tolist() == [0, 4, 4, 8, 0]
    assert of_keys.diff().tolist() == [6, 7, 4, 17, 0]
    with pytest.raises(RuntimeError, match="more documents"):
        sequences(of_last(DOCUMENTS, 8), 17, 3)


def test_more_documents_than_the_host_was_told_of_are_no_silent_error():
    with pytest.raises(RuntimeError, match="more documents than the host was told of"):
        sequences(DOCUMENTS, 17, 4)


def test_room_grows_with_what_the_host_was_told_and_never_shrinks(packages):
    flash = Flash()
    many = torch.arange(70).unsqueeze(0)
    for documents, room in ((DOCUMENTS, 32), (many, 96), (DOCUMENTS, 96)):
        flash.expect(documents)
        assert flash.room == room
    assert [rounded(n) for n in (1, 32, 33)] == [32, 32, 64]


def test_only_training_relies_on_what_the_host_was_told(packages):
    inputs = make_inputs(nope=8, rope=8, v=8, dtype=torch.bfloat16)
    backend = BACKENDS["2"]()
    backend.attend.room = 64
    backend(*inputs, 0.3, DOCUMENTS)
    with torch.no_grad():
        backend(*inputs, 0.3, DOCUMENTS)
    assert packages["flash_attn"].rooms == [64, 32]


def test_the_host_waits_for_the_number_of_documents_once_a_micro_batch(packages, monkeypatch):
    inputs, starts, counted = make_inputs(nope=8, rope=8, v=8, dtype=torch.bfloat16), DOCUMENTS.clone(), []
    monkeypatch.setattr(module, "rounded", lambda n: counted.append(n) or rounded(n))
    with torch.no_grad():
        for _ in range(3):  # layers
            BACKENDS["2"]()(*inputs, 0.3, starts)
    assert counted == [5]


def test_pytorchs_own_without_the_arguments_that_it_is_called_with_is_missing(packages, monkeypatch):
    assert not VariableLength().missing()
    monkeypatch.setattr(packages["torch.nn.attention.varlen"], "varlen_attn", lambda q, k, v, *places: q, raising=False)
    assert "no scale and window_size" in VariableLength().missing()


def test_what_is_no_operation_of_its_package_is_not_kept(packages):
    assert not BACKENDS["3"]().is_kept()  # stand-ins register none
    assert not Assembled(lambda *_: None, is_kept=False).is_kept() and Assembled(lambda *_: None).is_kept()
    library = torch.library.Library("flash_attn_3", "FRAGMENT")
    library.define("_flash_attn_forward(Tensor q) -> Tensor")
    assert BACKENDS["3"]().is_kept() and BACKENDS["3, padded"]().is_kept()


def test_the_operations_that_are_kept_have_the_names_that_recomputation_knows():
    names = {"::".join(kind.operation) for kind in (Flash, Flash3, VariableLength)}
    assert names <= ATTENTION_ELSEWHERE and VariableLength().is_kept()


def test_flash_attention_that_is_not_installed_names_the_extra():
    inputs = make_inputs()
    with pytest.raises(ConfigError, match=r"flash_attn is not installed: pip install 'rorqual\[flash\]'"):
        BACKENDS["2"]()(*inputs, 0.3)
    with pytest.raises(ConfigError, match="flash_attn_interface is not installed: build it from the folder `hopper`"):
        BACKENDS["3"]()(*inputs, 0.3)


@pytest.mark.parametrize("queries", [4096, 1024])
@pytest.mark.parametrize("documents", [False, True])
def test_pytorchs_own_takes_what_it_is_given_on_a_gpu(documents, queries):
    """By its check of shapes, without a GPU, at the sizes of V3."""
    with FakeTensorMode():
        q, kv, k_rope = (
            torch.empty(2, *width, device="cuda", dtype=torch.bfloat16)
            for width in ((queries, 128, 192), (4096, 128, 256), (4096, 64))
        )
        rotation = Rotation(*(torch.empty(4096, 32, device="cuda") for _ in range(2)))
        starts = torch.empty(2, queries, dtype=torch.int32, device="cuda") if documents else None
        backend = BACKENDS["PyTorch's"]()
        backend.attend.room = 64
        with torch.enable_grad():
            assert backend(q, kv, k_rope, rotation, 0.1, starts).shape == (2, queries, 128, 128)

"""The gate as one operation, in C++, in Triton and in PyTorch: choice, weights, balance loss, gradient; and the sort by expert."""

import pytest
import torch

from model.balance import sequence_balance_loss
from model.ops import cpu, routing
from model.ops.routing import Rule, Sorted, reference_route, route, sort_by_expert, weigh
from model.router import Router

RULES = {  # (E, rule)
    "groups": (12, Rule(3, 2, 3, True, 2.5)),
    "one group, K of 1": (8, Rule(1, 1, 1, True, 1.0)),
    "plain sigmoid": (20, Rule(4, 1, 5, False, 0.5)),
    "all chosen": (8, Rule(2, 2, 8, True, 2.5)),
    "V3's": (256, Rule(8, 4, 8, True, 2.5)),
}
# More tokens than one chunk of a sequence, one, more than a vector.
CASES = [(which, shape) for which in RULES for shape in ((2, 150), (3, 1), (1, 33))]
CASES.remove(("V3's", (2, 150)))  # an interpreter's seconds


@pytest.fixture(params=["C++", "PyTorch", "Triton"])
def path(request, monkeypatch, device):
    """What computes: the library, the operations without one, or the kernels for a GPU; returns the device of tensors."""
    if request.param == "PyTorch":
        monkeypatch.setattr(cpu, "library", lambda name: None)
    if request.param != "Triton":
        return torch.device("cpu")
    from model.ops.triton import routing as kernels

    def backward(logits, ids, weights, frequency, d_weights, *others):
        d_weights = None if d_weights is None else d_weights.contiguous()
        return kernels.route_backward(logits, ids, weights, frequency, d_weights, *others)

    monkeypatch.setattr(routing, "_route", lambda logits, bias, *rule: kernels.route(logits, bias, Rule(*rule)))
    monkeypatch.setattr(routing, "_route_backward", backward)
    return device


def draw(shape, experts, device, scale=1.0):
    logits = (scale * torch.randn(*shape, experts, device=device)).requires_grad_()
    return logits, 0.2 * torch.randn(experts, device=device)


@pytest.mark.parametrize(("which", "shape"), CASES)
def test_choice_weights_loss_and_gradient_are_those_of_the_equations(path, which, shape):
    experts, rule = RULES[which]
    logits, bias = draw(shape, experts, path)
    ids, weights, loss = route(logits, bias, rule)
    assert torch.equal(ids.sort().values, reference_route(logits, bias, rule)[0].sort().values)
    assert ids.dtype is torch.int64 and not ids.requires_grad

    exact = logits.detach().double().requires_grad_()
    expected = weigh(exact.flatten(0, 1), ids, rule), sequence_balance_loss(exact, rule.top_k)
    upstream = torch.randn(weights.shape, device=path), torch.tensor(-0.7, device=path)
    for ours, theirs in zip((weights, loss), expected):
        torch.testing.assert_close(ours.double(), theirs, rtol=3e-6, atol=1e-7)
    (found,) = torch.autograd.grad((weights, loss), logits, upstream)
    (gradient,) = torch.autograd.grad(expected, exact, [u.double() for u in upstream])
    torch.testing.assert_close(found.double(), gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))


@pytest.mark.parametrize("used", [0, 1], ids=["weights", "loss"])
def test_the_gradient_of_one_result_alone(path, used):
    experts, rule = RULES["groups"]
    logits, bias = draw((2, 5), experts, path)
    for function in (route, reference_route):
        result = function(logits, bias, rule)[1 + used]
        (found,) = torch.autograd.grad(result.square().sum(), logits)
        if function is route:
            ours = found
    torch.testing.assert_close(ours, found, rtol=1e-5, atol=1e-7)


def test_of_equals_the_lower_number_is_chosen(path):
    """All affinities are equal, then those of three groups; the kept groups are then the first of the best."""
    rule, zeros = Rule(4, 2, 3, True, 1.0), torch.zeros(1, 20, 16, device=path)
    bias = torch.zeros(16, device=path)
    assert route(zeros, bias, rule)[0].sort().values.tolist() == [[0, 1, 2]] * 20
    bias[:4] = -0.1
    assert route(zeros, bias, rule)[0].sort().values.tolist() == [[4, 5, 6]] * 20
    assert reference_route(zeros, bias, rule)[0].sort().values.tolist() == [[4, 5, 6]] * 20
    # 20 tokens hit experts 0, 1 and 2 for the loss, which knows no bias: f = 16/3 for each, P = 1/16
    assert route(zeros, bias, rule)[2].item() == pytest.approx(1.0)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf, 1e30, -1e30])
@pytest.mark.parametrize("where", ["one", "a row", "all"])
def test_whatever_the_logits_are_every_choice_is_an_expert_and_none_twice(path, number, where):
    experts, rule = RULES["groups"]
    logits, bias = draw((2, 9), experts, path)
    with torch.no_grad():
        {"one": logits[0, 3, 7:8], "a row": logits[0, 3], "all": logits}[where].fill_(number)
    ids, weights, loss = route(logits, bias, rule)
    assert ids.min() >= 0 and ids.max() < experts
    assert all(len(set(row)) == rule.top_k for row in ids.tolist())
    assert torch.equal(ids.sort().values, reference_route(logits, bias, rule)[0].sort().values)
    (gradient,) = torch.autograd.grad(weights.sum() + loss, logits)
    if where != "all":  # what other tokens get is as it was
        others = torch.ones(18, dtype=torch.bool, device=path)
        others[3] = False
        assert weights[others].isfinite().all() and weights[others].sum(-1).allclose(torch.tensor(2.5, device=path))
        if abs(number) == 1e30:
            assert gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_no_tokens_are_no_error(path, shape):
    experts, rule = RULES["groups"]
    logits, bias = draw(shape, experts, path)
    ids, weights, loss = route(logits, bias, rule)
    assert ids.shape == weights.shape == (0, 3) and loss.shape == ()
    (gradient,) = torch.autograd.grad(weights.sum() + loss, logits)
    assert gradient.shape == logits.shape


def test_the_number_of_threads_changes_no_bit():
    experts, rule = RULES["groups"]
    logits, bias = draw((3, 300), experts, "cpu")
    upstream, found = torch.randn(900, rule.top_k), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            ids, weights, loss = route(logits, bias, rule)
            found.append([ids, weights, loss, *torch.autograd.grad((weights * upstream).sum() + loss, logits)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_kept_are_logits_choice_and_one_number_for_an_expert_and_sequence():
    experts, rule = RULES["groups"]
    logits, bias = draw((2, 9), experts, "cpu")
    weights = route(logits, bias, rule)[1]
    assert [t.shape for t in weights.grad_fn.saved_tensors] == [(2, 9, 12), (18, 3), (18, 3), (2, 12)]


@pytest.mark.parametrize("compiled", [True, False], ids=["C++", "PyTorch"])
@pytest.mark.parametrize("shape", [(50, 3), (1, 1), (0, 4)])
def test_pairs_are_sorted_by_expert_and_keep_their_order(monkeypatch, shape, compiled):
    if not compiled:
        monkeypatch.setattr(cpu, "library", lambda name: None)
    ids = torch.randint(0, 7, shape)
    found = sort_by_expert(ids, 9)
    order = ids.flatten().sort(stable=True).indices
    expected = Sorted(order, order.argsort().view(shape), torch.bincount(ids.flatten(), minlength=9))
    for ours, theirs in zip(found, expected):
        assert torch.equal(ours, theirs) and ours.dtype is torch.int64


def test_the_gate_keeps_tokens_as_they_are_and_multiplies_in_fp32(make_config, randomize):
    router = Router(make_config())
    randomize(router, 0.3)
    x = torch.randn(2, 10, 48).bfloat16().requires_grad_()
    logits = router(x).logits
    assert logits.grad_fn.saved_tensors[0].data_ptr() == x.data_ptr()
    wide = x.detach().float().requires_grad_()
    expected = wide.flatten(0, 1) @ router.weight.T
    upstream = torch.randn_like(logits)
    ours = torch.autograd.grad(logits, (x, router.weight), upstream)
    theirs = torch.autograd.grad(expected, (wide, router.weight), upstream)
    assert torch.equal(ours[0], theirs[0].bfloat16())
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(ours[1], theirs[1])

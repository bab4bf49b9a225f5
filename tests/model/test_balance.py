"""The bias update in integers, the sequence-wise loss against Eqs. 17–20, and the trap of a vanishing denominator."""

import pytest
import torch

from model.balance import max_violation, sequence_balance_loss, update

# the bias -------------------------------------------------------------------------------------------------------------


def test_update_moves_each_bias_against_its_load():
    # Σc = 12, E = 4, mean 3:  loads 5 and 4 are above, 3 is the mean, 0 below
    bias = update(torch.zeros(4), torch.tensor([5, 3, 0, 4]), gamma=0.5)
    assert bias.tolist() == [-0.5, 0.0, 0.5, -0.5]


def test_update_adds_to_the_bias_and_leaves_its_inputs():
    bias, counts = torch.tensor([1.0, 2.0]), torch.tensor([3, 1])
    assert update(bias, counts, gamma=0.25).tolist() == [0.75, 2.25]
    assert bias.tolist() == [1.0, 2.0] and counts.tolist() == [3, 1]


def test_update_of_a_mean_that_is_no_integer():
    # Σc = 10, E = 4, mean 2.5: 10 − 4·3 < 0, 10 − 4·2 > 0
    assert update(torch.zeros(4), torch.tensor([3, 2, 3, 2]), gamma=1.0).tolist() == [-1, 1, -1, 1]


def test_update_is_exact_where_floats_are_not():
    # 2**24 + 1 is no fp32 number: as floats all three loads would be equal
    counts = torch.tensor([2**24 + 1, 2**24, 2**24 - 1])
    assert update(torch.zeros(3), counts, gamma=1.0).tolist() == [-1, 0, 1]


def test_update_leaves_a_balanced_or_idle_layer_alone_and_gamma_zero_everything():
    bias = torch.tensor([0.1, -0.2, 0.3])
    assert torch.equal(update(bias, torch.tensor([7, 7, 7]), gamma=0.1), bias)
    assert torch.equal(update(bias, torch.tensor([0, 0, 0]), gamma=0.1), bias)
    assert torch.equal(update(bias, torch.tensor([9, 1, 2]), gamma=0.0), bias)


def test_update_takes_all_layers_at_once():
    counts = torch.tensor([[4, 0], [1, 3]])
    assert update(torch.zeros(2, 2), counts, gamma=1.0).tolist() == [[-1, 1], [1, -1]]


def test_update_balances_a_skewed_router():
    """Scores that favour the first experts; 300 updates bring the load from almost all on K experts to near even."""
    generator = torch.Generator().manual_seed(0)
    skew, bias = torch.linspace(0.5, 0.0, 16), torch.zeros(16)
    violations = []
    for _ in range(300):
        scores = torch.rand(512, 16, generator=generator) * 0.3 + skew
        counts = torch.bincount((scores + bias).topk(4).indices.flatten(), minlength=16)
        violations.append(max_violation(counts).item())
        bias = update(bias, counts, gamma=0.005)
    assert violations[0] > 2 and max(violations[-20:]) < 0.3


def test_max_violation_is_the_excess_of_the_worst_expert():
    # means 2 and 1: 5/2 − 1 and 1/1 − 1
    assert max_violation(torch.tensor([[5, 1, 0, 2], [1, 1, 1, 1]])).tolist() == [1.5, 0.0]
    assert max_violation(torch.zeros(4)).isfinite()


# the sequence-wise loss -----------------------------------------------------------------------------------------------


def literal_loss(logits, top_k):
    """Eqs. 17–20 as they are written, one sequence, one expert, one token at a time; summed over the sequences."""
    total = 0.0
    for sequence in logits.sigmoid():
        length, experts = sequence.shape
        for i in range(experts):
            f_i, p_i = 0.0, 0.0
            for t in range(length):
                chosen = sequence[t].detach().sort(descending=True).indices[:top_k].tolist()
                f_i += experts / (top_k * length) * (i in chosen)  # Eq. 18
                p_i = p_i + sequence[t, i] / sequence[t].sum() / length  # Eqs. 19, 20
            total = total + f_i * p_i  # Eq. 17
    return total


@pytest.mark.parametrize(("experts", "top_k"), [(5, 1), (6, 4), (8, 3), (4, 4)])
def test_the_loss_and_its_gradient_equal_the_equations(experts, top_k):
    logits = (2 * torch.randn(3, 7, experts)).requires_grad_()
    ours, literal = sequence_balance_loss(logits, top_k), literal_loss(logits, top_k)
    torch.testing.assert_close(ours, literal)
    for a, b in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(literal, logits)):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_a_balanced_sequence_costs_one_and_a_collapsed_one_the_most():
    # E = 4, K = 1, T = 4; every expert once with affinities equal up to 1e-3: Σ f P = Σ 1·¼ = 1
    even = 1e-3 * torch.eye(4)[None]
    assert sequence_balance_loss(even, 1).item() == pytest.approx(1.0, abs=1e-3)
    # every token at expert 0 with all of its affinity: f_0 = 4, P_0 = 1
    collapsed = torch.full((1, 4, 4), -60.0)
    collapsed[..., 0] = 60.0
    assert sequence_balance_loss(collapsed, 1).item() == pytest.approx(4.0)
    # two sequences are added
    assert sequence_balance_loss(torch.cat((even, collapsed)), 1).item() == pytest.approx(5.0, abs=1e-3)


def test_the_gradient_pushes_load_from_busy_to_idle_experts():
    logits = torch.tensor([[[1.0, 0.0, 0.0, 0.0]] * 8]).requires_grad_()
    (grad,) = torch.autograd.grad(sequence_balance_loss(logits, 1), logits)
    assert (grad[..., 0] > 0).all() and (grad[..., 1:] < 0).all()


# the trap: s / (Σ s + 1e-20) ------------------------------------------------------------------------------------------


def trapped_loss(logits, top_k):
    """The same loss with the usual epsilon in the denominator, in fp32."""
    s = logits.sigmoid()
    experts, length = s.shape[-1], s.shape[-2]
    hits = torch.zeros_like(s).scatter_(-1, s.detach().topk(top_k).indices, 1.0)
    f = hits.sum(1) * experts / (top_k * length)
    p = (s / (s.sum(-1, keepdim=True) + 1e-20)).mean(1)
    return (f * p).sum()


def descend(loss, logits, steps=800, rate=20.0):
    """Gradient descent on the logits themselves, the freest router there is."""
    logits = logits.clone().requires_grad_()
    for _ in range(steps):
        (grad,) = torch.autograd.grad(loss(logits, 2), logits)
        with torch.no_grad():
            logits -= rate * grad
    return loss(logits, 2).item(), logits.detach()


def test_descent_falls_into_the_trap_with_an_epsilon_and_not_with_our_loss():
    start = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0)) - 45.0  # Σ s about 1e-19

    assert trapped_loss(start, 2) > 1
    trapped, where = descend(trapped_loss, start)
    assert trapped < 0.02, "the planted trap no longer works: this test would prove nothing"
    assert where.mean() < start.mean() - 2  # it got there by driving all affinities down, not by balancing

    ours, where = descend(sequence_balance_loss, start)
    assert ours > 0.8  # a balanced sequence costs 1
    torch.testing.assert_close(where.mean(), start.mean(), atol=0.5, rtol=0)  # nothing is gained by going down


@pytest.mark.parametrize("shift", [-30.0, -100.0, -1000.0])
def test_our_loss_depends_on_ratios_of_vanishing_affinities_alone(shift):
    logits = torch.randn(2, 16, 8, dtype=torch.float32)
    far = (logits - 40.0).requires_grad_()  # here sigmoid(x) = exp(x), so a shift keeps every ratio
    farther = (logits - 40.0 + shift).requires_grad_()
    losses = [sequence_balance_loss(x, 2) for x in (far, farther)]
    torch.testing.assert_close(*losses, atol=1e-3, rtol=0)
    grads = [torch.autograd.grad(loss, x)[0] for loss, x in zip(losses, (far, farther))]
    assert grads[0].abs().max() > 1e-3
    torch.testing.assert_close(*grads, atol=1e-4, rtol=0)
    assert trapped_loss(farther, 2) < 1e-3  # with the epsilon the loss is gone


def test_our_loss_has_a_floor():
    """The K best of a token hold at least K/E of its P, so that with i.i.d. tokens Σ f P ≥ 1; never below 1/T."""
    for scale in (0.0, 0.1, 1.0, 10.0):
        for shift in (0.0, -200.0):
            loss = sequence_balance_loss(scale * torch.randn(1, 16, 8) + shift, 2)
            assert loss >= 1 / 16 and loss.isfinite()

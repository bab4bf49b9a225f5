"""Targets, their counts and the objective, on examples that can be checked by eye."""

import pytest
import torch

from model.loss import Losses, count_targets, head_coefficients, targets_at

# T = 4, D_mtp = 2. Documents: 1 1 1 | 2 2 | −1 −1 (padding)
TOKENS = torch.tensor([[10, 11, 12, 13, 14, 15, 16]])
DOCUMENTS = torch.tensor([[1, 1, 1, 2, 2, -1, -1]])
ANY = torch.zeros_like(TOKENS)


@pytest.mark.parametrize(("depth", "expected"), [(0, [11, 12, 13, 14]), (1, [12, 13, 14, 15]), (2, [13, 14, 15, 16])])
def test_each_head_looks_one_token_further(depth, expected):
    assert targets_at(TOKENS, ANY, depth, 2, mask_documents=False).tolist() == [expected]


@pytest.mark.parametrize(
    ("depth", "expected"), [(0, [11, 12, 13, 14]), (1, [12, 13, 14, -100]), (2, [13, 14, -100, -100])]
)
def test_padding_is_never_a_target(depth, expected):
    # without masking a target in the next document counts; token 15 and 16 are padding
    assert targets_at(TOKENS, DOCUMENTS, depth, 2, mask_documents=False).tolist() == [expected]


@pytest.mark.parametrize(
    ("depth", "expected"), [(0, [11, 12, -100, 14]), (1, [12, -100, -100, -100]), (2, [-100, -100, -100, -100])]
)
def test_masking_leaves_out_targets_in_another_document(depth, expected):
    # document 1 is 10 11 12, document 2 is 13 14
    assert targets_at(TOKENS, DOCUMENTS, depth, 2, mask_documents=True).tolist() == [expected]


def test_a_padded_position_predicts_nothing():
    documents = torch.tensor([[-1, -1, 3, 3]])
    assert targets_at(torch.arange(4)[None], documents, 0, 0, mask_documents=False).tolist() == [[-100, -100, 3]]


def test_two_paddings_are_no_document():
    documents = torch.tensor([[-1, -1, -1]])
    assert targets_at(torch.arange(3)[None], documents, 0, 0, mask_documents=True).tolist() == [[-100, -100]]


def test_counts_are_those_of_the_targets():
    assert count_targets(TOKENS, ANY, 2, False).tolist() == [4, 4, 4]
    assert count_targets(TOKENS, DOCUMENTS, 2, False).tolist() == [4, 3, 2]
    assert count_targets(TOKENS, DOCUMENTS, 2, True).tolist() == [3, 1, 0]
    assert count_targets(TOKENS, DOCUMENTS, 2, True).dtype == torch.int64


def test_inputs_are_left_alone():
    tokens = TOKENS.clone()
    targets_at(tokens, DOCUMENTS, 0, 2, mask_documents=True).fill_(0)
    assert torch.equal(tokens, TOKENS)


def losses(main, mtp, balance, counts):
    return Losses(torch.tensor(main), torch.tensor(mtp), torch.tensor(balance), torch.tensor(counts))


def test_the_objective_divides_each_sum_by_its_own_denominator():
    #   12/6 + 0.3/2 · (8/4 + 3/1) + 0.01 · 10/5   =   2 + 0.75 + 0.02
    total = losses(12.0, [8.0, 3.0], 10.0, [6, 4, 1]).objective(torch.tensor([6, 4, 1]), 5, lambda_=0.3, alpha=0.01)
    assert total.item() == pytest.approx(2.77)


def test_shares_of_micro_batches_add_up_to_the_whole():
    n = torch.tensor([9, 7])
    parts = [losses(12.0, [8.0], 3.0, [6, 4]), losses(5.0, [1.0], 2.0, [3, 3])]
    whole = losses(17.0, [9.0], 5.0, [9, 7])
    shares = [part.objective(n, 4, 0.3, 1e-2) for part in parts]
    torch.testing.assert_close(sum(shares), whole.objective(n, 4, 0.3, 1e-2))


def test_without_mtp_only_the_main_loss_and_the_balance_remain():
    assert losses(12.0, [], 4.0, [6]).objective(torch.tensor([6]), 2, lambda_=9.9, alpha=0.5).item() == 3.0


def test_a_head_without_any_target_contributes_zero_and_no_nan():
    total = losses(12.0, [0.0], 0.0, [6, 0]).objective(torch.tensor([6, 0]), 1, lambda_=0.3, alpha=0.0)
    assert total.item() == 2.0


def test_what_a_head_counts_is_known_before_the_losses_are():
    targets = torch.tensor([6, 4, 0])
    found = losses(12.0, [8.0, 3.0], 10.0, [6, 4, 1])
    main, mtp = found.main.requires_grad_(), found.mtp.requires_grad_()
    total = found._replace(main=main, mtp=mtp).objective(targets, 5, lambda_=0.3, alpha=0.01)
    gradients = torch.autograd.grad(total, (main, mtp))
    torch.testing.assert_close(head_coefficients(targets, 0.3), torch.cat([gradients[0][None], gradients[1]]))
    assert head_coefficients(torch.tensor([4]), 0.3).tolist() == [0.25]

"""Multi-token prediction against Eqs. 21–25, computed with transformers' own MTP modules and, for one token, by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

LENGTH = 13


def batch(config, depth, rows=2):
    tokens = torch.randint(0, config.vocab_size, (rows, LENGTH + 1 + depth))
    return tokens, torch.zeros_like(tokens)


def transformers_twin(model):
    """transformers' main model and one of its MtpLayers for each depth, with the weights of ours."""
    config = model.config
    hf_config = DeepseekV3Config(**config.to_hf())
    hf_config._attn_implementation = hf_config._experts_implementation = "eager"
    main = DeepseekV3ForCausalLM(hf_config).eval()
    state = model.state_dict()
    main.load_state_dict({name: state[name] for name in main.state_dict()})
    depths = []
    for k in range(config.num_nextn_predict_layers):
        layer = MtpLayer(hf_config, DeepseekV3DecoderLayer, DeepseekV3RMSNorm, config.num_hidden_layers + k)
        prefix = f"model.layers.{config.num_hidden_layers + k}."
        ours = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        own = {"enorm.weight", "hnorm.weight", "eh_proj.weight"}
        renamed = {
            "post_norm.weight"
            if name == "shared_head.norm.weight"
            else name
            if name in own
            else f"mtp_block.{name}": value
            for name, value in ours.items()
        }
        layer.load_state_dict(renamed, strict=True)
        depths.append(layer)
    return main, depths


def literal_losses(main, depths, tokens):
    """Σ CE of every head. h^k_i from h^{k-1}_i and Emb(t_{i+k}) (Eqs. 21, 22), P = OutHead(h^k) (23), target t_{i+k+1} (24)."""
    positions = torch.arange(LENGTH)[None]
    causal = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)[None, None]
    hidden = main.model(tokens[:, :LENGTH], use_cache=False).last_hidden_state  # after the final norm
    losses = []
    for k, module in enumerate([None, *depths]):
        if module is not None:
            ahead = main.model.embed_tokens(tokens[:, k : k + LENGTH])
            rotary = main.model.rotary_emb(ahead, positions)
            hidden = module(ahead, hidden, rotary, causal, positions, None)
        labels = tokens[:, k + 1 : k + 1 + LENGTH]
        losses.append(F.cross_entropy(main.lm_head(hidden).flatten(0, 1), labels.flatten(), reduction="sum"))
    return losses


@pytest.mark.parametrize("depth", [1, 2])
def test_losses_and_gradients_equal_those_of_transformers_modules(make_model, depth):
    model = make_model(num_nextn_predict_layers=depth)
    tokens, documents = batch(model.config, depth)
    main, depths = transformers_twin(model)

    expected = literal_losses(main, depths, tokens)
    losses = model(tokens, documents).losses
    torch.testing.assert_close(losses.main, expected[0])
    torch.testing.assert_close(losses.mtp, torch.stack(expected[1:]))

    # Eq. 25 with λ = 0.3: L = L_main + λ/D Σ_k L_k, each a mean
    n = tokens.shape[0] * LENGTH
    losses.objective(losses.counts, sequences=2, lambda_=0.3, alpha=0.0).backward()
    ((expected[0] + 0.3 / depth * sum(expected[1:])) / n).backward()
    theirs = {name: p.grad for name, p in main.named_parameters()}
    for k, layer in enumerate(depths):
        prefix = f"model.layers.{model.config.num_hidden_layers + k}."
        for name, p in layer.named_parameters():
            ours = name.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
            theirs[prefix + ours] = p.grad
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert grads.keys() == theirs.keys()
    for name, grad in grads.items():
        assert (grad - theirs[name]).abs().max() < 1e-4 * theirs[name].abs().max(), name


def test_every_head_has_a_real_target_at_every_position(make_model):
    """Tokens 0 1 2 … 7, T = 5, D_mtp = 2: head k predicts i + k + 1 at position i, and the last target is the last token."""
    model = make_model(num_nextn_predict_layers=2)
    tokens = torch.arange(8)[None]
    hidden, _ = model.hidden_states(tokens, torch.zeros_like(tokens))
    losses = model(tokens, torch.zeros_like(tokens)).losses
    targets = [[1, 2, 3, 4, 5], [2, 3, 4, 5, 6], [3, 4, 5, 6, 7]]
    for h, row, loss in zip(hidden, targets, [losses.main, *losses.mtp]):
        torch.testing.assert_close(loss, F.cross_entropy(model.lm_head(h)[0], torch.tensor(row), reduction="sum"))
    assert losses.counts.tolist() == [5, 5, 5]


def test_no_head_sees_its_own_target(make_model):
    """Changing token j changes what head k says at position i only where i + k ≥ j."""
    model = make_model(num_nextn_predict_layers=2)
    tokens, documents = batch(model.config, 2, rows=1)
    j = 7
    changed = tokens.clone()
    changed[0, j] = (tokens[0, j] + 1) % model.config.vocab_size
    with torch.no_grad():
        before, after = (model.hidden_states(t, documents)[0] for t in (tokens, changed))
    for k in range(3):
        moved = ((before[k] - after[k]).abs().amax(-1) > 1e-4)[0]  # beyond rounding: experts compute in other batches
        assert moved.tolist() == [i + k >= j for i in range(LENGTH)], f"depth {k}"


def test_masked_documents_do_not_reach_each_other(make_model):
    """Losses of two packed documents are those of each alone, and no head has a target in the other."""
    model = make_model({"mask_documents": True}, num_nextn_predict_layers=2)
    tokens, _ = batch(model.config, 2, rows=1)  # 16 tokens: T = 13
    documents = torch.tensor([[4] * 6 + [5] * 10])
    losses = model(tokens, documents).losses
    # document 4: positions 0..5, targets up to token 5: 5, 4, 3.  document 5: positions 6..12: 7 each
    assert losses.counts.tolist() == [5 + 7, 4 + 7, 3 + 7]

    alone = copy.deepcopy(model)
    with torch.no_grad():
        padding = torch.full((1, 10), -1)
        first = alone(
            torch.cat((tokens[:, :6], tokens[:, 6:] * 0), 1), torch.cat((documents[:, :6], padding), 1)
        ).losses
        second = alone(tokens[:, 6:], documents[:, 6:]).losses
    torch.testing.assert_close(losses.main, first.main + second.main)
    torch.testing.assert_close(losses.mtp, first.mtp + second.mtp)


def test_embedding_and_head_are_shared_and_learn_from_every_head(make_model):
    model = make_model(num_nextn_predict_layers=2)
    names = [name for name, _ in model.named_parameters()]
    assert sum("embed_tokens" in name for name in names) == 1 and sum("head.weight" in name for name in names) == 1
    tokens, documents = batch(model.config, 2)
    shared = (model.model.embed_tokens.weight, model.lm_head.weight)
    for head in range(3):
        losses = model(tokens, documents).losses
        grads = torch.autograd.grad([losses.main, *losses.mtp][head], shared)
        assert all(grad.any() for grad in grads), f"head {head}"
    # depth k embeds the tokens from k on, so with depth 2 the tokens T and T + 1 are embedded too
    assert grads[0][tokens[0, LENGTH + 1]].any()


def test_expert_counts_name_the_mtp_layers_last(make_model):
    model = make_model(num_nextn_predict_layers=2)
    tokens, documents = batch(model.config, 2)
    out = model(tokens, documents)
    assert out.expert_counts.shape == (model.config.n_moe_layers, 12) == (2 + 2, 12)
    assert out.expert_counts.dtype == torch.int64
    assert (out.expert_counts.sum(-1) == 2 * LENGTH * 3).all()
    # a bias far above all others in the last MTP module alone moves the last row alone
    model.mtp_layers[1].mlp.gate.e_score_correction_bias[7] = 100.0
    moved = (model(tokens, documents).expert_counts != out.expert_counts).any(-1)
    assert moved.tolist() == [False, False, False, True]


def test_decoding_with_a_latent_cache_equals_the_forward_pass(make_model):
    """Main model and MTP modules, in chunks of unequal size: what `generate` relies on."""
    model = make_model(num_nextn_predict_layers=2)
    tokens, documents = batch(model.config, 2)
    with torch.no_grad():
        whole, _ = model.hidden_states(tokens, documents)
        caches = model.new_caches(2, LENGTH)
        pieces = [slice(0, 5), slice(5, 6), slice(6, 13)]
        main = torch.cat([model.decode(tokens[:, p], caches) for p in pieces], dim=1)
        torch.testing.assert_close(main, whole[0], atol=1e-5, rtol=1e-4)
        for k in (1, 2):
            cache = caches[model.config.num_hidden_layers + k - 1]
            state = torch.cat(
                [model.decode_mtp(k, whole[k - 1][:, p], tokens[:, k : k + LENGTH][:, p], cache) for p in pieces], dim=1
            )
            torch.testing.assert_close(state, whole[k], atol=1e-5, rtol=1e-4)
        # forgetting and reading again gives the same
        for cache in caches:
            cache.crop(6)
        again = model.decode(tokens[:, 6:13], caches)
        torch.testing.assert_close(again, whole[0][:, 6:], atol=1e-5, rtol=1e-4)

"""Decoding with a cache computes what a full forward computes, and speculation changes the speed of greedy text, not the text."""

import pytest
import torch

from model.config import ConfigError, YarnScaling
from model.init import initialize, write_whole
from model.transformer import Transformer
from parallel.build import build_engine
from parallel.layout import Layout, ParallelConfig
from tests.small_model import small_config, small_model
from train.generate import generate

YARN = YarnScaling(factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.7)
SHAPES = {
    "queries with a latent": {},
    "queries without a latent": {"q_lora_rank": None},
    "YaRN": {"rope_scaling": YARN},
}


def prompt(length, batch=1, seed=0):
    return torch.randint(0, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def full_logits(model, tokens):
    """Logits of every position from one forward without a cache. [B, T] → [B, T, V]."""
    ahead = torch.cat((tokens, tokens[:, : 1 + model.config.num_nextn_predict_layers]), dim=1)
    return model.lm_head(model.hidden_states(ahead, torch.zeros_like(ahead))[0][0])


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_with_a_cache_gives_the_logits_of_a_full_forward(shape):
    model = small_model(**SHAPES[shape])
    tokens = prompt(40, batch=2)
    expected = full_logits(model, tokens)
    assert expected.std() > 0.3
    caches = model.new_caches(2, 40)
    pieces = [model.decode(piece, caches[:3]) for piece in tokens.split((17, 1, 1, 5, 16), dim=1)]
    assert (model.lm_head(torch.cat(pieces, dim=1)) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_text_is_the_argmax_of_a_full_forward_at_every_position(shape):
    model = small_model(**SHAPES[shape])
    tokens = generate(model, prompt(9, batch=3), 30).tokens
    assert tokens.shape == (3, 39)
    assert torch.equal(full_logits(model, tokens)[:, 8:-1].argmax(-1), tokens[:, 9:])


@torch.no_grad()
def test_the_cache_holds_the_latent_and_the_rotary_key_of_a_token_and_layer():
    model = small_model()
    caches = model.new_caches(1, 50)
    assert [cache.entries.numel() for cache in caches] == [50 * (20 + 8)] * 4  # kv_lora_rank + qk_rope_head_dim


@pytest.mark.parametrize("depths", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_speculation_gives_the_greedy_text(shape, depths):
    model = small_model(num_nextn_predict_layers=depths, **SHAPES[shape])
    for seed, length in enumerate((1, 2, 7)):
        plain = generate(model, prompt(length, seed=seed), 24)
        fast = generate(model, prompt(length, seed=seed), 24, mtp=True)
        assert torch.equal(fast.tokens, plain.tokens)
        assert fast.drafted[0] > 0


@torch.no_grad()
@pytest.mark.parametrize("depths", [1, 2, 3])
def test_drafts_come_from_the_states_that_training_gives_the_modules(depths):
    """Each draft must be the argmax of the module's training forward over the settled tokens and the drafts before it."""
    from train.generate import _Speculation

    model = small_model(num_nextn_predict_layers=depths)
    run = _Speculation(model, prompt(6), 40)
    unread, drafts = run.tokens, run.tokens[:, :0]
    rejected = 0
    for _ in range(12):
        settled = run._verify(unread, drafts)
        rejected += drafts.shape[1] - (settled.shape[1] - 1)
        run.tokens = torch.cat((run.tokens, settled), dim=1)
        unread, drafts = settled[:, -1:], run._draft()
        assert drafts.shape[1] == depths
        n = run.tokens.shape[1] - 1
        seen = torch.cat((run.tokens, drafts), dim=1)  # position n − 1 of module k reads the token at n − 1 + k
        states, _ = model.hidden_states(seen, torch.zeros_like(seen))
        for depth in range(1, depths + 1):
            assert model.lm_head(states[depth][:, n - 1]).argmax(-1) == drafts[0, depth - 1]
    assert rejected > 0


@torch.no_grad()
def test_right_drafts_are_taken_and_counted():
    """Layers and modules that add nothing make every state a function of the last token alone, so that module 1, given the
    identity on its embedding half, drafts what the main model chooses."""
    model = small_model(num_nextn_predict_layers=2)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        for part in (layer.mlp, getattr(layer.mlp, "shared_experts", None), getattr(layer.mlp, "experts", None)):
            down = getattr(part, "down_proj", None)
            if down is not None:
                getattr(down, "weight", down).zero_()
    for module in model.mtp_layers:
        module.eh_proj.weight.copy_(torch.cat((torch.eye(48), torch.zeros(48, 48)), dim=1))
        module.enorm.weight.fill_(1.0)
        module.shared_head.norm.weight.copy_(model.model.norm.weight)
    plain = generate(model, prompt(5), 31)
    fast = generate(model, prompt(5), 31, mtp=True)
    assert torch.equal(fast.tokens, plain.tokens)
    # The prompt gives 1 token and each round 3; 30 are left, so 10 rounds, the last with all of its drafts.
    assert fast.drafted == fast.accepted == [10, 10]


@pytest.mark.parametrize("mtp", [False, True])
def test_text_ends_with_the_end_token(mtp):
    model = small_model()
    tokens = generate(model, prompt(5), 40).tokens[0, 5:].tolist()
    end = tokens[11]
    short = generate(model, prompt(5), 40, eos=end, mtp=mtp).tokens[0, 5:].tolist()
    assert short == tokens[: tokens.index(end) + 1]


def test_a_batch_goes_on_until_its_last_sequence_has_ended():
    model = small_model()
    alone = [generate(model, row[None], 40).tokens[0].tolist() for row in prompt(5, batch=4)]
    end = alone[0][12]
    rows = generate(model, prompt(5, batch=4), 40, eos=end).tokens.tolist()
    for row, whole in zip(rows, alone):
        ends = whole.index(end, 5) + 1 if end in whole[5:] else len(whole)
        assert row[:ends] == whole[: min(ends, len(row))]
        assert set(row[ends:]) <= {end}
    assert len(rows[0]) == max(whole.index(end, 5) + 1 if end in whole[5:] else len(whole) for whole in alone)


def test_sampling_is_a_function_of_the_seed():
    model = small_model()
    first, again, other = (generate(model, prompt(5), 30, temperature=1.0, seed=seed).tokens for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sampled_tokens_follow_the_softmax_at_the_temperature():
    model = small_model(vocab_size=8)
    rows, start = 4000, torch.tensor([[3, 1, 4]])
    drawn = generate(model, start.expand(rows, -1), 1, temperature=0.7, seed=5).tokens[:, 3]
    p = (full_logits(model, start)[0, -1] / 0.7).softmax(-1)
    found = drawn.bincount(minlength=8) / rows
    chi_squared = rows * ((found - p) ** 2 / p).sum()
    assert chi_squared < 24.3  # 99.9 % of 7 degrees of freedom


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 55}, "ask for at most 54"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 5, "temperature": -1.0}, "negative"),
        ({"max_new_tokens": 5, "temperature": 1.0, "mtp": True}, "greedy"),
    ],
)
def test_what_cannot_be_generated_is_refused_in_one_line(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        generate(small_model(), prompt(10), **options)
    assert "\n" not in str(error.value)


def test_text_may_fill_the_context_to_its_last_position():
    model = small_model()
    for mtp in (False, True):
        assert generate(model, prompt(10), 54, mtp=mtp).tokens.shape == (1, 64)


def texts(model):
    """Drawn, greedy and speculated text, and how often drafts were right."""
    drawn = generate(model, prompt(5, batch=2), 10, temperature=1.0)
    return (
        drawn.tokens.tolist(),
        generate(model, prompt(5), 20).tokens.tolist(),
        generate(model, prompt(5), 20, mtp=True),
    )


def texts_of_a_pipeline(config, schedule):
    layout = Layout(ParallelConfig(pipeline=2, schedule=schedule), 2, config)
    with torch.device("meta"):
        model = Transformer(config)
    build_engine(
        layout,
        model,
        torch.device("cpu"),
        lambda model, write: initialize(model, 0, "cpu", write),
        lambda named: torch.optim.AdamW([p for _, p in named], fused=True),
        None,
    )
    return texts(model)


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_text_of_a_pipeline_is_that_of_one_process(workers, schedule):
    config = small_config(num_nextn_predict_layers=2)
    model = Transformer(config)
    initialize(model, 0, "cpu", write_whole)
    *expected, fast = texts(model)
    assert fast.tokens.tolist() == expected[1] and fast.accepted < fast.drafted
    for *found, same in workers.run(2, texts_of_a_pipeline, config, schedule):
        assert found == expected
        assert torch.equal(same.tokens, fast.tokens)
        assert (same.drafted, same.accepted) == (fast.drafted, fast.accepted)

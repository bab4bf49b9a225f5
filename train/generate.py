"""Text from a model: greedy or sampled, and greedy with its own MTP modules as the draft of speculative decoding.

The cache holds the latent and the rotary key of a token, kv_lora_rank + qk_rope_head_dim numbers a layer (576 at V3's size).

Self-speculation (DeepSeek-V3 §2.2, §5.4.3). After the main model has read positions 0 … n−1 and chosen t_n, module k predicts
t_{n+k} from the state of the depth before and the embedding of the token k ahead, which is a draft from depth 2 on. The
main model then reads t_n and the drafts in one pass and keeps the drafts up to the first that is not its own choice, and
the choice after it. Every token is thus the main model's argmax over the tokens before it: the text is that of greedy
decoding, whatever the modules draft, as far as logits of several positions at once equal those of one at a time (they differ
in rounding, which shows only where two tokens tie to the last bits).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model.config import ConfigError, ModelConfig
from model.transformer import Transformer
from train.weights import open_weights


class Generation(NamedTuple):
    """What was generated, and how often the MTP modules' drafts were right."""

    tokens: Tensor  # [B, T + new] int64, the prompt first; a sequence that has ended repeats its end
    drafted: list[int]  # per MTP depth, drafts that the main model looked at; empty without mtp
    accepted: list[int]  # per MTP depth, those that it would have chosen itself, all depths before included


def load_model(
    source: Path | str, compute_dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Transformer, Any]:
    """A model ready to generate or to be evaluated, and its tokenizer (None where the source has none).

    Matrices are held in `compute_dtype`, streamed in one at a time; what the model computes in fp32 (norms, gates and their
    biases) stays fp32.

    Args:
        source: run folder, checkpoint or Hugging Face folder, as in `open_weights`.

    Raises:
        CheckpointError, ConfigError: as `open_weights`.
    """
    weights = open_weights(source)
    with torch.device("meta"):
        masked = bool(weights.data.get("mask_documents"))
        model = Transformer(weights.config, compute_dtype=compute_dtype, mask_documents=masked)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.endswith("mlp.gate.weight"):
                parameter.data = parameter.data.to(compute_dtype)
    model.to_empty(device=device)
    places = model.state_dict()
    for name, tensor in weights.tensors():
        places[name].copy_(tensor)
    return model.eval(), load_tokenizer(weights.tokenizer)


def load_tokenizer(folder: Path | None) -> Any:
    """The Hugging Face tokenizer in a folder; None for None. Code that lies in the folder is never run.

    Raises:
        ConfigError: its files cannot be read, or need such code.
    """
    if folder is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the library raises whatever its readers happen to raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"tokenizer {folder}: cannot be read ({reason:.200}); fetch its files again, or save it again with save_pretrained"
        ) from None


def continue_texts(
    model: Transformer, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 100, **options: Any
) -> list[str]:
    """Each prompt with its continuation; a text that reaches the end of the context stops there. `options` as in `generate`."""
    return [continue_text(model, tokenizer, prompt, max_new_tokens, **options)[0] for prompt in prompts]


def continue_text(
    model: Transformer, tokenizer: Any, prompt: str, max_new_tokens: int, **options: Any
) -> tuple[str, Generation]:
    """The prompt with its continuation, which ends at the tokenizer's end token or at the end of the context."""
    if tokenizer is None:
        raise ConfigError("tokenizer: the weights came without one; text needs it; put its files beside the weights")
    tokens = encode(tokenizer, prompt)
    room = model.config.max_position_embeddings - tokens.shape[1]
    fitting = min(max_new_tokens, room) if room > 0 else max_new_tokens
    generation = generate(model, tokens, fitting, eos=tokenizer.eos_token_id, **options)
    return tokenizer.decode(generation.tokens[0], skip_special_tokens=True), generation


def encode(tokenizer: Any, prompt: str) -> Tensor:
    """The tokens of a prompt, [1, T]; an empty one is the end token, after which every document of a store begins."""
    return torch.tensor([tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]])


@torch.no_grad()
def generate(
    model: Transformer,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    eos: int | None = None,
    mtp: bool = False,
) -> Generation:
    """Continue prompts of equal length. Where there is a process group, all its ranks call it together.

    Args:
        tokens: [B, T] int64 prompts.
        max_new_tokens: at most so many new tokens; fewer when every sequence has ended.
        temperature: 0 takes the likeliest token, else tokens are drawn from softmax(logits / temperature).
        seed: of the draws.
        eos: the token that ends a sequence; None to never end early.
        mtp: greedy self-speculative decoding of one prompt with the model's MTP modules. The text is the same, sooner.

    Raises:
        ConfigError: the text would outgrow the model's context, or the options do not go together.
    """
    _check(model.config, tokens, max_new_tokens, temperature, mtp)
    tokens = tokens.to(model.device)
    if mtp:
        return _Speculation(model, tokens, max_new_tokens).run(eos)

    caches = model.new_caches(tokens.shape[0], tokens.shape[1] + max_new_tokens)[: model.config.num_hidden_layers]
    generator = torch.Generator().manual_seed(seed)
    ended = torch.zeros(tokens.shape[0], 1, dtype=torch.bool, device=tokens.device)
    new = tokens
    for _ in range(max_new_tokens):
        logits = model.logits(model.decode(new, caches)[:, -1])  # [B, V]
        new = _choose(logits, temperature, generator)  # [B, 1]
        if eos is not None:
            new = new.masked_fill(ended, eos)
            ended = ended | (new == eos)
        tokens = torch.cat((tokens, new), dim=1)
        if ended.all():
            break
    return Generation(tokens, [], [])


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """The next token of each sequence. [B, V] → [B, 1]. Draws are made on the host, with the same numbers on any device.

    Ranks that hold a model together all take the first one's choice: rounding may break a tie another way on another rank, and
    one that ended earlier would leave the others waiting for it.
    """
    if temperature == 0:
        new = logits.argmax(-1, keepdim=True)
    else:
        p = (logits.float() / temperature).softmax(-1).cpu()
        new = torch.multinomial(p, 1, generator=generator).to(logits.device)
    if dist.is_initialized():
        dist.broadcast(new, src=0)
    return new


class _Speculation:
    """One prompt under self-speculative decoding.

    `tokens` are settled: the main model's own choices after the prompt. It has read all n of them but the last. Module k has
    read position i once it has seen the token at i + k, so of its n positions the last k − 1 rest on drafts, and are read again.
    """

    def __init__(self, model: Transformer, prompt: Tensor, max_new_tokens: int):
        main = model.config.num_hidden_layers
        self.model = model
        self.tokens = prompt  # [1, n + 1], at first the prompt with nothing read
        self.end = prompt.shape[1] + max_new_tokens
        caches = model.new_caches(1, self.end)
        self.caches, self.mtp_caches = caches[:main], caches[main:]
        nothing = torch.empty(1, 0, model.config.hidden_size, dtype=model.compute_dtype, device=prompt.device)
        self.hidden = [nothing] * (1 + len(self.mtp_caches))  # [1, n, D] of the main model, then of each module
        self.drafted, self.accepted = [0] * len(self.mtp_caches), [0] * len(self.mtp_caches)

    def run(self, eos: int | None) -> Generation:
        unread, drafts = self.tokens, self.tokens[:, :0]
        ended = False
        while not ended:
            settled = self._verify(unread, drafts)
            ends = (settled[0] == eos).nonzero() if eos is not None else settled.new_empty(0)
            if len(ends):
                settled = settled[:, : int(ends[0]) + 1]
            self.tokens = torch.cat((self.tokens, settled), dim=1)
            ended = bool(len(ends)) or self.tokens.shape[1] == self.end
            if not ended:
                unread, drafts = settled[:, -1:], self._draft()
        return Generation(self.tokens, self.drafted, self.accepted)

    def _verify(self, unread: Tensor, drafts: Tensor) -> Tensor:
        """Read tokens and drafts, [1, U] and [1, d]; the drafts that were right and the choice after them, [1, right + 1]."""
        hidden = self.model.decode(torch.cat((unread, drafts), dim=1), self.caches)  # [1, U + d, D]
        choices = self.model.logits(hidden[:, unread.shape[1] - 1 :]).argmax(-1)  # [1, d + 1]
        right = (choices[0, :-1] == drafts[0]).long().cumprod(0).tolist()
        for depth, hit in enumerate(right):
            self.drafted[depth] += 1
            self.accepted[depth] += hit
        read = unread.shape[1] + sum(right)
        self.hidden[0] = torch.cat((self.hidden[0], hidden[:, :read]), dim=1)
        for cache in self.caches:
            cache.crop(self.hidden[0].shape[1])
        return choices[:, : sum(right) + 1]

    def _draft(self) -> Tensor:
        """One token of each module, [1, d]; fewer before the end, so that no draft outgrows it."""
        n = self.hidden[0].shape[1]
        tokens = self.tokens
        for depth in range(1, min(len(self.mtp_caches), self.end - n - 2) + 1):
            cache = self.mtp_caches[depth - 1]
            start = cache.length
            ahead = tokens[:, start + depth : n + depth]  # [1, n − start]
            states = self.model.decode_mtp(depth, self.hidden[depth - 1][:, start:n], ahead, cache)
            self.hidden[depth] = torch.cat((self.hidden[depth][:, :start], states), dim=1)
            cache.crop(max(n + 1 - depth, 0))
            tokens = torch.cat((tokens, self.model.logits(states[:, -1:]).argmax(-1)), dim=1)
        return tokens[:, n + 1 :]


def _check(config: ModelConfig, tokens: Tensor, max_new_tokens: int, temperature: float, mtp: bool) -> None:
    batch, length = tokens.shape
    room = config.max_position_embeddings - length
    if length == 0:
        raise ConfigError(
            "prompt: has no tokens; a model continues something; give at least one, such as the bos token"
        )
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: {max_new_tokens} is not positive; ask for at least 1")
    if max_new_tokens > room:
        fix = f"ask for at most {room}" if room > 0 else "shorten the prompt"
        raise ConfigError(
            f"max_new_tokens: {max_new_tokens} after a prompt of {length} tokens outgrows the context, "
            f"max_position_embeddings = {config.max_position_embeddings}; {fix}"
        )
    if temperature < 0:
        raise ConfigError(f"temperature: {temperature} is negative; give 0 for greedy text, or a positive number")
    if mtp and temperature > 0:
        raise ConfigError(f"mtp: speculation is greedy and temperature = {temperature}; leave one of them out")
    if mtp and batch > 1:
        raise ConfigError(f"mtp: speculation takes one prompt, not {batch}; generate them one by one")
    if mtp and config.num_nextn_predict_layers == 0:
        raise ConfigError("mtp: the model has no MTP module, num_nextn_predict_layers = 0; leave mtp out")

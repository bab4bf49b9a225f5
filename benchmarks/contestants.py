"""The two sides of `train_step.py`: Rorqual's training step, and the same step of `transformers`' DeepseekV3.

Both start from the same weights and take the same steps: forward, backward, clipping, AdamW of the same class, groups and
arguments. MTP is off. Ours also computes what `transformers` has not: expert counts, the sequence-wise balance loss and the bias
update; their weights are 0 here, so that both minimise the same loss.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from model.config import ModelConfig, load_preset
from model.init import initialize
from model.transformer import Transformer
from parallel.ddp import DDPEngine
from parallel.engine import StepSettings
from train.optimizer import build_optimizer
from train.sections import OptimizerSection

LR = 1e-4
CLIP = 1.0
OPTIMIZER = OptimizerSection()


@dataclass(frozen=True)
class Shape:
    """A model and the batch of one step."""

    name: str
    config: ModelConfig
    batch: int
    sequence_length: int

    @classmethod
    def read(cls, path: Path) -> "Shape":
        """A file {"model": preset name or fields of a Hugging Face config.json, "batch": …, "sequence_length": …}."""
        record = json.loads(path.read_text())
        model = record["model"]
        fields = load_preset(model) if isinstance(model, str) else model
        length = record["sequence_length"]
        config = ModelConfig.from_hf(fields | {"num_nextn_predict_layers": 0, "max_position_embeddings": length})
        return cls(path.stem, config, record["batch"], length)

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence_length

    def draw(self) -> "Batch":
        """The tokens of every step: the same random ones in every process."""
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, self.config.vocab_size, (self.batch, self.sequence_length + 1), generator=generator)
        return Batch(tokens, torch.zeros_like(tokens, dtype=torch.int32))


class Batch(NamedTuple):
    tokens: Tensor  # [B, T + 1] int64
    documents: Tensor  # [B, T + 1] int32

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.tokens.to(device), self.documents.to(device))


class Contestant(Protocol):
    @property
    def model(self) -> torch.nn.Module: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    def step(self, batch: Batch) -> float:
        """One optimizer step; returns the loss before it, in nats per token."""
        ...


class Ours:
    """The engine as a user's run has it, in a group of one rank."""

    def __init__(self, shape: Shape, device: torch.device, compute_dtype: torch.dtype):
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        self.model = without_weights(shape.config, compute_dtype)
        optimizer = partial(build_optimizer, settings=OPTIMIZER)
        self.engine = DDPEngine(self.model, device, lambda m, write: initialize(m, 0, device, write), optimizer, CLIP)
        self.optimizer = self.engine.optimizer

    def step(self, batch: Batch) -> float:
        settings = StepSettings(lr=LR, gamma=0.0, alpha=0.0, lambda_=0.0, batch=len(batch.tokens))
        return self.engine.step([batch], settings).losses.main


class Theirs:
    """`DeepseekV3ForCausalLM` with the loss that it computes itself; bf16 by autocast."""

    def __init__(self, shape: Shape, device: torch.device, compute_dtype: torch.dtype, experts: str, attention: str):
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

        config = DeepseekV3Config(**shape.config.to_hf())
        config._experts_implementation = experts
        config._attn_implementation = attention
        with device:
            self.model = DeepseekV3ForCausalLM(config)
        self.model.load_state_dict(fresh(shape.config, device, compute_dtype).state_dict())
        self.optimizer = build_optimizer(self.model.named_parameters(), OPTIMIZER)
        for group in self.optimizer.param_groups:
            group["lr"] = LR
        self.compute: Callable[[], AbstractContextManager[Any]] = nullcontext
        if compute_dtype is not torch.float32:
            self.compute = lambda: torch.autocast(device.type, compute_dtype)

    def step(self, batch: Batch) -> float:
        inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:].contiguous()
        with self.compute():
            loss = self.model(inputs, labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def fresh(config: ModelConfig, device: torch.device, compute_dtype: torch.dtype) -> Transformer:
    """Our model with the weights that both sides start from."""
    model = without_weights(config, compute_dtype).to_empty(device=device)
    initialize(model, seed=0)
    return model


def without_weights(config: ModelConfig, compute_dtype: torch.dtype) -> Transformer:
    """Our model on the meta device."""
    with torch.device("meta"):
        return Transformer(config, compute_dtype=compute_dtype)

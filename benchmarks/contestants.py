"""The two sides of `train_step.py`: Rorqual's training step, and the same step of `transformers`' DeepseekV3.

Both start from the same weights and take the same steps: forward, backward, clipping, AdamW of the same groups and arguments. Ours
also computes what `transformers` has not: expert counts, the sequence-wise balance loss and the bias update; their weights are 0
here, so that both minimise the same loss. MTP, which `transformers` has not either, is a contestant of its own.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from data.samples import Phase, Samples, StoreEntry
from model.config import ModelConfig, load_preset
from model.flops import Recompute
from model.init import initialize
from model.ops.attention import AttentionBackend
from model.ops.attention.choose import Workload, choose
from model.transformer import Transformer
from parallel.ddp import DDPEngine
from parallel.engine import StepResult, StepSettings
from parallel.recompute import apply_recompute
from train.launch import keep_freed_memory
from train.optimizer import build_optimizer
from train.sections import OptimizerSection

LR = 1e-4
WARM_LR, WARM_UP = 4e-4, 50  # of the steps that warm weights, and how many of them the rate rises
CLIP = 1.0
OPTIMIZER = OptimizerSection()


@dataclass(frozen=True)
class Shape:
    """A model and the batch of one step."""

    name: str
    config: ModelConfig  # without MTP, unless `with_mtp` has added it
    batch: int  # sequences of a step
    micro_batch: int  # sequences in one forward pass
    sequence_length: int
    alone: bool  # a device has room for one contestant at a time

    @classmethod
    def read(cls, path: Path) -> "Shape":
        """A file {"model": preset name or fields of a Hugging Face config.json, "batch": …, "sequence_length": …}.

        A map with the key "preset" has the preset's fields and, over them, its own.
        """
        record = json.loads(path.read_text())
        model, length, batch = record["model"], record["sequence_length"], record["batch"]
        model = {"preset": model} if isinstance(model, str) else model
        fields = (load_preset(model["preset"]) if "preset" in model else {}) | model
        fields.pop("preset", None)
        config = ModelConfig.from_hf(fields | {"num_nextn_predict_layers": 0, "max_position_embeddings": length})
        return cls(path.stem, config, batch, record.get("micro_batch", batch), length, record.get("alone", False))

    def with_mtp(self, modules: int) -> "Shape":
        return replace(self, config=self.config.override({"num_nextn_predict_layers": modules}))

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence_length

    @property
    def micro_tokens(self) -> int:
        return self.micro_batch * self.sequence_length

    def draw(self) -> "Batch":
        """The tokens of every step: the same random ones in every process, with MTP and without."""
        generator, widths = (
            torch.Generator().manual_seed(1),
            (self.sequence_length + 1, self.config.num_nextn_predict_layers),
        )
        parts = [torch.randint(0, self.config.vocab_size, (self.batch, w), generator=generator) for w in widths]
        tokens = torch.cat(parts, dim=1)
        return Batch(tokens, torch.zeros_like(tokens, dtype=torch.int32))

    def read_from(self, store: Path, step: int) -> "Batch":
        """The real tokens of a step of a run over this store."""
        phase = Phase(0, [StoreEntry(store)], self.sequence_length)
        samples = Samples([phase], self.config.num_nextn_predict_layers, seed=0)
        batch = Batch(*samples.batch(step * self.batch, self.batch))
        most, size = int(batch.tokens.max()), self.config.vocab_size
        if most >= size:
            raise SystemExit(f"--store {store}: has token {most}, the shape's vocabulary {size}; give another store")
        return batch


class Batch(NamedTuple):
    tokens: Tensor  # [B, T + 1] int64
    documents: Tensor  # [B, T + 1] int32

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.tokens.to(device), self.documents.to(device))

    def split(self, sequences: int) -> list["Batch"]:
        return [Batch(*parts) for parts in zip(self.tokens.split(sequences), self.documents.split(sequences))]


class Contestant(Protocol):
    @property
    def model(self) -> torch.nn.Module: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    def step(self, batch: Batch) -> float:
        """One optimizer step; returns the loss before it, in nats per token."""
        ...


class Ours:
    """The engine as a user's run has it, in a group of one rank. A shape with MTP trains that too."""

    def __init__(self, shape: Shape, device: torch.device, compute_dtype: torch.dtype, recompute: Recompute = "none"):
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        if device.type == "cpu":
            keep_freed_memory()
        self.shape = shape
        sizes = (shape.config, shape.micro_batch, shape.sequence_length)
        attends = Workload(*sizes, documents=False, dtype=compute_dtype, keeps_outputs=recompute == "selective")
        attention, self.who_attends = choose("auto", attends, device, lambda measure: measure())
        self.model = without_weights(shape.config, compute_dtype, attention)
        apply_recompute(self.model, recompute)
        optimizer = partial(build_optimizer, settings=OPTIMIZER)
        self.engine = DDPEngine(self.model, device, lambda m, write: initialize(m, 0, device, write), optimizer, CLIP)
        self.optimizer = self.engine.optimizer

    def step(self, batch: Batch) -> float:
        settings = StepSettings(lr=LR, gamma=0.0, alpha=0.0, lambda_=0.3, batch=len(batch.tokens))
        return self.engine.step(batch.split(self.shape.micro_batch), settings).losses.main

    def train(self, batch: Batch, step: int) -> StepResult:
        """A step that learns and balances, as a run's: DeepSeek-V3's constants, with a short warm-up."""
        lr = WARM_LR * min(1.0, (step + 1) / WARM_UP)
        settings = StepSettings(lr=lr, gamma=1e-3, alpha=1e-4, lambda_=0.3, batch=len(batch.tokens))
        return self.engine.step(batch.split(self.shape.micro_batch), settings)


class Theirs:
    """`DeepseekV3ForCausalLM` with the loss that it computes itself; bf16 by autocast."""

    def __init__(
        self,
        shape: Shape,
        device: torch.device,
        compute_dtype: torch.dtype,
        experts: str,
        attention: str,
        recompute: bool = False,
    ):
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

        config = DeepseekV3Config(**shape.config.to_hf())
        config._experts_implementation = experts
        config._attn_implementation = attention
        with device:
            self.model = DeepseekV3ForCausalLM(config)
        if recompute:
            self.model.gradient_checkpointing_enable()
        self.micro_batch = shape.micro_batch
        self.model.load_state_dict(fresh(shape.config, device, compute_dtype).state_dict())
        self.optimizer = build_optimizer(self.model.named_parameters(), OPTIMIZER)
        for group in self.optimizer.param_groups:
            group["lr"] = LR
        self.compute: Callable[[], AbstractContextManager[Any]] = nullcontext
        if compute_dtype is not torch.float32:
            self.compute = lambda: torch.autocast(device.type, compute_dtype)

    def step(self, batch: Batch) -> float:
        parts = batch.split(self.micro_batch)
        total = torch.zeros((), device=batch.tokens.device)
        for part in parts:
            inputs, targets = part.tokens[:, :-1], part.tokens[:, 1:].contiguous()
            with self.compute():
                loss = self.model(inputs, labels=targets, shift_labels=targets, use_cache=False).loss
            (loss / len(parts)).backward()
            total += loss.detach() / len(parts)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total)


def fresh(config: ModelConfig, device: torch.device, compute_dtype: torch.dtype) -> Transformer:
    """Our model with the weights that both sides start from."""
    model = without_weights(config, compute_dtype).to_empty(device=device)
    initialize(model, seed=0)
    return model


def without_weights(
    config: ModelConfig, compute_dtype: torch.dtype, attention: AttentionBackend | Literal["fused"] = "fused"
) -> Transformer:
    """Our model on the meta device."""
    with torch.device("meta"):
        return Transformer(config, compute_dtype=compute_dtype, attention=attention)

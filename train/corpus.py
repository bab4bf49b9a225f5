"""The data of a run: its stores, checked against the model, as training samples and validation windows."""

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.loader import Batch, Samples, StoreEntry, validation_batches
from data.store import Store
from train.config import Recipe, RecipeError
from train.generate import load_tokenizer
from train.launch import Process


class Corpus:
    """Opened stores of a recipe.

    Args:
        recipe: its `data` section names the stores, its model must fit their tokenizer.
        total_samples: samples of the whole run; a source with `max_epochs` must not run out before.

    Raises:
        DataError: a store is missing, damaged or too small, also for validation.
        RecipeError: the model does not fit the tokenizer, or a validation store has another one.
    """

    def __init__(self, recipe: Recipe, total_samples: int):
        self.recipe = recipe
        section = recipe.data
        self.length = section.sequence_length
        self.depths = recipe.model_config_resolved().num_nextn_predict_layers
        self.tokens_per_evaluation = recipe.evaluate.tokens
        entries = [StoreEntry(Path(source.path), source.weight, source.max_epochs) for source in section.train]
        self.samples = Samples(entries, self.length, self.depths, section.seed)
        self.samples.check_available(total_samples)
        self.total_samples = total_samples
        self.validation = [Store.open(source.path) for source in section.validation or section.train]
        check_vocabulary(recipe, self.samples.stores[0])
        for store in self.validation:
            check_same_tokenizer(self.samples.stores[0], store)
        for _ in self._validation_batches(
            1, 0, 1
        ):  # raises where there is nothing to validate on: now, not after the last step
            break

    @property
    def tokenizer_folder(self) -> Path:
        return self.samples.stores[0].tokenizer_folder

    @cached_property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer of the stores."""
        return load_tokenizer(self.tokenizer_folder)

    @cached_property
    def token_bytes(self) -> Tensor:
        """[V] UTF-8 bytes of each token of the model's vocabulary that the tokenizer knows."""
        return torch.from_numpy(self.samples.stores[0].token_bytes())

    def describe(self) -> str:
        """How often the run reads each source, in one line."""
        epochs = self.samples.epochs(self.total_samples).items()
        return "data: " + ", ".join(f"{source} {passes:.2g} epochs" for source, passes in epochs)

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.samples.stores[0].manifest.tokenizer_fingerprint

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the sample order: the data section, with the stores' contents in place of their paths."""
        section = self.recipe.data.model_dump(mode="json", exclude={"workers", "validation"})
        for entry, store in zip(section["train"], self.samples.stores):
            entry["path"] = store.manifest.model_dump(include={"tokenizer_fingerprint", "splits", "files"})
        return hashlib.sha256(json.dumps(section, sort_keys=True).encode()).hexdigest()

    def validation_batches(self, process: Process, micro_batch: int) -> Iterator[tuple[str, Batch]]:
        """(source, batch) of this rank's share of the validation windows."""
        return self._validation_batches(micro_batch, process.rank, process.world_size)

    def _validation_batches(self, batch: int, rank: int, world_size: int) -> Iterator[tuple[str, Batch]]:
        limit = self.tokens_per_evaluation
        return validation_batches(self.validation, self.length, self.depths, batch, limit, rank, world_size)


def check_vocabulary(recipe: Recipe, store: Store) -> None:
    """The model must have a row for each token of the store."""
    vocabulary = recipe.model_config_resolved().vocab_size
    if vocabulary < store.vocab_size:
        raise RecipeError(
            f"model.vocab_size = {vocabulary}: the tokenizer of {store.path} has {store.vocab_size} tokens; the model must have "
            f"a row for each; write model.vocab_size={-(-store.vocab_size // 64) * 64}"
        )


def check_same_tokenizer(first: Store, validation: Store) -> None:
    """Validation text must be cut by the tokenizer that the model is trained with."""
    if validation.manifest.tokenizer_fingerprint != first.manifest.tokenizer_fingerprint:
        raise RecipeError(
            f"data.validation = {validation.path}: was made with another tokenizer than {first.path}; "
            "a model reads one tokenizer's tokens; prepare it again with "
            f"`tokenizer: {{kind: folder, path: {first.tokenizer_folder}}}` in its recipe"
        )

"""The data of a run: its stores, checked against the model, as training samples and validation windows."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.packing import packed_file
from data.samples import Batch, Phase, Samples, StoreEntry
from data.store import Store
from data.validation import validation_batches
from train.config import Recipe, RecipeError
from train.fields import value_at
from train.generate import load_tokenizer
from train.guard.passed_over import consumed
from train.planning.advice import law_warnings
from train.position import Begun, Position, check_unchanged
from train.ranks import Ranks
from train.schedule import Schedule
from train.sections import Consumption

log = logging.getLogger(__name__)

ALONE = Ranks(None)


class _Start(NamedTuple):
    """Where a stage of the data begins."""

    stage: int  # its number
    sample: int
    tokens: int  # consumed before it


class Corpus:
    """Opened stores of a recipe, from where a run stands to its end. What only stages before that have read is not opened.

    Args:
        recipe: its `data` section names the stores, its model must fit their tokenizer.
        schedule: of the run; it tells with which sample each stage begins.
        record: `run.json` of the checkpoint that the run continues from; None for a new run.
        ranks: those that construct it together; where documents have to be packed, the first one does it.

    Raises:
        DataError: a store is missing, damaged or too small, also for validation, or a source with `max_epochs` runs out.
        RecipeError: the model does not fit the tokenizer, a validation store or the checkpoint has another one, or the recipe would
            draw what has been consumed otherwise.
    """

    def __init__(
        self, recipe: Recipe, schedule: Schedule, record: Mapping[str, Any] | None = None, ranks: Ranks = ALONE
    ) -> None:
        self.recipe = recipe
        section = recipe.data
        self.depths = recipe.model_config_resolved().num_nextn_predict_layers
        self.tokens_per_evaluation = recipe.evaluate.tokens
        self.start = Position() if record is None else Position.of(record)
        if record is not None:
            check_unchanged(recipe, record)
        starts, self.total_samples = self._stages_from_here(schedule)
        self.samples = self._open_samples(starts, ranks)
        check_vocabulary(recipe, self.samples.stores[0])
        if record is not None and record["tokenizer_fingerprint"] != self.tokenizer_fingerprint:
            raise RecipeError(
                f"data.train = {self.samples.stores[0].path}: its tokenizer is not the one that the run in {recipe.run.dir} has; "
                "token ids must keep their meaning; prepare the text with the run's tokenizer, or set another run.dir"
            )
        for line in law_warnings(recipe, self.tokenizer_fingerprint) if ranks.rank == 0 else ():
            log.warning("%s", line)
        self.sections = self._with_those_to_come(starts)
        self.samples.check_available(self.total_samples)
        self.validation = [Store.open(source.path) for source in section.validation or section.train]
        for store in self.validation:
            check_same_tokenizer(self.samples.stores[0], store)
        for length in {section.consumption()[start.stage].sequence_length for start in starts}:
            # What cannot be validated on is refused now, not after the last step.
            next(self.validation_batches(length, 0, 1, 1))

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
        """How often the run has read each source, and will have at its end, in one line."""
        now, then = self.samples.epochs(self.start.samples), self.samples.epochs(self.total_samples)
        return "data: " + ", ".join(
            f"{source} {f'{now[source]:.2g} of ' if now[source] else ''}{passes:.2g} epochs"
            for source, passes in then.items()
        )

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.samples.stores[0].manifest.tokenizer_fingerprint

    def position(self, tokens: int, samples: int) -> Position:
        """What a checkpoint holds of the data after so many tokens and samples."""
        sections = tuple(section for section in self.sections if section.from_sample < samples)
        return Position(tokens, samples, sections, self.samples.read(samples))

    def fingerprint(self, stage: Consumption) -> str:
        """SHA-256 of all that decides a stage's samples, with the stores' contents in place of their paths."""
        section = self.recipe.data
        stores = [self.samples.store(Path(source.path)) for source in stage.train]
        weights = [source.weight for source in stage.train]
        what = {
            "train": [[store.content, store.shares("train"), weight] for store, weight in zip(stores, weights)],
            "sequence_length": stage.sequence_length,
            "packing": stage.packing,
            "mask_documents": section.mask_documents,
            "seed": section.seed,
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def validation_batches(
        self, length: int, reader: int, readers: int, micro_batch: int
    ) -> Iterator[tuple[str, Batch]]:
        """(source, batch) of one reader's share of the validation windows, each as long as a sequence of the run's stage."""
        limit = self.tokens_per_evaluation
        return validation_batches(self.validation, length, self.depths, micro_batch, limit, reader, readers)

    def stage_at(self, tokens: int) -> int:
        """Number of the stage that a step belongs to which starts after `tokens` tokens."""
        return value_at(tuple((stage.from_tokens, k) for k, stage in enumerate(self.recipe.data.consumption())), tokens)

    def _continues(self, stage: int) -> bool:
        """Whether the run goes on in a stage that had begun."""
        sections = self.start.sections
        return bool(sections) and self.stage_at(sections[-1].from_tokens) == stage

    def _stages_from_here(self, schedule: Schedule) -> tuple[list[_Start], int]:
        """Where the stage begins in which the run stands, and where those that are to come; and the samples of the whole run."""
        tokens, sample = self.start.tokens, self.start.samples
        stage = self.stage_at(tokens)
        here = self.start.sections[-1] if self._continues(stage) else None
        starts = [_Start(stage, here.from_sample, here.from_tokens) if here else _Start(stage, sample, tokens)]
        for span in schedule.spans_from(tokens):
            if (stage := self.stage_at(span.first_token)) != starts[-1].stage:
                starts.append(_Start(stage, sample, span.first_token))
            sample = consumed(sample, span.steps, span.sequences, schedule.passed_over)
        return starts, sample

    def _open_samples(self, starts: list[_Start], ranks: Ranks) -> Samples:
        """The samples from the first of these stages on, with what has been read before it."""
        stages = self.recipe.data.consumption()
        phases = []
        for start in starts:
            stage = stages[start.stage]
            entries = [StoreEntry(Path(source.path), source.weight, source.max_epochs) for source in stage.train]
            phases.append(Phase(start.sample, entries, stage.sequence_length, stage.packing))
        if any(phase.packing == "best_fit" for phase in phases):
            ranks.first(lambda: _pack(phases))
        paths = {source.path for stage in stages for source in stage.train}
        read = self.start.sections[-1].read if self._continues(starts[0].stage) else self.start.read
        return Samples(phases, self.depths, self.recipe.data.seed, read, by_store=len(paths) > 1)

    def _with_those_to_come(self, starts: list[_Start]) -> tuple[Begun, ...]:
        """The stages that have begun and those that will. The stores of one that goes on must hold what they held."""
        begun, stages = self.start.sections, self.recipe.data.consumption()
        planned = []
        for start in starts:
            read = {name: read for name, read in self.samples.read(start.sample).items() if read.samples}
            planned.append(Begun(start.sample, start.tokens, self.fingerprint(stages[start.stage]), read))
        if not self._continues(starts[0].stage):
            return (*begun, *planned)
        if planned[0].hash != begun[-1].hash:
            raise RecipeError(
                f"data.train = {self.samples.stores[0].path}: holds another text, or other weights, than the run in "
                f"{self.recipe.run.dir} has read since sample {starts[0].sample:,}; bring that store back, or let the other one "
                f"begin here with data.stages=[{{from_tokens: {self.start.tokens}, train: …}}]"
            )
        return (*begun, *planned[1:])


def _pack(phases: list[Phase]) -> None:
    """Pack the documents of all sources that need it."""
    for phase in phases:
        for entry in phase.entries if phase.packing == "best_fit" else ():
            store = Store.open(entry.path)
            for source in store.sources("train"):
                packed_file(store, source, phase.sequence_length)


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

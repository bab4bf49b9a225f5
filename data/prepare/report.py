"""The accounts of all shards, added up: what the manifest and the report page say of a preparation."""

from collections import Counter
from typing import Any

from data.counts import Count
from data.manifest import SPLITS
from data.packing import packing_statistics
from data.prepare import clean, duplicates, encode, read, vocabulary, write
from data.prepare.accounts import EXAMPLES_KEPT, Cleaning, SplitCount
from data.prepare.job import Job, Shard, names_of, steps_of
from data.report.shape import Packing, RejectedDocument, Report, Stage, Tokens, Unreadable, UnreadableRecord

SEQUENCE_LENGTHS = (512, 4096, 32_768)  # tokens; for which packing is measured
PACKED_DOCUMENTS = 1 << 18  # of each source, in whose order nothing is special


def report(job: Job, shards: list[Shard], versions: dict[str, str]) -> Report:
    """All that the report page shows."""
    sources = [source.name for source in job.recipe.sources]
    cleaned = {name: _cleaning(job, shards, number) for number, name in enumerate(sources)}
    encoded = [(sources[shard.source], encode.account(job, shard)) for shard in shards]
    token_lengths: dict[str, Counter[int]] = {name: Counter() for name in sources}
    tokens: dict[str, dict[str, SplitCount]] = {name: {split: SplitCount() for split in SPLITS} for name in sources}
    for name, account in encoded:
        token_lengths[name].update(account.lengths)
        for split, count in account.splits.items():
            tokens[name][split] += count
    return Report(
        recipe=job.name,
        versions=versions,
        stages=stages(job, shards),
        rejected={name: account.rejected for name, account in cleaned.items()},
        unreadable={name: _unreadable(job, number) for number, name in enumerate(sources)},
        languages={name: account.languages for name, account in cleaned.items()},
        lengths={name: account.lengths for name, account in cleaned.items()},
        token_lengths={name: dict(sorted(lengths.items())) for name, lengths in token_lengths.items()},
        duplicates=duplicates.summary(job),
        tokens={name: {split: _tokens(count) for split, count in splits.items()} for name, splits in tokens.items()},
        packing=_packing(job, shards),
        reference=job.recipe.reference_tokenizer.name if job.recipe.reference_tokenizer else None,
        examples=[
            RejectedDocument(source=name, step=e.step, reason=e.reason, where=e.where, text=e.text)
            for name, account in cleaned.items()
            for e in account.examples
        ],
    )


def manifest_steps(job: Job, shards: list[Shard]) -> list[dict[str, Any]]:
    """The manifest's list of what was done, in order, with what each step left of each source."""
    counted = [
        {"step": stage.name, "sources": {source: count.model_dump() for source, count in stage.sources.items()}}
        for stage in stages(job, shards)
    ]
    return [*counted, {"step": "tokenizer", **vocabulary.made(job)}, {"step": "shuffle", "seed": job.recipe.seed}]


def stages(job: Job, shards: list[Shard]) -> list[Stage]:
    """What is left of each source after reading, after each step of its cleaning, and after both removals of duplicates."""
    found: dict[str, dict[str, Count]] = {"read": {}}
    removed = duplicates.summary(job).removed
    for number, source in enumerate(job.recipe.sources):
        left = sum((account.read for account in read.accounts(job, number)), Count())
        found["read"][source.name] = left
        for name, left in zip(names_of(steps_of(job.recipe, number)), _cleaning(job, shards, number).after):
            found.setdefault(name, {})[source.name] = left
    for source in job.recipe.sources:
        left = [of_step[source.name] for of_step in found.values() if source.name in of_step][-1]
        for kind, fallen in removed[source.name].items():
            left -= fallen
            found.setdefault(f"{kind} duplicates", {})[source.name] = left
    return [Stage(name=name, sources=sources) for name, sources in found.items()]


def kept(job: Job, shards: list[Shard]) -> Count:
    """What all steps and the removal of duplicates leave."""
    return sum(stages(job, shards)[-1].sources.values(), Count())


def _cleaning(job: Job, shards: list[Shard], source: int) -> Cleaning:
    accounts = (clean.account(job, shard) for shard in shards if shard.source == source)
    return Cleaning.total(accounts, len(steps_of(job.recipe, source)))


def _unreadable(job: Job, source: int) -> Unreadable:
    accounts = read.accounts(job, source)
    reasons: Counter[str] = Counter()
    examples: list[UnreadableRecord] = []
    for account in accounts:
        for example in account.examples:
            if sum(shown.reason == example.reason for shown in examples) < EXAMPLES_KEPT:
                examples.append(UnreadableRecord(**example.model_dump()))
        reasons.update(account.unreadable)
    return Unreadable(reasons=dict(sorted(reasons.items())), examples=examples)


def _packing(job: Job, shards: list[Shard]) -> dict[int, Packing]:
    lengths = write.first_lengths(job, shards, "train", PACKED_DOCUMENTS)
    found = {}
    for sequence_length in SEQUENCE_LENGTHS:
        ways = packing_statistics(lengths, sequence_length)
        found[sequence_length] = Packing(
            cut_by_windows=ways["concat"]["cut_needlessly"],
            cut_by_best_fit=ways["best_fit"]["cut"],
            padding_of_best_fit=ways["best_fit"]["padding"],
        )
    return found


def _tokens(count: SplitCount) -> Tokens:
    per_token = count.bytes / count.reference_tokens if count.reference_tokens else None
    return Tokens(
        documents=count.documents, tokens=count.tokens, bytes=count.bytes, reference_bytes_per_token=per_token
    )

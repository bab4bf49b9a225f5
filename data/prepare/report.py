"""The accounts of all shards, added up: what the manifest and the report page say of a preparation."""

from collections import Counter
from typing import Any

from data.counts import Count
from data.dedup.duplicates import Kind
from data.errors import DataError
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
    """What is left of each source after reading, after each step of its cleaning, and after both removals of duplicates.

    Steps come in the order of the first source that has them; where another source has them in another order, a step is named a
    second time, so that no source grows on the way down.
    """
    found: list[tuple[str, dict[str, Count]]] = [("read", {})]
    removed = duplicates.summary(job).removed
    ends: dict[str, Count] = {}
    for number, source in enumerate(job.recipe.sources):
        left = sum((account.read for account in read.accounts(job, number)), Count())
        found[0][1][source.name] = left
        place = 0
        for name, left in zip(names_of(steps_of(job.recipe, number)), _cleaning(job, shards, number).after):
            place = next((later for later in range(place + 1, len(found)) if found[later][0] == name), 0) or len(found)
            if place == len(found):
                found.append((name, {}))
            found[place][1][source.name] = left
        ends[source.name] = left
    kinds: tuple[tuple[Kind, bool], ...]
    kinds = (("exact", job.recipe.dedup.exact), ("near", job.recipe.dedup.minhash is not None))
    for kind in (kind for kind, is_on in kinds if is_on):
        ends = {name: left - removed[name][kind] for name, left in ends.items()}
        found.append((f"{kind} duplicates", dict(ends)))
    return [Stage(name=name, sources=sources) for name, sources in found]


def kept(job: Job, shards: list[Shard]) -> Count:
    """What all steps and the removal of duplicates leave."""
    return sum(_left(job, shards).values(), Count())


def check_every_source(job: Job, shards: list[Shard]) -> None:
    """Each source must have something left.

    Raises:
        DataError: a source of which everything fell.
    """
    for name, left in _left(job, shards).items():
        if not left.documents:
            raise DataError(
                f"source {name}: no document is left after its steps and the removal of duplicates; loosen them, raise its "
                "priority, or leave the source out"
            )


def _left(job: Job, shards: list[Shard]) -> dict[str, Count]:
    found: dict[str, Count] = {}
    for stage in stages(job, shards):
        found |= stage.sources
    return found


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

"""The data of a run is known by its content, not by where it lies; what has begun stays, and what shall change is a stage."""

import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import DataError
from data.loader import Loader, Planned
from data.manifest import Manifest
from data.store import Store
from tests.small_run import CHANGES
from train.config import Recipe, RecipeError, load_recipe
from train.corpus import Corpus
from train.schedule import Schedule

TOKENS = 4096  # of the run that these tests plan: 16 steps of 8 × 32


def recipe(store: Path, *changes: str) -> Recipe:
    settings = CHANGES | {"data.train": store, "schedule.tokens": TOKENS, "run.dir": "run"}
    return load_recipe("tiny", [*(f"{key}={value}" for key, value in settings.items()), *changes])


def corpus(recipe: Recipe, record: dict[str, Any] | None = None) -> Corpus:
    return Corpus(recipe, Schedule(recipe.schedule, recipe.data.lengths), record)


def fingerprint(store: Path, *changes: str) -> str:
    return corpus(recipe(store, *changes)).sections[0].hash


def test_a_store_that_has_moved_is_the_same_data(tiny_store: Store, tmp_path: Path) -> None:
    shutil.copytree(tiny_store.path, tmp_path / "moved")
    assert fingerprint(tmp_path / "moved", "run.seed=3") == fingerprint(tiny_store.path)


@pytest.mark.parametrize(
    "change", ["data.seed=1", "data.sequence_length=16", "data.mask_documents=true", "data.packing=best_fit"]
)
def test_what_changes_the_samples_changes_the_fingerprint(tiny_store: Store, change: str) -> None:
    assert fingerprint(tiny_store.path, change) != fingerprint(tiny_store.path)


@pytest.mark.parametrize(
    "change", ["data.workers=0", "parallel.micro_batch=1", "data.stages=[{from_tokens: 2048, sequence_length: 64}]"]
)
def test_what_leaves_the_samples_leaves_the_fingerprint(tiny_store: Store, change: str) -> None:
    assert fingerprint(tiny_store.path, change) == fingerprint(tiny_store.path)


def test_other_text_in_the_same_place_is_other_data(tiny_store: Store, tmp_path: Path) -> None:
    """The manifest's hash of train.bin is what tells."""
    assert fingerprint(altered(tiny_store, tmp_path / "other")) != fingerprint(tiny_store.path)


def altered(store: Store, path: Path) -> Path:
    """A copy of a store whose manifest says that its text is another one."""
    shutil.copytree(store.path, path)
    manifest = store.manifest.model_dump()
    manifest["files"]["train.bin"]["sha256"] = "0" * 64
    Manifest.model_validate(manifest).write(path)
    return path


def relabelled(store: Store, path: Path, weight: float) -> Path:
    """A copy of a store with another report, recipe and library, whose first source has this weight."""
    shutil.copytree(store.path, path)
    manifest = store.manifest.model_dump()
    manifest["files"]["report.json"]["sha256"] = "0" * 64
    manifest |= {"recipe": {"sources": []}, "versions": {"numpy": "9.9"}, "steps": []}
    manifest["splits"]["train"]["sources"][0]["weight"] = weight
    Manifest.model_validate(manifest).write(path)
    return path


def test_a_store_is_known_by_its_tokens_and_not_by_how_its_recipe_was_called(tiny_store: Store, tmp_path: Path) -> None:
    other = relabelled(tiny_store, tmp_path / "other", weight=0.75)
    assert Store.open(other).content == tiny_store.content
    assert fingerprint(other) == fingerprint(tiny_store.path)
    runs = [Journey().go_on(recipe(store), 4) for store in (tiny_store.path, other)]
    assert runs[0].rows == runs[1].rows
    assert runs[0].go_on(recipe(other), 2).rows == runs[1].go_on(recipe(tiny_store.path), 2).rows


def test_other_weights_in_a_store_are_the_same_text_in_another_mixture(tiny_store: Store, tmp_path: Path) -> None:
    other = relabelled(tiny_store, tmp_path / "other", weight=0.5)
    assert Store.open(other).content == tiny_store.content
    assert fingerprint(other) != fingerprint(tiny_store.path)
    run = Journey().go_on(recipe(tiny_store.path), 4)
    with pytest.raises(RecipeError, match="holds another text, or other weights"):
        run.go_on(recipe(other), 1)
    run.go_on(recipe(tiny_store.path, f"data.stages=[{{from_tokens: 1024, train: {other}}}]"), 1)


class Journey:
    """A run without a model: it reads its samples, stops, and goes on from what a checkpoint holds, as the trainer does."""

    def __init__(self) -> None:
        self.record: dict[str, Any] | None = None
        self.rows: list[tuple[int, ...]] = []  # every sequence in the order of the samples
        self.consumed: list[dict[str, int]] = []  # tokens of every source after each step

    def go_on(self, recipe: Recipe, steps: int, world_size: int = 1, micro_batch: int = 8) -> "Journey":
        """Make so many steps, or those that are left."""
        schedule = Schedule(recipe.schedule, recipe.data.lengths)
        corpus = Corpus(recipe, schedule, self.record)
        tokens, samples = corpus.start.tokens, corpus.start.samples
        plan = list(schedule.steps(tokens, samples))[:steps]
        entries = [Planned(step.first_sample, step.settings.batch, micro_batch) for step in plan]
        ranks = [Loader(corpus.samples, rank, world_size, workers=0).steps(entries) for rank in range(world_size)]
        for step in plan:
            for batches in [next(rank) for rank in ranks]:
                self.rows += [tuple(row) for batch in batches for row in batch.tokens.tolist()]
            tokens, samples = tokens + step.tokens, samples + step.settings.batch
            self.consumed.append(corpus.samples.tokens_by_source(samples))
        self.record = corpus.position(tokens, samples).to_record() | {
            "recipe": recipe.model_dump(mode="json", by_alias=True),
            "tokenizer_fingerprint": corpus.tokenizer_fingerprint,
        }
        return self


STAGES = (
    "data.stages=[{from_tokens: 700, train: [{path: STORE, weight: 1}, {path: OTHER, weight: 3}]},"
    "{from_tokens: 1400, sequence_length: 64, micro_batch: 2}, {from_tokens: 2304, sequence_length: 32, train: OTHER},"
    "{from_tokens: 3000, train: STORE, packing: best_fit}]"
)


@pytest.fixture
def staged(tiny_store: Store, tmp_path: Path) -> Iterator[Recipe]:
    """Two stores, two lengths, two packings."""
    other = altered(tiny_store, tmp_path / "other")
    yield recipe(tiny_store.path, STAGES.replace("STORE", str(tiny_store.path)).replace("OTHER", str(other)))


def test_wherever_a_run_stops_and_on_however_many_ranks_it_goes_on_its_samples_are_the_same(staged: Recipe) -> None:
    whole = Journey().go_on(staged, 100)
    assert len(whole.rows) > TOKENS // 64 and {len(row) for row in whole.rows} == {34, 66}
    pick = random.Random(0)
    for _ in range(25):
        stopped = Journey()
        while len(stopped.rows) < len(whole.rows):
            stopped.go_on(staged, pick.randint(1, 7), pick.choice([1, 2, 4]), pick.randint(1, 9))
        assert stopped.rows == whole.rows
        assert stopped.consumed == whole.consumed
        assert stopped.record == whole.record


def test_every_stage_is_in_the_record_with_what_was_read_before_it(staged: Recipe) -> None:
    record = Journey().go_on(staged, 100).record
    assert record is not None
    # Steps of 256 tokens: the stages at 700, 1400, 2304 and 3000 begin with the steps at 768, 1536, 2304 and 3072.
    assert [section["from_tokens"] for section in record["data_sections"]] == [0, 768, 1536, 2304, 3072]
    assert [section["from_sample"] for section in record["data_sections"]] == [0, 24, 48, 60, 84]
    for section in record["data_sections"]:
        reads = section["read"].values()
        assert sum(read["samples"] for read in reads) == section["from_sample"]
        assert sum(read["samples"] * read["sequence_length"] for read in reads) == section["from_tokens"]
    assert sum(record["tokens_by_source"].values()) == record["tokens"] == TOKENS
    assert sum(record["samples_by_source"].values()) == record["samples"]


def test_a_mixture_changed_twice_on_the_way_is_the_mixture_that_was_planned_so(
    tiny_store: Store, tmp_path: Path
) -> None:
    """Each change is a stage that the recipe gets while the run is stopped. A checkpoint tells what was before."""
    other = altered(tiny_store, tmp_path / "other")
    first = f"{{from_tokens: 1024, train: [{tiny_store.path}, {{path: {other}, weight: 2}}]}}"
    second = f"{{from_tokens: 2560, sequence_length: 64, train: {other}}}"
    run = Journey().go_on(recipe(tiny_store.path), 4)
    run.go_on(recipe(tiny_store.path, f"data.stages=[{first}]"), 3, 2).go_on(
        recipe(tiny_store.path, f"data.stages=[{first}]"), 3
    )
    run.go_on(recipe(tiny_store.path, f"data.stages=[{first}, {second}]"), 2, 4)
    run.go_on(recipe(tiny_store.path, f"data.stages=[{first}, {second}]"), 100)
    planned = Journey().go_on(recipe(tiny_store.path, f"data.stages=[{first}, {second}]"), 100)
    assert run.rows == planned.rows
    assert run.record is not None and planned.record is not None
    for record in (
        run.record,
        planned.record,
    ):  # but for the names: as long as there was one store, its own was not needed
        for section in record["data_sections"]:
            section["read"] = {stream: read["samples"] for stream, read in section["read"].items()}
    assert run.record == planned.record
    assert set(run.record["tokens_by_source"]) == {"store/verse", "store/code", "other/verse", "other/code"}
    assert run.consumed[4:] == planned.consumed[4:]


def test_a_stage_that_has_begun_keeps_its_samples_when_the_batch_is_changed(staged: Recipe) -> None:
    """Its first sample is in the checkpoint: by the new batches alone it would have begun elsewhere."""
    run = Journey().go_on(staged, 4)  # the stage at 700 has begun with the step at 768
    changed = Recipe.model_validate(
        staged.model_dump(by_alias=True)
        | {"schedule": staged.schedule.model_dump(by_alias=True) | {"batch_tokens": 640}}
    )
    run.go_on(changed, 1)
    whole = Journey().go_on(staged, 100)
    assert run.rows[:48] == whole.rows[:48]
    assert run.record is not None and run.record["data_sections"][1]["from_sample"] == 24


def test_what_only_earlier_stages_have_read_need_not_be_there(tiny_store: Store, tmp_path: Path) -> None:
    first, other = tmp_path / "first", altered(tiny_store, tmp_path / "other")
    shutil.copytree(tiny_store.path, first)
    changes = (f"data.stages=[{{from_tokens: 1024, train: {other}}}]", f"data.validation={other}")
    whole = Journey().go_on(recipe(first, *changes), 100)
    run = Journey().go_on(recipe(first, *changes), 6)
    shutil.rmtree(first)
    assert run.go_on(recipe(first, *changes), 100).record == whole.record


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            "data.train=[{path: STORE, weight: 2}]",
            "data.train.0.weight = 2.0: the run in run has consumed 1,024 tokens, drawn with 1.0; what has begun stays; "
            "set it back, and let the change begin here with data.stages=[{from_tokens: 1024, train: …}]",
        ),
        ("data.train=[STORE, OTHER]", r"data.train = \[.*\]: .*, drawn with \[.*\]; .*{from_tokens: 1024, train: …}"),
        ("data.sequence_length=16", "data.sequence_length = 16: .* drawn with 32; .*{from_tokens: 1024, sequence_length: …}"),
        ("data.packing=best_fit", "data.packing = 'best_fit': .* drawn with 'concat'; .*{from_tokens: 1024, packing: …}"),
        ("data.seed=1", "data.seed = 1: the run in run began with 0; it holds for a whole run; .* another run.dir"),
        ("data.mask_documents=true", "data.mask_documents = true: the run in run began with false; .* another run.dir"),
        ("data.stages=[{from_tokens: 512, packing: best_fit}]", "data.stages: .* at 512 tokens; .* from_tokens: 1024 or more"),
        (
            "data.train=OTHER",
            "data.train = .*other: holds another text, or other weights, than the run in run has read since sample 0; bring that "
            "store back, or let the other one begin here with data.stages=[{from_tokens: 1024, train: …}]",
        ),
    ],
)  # fmt: skip
def test_what_has_begun_is_not_edited(tiny_store: Store, tmp_path: Path, change: str, line: str) -> None:
    other = altered(tiny_store, tmp_path / "other")
    record = Journey().go_on(recipe(tiny_store.path), 4).record
    with pytest.raises(RecipeError) as refused:
        corpus(
            recipe(tiny_store.path, change.replace("STORE", str(tiny_store.path)).replace("OTHER", str(other))), record
        )
    said = str(refused.value)
    assert said == line or re.match(line.replace("=[{", r"=\[{"), said), said


def test_a_stage_that_has_begun_is_not_taken_away(staged: Recipe, tiny_store: Store) -> None:
    record = Journey().go_on(staged, 5).record
    with pytest.raises(RecipeError, match=r"data.stages: the stage from 700 tokens on is missing; .* put it back"):
        corpus(recipe(tiny_store.path), record)


def test_what_draws_no_other_sample_may_change(tiny_store: Store, tmp_path: Path) -> None:
    shutil.copytree(tiny_store.path, tmp_path / "moved")
    run = Journey().go_on(recipe(tiny_store.path), 4)
    changed = recipe(
        tmp_path / "moved",
        f"data.train=[{{path: {tmp_path / 'moved'}, max_epochs: 9}}]",
        "data.workers=3",
        "schedule.tokens=8192",
    )
    run.go_on(changed, 100)
    assert run.rows == Journey().go_on(recipe(tiny_store.path, "schedule.tokens=8192"), 100).rows


def test_max_epochs_counts_what_all_stages_read(tiny_store: Store) -> None:
    """32,768 tokens are 1.2 and 2.2 epochs of the two sources, half of them in windows of 32 and half in windows of 64."""
    limited = f"data.train=[{{path: {tiny_store.path}, max_epochs: EPOCHS}}]"
    stage = "data.stages=[{from_tokens: 16384, sequence_length: 64}]"
    changes = ("schedule.tokens=32768", stage)
    whole = corpus(recipe(tiny_store.path, *changes))
    most = max(whole.samples.epochs(whole.total_samples).values())
    corpus(recipe(tiny_store.path, limited.replace("EPOCHS", f"{most + 0.01:.4f}"), *changes))
    with pytest.raises(DataError, match=r"samples need \d+ of source verse, max_epochs allows \d+"):
        corpus(recipe(tiny_store.path, limited.replace("EPOCHS", f"{most - 0.01:.4f}"), *changes))


def test_a_line_tells_the_epochs_so_far_and_at_the_end(tiny_store: Store) -> None:
    run = Journey().go_on(recipe(tiny_store.path), 8)
    assert re.fullmatch(r"data: verse 0\.\d+ epochs, code 0\.\d+ epochs", corpus(recipe(tiny_store.path)).describe())
    said = corpus(recipe(tiny_store.path), run.record).describe()
    assert re.fullmatch(r"data: verse 0\.\d+ of 0\.\d+ epochs, code 0\.\d+ of 0\.\d+ epochs", said)


def test_batches_of_a_longer_stage_are_as_long(staged: Recipe) -> None:
    """Sequences of 64 in batches of 256 tokens, in its own micro-batches of 2."""
    schedule = Schedule(staged.schedule, staged.data.lengths)
    steps = [step for step in schedule.steps() if step.sequence_length == 64]
    assert [(step.first_token, step.settings.batch) for step in steps] == [(1536, 4), (1792, 4), (2048, 4)]
    assert {staged.micro_batch(step.first_token) for step in steps} == {2}
    samples = corpus(staged).samples
    planned = Planned(steps[0].first_sample, 4, 2)
    batches = Loader(samples).step(planned)
    assert [batch.tokens.shape for batch in batches] == [torch.Size([2, 66])] * 2

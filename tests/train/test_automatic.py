"""Real runs whose learning rate and batch a law decides: they end and continue as any other, and doubts are told at the start."""

from pathlib import Path

import pytest

from data.store import Store
from parallel.layout import LayoutError
from tests.small_run import LENGTH, Run, assert_same_bits
from train.config import Recipe, load_recipe
from train.continued import continued
from train.fields import as_points
from train.scaling.law import Law, PowerLaw, load_law, save_law
from train.schedule import Schedule

TOKENS = 4096


def law(path: Path, tokenizer: str | None = None, sequences: int = 8, lr: float = 1e-2) -> Path:
    """A law whose best batch of D tokens is 8 sequences at 4,096 tokens and grows with the root of D."""
    save_law(
        Law(
            name="roots",
            source="this test",
            lr=PowerLaw(coefficient=lr, exponents={}),
            batch_tokens=PowerLaw(coefficient=sequences * LENGTH / TOKENS**0.5, exponents={"tokens": 0.5}),
            measured={"tokens": (1000, 10_000)},
            tokenizer=tokenizer,
        ),
        path,
    )
    return path


def ramp(path: Path) -> tuple[str, ...]:
    return (
        *(f"schedule.law={path}", "schedule.lr=auto", "schedule.batch_tokens=ramp", f"schedule.tokens={TOKENS}"),
        *("parallel.micro_batch=1", "schedule.warmup_steps=0", "schedule.shape=wsd"),
    )


@pytest.fixture(scope="module")
def ramped(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a ramp, to its end; its law is beside it."""
    folder = tmp_path_factory.mktemp("ramped")
    run = Run(tiny_store, folder / "run")
    assert run.train(*ramp(law(folder / "law.json"))) == [0], run.said
    return run


def test_a_ramp_that_is_interrupted_ends_as_one_that_is_not(tiny_store: Store, tmp_path: Path, ramped: Run) -> None:
    """Batches of 1, 2, 4 and 8 sequences. Stopped within the third stage, continued in a new process: the same bits."""
    path = ramped.folder.parent / "law.json"
    changes = ramp(path)
    recipe = load_recipe("tiny", ramped.arguments(*changes)[1:])
    # √(D/4096) · 8 sequences is √½ of 2, 4 and 8 sequences at 128, 512 and 2,048 tokens
    assert recipe.schedule.batch_tokens == ((0, 32), (128, 64), (512, 128), (2048, 256))
    once, twice = ramped, Run(tiny_store, tmp_path / "twice")
    # 4 steps to 128 tokens, 6 to 512, 12 to 2,048, 8 to 4,096
    assert twice.train(*changes, "run.stop_at_step=15") == [0], twice.said
    assert twice.train(*changes) == [0], twice.said
    lines = once.metrics()
    assert [line["batch_tokens"] for line in lines] == [32] * 4 + [64] * 6 + [128] * 12 + [256] * 8
    for line in lines[:-4]:  # before the decay: the peak belongs to batches of 256
        assert line["lr"] == pytest.approx(1e-2 * (line["batch_tokens"] / 256) ** 0.5)
    assert twice.metrics() == lines
    assert_same_bits(twice.tensors(30), once.tensors(30))
    assert once.record(30)["law"] == str(path)
    assert once.record(30)["law_hash"] == load_law(path).hash


def test_a_run_keeps_what_its_law_gave_when_another_law_has_taken_its_place(tiny_store: Store, tmp_path: Path) -> None:
    """Stopped on two processes, the law's file overwritten, the same command: the steps of a run that nothing happened to."""
    changes = (*ramp(law(tmp_path / "law.json")), "schedule.tokens=1024", "schedule.batch_multiple=2")
    first = load_law(tmp_path / "law.json").hash
    once, twice = Run(tiny_store, tmp_path / "once"), Run(tiny_store, tmp_path / "twice")
    assert once.train(*changes, processes=2) == [0, 0], once.said
    assert twice.train(*changes, "run.stop_at_step=5", processes=2) == [0, 0], twice.said
    law(tmp_path / "law.json", sequences=16, lr=3e-3)
    assert twice.train(*changes, processes=2) == [0, 0], twice.said
    assert twice.metrics() == once.metrics()
    steps = len(once.metrics())
    assert_same_bits(twice.tensors(steps), once.tensors(steps))
    told = [line for line in twice.said.splitlines() if "keeps its" in line]
    assert told == [
        f"law {tmp_path / 'law.json'} gives schedule.lr = 0.003, schedule.batch_tokens = [[0, 64], [128, 128], [512, 256]] now; "
        f"the run in {twice.folder} keeps its schedule.lr = 0.01, schedule.batch_tokens = [[0, 64], [512, 128]]; "
        "give numbers to change them"
    ]
    assert twice.record(steps)["law_hash"] == first
    assert load_recipe(twice.folder / "recipe.yaml").schedule == load_recipe(once.folder / "recipe.yaml").schedule


def test_what_a_run_keeps_and_what_is_given_by_hand(tmp_path: Path) -> None:
    """A rule of recipes alone: `auto` is the run's number, a number is a number, and what has not changed is not told."""

    def asked(*changes: str) -> Recipe:
        return load_recipe("tiny", [*ramp(tmp_path / "law.json"), *changes])

    law(tmp_path / "law.json")
    old = asked("schedule.batch_tokens=auto")
    record = {"recipe": old.model_dump(mode="json", by_alias=True)}
    assert continued(old, record) == (old, None)
    law(tmp_path / "law.json", lr=3e-3)
    kept, told = continued(asked("schedule.batch_tokens=auto"), record)
    assert kept == old and told and "schedule.lr" in told and "batch_tokens" not in told
    kept, told = continued(asked("schedule.batch_tokens=auto", "schedule.lr=5e-3"), record)
    assert (kept.schedule.lr, kept.schedule.batch_tokens, told) == (5e-3, old.schedule.batch_tokens, None)
    assert kept.schedule.from_law and set(kept.schedule.from_law.numbers) == {"batch_tokens"}
    longer, told = continued(asked("schedule.batch_tokens=auto", "schedule.tokens=16384"), record)
    assert longer.schedule.batch_tokens == old.schedule.batch_tokens and longer.schedule.tokens == 16384
    record["recipe"]["schedule"] |= {"from_law": None, "law": None}  # begun with numbers
    kept, told = continued(asked(), record)
    assert kept.schedule == old.schedule.model_copy(update={"from_law": None, "law": None})
    assert kept.schedule.lr_batch_exponent == 0 and told and "schedule.lr_batch_exponent = 0.5" in told


def test_a_batch_of_a_law_that_the_processes_cannot_share_names_what_helps(tiny_store: Store, tmp_path: Path) -> None:
    run, changes = Run(tiny_store, tmp_path / "run"), ramp(law(tmp_path / "law.json"))
    assert run.train(*changes, "schedule.batch_multiple=2", processes=3) == [2] * 3
    assert (
        "a global batch of 2 sequences does not divide over 3 processes; "
        "write schedule.batch_tokens=ramp schedule.batch_multiple=6 or another number of processes" in run.said
    )
    helped = load_recipe("tiny", [*run.arguments(*changes)[1:], "schedule.batch_multiple=6"])
    Schedule(helped.schedule, helped.data.lengths).check_layout(helped.layout(3), helped.micro_batch)
    schedule = Schedule(load_recipe("tiny", run.arguments(*changes)[1:]).schedule, LENGTH)
    with pytest.raises(LayoutError, match="does not divide over 3 processes; choose a multiple of 3 sequences"):
        schedule.check_layout(helped.layout(3), helped.micro_batch, is_begun=True)


def test_a_ramp_takes_the_samples_that_a_constant_batch_takes_in_the_same_order(
    tiny_store: Store, tmp_path: Path, ramped: Run
) -> None:
    """What has been read of each source after as many samples is the same."""
    constant = Run(tiny_store, tmp_path / "constant")
    assert constant.train(f"schedule.tokens={TOKENS}") == [0], constant.said
    read = {line["tokens"]: line["tokens_by_source"] for line in ramped.metrics()}
    same = [line for line in constant.metrics() if line["tokens"] in read]
    assert len(same) > 8 and all(read[line["tokens"]] == line["tokens_by_source"] for line in same)
    assert ramped.record(30)["samples_by_source"] == constant.record(16)["samples_by_source"]


def test_a_law_of_another_tokenizer_or_another_scale_is_told_at_the_start(tiny_store: Store, tmp_path: Path) -> None:
    own, other = (
        law(tmp_path / "own.json", tiny_store.manifest.tokenizer_fingerprint),
        law(tmp_path / "other.json", "ab" * 32),
    )
    for path, tokens, batch, told in (
        (own, 1024, 128, None),
        (own, 1024, 32, "its learning rate belongs to a batch of 128 tokens, the recipe has 32;"),
        (other, 1024, 128, "another tokenizer cut"),
        (own, 64, 32, "far outside"),
    ):
        run = Run(tiny_store, tmp_path / f"{path.stem}-{tokens}-{batch}")
        changes = (
            f"schedule.law={path}",
            "schedule.lr=auto",
            f"schedule.tokens={tokens}",
            f"schedule.batch_tokens={batch}",
        )
        assert run.train(*changes, "parallel.micro_batch=1", "run.stop_at_step=1") == [0], run.said
        assert ("law roots" in run.said) == (told is not None) and (told or "") in run.said, run.said


def test_a_continued_run_needs_its_law_no_more_once_its_recipe_is_written(tiny_store: Store, tmp_path: Path) -> None:
    run, path = Run(tiny_store, tmp_path / "run"), law(tmp_path / "law.json")
    assert run.train(*ramp(path), "run.stop_at_step=2") == [0], run.said
    path.unlink()
    recipe = load_recipe(run.folder / "recipe.yaml", ["run.stop_at_step=null"])
    assert as_points(recipe.schedule.batch_tokens)[-1] == (2048, 256) and recipe.schedule.lr_batch_exponent == 0.5

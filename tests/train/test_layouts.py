"""One run under one layout after another: the checkpoint that each leaves is the whole run, and no rank ever holds all of it."""

import json
import os
import signal
import time
from collections.abc import Mapping, Set
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch import Tensor
from torch.distributed.tensor import DTensor

from data.store import Store
from tests.small_run import LENGTH, SEQUENCES, STEPS, Run, assert_same_bits
from train.checkpoint import Checkpoints
from train.cli import main
from train.export import export
from train.generate import continue_texts, load_model
from train.storage import Writer


class Leg(NamedTuple):
    """A part of a run: its processes, how they share the model, the step at which it stops."""

    processes: int
    parallel: dict[str, Any]
    end: int

    @property
    def changes(self) -> tuple[str, ...]:
        """As they stand on the command line. With one sequence a micro-batch every leg accumulates 8, 4 or 2 of them."""
        return ("parallel.micro_batch=1", *(f"parallel.{key}={value}" for key, value in self.parallel.items()))


LEGS = {
    "ddp+1f1b@2": Leg(2, {"engine": "ddp", "pipeline": 2}, 3),
    "fsdp+interleaved+context@4": Leg(4, {"engine": "fsdp", "pipeline": 2, "schedule": "interleaved", "context": 2}, 6),
    "zero2@2": Leg(2, {"engine": "zero2"}, 9),
    "fsdp+expert@4": Leg(4, {"engine": "fsdp", "expert": 2}, 12),
    "zero3@4": Leg(4, {"engine": "zero3"}, 14),
    "fsdp+replicate@4": Leg(4, {"engine": "fsdp", "replicate": 2}, 17),
    "ddp@1": Leg(1, {"engine": "ddp"}, STEPS),
}
LOSS_TOLERANCE, TENSOR_TOLERANCE = 2e-6, 1e-4


class Chain(NamedTuple):
    """A run of all legs, one after the other, and the bytes of host memory that its checkpoints took, by leg and rank."""

    run: Run
    staged: dict[str, list[int]]  # for a copy of what an asynchronous save writes
    given: dict[str, list[int]]  # to the writer
    again: dict[str, list[int]]  # for a copy of what the engine had copied for the save already
    read: dict[str, list[int]]  # of the checkpoint before


@pytest.fixture(scope="module")
def chain(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    chain = Chain(Run(tiny_store, folder / "run"), {}, {}, {}, {})
    for name, leg in LEGS.items():
        notes = folder / name
        notes.mkdir()
        changes = (*leg.changes, f"run.stop_at_step={leg.end}", "checkpoint.keep=10")
        processes = chain.run.start(*changes, processes=leg.processes, work=train_and_note, extra=(notes,))
        assert processes.wait() == [0] * leg.processes, chain.run.said
        ranks = [json.loads((notes / str(rank)).read_text()) for rank in range(leg.processes)]
        for kind in chain._fields[1:]:
            getattr(chain, kind)[name] = [noted[kind] for noted in ranks]
    return chain


def train_and_note(arguments: list[str], notes: Path) -> int:
    """`rorqual train` that notes what this rank stages, writes and reads."""
    noted = {"staged": 0, "given": 0, "again": 0, "read": 0}
    save, write, load = Checkpoints.save, Checkpoints._write_aside, Checkpoints.load
    copies: set[int] = set()  # addresses of what the engine copied

    def note_save(self: Checkpoints, step: int, state: Mapping[str, Any], run: Any, copied: Set[str]) -> None:
        copies.update(tensor.data_ptr() for section in copied for tensor in state[section].values())
        noted["again"] = sum(tensor.nbytes for section in copied for tensor in state[section].values())
        save(self, step, state, run, copied)

    def note_write(self: Checkpoints, step: int, tensors: dict[str, Tensor], run_json: str) -> None:
        memory = {local(t).untyped_storage().data_ptr(): local(t).untyped_storage().nbytes() for t in tensors.values()}
        noted["staged"] = sum(memory.values())
        noted["given"] = sum(local(tensor).nbytes for tensor in tensors.values())
        noted["again"] -= sum(size for address, size in memory.items() if address in copies)
        write(self, step, tensors, run_json)

    def note_load(self: Checkpoints, path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
        sections = [section.values() if isinstance(section, Mapping) else [section] for section in state.values()]
        noted["read"] = sum(local(tensor).nbytes for section in sections for tensor in section)
        return load(self, path, state)

    Checkpoints.save, Checkpoints._write_aside, Checkpoints.load = note_save, note_write, note_load  # type: ignore
    code = main(["train", *arguments])
    (notes / os.environ.get("RANK", "0")).write_text(json.dumps(noted))
    return code


def test_a_run_that_changes_its_layout_six_times_is_the_run_that_never_did(chain: Chain, whole: Run) -> None:
    """Losses and norms of every step, and at the end all that a checkpoint holds, against one process that never stopped.

    Losses and norms were measured within 3e-7 of each other in all of the 20 steps, two or three units in the last place of fp32.
    Tensors are compared by their largest element, and were measured within 9e-6 (weights) and 3e-6 (moments): Adam divides a
    gradient by its own size, so that where a gradient is all rounding, rounding decides over a step of the size of the learning
    rate, here 1e-2. Expert biases are the same to the bit: no decision of the balancing fell otherwise.
    """
    expected, found = whole.metrics(), chain.run.metrics()
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    for line, same in zip(found, expected):
        for key in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
            assert line[key] == pytest.approx(same[key], rel=LOSS_TOLERANCE), (line["step"], key)
        for key in ("lr", "max_vio", "bias_min", "bias_max", "tokens"):
            assert line[key] == same[key], (line["step"], key)
    state, reference = chain.run.tensors(), whole.tensors()
    assert state.keys() == reference.keys()
    for name, tensor in reference.items():
        gap = float((state[name] - tensor).abs().max())
        exact = name.startswith(("buffers.", "steps", "loss_scale."))
        assert gap <= (0 if exact else TENSOR_TOLERANCE * float(tensor.abs().max())), (name, gap)
    for source, result in expected[-1]["validation"].items():
        assert found[-1]["validation"][source]["nats_per_token"] == pytest.approx(result["nats_per_token"], rel=1e-5)


def test_every_checkpoint_says_its_layout_and_how_far_the_data_is_read(chain: Chain, whole: Run) -> None:
    sections = whole.record()["data_sections"]
    for leg in LEGS.values():
        record = chain.run.record(leg.end)
        assert record["world_size"] == leg.processes
        assert leg.parallel.items() <= record["recipe"]["parallel"].items()
        assert (record["step"], record["samples"]) == (leg.end, leg.end * SEQUENCES)
        assert record["tokens"] == leg.end * SEQUENCES * LENGTH
        assert sum(record["samples_by_source"].values()) == record["samples"]
        assert record["data_sections"] == sections
    assert chain.run.record()["samples_by_source"] == whole.record()["samples_by_source"]


def test_no_rank_copies_writes_or_reads_more_than_its_share(chain: Chain) -> None:
    """All ranks together stage the state once, replicas included; what a pipeline rank has is shared evenly, within a hundredth."""
    size = sum(tensor.nbytes for tensor in chain.run.tensors().values())
    for name, leg in LEGS.items():
        assert sum(chain.staged[name]) == sum(chain.given[name]) == size, name
        assert set(chain.again[name]) == {0}, name
        # ZeRO-2 has the weights, a quarter of the state, on every rank; HSDP has all of it in every replica.
        copies = 0.75 + 0.25 * leg.processes if name == "zero2@2" else leg.parallel.get("replicate", 1)
        in_stage = leg.processes // leg.parallel.get("pipeline", 1)
        for first in range(0, leg.processes, in_stage):
            given, read = (noted[name][first : first + in_stage] for noted in (chain.given, chain.read))
            share = sum(given) / in_stage
            assert max(given) < 1.01 * share, name
            assert max(read) < 1.03 * copies * share, name


@pytest.mark.parametrize(
    "leg",
    [
        Leg(4, {"engine": "fsdp", "expert": 2, "pipeline": 2, "schedule": "dualpipev"}, 1),
        Leg(2, {"engine": "zero3", "context": 2}, 1),
    ],
    ids=["fsdp+expert+dualpipev", "zero3+context"],
)
def test_ranks_start_from_weights_evaluate_and_write_samples_together(
    run: Run, whole: Run, tiny_store: Store, tmp_path: Path, leg: Leg
) -> None:
    """One step that changes nothing, then one window of each source: where there are two data ranks, one takes part without one."""
    still = ("schedule.lr=1e-30", "schedule.gamma=0", f"schedule.tokens={SEQUENCES * LENGTH}")
    asked = ("evaluate.tokens=64", 'evaluate.sample_prompts=["The whale"]', "checkpoint.asynchronous=false")
    changes = (f"run.initialize_from={whole.folder}", *still, *asked, *leg.changes)
    assert run.train(*changes, processes=leg.processes) == [0] * leg.processes, run.said
    weights = {name: t for name, t in whole.tensors().items() if name.startswith(("parameters.", "buffers."))}
    assert_same_bits({name: tensor for name, tensor in run.tensors(1).items() if name in weights}, weights)

    answer = tmp_path / "evaluation.json"
    asked = ("evaluate", str(run.folder), "--data", str(tiny_store.path), "--tokens", "64", "--json")
    assert run.start(work=say_into, extra=(answer, asked)).wait() == [0], run.said
    found = json.loads(answer.read_text())
    for source, result in run.metrics()[-1]["validation"].items():
        assert found["validation"][source]["accuracy"] == result["accuracy"]
        assert found["validation"][source]["nats_per_token"] == pytest.approx(result["nats_per_token"], rel=1e-5)
    assert found["validation_max_vio"] == run.metrics()[-1]["validation_max_vio"]

    export(run.folder, tmp_path / "exported", dtype="fp32")
    model, tokenizer = load_model(tmp_path / "exported")
    (text,) = continue_texts(model, tokenizer, ["The whale"])
    assert (run.folder / "samples" / "step-00000001.txt").read_text("utf-8") == text + "\n"


def say_into(_: list[str], answer: Path, command: tuple[str, ...]) -> int:
    """A command of `rorqual` whose output goes to a file."""
    with answer.open("w") as file, redirect_stdout(file):
        return main(list(command))


def test_training_goes_on_beside_a_save_and_a_kill_in_its_middle_loses_only_that(run: Run, whole: Run) -> None:
    leg = Leg(2, {"engine": "fsdp"}, STEPS)
    changes = (*leg.changes, "checkpoint.every_steps=2")
    processes = run.start(*changes, processes=leg.processes, work=train_with_a_save_that_hangs, extra=(4,))
    processes.until(lambda: steps_on_record(run) >= 6)
    processes.send(signal.SIGKILL)
    assert processes.wait() == [-signal.SIGKILL] * leg.processes, run.said
    assert run.checkpoints() == [".step-00000004.tmp", "step-00000002"]
    assert run.train(*changes, "run.stop_at_step=8", processes=leg.processes) == [0] * leg.processes, run.said
    assert "layout: engine fsdp on 2 processes\n" in run.said
    assert f"continuing after step 2 of {STEPS}\n" in run.said
    assert run.checkpoints() == ["step-00000004", "step-00000006", "step-00000008"]
    for line, same in zip(run.metrics(), whole.metrics()[:8], strict=True):
        assert line["loss"] == pytest.approx(same["loss"], rel=LOSS_TOLERANCE), line["step"]


def train_with_a_save_that_hangs(arguments: list[str], step: int) -> int:
    """`rorqual train` whose save of a step writes its files and then stops for ever."""
    write = Writer.write_data

    def write_and_hang(self: Writer, plan: Any, planner: Any) -> Any:
        written = write(self, plan, planner)
        while f"step-{step:08d}" in str(self.folder):
            time.sleep(60)
        return written

    Writer.write_data = write_and_hang  # type: ignore[method-assign]
    return main(["train", *arguments])


def steps_on_record(run: Run) -> int:
    """Steps in `metrics.jsonl` so far."""
    path = run.folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

"""The training loop: from a recipe and a process to a finished, interrupted or failed run.

A run is a function of its recipe. What it has done is the number of tokens consumed, from which the schedule gives the settings of
the next step and the loader its samples; starting the same recipe again continues from the newest complete checkpoint.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data.errors import DataError, MakerDied
from data.files import replace_file
from data.loader import Loader, Planned, Steps
from data.samples import Batch
from data.tokenizer import copy_folder
from model.config import ModelConfig
from model.init import Write, initialize
from model.ops.attention.choose import expect
from model.transformer import Transformer
from parallel.engine import State
from train.assemble import assemble
from train.checkpoint import CheckpointError, Checkpoints, DiskError, read_run
from train.config import Recipe
from train.continued import continued
from train.corpus import Corpus
from train.evaluate import Evaluation, evaluate
from train.first_weights import began_extended, start_from
from train.generate import continue_texts
from train.guard.evidence import save_evidence
from train.guard.incidents import all_passed_over, roll_backs
from train.guard.judge import Answer, Judge
from train.guard.locate import Located, locate
from train.guard.patience import LONG, START
from train.guard.replicas import ReplicasDiffer, compare_replicas
from train.guard.start import check_content, check_groups_and_devices
from train.guard.wrong import Wrong
from train.late import Late, Launched
from train.launch import Process
from train.layout_words import layout_in_words
from train.optimizer import HostEMA
from train.ranks import Ranks
from train.runlog import RunLog, written_into
from train.schedule import Schedule, Step

log = logging.getLogger(__name__)

FINISHED, DIVERGED = 0, 3  # exit codes
NOTICEABLE = 1.0  # seconds that training waits for a disk before a line says so


class Trainer:
    """One run on this process. `run` returns the exit code.

    Args:
        asked_to_stop: whether a signal has come to this process.

    Raises:
        RecipeError, LayoutError, DataError, CheckpointError, UnlikeError: a mistake found before the first step.
    """

    def __init__(self, recipe: Recipe, process: Process, asked_to_stop: Callable[[], bool] = lambda: False):
        self.process, self.watch, self.asked_to_stop = process, process.watch, asked_to_stop
        self.folder = Path(recipe.run.dir)
        self.layout = recipe.layout(process.world_size)
        self.ranks = Ranks(dist.new_group(backend="gloo"))
        saving = recipe.checkpoint
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints", saving.keep, saving.keep_every_steps, saving.asynchronous
        )
        self._stand(recipe)  # before the engine: the processes that read ahead would share its memory
        self.watch.at("building the engine", patience=START)
        self.engine, self.attention, self.who_computes = assemble(
            self.recipe, self.layout, process, self.ranks, self._model_at(self.tokens), self._fill
        )
        ema = recipe.optimizer.ema
        self.ema = HostEMA(self.engine.parts(), ema) if ema else None
        self.last_save = time.monotonic()
        self.has_stepped = False  # the first step takes longer: blocks are compiled

    def run(self) -> int:
        """Train to the end of the recipe, to `run.stop_at_step`, or to a signal."""
        with ExitStack() as stack:
            stack.callback(lambda: self.batches.close())
            while (code := self._train()) is None:  # rolled back
                self.batches.close()
                self._stand(self.recipe)
        return code

    def _stand(self, recipe: Recipe) -> None:
        """Where the run begins or goes on: all that the newest checkpoint says, but for its tensors (`_resume`).

        It is the newest that has read nothing of what the run has passed over since.
        """
        self.watch.at("reading the newest checkpoint", patience=LONG)
        rolled_back = self.ranks.first(lambda: roll_backs(self.folder, self.checkpoints))
        self.newest = self.checkpoints.latest()
        record = self._read_newest()
        recipe, told = continued(recipe, record) if record else (recipe, None)
        if told and self.process.is_first:
            log.warning("%s", told)
        recipe = recipe.passing_over(all_passed_over(recipe, record, rolled_back))
        self.recipe = recipe
        self.schedule = Schedule(recipe.schedule, recipe.data.lengths, recipe.data.passed_over)
        self.schedule.check_layout(self.layout, recipe.micro_batch, is_begun=bool(record))
        self.watch.at("opening stores", patience=LONG)  # the first rank packs documents alone
        self.corpus = Corpus(recipe, self.schedule, record or None, self.ranks)
        check_content(self.ranks, [*self.corpus.samples.stores, *self.corpus.validation])
        self.step = record.get("step", 0)  # optimizer steps behind us, skipped ones included
        self.tokens, self.samples = self.corpus.start.tokens, self.corpus.start.samples  # consumed
        self.skipped = record.get("skipped", 0)  # steps that updated nothing
        self.judge = Judge(recipe, self.corpus, self.checkpoints, self.ranks, record, rolled_back, self._locate)
        self.config = recipe.model_config_resolved()  # of its longest sequences
        self.is_extended = began_extended(recipe, record)
        self.batches = self._read_ahead()

    def _train(self) -> int | None:
        """Train from where the run stands. Returns the exit code; None: the run has rolled back, and must stand anew."""
        started = check_groups_and_devices(self.ranks, self.engine.groups, self.process.device, self.watch)
        if self._is_stopped_already():
            return FINISHED
        self._resume()
        with self.ranks.all(self._open_log) as run_log:
            run_log.say(self.corpus.describe())
            left = [] if self._is_over else self.schedule.spans_from(self.tokens)
            for line in (
                layout_in_words(self.recipe, self.layout, self.process.world_size, left) + self.who_computes + started
            ):
                run_log.say(line)
            if self.step:
                run_log.say(f"continuing after step {self.step} of {self.schedule.total_steps}")
            if self._is_stopped_already():
                return FINISHED
            if self.newest is None and self.recipe.spikes.action == "roll_back":
                self._save()
                self.checkpoints.wait()  # without it there would be nothing to roll back to
            late = Late()
            for step, batches, waited in [] if self._is_over else self._steps():
                late.add(self._launch(step, batches, waited))
                self.watch.at("between steps", self.step)
                if _is_multiple(self.step, self.recipe.run.compare_replicas_every_steps):
                    self._compare_replicas()
                stop, save, failed = self._agree(self.asked_to_stop(), self._is_time_to_save(), self.checkpoints.failed)
                if failed:  # every rank must come to hear of it
                    self._finish_save(run_log)
                for launched in late.due(partial(self._needs_result, stop or save)):
                    wrong = self._end_step(launched, run_log)
                    if wrong and self.judge.is_too_much(wrong):
                        self._finish_save(run_log)
                        self.watch.at("what to do about it", launched.number, LONG)
                        answer, why = self.judge.answer(launched, wrong, run_log.say)
                        if answer is Answer.ROLL_BACK:
                            return None
                        if answer is Answer.GIVE_UP:
                            return self._diverge(launched, wrong, why, run_log)
                if save or stop or self._is_over:
                    self._finish_save(run_log)
                    with nullcontext() if stop or self._is_over else _told(run_log):
                        self._save()
                    run_log.start_step()
                if stop or self._is_over:
                    break
            self.watch.at("waiting for the last save", self.step, LONG)
            self.checkpoints.wait()
            self.ranks.all(run_log.flush)
            run_log.say(self._ending())
        return FINISHED

    @property
    def _is_finished(self) -> bool:
        return self.tokens >= self.schedule.tokens

    @property
    def _is_over(self) -> bool:
        """Whether there is nothing left to do, or nothing that this start may do."""
        stop = self.recipe.run.stop_at_step
        return self._is_finished or (stop is not None and self.step >= stop)

    def _fill(self, model: Transformer, write: Write) -> None:
        """A run's first weights: drawn from its seed, or taken from elsewhere."""
        initialize(model, self.recipe.run.seed, self.process.device, write)
        source = self.recipe.run.initialize_from
        if source and self.newest is None:
            start_from(model, source, write)

    def _model_at(self, tokens: int) -> ModelConfig:
        """The model of the step that starts after so many tokens. What has been extended stays so, however short the sequences."""
        return self.config if self.is_extended else self.config.at_length(self.recipe.data.longest(tokens))

    def _read_ahead(self) -> Steps:
        """This rank's micro-batches of the steps that are left, made by processes that start now."""
        loader = Loader(
            self.corpus.samples,
            self.layout.data_rank(self.process.rank),
            self.layout.data_ranks,
            0 if self._is_over else self.recipe.data.workers,
            pin=self.process.device.type == "cuda",
        )
        steps = self.schedule.steps(self.tokens, self.samples)
        micro_batch = self.recipe.micro_batch
        return loader.steps(
            Planned(step.first_sample, step.settings.batch, micro_batch(step.first_token)) for step in steps
        )

    def _steps(self) -> Iterator[tuple[Step, list[Batch], float]]:
        """The steps that are left, each with this rank's micro-batches and the seconds that it waited for them."""
        for step in self.schedule.steps(self.tokens, self.samples):
            asked = time.perf_counter()
            self.watch.at("waiting for data", self.step + 1)
            try:
                batches = self.ranks.all(lambda: next(self.batches))  # what one rank finds damaged ends all of them
            except (DataError, MakerDied):
                self.checkpoints.wait()  # the one under way is good
                raise
            yield step, batches, time.perf_counter() - asked

    def _launch(self, step: Step, batches: list[Batch], waited: float) -> Launched:
        device = self.process.device
        self.watch.at("forward and backward", self.step + 1, 0 if self.has_stepped else START)
        for batch in batches:
            expect(self.attention, batch.documents)
        on_device = [Batch(*(part.to(device, non_blocking=True) for part in batch)) for batch in batches]
        self.engine.model.set_positions(self._model_at(step.first_token))
        pending = self.engine.launch(on_device, self.judge.with_limit(self.step + 1, step))
        if self.ema:
            self.ema.update(lambda: pending.result().skipped)
        self.has_stepped = True
        self.step += 1
        self.tokens += step.tokens
        self.samples = step.end_sample
        consumed = self.corpus.samples.tokens_by_source(self.samples)
        return Launched(self.step, step, batches, pending, waited, consumed)

    def _needs_result(self, is_asked: bool) -> bool:
        """Whether the result of the last step must be known before another one may be launched."""
        is_needed = self._validates(self.step) or self._is_time_to_save() or self._is_over
        return is_asked or is_needed or self.judge.is_next_too_much

    def _end_step(self, launched: Launched, run_log: RunLog) -> Wrong | None:
        """Count a step and write down what is known of it, with a validation where it is due; what went wrong, if anything did."""
        self.watch.at("its result", launched.number)
        result, step = launched.pending.result(), launched.step
        wrong, limit = self.judge.see(launched)
        self.skipped += result.skipped
        metrics = run_log.end_step(
            launched.number, step, result, self.skipped, launched.waited, launched.consumed, limit
        )
        if wrong:
            self.judge.tell(launched, wrong, limit, run_log.say)
        validates = self._validates(launched.number)
        run_log.write(metrics, self._evaluate(step) if validates else None)
        if validates or wrong:
            run_log.start_step()
        return wrong

    def _locate(self, launched: Launched, limit: float) -> Located:
        """Which sequences of a step went wrong, and where: on all ranks together."""
        step, device = launched.step, self.process.device
        self.watch.at("replay, sequence by sequence", launched.number, LONG)
        self.engine.model.set_positions(self._model_at(step.first_token))
        batches = [Batch(*(part.to(device) for part in batch)) for batch in launched.batches]
        reader = self.layout.data_rank(self.process.rank), self.layout.data_ranks
        return locate(self.engine.model, batches, self.corpus.samples, step.first_sample, limit, reader, self.ranks)

    def _diverge(self, launched: Launched, wrong: Wrong, why: str, run_log: RunLog) -> int:
        """Save what is needed to look at a run that cannot go on."""
        self._save()
        self.ranks.all(partial(self._save_evidence, launched))
        self.checkpoints.wait()
        in_a_row = self.judge.skipped_in_a_row
        what = f"{in_a_row} steps in a row {wrong.reason}" if in_a_row > 1 else wrong.of(launched.number)
        run_log.say(
            f"{what}{why}; batches and settings are in {self.folder / 'non_finite'}, the weights in its checkpoint"
        )
        return DIVERGED

    def _validates(self, number: int) -> bool:
        return (self._is_finished and number == self.step) or _is_multiple(number, self.recipe.evaluate.every_steps)

    def _evaluate(self, step: Step) -> Evaluation:
        """Validate after a step, on windows as long as its sequences, and let the model write samples: on all ranks together."""
        self.watch.at("validation", self.step)
        model = self.engine.model
        reader = self.layout.data_rank(self.process.rank), self.layout.data_ranks
        batches = self.corpus.validation_batches(
            step.sequence_length, *reader, self.recipe.micro_batch(step.first_token)
        )
        evaluation = evaluate(model, self.ranks.in_step(batches), self.corpus.token_bytes)
        if prompts := self.recipe.evaluate.sample_prompts:
            # On all ranks: none of them may hold the whole model.
            samples = continue_texts(model, self.corpus.tokenizer, prompts)
            self.ranks.first(partial(self._write_samples, samples))
        return evaluation

    def _write_samples(self, samples: list[str]) -> None:
        path = self.folder / "samples" / f"step-{self.step:08d}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replace_file(path) as temporary:
                temporary.write_text("\n\n———\n\n".join(samples) + "\n", encoding="utf-8")
        except OSError as error:
            log.warning("%s: %s; these samples are not kept, training goes on; free space", path, error.strerror)

    def _is_time_to_save(self) -> bool:
        minutes = self.recipe.checkpoint.every_minutes
        return _is_multiple(self.step, self.recipe.checkpoint.every_steps) or (
            minutes is not None and time.monotonic() - self.last_save > 60 * minutes
        )

    def _agree(self, *flags: bool) -> list[bool]:
        """Per flag, whether any rank raised it: signals and clocks differ between ranks, decisions must not."""
        return self.ranks.union(list(flags))

    def _is_stopped_already(self) -> bool:
        """Whether a signal has come to any rank before its first step. The run then ends as it stood: there is nothing to save."""
        if self._is_over:
            return False
        (stop,) = self._agree(self.asked_to_stop())
        if stop and self.process.is_first:
            begun = f"to continue after step {self.step}" if self.step else "to begin"
            log.warning("stopped before the first step: nothing was trained; start the same command again %s", begun)
        return stop

    def _state(self) -> State:
        state = self.engine.state()
        if self.ema:
            state["ema"] = self.engine.gather(self.ema.parts())
        return state

    def _compare_replicas(self) -> None:
        try:
            compare_replicas(self.engine.alike(), self.ranks, self.process.device, self.step)
        except ReplicasDiffer:
            with suppress(DiskError):
                self.checkpoints.wait()  # what is being written was found alike
            raise

    def _finish_save(self, run_log: RunLog) -> None:
        """Let the save under way end. A disk that did not take it, or took long, is told."""
        self.watch.at("waiting for the save under way", self.step, LONG)
        began = time.monotonic()
        with _told(run_log):
            self.checkpoints.wait()
        if (waited := time.monotonic() - began) > NOTICEABLE:
            run_log.say(
                f"step {self.step}: training waited {waited:.1f} s for the last checkpoint to reach the disk; "
                "save less often (checkpoint.every_steps, checkpoint.every_minutes) or set run.dir to a faster disk"
            )

    def _save(self) -> None:
        self.watch.at("saving", self.step, LONG)
        self.checkpoints.wait()  # or the host would hold this state beside the one that is being written
        self._compare_replicas()
        # An engine that gathers its moments gathers the average of the weights too.
        copied = self.engine.copied | ({"ema"} if self.engine.copied else set())
        self.checkpoints.save(
            self.step,
            self._state(),
            {
                "recipe": self.recipe.model_dump(mode="json", by_alias=True),
                "model": self.engine.model.config.to_hf(),
                "step": self.step,
                **self.corpus.position(self.tokens, self.samples).to_record(),
                "skipped": self.skipped,
                "skipped_in_a_row": self.judge.skipped_in_a_row,
                "losses": self.judge.spikes.record(),
                # Every random number of a run is drawn from a seed and a name or an index: there is no generator to save.
                "random": {"weights": self.recipe.run.seed, "order": self.recipe.data.seed},
                "world_size": self.process.world_size,
                "tokenizer_fingerprint": self.corpus.tokenizer_fingerprint,
                "versions": {name: version(name) for name in ("rorqual", "torch", "transformers")},
                "law": self.recipe.schedule.law,
                "law_hash": taken.hash if (taken := self.recipe.schedule.from_law) else None,
            },
            copied,
        )
        self.last_save = time.monotonic()

    def _read_newest(self) -> dict[str, Any]:
        """`run.json` of the newest complete checkpoint of the run's folder; empty if there is none."""
        if (path := self.newest) is not None:
            return self.ranks.first(lambda: read_run(path))
        damaged = self.ranks.first(lambda: sorted(self.checkpoints.folder.glob("step-*/COMPLETE")))
        if damaged:
            raise CheckpointError(
                f"run.dir = {self.folder}: none of its {len(damaged)} checkpoints is whole (warned of above); a run must not "
                "begin again over one that has trained; restore a checkpoint, or set another run.dir"
            )
        return {}

    def _resume(self) -> None:
        """Take the tensors of the checkpoint that the run continues from, if there is one."""
        if self.newest is None:
            return
        self.watch.at("loading", self.step, LONG)
        state = self._state()
        self.checkpoints.load(self.newest, state)
        self.engine.load(state)
        if self.ema:
            self.engine.spread(state["ema"], self.ema.parts())

    def _open_log(self) -> RunLog:
        """The record of the run; on the first rank its folder too, with its recipe and its tokenizer."""
        if not self.process.is_first:
            return RunLog(self.recipe, self.process, self.schedule, self.engine.model, self.step)
        with written_into(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            run_log = RunLog(self.recipe, self.process, self.schedule, self.engine.model, self.step)
            if not (self.folder / "tokenizer").exists():
                unfinished = self.folder / ".tokenizer.tmp"
                shutil.rmtree(unfinished, ignore_errors=True)
                copy_folder(self.corpus.tokenizer_folder, unfinished)
                unfinished.rename(self.folder / "tokenizer")
            with replace_file(self.folder / "recipe.yaml") as path:
                path.write_text(self.recipe.to_yaml(), encoding="utf-8")
        return run_log

    def _save_evidence(self, launched: Launched) -> None:
        name = f"step-{launched.number:08d}"
        located = self.judge.located
        more = {"weights": f"checkpoints/step-{self.step:08d}", "located": located and asdict(located)}
        save_evidence(self.folder, self.folder / "non_finite" / name, self.process, launched, **more)

    def _ending(self) -> str:
        where = self.folder / "checkpoints" / f"step-{self.step:08d}"
        skipped = f" ({self.skipped} of {self.step} steps skipped, see metrics.jsonl)" if self.skipped else ""
        if self._is_finished:
            return f"finished at step {self.step}{skipped}; checkpoint {where}"
        again = "raise run.stop_at_step" if self._is_over else "start the same command again"
        return f"stopped at step {self.step} of {self.schedule.total_steps}{skipped}; {again} to continue from {where}"


@contextmanager
def _told(run_log: RunLog) -> Iterator[None]:
    """A disk that fails between two steps is told, not raised: training goes on, and the next save that is due tries again."""
    try:
        yield
    except DiskError as error:
        run_log.say(f"{error}; training goes on, and the next save that is due tries again")


def _is_multiple(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0

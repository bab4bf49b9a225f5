"""The command `rorqual`: every command's arguments, and what a mistake looks like.

A user's mistake is one line on stderr and exit code 2. Anything else is ours and keeps its traceback. Commands import what they
need when they run, so that `--help` answers at once.
"""

import errno
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from train.arguments import AsJson, Overrides, RecipeName, started_processes
from train.config import RecipeError, load_recipe
from train.guard.orphan import die_with_launcher
from train.guard.status import Status, reported_to
from train.planning.command import plan, print_advice, schedule_of
from train.scaling.commands import scaling
from train.signals import listen_for_signals

# The errors that stand for a user's mistake, by name: none of their modules needs to be loaded to know them.
USERS_MISTAKES = {
    "data.errors.DataError",
    "model.config.ConfigError",
    "parallel.layout.LayoutError",
    "train.checkpoint.DiskError",
    "train.config.RecipeError",
    "train.guard.alike.UnlikeError",
    "train.loggers.MetricsError",
    "train.marker.CheckpointError",
    "train.marker.VersionError",
    "train.planning.devices.DeviceError",
    "train.scaling.errors.ScalingError",
}

# The errors that stand for a disturbance from outside: the same command, started again, goes on from the newest checkpoint.
DISTURBANCES = {"data.errors.MakerDied", "train.guard.lost.Lost", "train.guard.replicas.ReplicasDiffer"}

BUG, MISTAKE, LOST = 1, 2, 4  # exit codes

# What the machine refuses, wherever it happens: strerror and the file name say it in one line. EIO, a disk or a server that fails
# now, is a disturbance.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Raw text in, a DeepSeek-V3 checkpoint out.",
)
data = typer.Typer(no_args_is_help=True, help="Raw text to token stores.")
tokenizer = typer.Typer(no_args_is_help=True, help="Tokenizers.")
app.add_typer(data, name="data")
app.add_typer(tokenizer, name="tokenizer")
app.add_typer(scaling, name="scaling")

DataRecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="default, or a YAML file: a data recipe.")]
StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="A folder that `data prepare` made.")]
Weights = Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT|HF_FOLDER", help="Where the weights are.")]
Processes = Annotated[
    int | None, typer.Option(min=1, help="Count for so many processes; default: as many as the launcher started, or 1.")
]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes that do the work; default: one a core.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0 done, 2 a user's mistake, 3 no finite gradients, 4 disturbed from outside."""
    try:
        app(args=arguments)
    except SystemExit as end:  # typer's own: help, a usage error, a command's exit code
        return int(end.code or 0)
    except Exception as error:
        code = code_of(error)
        if code == BUG:
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one line a node, not one a process
            print(f"rorqual: {_one_line(error)}", file=sys.stderr)
        return code
    return 0


def code_of(error: BaseException) -> int:
    """The exit code of an error."""
    kind = f"{type(error).__module__}.{type(error).__qualname__}"
    number = error.errno if isinstance(error, OSError) else None
    if kind in DISTURBANCES or number == errno.EIO:
        return LOST
    return MISTAKE if number in DISK_ERRORS or kind in USERS_MISTAKES else BUG


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe and what it amounts to.")
    ] = False,
    processes: Processes = None,
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
    status: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Train, or continue a run. Several processes: `torchrun -m train RECIPE …` with the same arguments."""
    die_with_launcher()
    with reported_to(status if os.environ.get("LOCAL_RANK", "0") == "0" else None, code_of) as report:
        code = _train(recipe, overrides or [], dry_run, processes, report)
        report.end(code)
    raise typer.Exit(code)


def _train(recipe: str, overrides: list[str], dry_run: bool, processes: int | None, report: Status) -> int:
    """The exit code of a run that came to an end."""
    loaded = load_recipe(recipe, overrides)
    if dry_run:
        from train.planning.plan import Plan
        from train.planning.shown.text import table

        planned = Plan.of(loaded, schedule_of(loaded), processes or started_processes())
        print(loaded.to_yaml())
        print("\n".join(table(planned.numbers())))
        print_advice(loaded)
        return 0
    if processes:
        raise RecipeError(
            f"--processes {processes}: counts for --dry-run only; a launcher starts them: "
            f"torchrun --nproc-per-node {processes} -m train {recipe} …"
        )
    from train.guard.watch import Watch
    from train.launch import process_group
    from train.trainer import Trainer

    with listen_for_signals() as asked_to_stop:
        report.ready(os.getpid())
        written = loaded.model_dump(mode="json", by_alias=True)
        watch = Watch(report.end)
        with process_group(loaded.run.device, written, loaded.run.hang_seconds, watch, code_of) as process:
            return Trainer(loaded, process, asked_to_stop).run()


app.command()(plan)


@app.command()
def export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|CHECKPOINT", help="The run's newest checkpoint, or one of them.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The Hugging Face folder to write.")],
    dtype: Annotated[
        Literal["fp32", "bf16"], typer.Option(help="Of the weights; the expert biases stay fp32.")
    ] = "bf16",
    mtp: Annotated[bool, typer.Option("--mtp", help="With the multi-token-prediction modules.")] = False,
    ema: Annotated[bool, typer.Option("--ema", help="The moving average of the weights (optimizer.ema).")] = False,
    fp8: Annotated[
        bool, typer.Option("--fp8", help="Matrices of attention and experts in FP8 with scales, as DeepSeek-V3's.")
    ] = False,
) -> None:
    """Write a checkpoint as a Hugging Face DeepSeek-V3 folder."""
    if fp8 and dtype == "fp32":
        raise RecipeError("export: --fp8 with --dtype fp32; what is not in FP8 is then bf16; leave --dtype out")
    from train.export import export as write
    from train.export import off_tiles
    from train.weights import open_weights

    write(source, out, dtype="fp8" if fp8 else dtype, mtp=mtp, ema=ema)
    if fp8 and (matrix := off_tiles(open_weights(source).config)):
        print(
            f"warning: transformers (5.23) without a GPU fails at FP8 matrices with a side beyond 128 that is no multiple of it, "
            f"or reads them wrong, here {matrix}; for it, export without --fp8",
            file=sys.stderr,
        )
    print(out)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="HF_FOLDER", help="A DeepSeek-V3 model in safetensors.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint to write, for run.initialize_from=OUT.")],
) -> None:
    """Turn a Hugging Face folder into a checkpoint that a run can start from."""
    from train.export import import_folder

    import_folder(source, out)
    print(out)


@app.command()
def evaluate(
    source: Weights,
    store: Annotated[Path, typer.Option("--data", help="A token store; its validation split is read.")],
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens of a window; default: the run's own, or 512 for a Hugging Face folder.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="At most so many tokens in all; default: all there are.")] = None,
    as_json: AsJson = False,
) -> None:
    """Nats per token and bits per byte of every source, accuracy of every head, balance of the experts."""
    from train.evaluate import evaluate_source

    evaluation = evaluate_source(source, store, sequence_length, tokens)
    if as_json:
        print(json.dumps(evaluation.to_dict()))
        return
    for name, result in evaluation.sources.items():
        accuracy = " ".join(f"{share:.3f}" for share in result.accuracy)
        print(
            f"{name}: {result.nats_per_token:.4f} nats/token, {result.bits_per_byte:.4f} bits/byte over {result.tokens:,} tokens, "
            f"accuracy {accuracy}"
        )


@app.command()
def generate(
    source: Weights,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="At most so many new tokens.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    mtp: Annotated[
        bool, typer.Option("--mtp", help="Greedy, with the MTP modules' drafts: the same text, sooner.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Continue a text."""
    import torch

    from train.generate import continue_text, load_model

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model, tokens = load_model(source, dtype, device)
    if tokens is None:
        raise RecipeError(
            f"{source}: has no tokenizer; put tokenizer.json and tokenizer_config.json beside its config.json"
        )
    text, generation = continue_text(model, tokens, prompt, max_new_tokens, temperature=temperature, seed=seed, mtp=mtp)
    if as_json:
        drafts = {"drafted": generation.drafted, "accepted": generation.accepted} if mtp else {}
        print(json.dumps({"text": text, **drafts}))
    else:
        print(text)


@data.command()
def prepare(
    recipe: DataRecipeName,
    out: Annotated[Path, typer.Option(help="The store to write.")],
    workers: Workers = None,
    task: Annotated[int, typer.Option(min=0, help="Which of several tasks this is that share the work; from 0.")] = 0,
    tasks: Annotated[int, typer.Option(min=1, help="How many tasks share the work.")] = 1,
) -> None:
    """Read sources, clean and deduplicate, train or take a tokenizer, and write a token store; continues what was interrupted."""
    from data.prepare import prepare as run
    from data.prepare.work import Share

    run(recipe, out, workers or len(os.sched_getaffinity(0)), Share(task, tasks))


@data.command()
def verify(store: StorePath) -> None:
    """Read every byte of a store and compare it with its manifest."""
    from data.store import verify_store

    print(json.dumps(verify_store(store)))


@data.command()
def inspect(
    store: StorePath,
    document: Annotated[int, typer.Option(help="Its number in the split.")],
    split: Annotated[str, typer.Option(help="train or validation.")] = "train",
) -> None:
    """Print a document as the model sees it."""
    from data.store import Store, inspect_document

    print(inspect_document(Store.open(store), split, document))


@data.command()
def stats(
    store: StorePath,
    html: Annotated[Path | None, typer.Option(help="Write the report of its preparation as a page.")] = None,
) -> None:
    """Documents, tokens and bytes of every split and source, as JSON; how they became what they are, as a page."""
    from data.report.page import write_report
    from data.report.shape import Report
    from data.store import Store, store_stats

    opened = Store.open(store)
    print(json.dumps(store_stats(opened), indent=1))
    if html is not None:
        write_report(Report.read(opened.path), html, opened.manifest.recipe)


@data.command("import")
def data_import(
    files: Annotated[
        list[str], typer.Argument(metavar="[NAME=]FILE …", help="Megatron .bin/.idx or datatrove .ds files.")
    ],
    folder: Annotated[Path, typer.Option("--tokenizer", help="The Hugging Face tokenizer folder of their ids.")],
    out: Annotated[Path, typer.Option(help="The store to write.")],
    weight: Annotated[list[str] | None, typer.Option(metavar="NAME=W", help="Share of a source; default: 1.")] = None,
    validation: Annotated[
        float, typer.Option(help="Share of the documents, taken from the end of sources without validation files.")
    ] = 0.01,
    held_out: Annotated[
        list[str] | None, typer.Option("--validation-file", metavar="[NAME=]FILE", help="Validation files of a source.")
    ] = None,
) -> None:
    """Make a store of token files that Megatron-LM, GPT-NeoX or datatrove wrote; files of one name are one source."""
    from data.foreign import ForeignSource, import_store

    train, kept = _by_name(files), _by_name(held_out or [])
    weights = {name: _weight(name, values) for name, values in _by_name(weight or []).items()}
    if unknown := sorted((kept.keys() | weights.keys()) - train.keys()):
        raise RecipeError(f"{unknown[0]}: no source is called so; the sources are {', '.join(train)}; write NAME=VALUE")
    sources = [
        ForeignSource(
            name, [Path(path) for path in paths], [Path(path) for path in kept.get(name, [])], weights.get(name, 1.0)
        )
        for name, paths in train.items()
    ]
    store = import_store(sources, folder, out, validation)
    print(
        f"{store.path}: {', '.join(f'{split} {record.tokens:,} tokens' for split, record in store.manifest.splits.items())}"
    )


@data.command("export")
def data_export(
    store: StorePath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    layout: Annotated[str, typer.Option("--format", help="megatron or datatrove.")] = "megatron",
) -> None:
    """Lay out a store's tokens as Megatron-LM and GPT-NeoX, or datatrove, expect them."""
    from data.foreign import export_store
    from data.store import Store

    if layout not in ("megatron", "datatrove"):
        raise RecipeError(f"--format = {layout!r}: must be megatron or datatrove")
    for path in export_store(Store.open(store), out, layout):  # type: ignore[arg-type]
        print(path)


@tokenizer.command("train")
def tokenizer_train(
    recipe: DataRecipeName,
    out: Annotated[Path, typer.Option(help="The Hugging Face tokenizer folder to write.")],
    workers: Workers = None,
) -> None:
    """Train a tokenizer on the sources of a data recipe."""
    from data.prepare import train_tokenizer

    train_tokenizer(recipe, out, workers or len(os.sched_getaffinity(0)))
    print(out)


@tokenizer.command("evaluate")
def tokenizer_evaluate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A Hugging Face tokenizer folder.")],
    text: Annotated[list[Path], typer.Option(help="A text file; may be given several times.")],
    reference: Annotated[Path | None, typer.Option(help="A tokenizer folder to compare with.")] = None,
) -> None:
    """Bytes per token of a tokenizer on texts, and whether decoding gives the texts back, as JSON."""
    from data.tokenizer import evaluate_tokenizer

    print(json.dumps(evaluate_tokenizer(folder, text, reference)))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def report(context: typer.Context) -> None:
    """A page about a run: not built yet."""
    _not_built_yet("report")


def _one_line(error: Exception) -> str:
    """What a mistake says, where it repeats what a file holds too: without line breaks or what else a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(error))


def _not_built_yet(what: str) -> NoReturn:
    raise RecipeError(f"{what}: not built yet")


def _by_name(values: Sequence[str]) -> dict[str, list[str]]:
    """["a=x", "a=y", "z"] as {"a": ["x", "y"], "z": ["z"]}: what has no name is called by its file's."""
    found: dict[str, list[str]] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        found.setdefault(name if equals else Path(value).stem, []).append(rest if equals else value)
    return found


def _weight(name: str, values: Sequence[str]) -> float:
    if len(values) > 1:
        raise RecipeError(f"--weight {name}: given {len(values)} times; give each source one weight")
    try:
        return float(values[0])
    except ValueError:
        raise RecipeError(f"--weight {name}={values[0]}: must be NAME=NUMBER") from None


if __name__ == "__main__":
    sys.exit(main())

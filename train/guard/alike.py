"""What must be the same on every rank of a run, and the line that says where it is not."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import torch

from train.guard.members import Member, in_words

PACKAGES = ("model", "parallel", "data", "train")
CODE = {".py", ".cpp", ".h"}
LONG = 120  # characters of a value; beyond them its hash stands for it

Facts = dict[str, str]  # by the name that a person would look for


class UnlikeError(ValueError):
    """The processes of a run differ where they must not. The message is one line: field, values, ranks, hosts and fix."""


def facts_of(recipe: Mapping[str, Any], uses_cuda: bool) -> Facts:
    """The versions that a run stands on, its own source, then its recipe, a key at a time."""
    engine = recipe.get("parallel", {}).get("engine", "")
    packages = ["rorqual", "torch", "transformers"] + ["deepspeed"] * engine.startswith("zero")
    facts = {"Python": python_version()} | {name: version(name) for name in packages}
    facts["source of rorqual"] = f"sha256 {source_hash(Path(__file__).parents[2])[:12]}"
    if uses_cuda:
        facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return facts | _leaves(recipe)


@cache
def source_hash(root: Path) -> str:
    """Of every file of code of the packages under a folder: a checkout keeps its version while it changes."""
    whole = sha256()
    for package in PACKAGES:
        for path in sorted(path for path in (root / package).rglob("*") if path.suffix in CODE):
            whole.update(f"{path.relative_to(root)}\0".encode() + sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def difference(members: Sequence[Member], facts: Sequence[Facts], fix: str) -> str | None:
    """The first fact that some members have otherwise than most; None where all are alike.

    Args:
        members, facts: of each rank.
        fix: what to do about it.
    """
    for name in dict.fromkeys(name for one in facts for name in one):
        values = [one.get(name, "nothing") for one in facts]
        (most, _), *others = Counter(values).most_common()
        if others:
            by_value = [
                f"{value} on {in_words([m for m, its in zip(members, values) if its == value])}" for value, _ in others
            ]
            return f"{name}: {', '.join(by_value)}; {most} on the others; it must be the same on every rank; {fix}"
    return None


def _leaves(recipe: Mapping[str, Any], prefix: str = "") -> Facts:
    """{"run": {"seed": 0}} as {"run.seed": "0"}."""
    found: Facts = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            found |= _leaves(value, f"{prefix}{key}.")
        else:
            text = json.dumps(value)
            found[prefix + key] = text if len(text) <= LONG else f"sha256 {sha256(text.encode()).hexdigest()[:12]}"
    return found

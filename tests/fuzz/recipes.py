"""Recipes that somebody could have written: those that we ship, each changed in one place or two by a seeded draw.

A change that no rule of a recipe could allow says so (`is_wrong`), so that a test can tell a wrong acceptance; of the others only
the manners are known: accepted, or refused in one line.
"""

import copy
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data.yaml_io import as_yaml, read_yaml
from tests.fuzz.files import places

ROOT = Path(__file__).parents[2]
TRAINING, DATA = ROOT / "train" / "recipes", ROOT / "data" / "recipes"

# What may stand where a value stood. YAML text, so that what no dumper writes can stand there too.
VALUES = (
    "null", "true", "0", "-1", "1", "3", "0.5", "-0.0", "1e400", ".inf", "-.inf", ".nan", "1e-320", "1_000", "0x10", "0o17",
    "9" * 30, "9" * 5000, "1" + "0" * 18, "4294967296", "2147483648", "2001-01-01", "12:30:45", "''", "' '", "auto", "x",
    "a\nb", '"a\\nb"', '"\\0"', '"\\x1b[2J"', '"\\ud800"', "'" + "x" * 5000 + "'", "naïve-🐋-ﷺ", "'../../etc/passwd'",
    "/dev/null", "/dev/zero",
    ".", "~", "=", "%", "@x", "`x`", "- x", "? x", "|", ">", "'x", "<<", "!!binary aGVsbG8=", "!!set {a, b}", "!!str 5",
    "!!int '5'", "!!float '5'", "!!omap [a: 1]", "!!python/name:os.system", "[]", "{}", "[1]", "[[0, 1], [5, 2]]", "[a, b]",
    "[null]", "{a: 1}", "{1: 2}", "{null: null}", "{kind: x}", "{? [a] : b}", "&a [*a]", "&a {b: *a}", "[&a [x, x], *a, *a]",
    "*nothing", "{<<: {a: 1}}", "[1, 2", "{a: 1",
)  # fmt: skip

# What no key of a recipe takes, whatever it is about.
WRONG = (
    "[[[[x]]]]", "{zzz: {zzz: [zzz]}}", "!!python/object/apply:os.system ['touch pwned']", "!!python/name:os.system", "!unknown 1",
    "*nothing", "[1, 2", "{a: 1", '"x', "@x", "&a [*a]",
)  # fmt: skip


MAY_BE_NEGATIVE = {"seed", "priority"}


class Recipe(NamedTuple):
    """A changed recipe."""

    text: bytes
    is_wrong: bool
    what: str  # of it was changed, for the message of a test that fails


@dataclass(frozen=True)
class Base:
    """A recipe that is right, and what its change may touch."""

    name: str
    content: dict[str, Any]
    required: tuple[str, ...]  # keys without which there is no recipe


def training_recipes() -> list[Base]:
    required = ("model", "data", "schedule", "run")
    return [Base(path.stem, read_yaml(path), required) for path in sorted(TRAINING.glob("*.yaml"))]


def data_recipes() -> list[Base]:
    return [Base(path.stem, read_yaml(path), ("sources",)) for path in sorted(DATA.glob("*.yaml"))]


def fuzzed(bases: list[Base], count: int, seed: int) -> Iterator[Recipe]:
    """So many changed recipes; the first ones are the same however many are asked for."""
    for number in range(count):
        draw = random.Random(f"{seed}/{number}")
        yield draw.choice(CHANGES)(draw, draw.choice(bases))


def _value(draw: random.Random, base: Base) -> Recipe:
    """Another value in the place of one."""
    return _put(draw, base, draw.choice(VALUES), is_wrong=False)


def _wrong_value(draw: random.Random, base: Base) -> Recipe:
    return _put(draw, base, draw.choice(WRONG), is_wrong=True)


def _impossible_number(draw: random.Random, base: Base) -> Recipe:
    """In the place of a number one that counts nothing and measures nothing."""
    content = copy.deepcopy(base.content)
    numbers = [(p, k) for p, k in places(content) if type(p[k]) in (int, float) and k not in MAY_BE_NEGATIVE]
    place, key = draw.choice(numbers)
    place[key] = value = draw.choice((math.nan, -math.inf, -1, -0.5, -(10**30)))
    return Recipe(as_yaml(content).encode(), True, f"{base.name}: {key} = {value}")


def _nested(draw: random.Random, base: Base) -> Recipe:
    """A value as deep as a mine."""
    depth = draw.choice((50, 500, 5000, 50_000))
    opened, closed = draw.choice((("[", "]"), ("{a: ", "}")))
    return _put(draw, base, opened * depth + "1" + closed * depth, is_wrong=True)


def _laughs(draw: random.Random, base: Base) -> Recipe:
    """A value of 10⁹ elements, written in nine lines."""
    rows = ["&a0 [x, x, x, x, x, x, x, x, x, x]"] + [f"&a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    return _put(draw, base, f"[{', '.join(rows)}]", is_wrong=True)


def _unknown_key(draw: random.Random, base: Base) -> Recipe:
    """A key that is nobody's, in a mapping."""
    content = copy.deepcopy(base.content)
    inside = draw.choice([content, *(place[key] for place, key in places(content) if isinstance(place[key], dict))])
    key = draw.choice(("zzz", "ключ", "model ", "Run", "1", "__class__", "a.b", ""))
    inside[key] = draw.choice((None, 1, "x", [], {}))
    return Recipe(as_yaml(content).encode(), True, f"{base.name}: unknown key {key!r}")


def _misspelt_key(draw: random.Random, base: Base) -> Recipe:
    """A key with a letter too few."""
    content = copy.deepcopy(base.content)
    place, key = draw.choice([(place, key) for place, key in places(content) if isinstance(place, dict)])
    renamed = {(key[:-1] if name == key else name): value for name, value in place.items()}
    place.clear()
    place.update(renamed)
    return Recipe(as_yaml(content).encode(), True, f"{base.name}: {key} is called {key[:-1]}")


def _missing_key(draw: random.Random, base: Base) -> Recipe:
    """Without a key; without a section it is no recipe."""
    content = copy.deepcopy(base.content)
    place, key = draw.choice([(place, key) for place, key in places(content) if isinstance(place, dict)])
    del place[key]
    return Recipe(as_yaml(content).encode(), place is content and key in base.required, f"{base.name}: without {key}")


def _repeated_key(draw: random.Random, base: Base) -> Recipe:
    text = as_yaml(base.content)
    key = draw.choice(list(base.content))
    return Recipe(f"{text}{key}: 1\n".encode(), True, f"{base.name}: {key} twice")


def _structure(draw: random.Random, base: Base) -> Recipe:
    """What is no mapping of sections."""
    text = as_yaml(base.content)
    half = text[: draw.randrange(5, len(text) // 3)]
    changed = draw.choice(
        (
            *(f"- {text}", f"[{text}]", "x", "5", "[]", "- 1\n- 2", "!!set {model, data}", "<<: {a: 1}\n"),
            *(text.replace(": ", "= "), text.replace("\n", " "), text.replace("  ", "\t"), f"{half}\n  - : ["),
            *(f"{text}---\n{text}", f"%YAML 9.9\n---\n{text}x: 1\n"),
        )
    )
    return Recipe(changed.encode(), True, f"{base.name}: structure {changed[:30]!r}")


def _bytes(draw: random.Random, base: Base) -> Recipe:
    """Bytes that are no UTF-8, or nothing that YAML knows, somewhere in it."""
    text = bytearray(as_yaml(base.content).encode())
    wrong = draw.choice((b"\xff", b"\xc3\x28", b"\x00", b"\xed\xa0\x80", b"\x07", b"\x7f"))
    place = draw.randrange(len(text))
    text[place:place] = wrong
    return Recipe(bytes(text), True, f"{base.name}: {wrong!r} at {place}")


def _flips(draw: random.Random, base: Base) -> Recipe:
    """A few characters that are others."""
    text = bytearray(as_yaml(base.content).encode())
    for _ in range(draw.randint(1, 4)):
        text[draw.randrange(len(text))] = draw.choice(b" :-#[]{}&*!|>'\"%@\n0a")
    return Recipe(bytes(text), False, f"{base.name}: flipped characters")


def _encoding(draw: random.Random, base: Base) -> Recipe:
    """The same recipe in an encoding that is not ours; a mark of UTF-8 is allowed."""
    text = as_yaml(base.content)
    return Recipe(text.encode(draw.choice(("utf-16", "utf-32"))), True, f"{base.name}: another encoding")


CHANGES: tuple[Callable[[random.Random, Base], Recipe], ...] = (
    *(_value,) * 8,
    *(_wrong_value,) * 3,
    *(_impossible_number, _unknown_key, _misspelt_key, _flips) * 2,
    *(_nested, _laughs, _missing_key, _repeated_key, _structure, _bytes, _encoding),
)


def _put(draw: random.Random, base: Base, value: str, is_wrong: bool) -> Recipe:
    """YAML text in the place of a value."""
    content = copy.deepcopy(base.content)
    place, key = draw.choice(places(content))
    place[key] = "@@@"
    text = as_yaml(content).replace("'@@@'", value)
    return Recipe(text.encode("utf-8", "surrogatepass"), is_wrong, f"{base.name}: {key} = {value[:40]}")

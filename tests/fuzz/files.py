"""Files as a bad disk, a bad copy or a bad hand leaves them, by a seeded draw."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

VALUES = (None, True, -1, 0, 10**30, 1e308, "", "x", "../../etc/passwd", "\0", [], {}, [[]], {"a": 1})


def corrupt(path: Path, draw: random.Random, others: list[Path]) -> str:
    """Change a file so that it is another one; what was done to it."""
    before = path.read_bytes()
    changes: list[Callable[[], bytes]] = [
        *(lambda: _flipped(before, draw),) * 3,
        lambda: before[: draw.randrange(len(before))],
        lambda: b"",
        lambda: draw.randbytes(len(before)),
        lambda: before + draw.randbytes(draw.randint(1, 100)),
        lambda: _moved(before, draw),
        lambda: draw.choice(others).read_bytes(),
    ]
    if path.suffix == ".json":
        changes += [lambda: _edited(before, draw)] * 4
    while (after := (change := draw.choice(changes))()) == before:
        pass
    path.write_bytes(after)
    return f"{path.name}: {len(before)} bytes became {len(after)} by change {changes.index(change)}"


def _flipped(content: bytes, draw: random.Random) -> bytes:
    """One bit to eight are others."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 8))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _moved(content: bytes, draw: random.Random) -> bytes:
    """A stretch stands where another one was."""
    start, stop = sorted(draw.sample(range(len(content) + 1), 2))
    place = draw.randrange(len(content))
    return (content[:place] + content[start:stop] + content[place:])[: len(content)]


def _edited(content: bytes, draw: random.Random) -> bytes:
    """JSON in which a key has another value, or is missing."""
    values = json.loads(content)
    place, key = draw.choice(places(values)[:2000])
    if draw.random() < 0.3:
        del place[key]
    else:
        place[key] = draw.choice(VALUES)
    return json.dumps(values).encode()


def places(content: Any) -> list[tuple[Any, Any]]:
    """Where values stand: (mapping or list, key or index)."""
    found: list[tuple[Any, Any]] = []
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        found += [(content, key), *places(value)]
    return found

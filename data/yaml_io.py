"""YAML files as plain dictionaries, and what is wrong with them in one line."""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from data.errors import DataError


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Read a YAML 1.2 file whose top level is a mapping; `1e7` is a number, a repeated key is an error.

    Raises:
        DataError: the file is missing, is no YAML, repeats a key (named with its line), or is no mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    yaml = YAML(typ="safe", pure=True)
    try:
        content = yaml.load(text)
    except DuplicateKeyError as error:
        found = re.search(r'duplicate key "(.*?)" with', error.problem or "")
        key = repr(found[1]) if found else "a key"
        raise DataError(f"{path}: line {error.problem_mark.line + 1}: {key} appears twice; keep one of them") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise DataError(f"{path}: {where}not YAML ({error.problem}); mend the line") from None
    except YAMLError as error:
        raise DataError(f"{path}: not YAML ({' '.join(str(error).split())}); mend the file") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise DataError(f"{path}: the top level is a {type(content).__name__}; it must be a mapping of keys to values")
    return content


def first_problem(error: ValidationError, model: type[BaseModel], content: Any) -> str:
    """The first problem of a validation as one line: field, value, rule and, for an unknown key, the nearest known one.

    Args:
        error: what pydantic raised when `model` validated `content`.
    """
    problem = error.errors(include_url=False, include_context=False)[0]
    field = _written_path(problem["loc"], content)
    if problem["type"] == "extra_forbidden":
        key = str(problem["loc"][-1])
        known = _known_keys(model, problem["loc"][:-1])
        near = get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}" if known else "remove it"
        return f"{field}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{field}: required, but not given; add it"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{field}: {problem['input']!r}: {message[:1].lower()}{message[1:]}"


def _written_path(location: tuple[int | str, ...], content: Any) -> str:
    """A pydantic location as the user wrote it: without the tags of unions, which are no keys of the file."""
    parts: list[str] = []
    for position, part in enumerate(location):
        inside = isinstance(content, dict) and part in content
        inside = inside or (isinstance(content, list) and isinstance(part, int) and part < len(content))
        if inside:
            content = content[part]
        elif position < len(location) - 1:
            continue
        parts.append(str(part))
    return ".".join(parts) or "top level"


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Keys that the model at `location` below `model` accepts; at a union's tag, the model with that tag."""
    models = [model]
    for part in location:
        if isinstance(part, int):
            continue
        inner = [i for m in models if part in m.model_fields for i in _models_in(m.model_fields[part].annotation)]
        models = inner or [m for m in models if any(part in get_args(f.annotation) for f in m.model_fields.values())]
    return sorted({field.alias or name for m in models for name, field in m.model_fields.items()})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Every pydantic model inside a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]

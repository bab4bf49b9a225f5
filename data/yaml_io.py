"""YAML as plain dictionaries and back, and what is wrong with them in one line."""

import io
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import AfterValidator, BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from data.errors import DataError

# Of pydantic's types of errors.
WITHOUT_VALUE = {"extra_forbidden", "missing", "union_tag_not_found"}
NO_MAPPING = {"model_type", "model_attributes_type", "dict_type"}
MOST_NESTED, MOST_VALUES, MOST_WHOLE = 100, 1_000_000, 2**63 - 1  # of what a file may hold
NO_LIST = {"list_type", "tuple_type"}


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
    try:
        content = load_yaml(text)
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


def load_yaml(text: str) -> Any:
    """A value of YAML 1.2 made of mappings, lists, text, numbers, truth values and nulls. Nothing that a tag names is ever built.

    Raises:
        YAMLError: it is none, or one that nobody writes by hand: nested without end, or endless by aliases.
    """
    if (deepest := _nesting(text)) > MOST_NESTED:
        raise YAMLError(f"{deepest} brackets inside one another; at most {MOST_NESTED}")
    try:
        content = YAML(typ="safe", pure=True).load(text)
        if (values := _count(content, {})) > MOST_VALUES:
            raise YAMLError(f"{values:,} values with its aliases written out; at most {MOST_VALUES:,}")
    except RecursionError:
        raise YAMLError("nested too deeply") from None
    except (ValueError, TypeError, OverflowError) as error:  # a tag or a number that cannot be what it looks like
        raise YAMLError(f"a value cannot be read: {error}") from None
    return content


def _nesting(text: str) -> int:
    """Brackets that are open at once at most, those in quotes too: to scan deep ones takes the square of their depth."""
    depth = deepest = 0
    for bracket in re.findall(r"[][{}]", text):
        depth = depth + 1 if bracket in "[{" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    return deepest


def _count(value: Any, counted: dict[int, int]) -> int:
    """Values in a value, as often as they appear; `counted` knows those that an alias may repeat, 0 while they are looked at."""
    if isinstance(value, dict | list):
        if id(value) not in counted:
            counted[id(value)] = 0
            inside = [*value, *value.values()] if isinstance(value, dict) else value
            counted[id(value)] = 1 + sum(_count(one, counted) for one in inside)
        if not counted[id(value)]:
            raise YAMLError("an alias stands inside what it is the name of")
        return counted[id(value)]
    if not isinstance(value, str | int | float | None):
        raise YAMLError(f"{short(value)} is a {type(value).__name__}; write it in quotes if it is text")
    if isinstance(value, int) and abs(value) > MOST_WHOLE:
        raise YAMLError(f"{short(value)} is beyond 2^63; write a smaller number")
    if isinstance(value, str) and not value.isprintable() and re.search("[\0\ud800-\udfff]", value):
        raise YAMLError(f"{short(value)} holds characters that no text has; leave them out")
    return 1


def short(value: Any) -> str:
    """A value in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…{text[-2:]}"


def as_yaml(content: dict[str, Any]) -> str:
    """Plain values as YAML, keys in their order."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    written = io.StringIO()
    yaml.dump(content, written)
    return written.getvalue()


def first_problem(error: ValidationError, model: type[BaseModel], content: Any) -> str:
    """The first problem of a validation as one line: field, value, rule and, for an unknown key or kind, the nearest known one.

    An unknown key comes before all else, since what is missing may be what it stands for. Mappings and lists are not shown. What
    a validator of a whole model says begins with the field that it is about.

    Args:
        error: what pydantic raised when `model` validated `content`.
    """
    problems = error.errors(include_url=False)
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    paths = [_written_path(problem, content) for problem in problems]
    # Of a union's members, the one that got furthest was meant; of several that got as far, any may have been.
    path = max((path for path in paths if path[: len(paths[0])] == paths[0]), key=len)
    mine = [problem for problem, of in zip(problems, paths) if of == path]
    value = mine[0]["input"]
    rules = " or ".join(dict.fromkeys(_rule(problem, model) for problem in mine)).replace(" or must be ", " or ")
    if mine[0]["type"] == "value_error" and isinstance(value, dict):
        return ".".join([*path, rules])
    shown = [] if mine[0]["type"] in WITHOUT_VALUE or isinstance(value, dict | list) else [short(value)]
    return ": ".join([".".join(path) or "top level", *shown, rules])


def _rule(problem: ErrorDetails, model: type[BaseModel]) -> str:
    """What is wrong with a value and what would be right."""
    kind, context, value = problem["type"], problem.get("ctx", {}), problem["input"]
    if kind == "extra_forbidden":
        known = sorted(_keys(_models_at(model, problem["loc"][:-1])))
        near = get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}" if known else "remove it"
        return f"unknown key; {hint}"
    if kind == "missing":
        return "required, but not given; add it"
    kinds = _kinds(_models_at(model, problem["loc"]))
    if kind == "union_tag_not_found":
        return f"required, but not given; one of {', '.join(kinds)}"
    if kind == "union_tag_invalid":
        near = get_close_matches(context["tag"], kinds, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{short(context['tag'])}: unknown kind; {hint}known kinds: {', '.join(kinds)}"
    if kind in NO_MAPPING:
        near = get_close_matches(str(value), kinds, n=1)
        example = f", e.g. {{kind: {near[0]}}}" if near else f", e.g. {{kind: {kinds[0]}, …}}" if kinds else ""
        return f"must be a mapping{example}"
    if kind in NO_LIST:
        return "must be a list"
    if kind == "too_short":
        return "must have at least " + {1: "one"}.get(context["min_length"], str(context["min_length"]))
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be ", "must be ")
    return message[:1].lower() + message[1:]


def _written_path(problem: ErrorDetails, content: Any) -> list[str]:
    """A problem's location as the user wrote it: without the tags of unions, which are no keys of the file."""
    parts: list[str] = []
    for part in problem["loc"]:
        inside = isinstance(content, dict) and part in content
        inside = inside or (isinstance(content, list) and isinstance(part, int) and part < len(content))
        if inside:
            content = content[part]
            parts.append(str(part))
    if problem["type"] == "missing":
        parts.append(str(problem["loc"][-1]))
    if problem["type"].startswith("union_tag"):
        parts.append(problem["ctx"]["discriminator"].strip("'"))
    return parts


def _models_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[type[BaseModel]]:
    """The models that may stand at `location` below `model`; at a union's tag, the model with that tag."""
    models = [model]
    for part in location:
        if isinstance(part, int):
            continue
        inner = [i for m in models if part in m.model_fields for i in _models_in(m.model_fields[part].annotation)]
        models = inner or [m for m in models if any(part in get_args(f.annotation) for f in m.model_fields.values())]
    return models


def _keys(models: list[type[BaseModel]]) -> set[str]:
    return {field.alias or name for model in models for name, field in model.model_fields.items()}


def _kinds(models: list[type[BaseModel]]) -> list[str]:
    """The tags by which the models of a union are told apart."""
    return [
        tag
        for model in models
        if "kind" in model.model_fields
        for tag in get_args(model.model_fields["kind"].annotation)
    ]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Every pydantic model inside a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def matching(pattern: str, rule: str) -> AfterValidator:
    """For `Annotated[str, matching(…)]`: a string that the whole pattern fits, refused with the rule in words."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"must be {rule}")
        return value

    return AfterValidator(check)

"""What a run's result depends on, in full, so that a finished run counts for later versions of the code and for no other recipe.

A result keeps the identity that it was made with. Keys that two identities have in common must be equal, and a key that only one
of them has, because the code of the other does not know it, must have its default there. Where the text lies, who reads it, how
a run lies on its processes and what it prints decide nothing.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any, Self

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticUndefined

from model.config import ModelConfig
from train.config import Recipe
from train.sections import Source

# Sections of a recipe that decide, and their keys that do not.
SECTIONS: dict[str, tuple[str, ...]] = {
    "data": ("train", "validation", "stages", "workers"),  # the first three with the text in place of its path
    "precision": (),
    "optimizer": (),
    "schedule": ("preset", "law", "batch_multiple"),  # where its numbers are from
    "evaluate": ("sample_prompts",),
    "run": ("dir", "stop_at_step", "compile", "device"),
}


class Identity(BaseModel):
    """The values of a recipe that decide its result.

    Attributes:
        values: by section; of the model, every dimension.
        given: `section.key` of those that are not the default.
    """

    model_config = ConfigDict(frozen=True)

    values: dict[str, dict[str, Any]]
    given: tuple[str, ...]

    @classmethod
    def of(cls, recipe: Recipe, config: ModelConfig, text: Mapping[str, str]) -> Self:
        """Of a recipe, its model, and the content of each store that it names by path."""
        values: dict[str, dict[str, Any]] = {"model": asdict(config)}
        defaults = {
            f"model.{f.name}": f.default if f.default is not MISSING else PydanticUndefined for f in fields(config)
        }
        for name, ignored in SECTIONS.items():
            section = getattr(recipe, name)
            values[name] = section.model_dump(mode="json", by_alias=True, exclude=set(ignored))
            for key, info in type(section).model_fields.items():
                defaults[f"{name}.{info.alias or key}"] = info.get_default(call_default_factory=True)
        data = recipe.data
        values["data"] |= {
            "train": _texts(data.train, text),
            "validation": None if data.validation is None else _texts(data.validation, text),
            "stages": [
                stage.model_dump(mode="json", exclude={"train"}, exclude_none=True)
                | ({} if stage.train is None else {"train": _texts(stage.train, text)})
                for stage in data.stages
            ],
        }
        plain = json.loads(json.dumps(values))
        given = [
            key
            for key, value in _flat(plain).items()
            if defaults[key] is PydanticUndefined or value != json.loads(json.dumps(defaults[key]))
        ]
        return cls(values=plain, given=tuple(given))

    def difference(self, other: "Identity") -> str | None:
        """The first key by which two runs differ, as `key value other`; None where they are one."""
        mine, theirs = _flat(self.values), _flat(other.values)
        given = {*self.given, *other.given}
        for key in [*mine, *(key for key in theirs if key not in mine)]:
            if key in mine and key in theirs:
                if mine[key] != theirs[key]:
                    return f"{key} {json.dumps(mine[key])} {json.dumps(theirs[key])}"
            elif key in given:
                return f"{key} {json.dumps(mine.get(key))} {json.dumps(theirs.get(key))}"
        return None

    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.values, sort_keys=True).encode()).hexdigest()


def _flat(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, keys in values.items() for key, value in keys.items()}


def _texts(sources: Iterable[Source], text: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {"content": text[source.path], **source.model_dump(mode="json", exclude={"path"}, exclude_defaults=True)}
        for source in sources
    ]

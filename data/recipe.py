"""The data recipe: which text, in which shares, cut by which tokenizer. Unknown and repeated keys are errors."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from data.clean import StepConfig
from data.dedup.signatures import Dedup
from data.errors import DataError
from data.manifest import Record
from data.sources import Source
from data.yaml_io import first_problem, read_yaml

BUILT_IN = Path(__file__).parent / "recipes"


class Trained(Record):
    """A tokenizer that is trained on a sample of the train split."""

    kind: Literal["bpe", "sentencepiece"] = "bpe"
    model: Literal["unigram", "bpe"] = "unigram"  # of sentencepiece
    vocab_size: int = Field(default=4096, ge=300)  # ids in all, special tokens and the 256 bytes included
    sample_bytes: int = Field(default=20_000_000, ge=1)  # text it is trained on, shared among the sources by weight


class Given(Record):
    """A Hugging Face tokenizer folder that is copied into the store."""

    kind: Literal["folder"]
    path: Path


class DataRecipe(Record):
    """A whole data recipe, as `data/recipes/default.yaml` has it."""

    sources: list[Source] = Field(min_length=1)
    tokenizer: Annotated[Trained | Given, Field(discriminator="kind")] = Trained(kind="bpe")
    steps: tuple[StepConfig, ...] = ()  # cleaning of the sources that have no steps of their own
    dedup: Dedup = Dedup()
    reference_tokenizer: Path | None = None  # a folder; the report compares bytes per token with its
    fim_rate: float = Field(
        default=0.0, ge=0, le=1
    )  # share of the train documents in fill-in-the-middle form; DeepSeek-V3: 0.1
    split_joined_rate: float = Field(
        default=0.0, ge=0, le=1
    )  # share of tokens of punctuation and line breaks that are split
    validation: float = Field(default=0.01, ge=0, le=1)  # share of the documents, by a hash of their text; 1: all
    seed: int = 0  # of the order of documents on disk, and of what is drawn in them
    shard_bytes: int = Field(default=16 << 20, ge=1)  # text of one item of work; the store does not depend on it
    tokens_per_file: int = Field(default=1 << 31, ge=1)  # a split with more lies in several files

    @model_validator(mode="after")
    def _names_differ(self) -> "DataRecipe":
        name, count = Counter(source.name for source in self.sources).most_common(1)[0]
        if count > 1:
            raise ValueError(f"sources: name {name!r} is used {count} times; give each source its own name")
        return self

    @model_validator(mode="after")
    def _tokenizer_has_text(self) -> "DataRecipe":
        if self.validation == 1 and not isinstance(self.tokenizer, Given):
            raise ValueError(
                "validation: 1: leaves no text to train a tokenizer on; give one: tokenizer: {kind: folder, path: …}"
            )
        return self


def load_data_recipe(recipe: Path | str) -> DataRecipe:
    """Read a recipe from a YAML file, or a built-in one by its name (`default`).

    Raises:
        DataError: the file cannot be read, or the first field that breaks a rule.
    """
    built_in = BUILT_IN / f"{recipe}.yaml"
    path = built_in if built_in.is_file() and not Path(recipe).exists() else Path(recipe)
    content: dict[str, Any] = read_yaml(path)
    tokenizer = content.get("tokenizer")
    if isinstance(tokenizer, dict):
        tokenizer.setdefault("kind", "bpe")
    try:
        return DataRecipe.model_validate(content)
    except ValidationError as error:
        raise DataError(f"{path}: {first_problem(error, DataRecipe, content)}") from None

"""Data recipes: what is read, and what is refused with one line that says how to mend it."""

import pytest

from data.errors import DataError
from data.recipe import load_data_recipe
from data.yaml_io import read_yaml

GOOD = "sources: [{name: a, kind: jsonl, path: a.jsonl}]\n"


def test_the_built_in_recipe_is_found_by_name_and_by_path():
    recipe = load_data_recipe("default")
    assert recipe == load_data_recipe("data/recipes/default.yaml")
    assert [source.name for source in recipe.sources] == ["shakespeare", "python"]
    assert recipe.tokenizer.vocab_size == 4096


def test_a_short_recipe_gets_the_defaults(tmp_path):
    (tmp_path / "r.yaml").write_text(GOOD + "tokenizer: {vocab_size: 1000}\n")
    recipe = load_data_recipe(tmp_path / "r.yaml")
    assert (recipe.tokenizer.kind, recipe.tokenizer.vocab_size, recipe.seed) == ("bpe", 1000, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "seed: 1\nseed: 2\n", r"r.yaml: line 3: 'seed' appears twice; keep one of them"),
        ("sources: [{name: a, name: b}]\n", r"r.yaml: line 1: 'name' appears twice"),
        (GOOD + "valdation: 0.1\n", r"r.yaml: valdation: unknown key; did you mean 'validation'\?"),
        (GOOD + "tokenizer: {vocab: 500}\n", r"r.yaml: tokenizer.vocab: unknown key; did you mean 'vocab_size'\?"),
        (GOOD.replace("path", "paht"), r"r.yaml: sources.0.paht: unknown key; did you mean 'path'\?$"),
        (GOOD[:-3] + ", zzz: 1}]\n", r"sources.0.zzz: unknown key; known keys: kind, language, .*, text_field, weight"),
        (GOOD.replace("name: a", "name: a, weight: -1"), r"sources.0.weight: -1: must be greater than 0"),
        (
            GOOD.replace("jsonl,", "csv,"),
            r"sources.0.kind: 'csv': unknown kind; known kinds: jsonl, parquet, text, .*, stdlib$",
        ),
        (
            GOOD.replace("jsonl,", "json,"),
            r"sources.0.kind: 'json': unknown kind; did you mean 'jsonl'\? known kinds: jsonl, .*",
        ),
        (
            GOOD.replace("kind: jsonl,", ""),
            r"sources.0.kind: required, but not given; one of jsonl, parquet, .*, stdlib$",
        ),
        (GOOD.replace("path: a.jsonl", "path: 1"), r"sources.0.path: 1: must be a valid string or a list$"),
        (GOOD.replace("path: a.jsonl", "path: [a, 1]"), r"sources.0.path.1: 1: must be a valid string$"),
        (
            GOOD.replace("name: a", "name: .."),
            r"sources.0.name: '..': must be letters, digits, . _ -, beginning with a letter",
        ),
        (GOOD + "steps: normalise\n", r"yaml: steps: 'normalise': must be a list$"),
        (GOOD + "steps: [normalize]\n", r"yaml: steps.0: 'normalize': must be a mapping, e.g. {kind: normalise}$"),
        (
            GOOD + "steps: [{kind: gopher_quality, min_words: 9, max_words: 8}]\n",
            r"steps.0.min_words: 9: is more than max_words = 8",
        ),
        (GOOD + "steps: [{kind: custom, step: mine}]\n", r"steps.0.step: 'mine': must be package.module:Class$"),
        (GOOD + "steps: [{kind: language, keep: [EN]}]\n", r"steps.0.keep.0: 'EN': must be an ISO 639 code"),
        (GOOD + "tokenizer: {kind: folder}\n", r"tokenizer.path: required, but not given"),
        (GOOD + "tokenizer: {vocab_size: many}\n", r"tokenizer.vocab_size: 'many': must be a valid integer"),
        (GOOD + "validation: 1.5\n", r"validation: 1.5: must be less than or equal to 1"),
        (GOOD + "validation: 1\n", r"yaml: validation: 1: leaves no text to train a tokenizer on; give one"),
        ("sources: []\n", r"yaml: sources: must have at least one$"),
        ("", r"sources: required, but not given"),
        ("sources: [{name: a, kind: stdlib}, {name: a, kind: stdlib}]\n", r"yaml: sources: name 'a' is used 2 times"),
        ("a: [1\n", r"r.yaml: line 2: not YAML"),
        ("- 1\n", r"r.yaml: the top level is a list; it must be a mapping"),
    ],
)
def test_a_mistake_is_named_with_field_value_rule_and_fix(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(DataError, match=message) as error:
        load_data_recipe(tmp_path / "r.yaml")
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none.yaml: cannot be read \(No such file"):
        read_yaml(tmp_path / "none.yaml")


def test_numbers_are_read_as_yaml_1_2_has_them(tmp_path):
    (tmp_path / "r.yaml").write_text("a: 1e7\nb: 1e-8\nc: on\nd: 1_000\ne: 010\n")
    assert read_yaml(tmp_path / "r.yaml") == {"a": 1e7, "b": 1e-8, "c": "on", "d": 1000, "e": 10}

"""How far back a model finds what it has read: within the context that it began with, and before and after YaRN extends it.

    python benchmarks/long_context.py --work FOLDER [--seeds 0 1] [--plot FILE.png] [--json FILE] [key=value …]

A document has 511 words. `c7=3` gives channel 7 the value 3, once in a document, and every `c7?` after it is followed by `3`.
What is trained on asks for all channels again and again, for those most that got their value last. In the documents that count,
a channel is asked for the first time after a wait, of a few words or of hundreds, and these first answers are counted, by the
distance of their value, which stands nowhere else. Guessing is right once in 8.

The recipe `benchmarks/recipes/long_context.yaml` is one run with a stage: 64 tokens with plain RoPE, then 512 with YaRN. A copy of
the run, stopped between, goes on at 512 tokens without YaRN. `key=value` changes the recipe. What is in FOLDER already is not made
again.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from data.prepare import prepare
from data.recipe import DataRecipe
from data.store import Store
from data.tokenizer.folder import BOS, EOS, PAD, write_folder
from model.transformer import Transformer
from train.config import load_recipe
from train.generate import load_model
from train.schedule import Schedule

RECIPE = Path(__file__).parent / "recipes" / "long_context.yaml"
CHANNELS, VALUES = 32, 8
PAIRS = [f"c{channel}={value}" for channel in range(CHANNELS) for value in range(VALUES)]
QUESTIONS = [f"c{channel}?" for channel in range(CHANNELS)]
WORDS = [BOS, EOS, PAD, *PAIRS, *QUESTIONS, *map(str, range(VALUES))]
FIRST_PAIR, FIRST_QUESTION = WORDS.index(PAIRS[0]), WORDS.index(QUESTIONS[0])
LENGTH = 512  # tokens of a document, the end-of-sentence token included
DOCUMENTS = {"train": 3000, "recall": 300}

EVERY = 10  # steps of the stage, between checkpoints

Accuracies = dict[int, float]  # of answers whose pair stands [d, 2d) tokens back, by d


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stores = write_stores(arguments.work)
    results = {}
    for seed in arguments.seeds:
        data = [f"data.train={stores['train'].path}", f"data.validation={stores['recall'].path}"]
        given = [*data, f"run.seed={seed}", f"data.seed={seed}", *arguments.overrides]
        results[seed] = of_seed(given, stores["recall"], arguments.work / f"seed-{seed}")
    report(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.plot:
        draw(results, arguments.plot)


def write_stores(folder: Path) -> dict[str, Store]:
    """Stores of documents to train on, and of those that count."""
    folder.mkdir(parents=True, exist_ok=True)
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token=PAD))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    words.add_special_tokens([BOS, EOS, PAD])
    write_folder(folder / "tokenizer", words)
    stores = {}
    for name, documents in DOCUMENTS.items():
        draw, text = random.Random(name), folder / f"{name}.jsonl"
        lines = (json.dumps({"text": " ".join(document(draw, name == "recall"))}) + "\n" for _ in range(documents))
        text.write_text("".join(lines), encoding="utf-8")
        recipe = {
            "sources": [{"name": name, "kind": "jsonl", "path": str(text)}],
            "tokenizer": {"kind": "folder", "path": str(folder / "tokenizer")},
            "validation": 1.0 if name == "recall" else 0.0,
        }
        stores[name] = prepare(DataRecipe.model_validate(recipe), folder / f"store-{name}")
    return stores


def document(draw: random.Random, waits: bool) -> list[str]:
    """LENGTH − 1 words: pairs at any time, and between them questions, near and far.

    A channel whose pair stands d words back is asked for in proportion to 1/d. With `waits`, each is asked for the first time after
    a wait of its own, 1 to LENGTH words, all scales alike, and only then as often as others.
    """
    unset = draw.sample(range(CHANNELS), CHANNELS)
    words: list[str] = []
    places: dict[int, int] = {}  # where the pair of each channel stands
    values: dict[int, int] = {}
    wait: dict[int, float] = {}  # of those that have not been asked for
    while len(words) < LENGTH - 1:
        due = [channel for channel in wait if len(words) - places[channel] >= wait[channel]]
        if not due and unset and (len(wait) == len(places) or draw.random() < 2 * CHANNELS / LENGTH):
            channel = unset.pop()
            places[channel], values[channel] = len(words), draw.randrange(VALUES)
            if waits:
                wait[channel] = LENGTH ** draw.random()
            words.append(f"c{channel}={values[channel]}")
            continue
        asked = due[:1] or [channel for channel in places if channel not in wait]
        if not asked:  # every channel has its value, and waits
            asked = [min(wait, key=lambda channel: places[channel] + wait[channel])]
        [channel] = draw.choices(asked, [1 / (len(words) - places[channel]) for channel in asked])
        wait.pop(channel, None)
        words += [f"c{channel}?", str(values[channel])]
    return words[: LENGTH - 1]


def of_seed(settings: Sequence[str], store: Store, folder: Path) -> dict[str, Any]:
    """Train both runs of a seed, and count the right answers of their checkpoints."""
    yarn, plain = folder / "yarn", folder / "plain"
    recipe = load_recipe(RECIPE, settings)
    spans = Schedule(recipe.schedule, recipe.data.lengths).spans
    first = sum(span.steps for span in spans if span.sequence_length < LENGTH)
    if not plain.exists():
        train(yarn, *settings, f"run.stop_at_step={first}", "checkpoint.every_steps=null")
        shutil.copytree(yarn, plain)
    train(yarn, *settings)
    train(plain, *settings, "model.rope_scaling=null")

    split = store.split("validation")
    numbers = [split.document(number).astype("int64") for number in range(split.document_count)]
    documents = torch.from_numpy(np.stack(numbers))  # [documents, LENGTH]
    before, _ = load_model(checkpoint(yarn, first))
    result: dict[str, Any] = {"steps": first}
    result["within"] = accuracies(before, documents.view(-1, recipe.data.sequence_length))
    longer = recipe.model_config_resolved()
    for name, run in {"plain RoPE": plain, "YaRN": yarn}.items():
        before.set_positions(longer if run == yarn else longer.override({"rope_scaling": None}))
        result[name] = {0: accuracies(before, documents)}
        for step in range(first + EVERY, first + spans[-1].steps + 1, EVERY):
            result[name][step - first] = accuracies(load_model(checkpoint(run, step))[0], documents)
    return result


def train(run: Path, *changes: str) -> None:
    """Train, or go on training."""
    subprocess.run([sys.executable, "-m", "train", str(RECIPE), *changes, f"run.dir={run}"], check=True)


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


@torch.no_grad()
def accuracies(model: Transformer, tokens: Tensor) -> Accuracies:
    """Share of right answers by distance. tokens: [B, T]."""
    distances = torch.cat([first_questions(some) for some in tokens.split(16)])
    following = torch.cat((tokens, tokens[:, :1]), dim=1)  # the model wants a target at the last position too
    hidden, _ = model.hidden_states(following, torch.zeros_like(following))  # of the main head: [B, T, D]
    asks = distances > 0
    found = model.logits(hidden[0][asks]).argmax(-1) == following[:, 1:][asks]
    scales = distances[asks].log2().floor().long()
    return {2 ** int(scale): round(float(found[scales == scale].float().mean()), 4) for scale in scales.unique()}


def first_questions(tokens: Tensor) -> Tensor:
    """How far back its pair is, at the first question of each channel that has a pair before it; else 0. Both [B, T]."""
    position = torch.arange(tokens.shape[1])
    question, pair = tokens - FIRST_QUESTION, tokens - FIRST_PAIR
    question = torch.where((question >= 0) & (question < CHANNELS), question, -1)
    pair = torch.where((pair >= 0) & (pair < len(PAIRS)), pair // VALUES, -2)
    earlier = position.unsqueeze(-1) > position  # [T, T]
    before = question.unsqueeze(-1) == pair.unsqueeze(-2)  # [B, T, T]
    again = (question.unsqueeze(-1) == question.unsqueeze(-2)) & earlier
    distance = ((position.unsqueeze(-1) - position) * (before & earlier)).amax(-1)  # one pair a channel
    is_first = (question >= 0) & ~again.any(-1)
    is_first[:, -1] = False  # its answer is not there
    return distance * is_first


def report(results: dict[int, Any]) -> None:
    """A line for each model, of all seeds: right answers by distance, the worst seed's."""
    within = results[next(iter(results))]
    print(f"{'steps':28}" + "".join(f"{d}–{2 * d - 1}".rjust(9) for d in within["YaRN"][0]))

    def line(name: str, found: Sequence[Accuracies]) -> None:
        print(f"{name:28}" + "".join(f"{min(one[d] for one in found):9.3f}" for d in found[0]))

    line(f"{within['steps']}, as trained", [one["within"] for one in results.values()])
    for name in ("plain RoPE", "YaRN"):
        for steps in within[name]:
            line(f"{within['steps']} + {steps}, {name}", [one[name][steps] for one in results.values()])


def draw(results: dict[int, Any], path: Path) -> None:
    """Right answers by distance, one panel before training at the longer length and one behind it; a line a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    last = max(results[next(iter(results))]["YaRN"])
    first = min(step for step in results[next(iter(results))]["YaRN"] if step)
    colours = {"YaRN": "C0", "plain RoPE": "C1", "within": "0.4"}
    for axis, steps in zip(figure.subplots(1, 3, sharey=True), (0, first, last)):
        for seed, result in results.items():
            label = seed == next(iter(results))
            lines = {name: result[name][steps] for name in ("YaRN", "plain RoPE")}
            if not steps:
                lines["within"] = result["within"]
            for name, found in lines.items():
                said = "as trained, at 64 tokens" if name == "within" else f"{name}, at {LENGTH} tokens"
                axis.plot(list(found), list(found.values()), color=colours[name], marker="o", markersize=3,
                          linewidth=1.2, label=said if label else None)  # fmt: skip
        axis.axhline(1 / VALUES, color="0.7", linewidth=0.8, linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set_title(f"{steps} steps at {LENGTH} tokens", loc="left")
        axis.set_xlabel("distance, tokens")
        axis.grid(alpha=0.25)
    figure.axes[0].set_ylabel("right answers")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()

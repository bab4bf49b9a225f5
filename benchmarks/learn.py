"""What a machine learns in an hour: a transformer against an n-gram on the same bytes, in bits per byte and per language.

    python benchmarks/learn.py --train train.jsonl.xz --validation validation.jsonl.xz --work FOLDER [--processes 2] [key=value …]

The JSONL files have the fields `text` and `lang`. Each language becomes a source of one token store, weighted by its bytes; the
validation file becomes a store of its own under the same tokenizer. `key=value` changes the recipe `benchmarks/recipes/learn.yaml`.
Interrupted, the same command continues.
"""

import argparse
import json
import lzma
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

RECIPE = Path(__file__).parent / "recipes" / "learn.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--prepare-only", action="store_true")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    work = arguments.work
    tokenizer = {"kind": "bpe", "vocab_size": arguments.vocab_size, "sample_bytes": 20_000_000}
    prepare(arguments.train, work / "train", tokenizer, validation=0.01)
    given = {"kind": "folder", "path": str(work / "train/store/tokenizer")}
    prepare(arguments.validation, work / "validation", given, validation=1.0)
    if arguments.prepare_only:
        return
    run = work / "run"
    train = [f"data.train={work}/train/store", f"data.validation={work}/validation/store", f"run.dir={run}"]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={arguments.processes}",
    ]
    subprocess.run([*launcher, "-m", "train", str(RECIPE), *train, *arguments.overrides], check=True)
    command = [
        sys.executable,
        "-m",
        "train.cli",
        "evaluate",
        str(run),
        "--data",
        str(work / "validation/store"),
        "--json",
    ]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    report(result["validation"])


def report(sources: Mapping[str, Mapping[str, Any]]) -> None:
    """A line a language, and one for all of them: bits per byte over the bytes of all."""
    print(f"{'language':14}{'bits/byte':>11}{'nats/token':>12}  share of next, second-next … tokens put first")
    bits = size = 0.0
    for language, result in sources.items():
        bits += result["nats_per_token"] * result["tokens"] / math.log(2)
        size += result["nats_per_token"] * result["tokens"] / math.log(2) / result["bits_per_byte"]
        shares = "  ".join(f"{share:.3f}" for share in result["accuracy"])
        print(f"{language:14}{result['bits_per_byte']:11.3f}{result['nats_per_token']:12.3f}  {shares}")
    print(f"{'all':14}{bits / size:11.3f}")


def prepare(text: Path, folder: Path, tokenizer: Mapping[str, object], validation: float) -> None:
    """Split a JSONL file by language and make a token store of it, with the project's own command."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.yaml"
    if not recipe.exists():
        sources = [
            {"name": language, "kind": "jsonl", "path": str(path), "weight": float(path.stat().st_size)}
            for language, path in sorted(split_by_language(text, folder).items())
        ]
        YAML().dump({"sources": sources, "tokenizer": tokenizer, "validation": validation}, recipe)
    command = [sys.executable, "-m", "train.cli", "data", "prepare", str(recipe), "--out", str(folder / "store")]
    subprocess.run(command, check=True)


def split_by_language(text: Path, folder: Path) -> dict[str, Path]:
    """One JSONL file a language; regional forms (zh_CN, zh_TW) count as their language."""
    paths: dict[str, Path] = {}
    files = {}
    with lzma.open(text, "rt", encoding="utf-8") if text.suffix == ".xz" else text.open(encoding="utf-8") as lines:
        for line in lines:
            document = json.loads(line)
            language = document["lang"].partition("_")[0]
            if language not in files:
                paths[language] = folder / f"{language}.jsonl"
                files[language] = paths[language].open("w", encoding="utf-8")
            files[language].write(json.dumps({"text": document["text"]}, ensure_ascii=False) + "\n")
    for file in files.values():
        file.close()
    return paths


if __name__ == "__main__":
    main()

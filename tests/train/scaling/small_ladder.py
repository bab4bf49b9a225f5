"""A ladder of runs that take a second each."""

from pathlib import Path
from typing import Any

from data.yaml_io import as_yaml

MODEL = {
    "preset": "tiny",
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}


def write_ladder(folder: Path, store: Path, **changes: Any) -> Path:
    """Write `ladder.yaml`; what `changes` names is put where it belongs in the file."""
    schedule = {"shape": "wsd", "gamma": 0.01, "alpha": 1e-3, "lambda": 0.0} | changes.pop("schedule", {})
    data = changes.pop("data", {"train": str(store), "sequence_length": 32, "workers": 0})
    recipe = {
        "model": MODEL,
        "data": {**data, "train": str(store)},
        "parallel": {"micro_batch": 8},
        "schedule": schedule,
        "evaluate": {"tokens": 512},
        "logging": {"every_steps": 100},
        "run": {"device": "cpu"},
    } | changes.pop("sections", {})
    ladder = {
        "recipe": changes.pop("recipe", recipe),
        "budgets": changes.pop("budgets", [4e8, 8e8]),
        "hyperparameters": {
            "widths": changes.pop("widths", [16]),
            "lr": changes.pop("lr", [4e-3, 8e-3]),
            "batch_tokens": changes.pop("batch_tokens", [256]),
            "spacing": changes.pop("spacing", 2.0),
            "max_cells": changes.pop("max_cells", 20),
        },
        "allocation": {"widths": changes.pop("row", [8, 16, 24]), "sizes": changes.pop("sizes", 3)},
        "seeds": changes.pop("seeds", 3),
        "warmup_tokens": 1024,
        "dir": changes.pop("dir", str(folder / "ladder")),
        **changes,
    }
    path = folder / "ladder.yaml"
    path.write_text(as_yaml(ladder), encoding="utf-8")
    return path

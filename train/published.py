"""The training schedules that DeepSeek published, as data: `schedule: {preset: deepseek-v3}` starts from one of them.

Values are keyed as in the recipe. Token positions belong to the published number of tokens; `published(name, tokens)` moves them
in proportion when a run is shorter or longer. Batches are in tokens: sequences of 4,096, the context of every one of these runs.
"""

from typing import Any

SEQUENCE = 4096  # tokens; the pretraining context of all models below


def ramp(first: int, last: int, over: int) -> list[list[int]]:
    """A batch that grows from `first` to `last` sequences of 4,096 over `over` tokens, as [[tokens, batch_tokens], …].

    The reports only say that the batch grows gradually. Here it grows by a third of its first value, in stages of equal token
    spans: V3's is 3, 4, 5 … 15 × 1,024 sequences and V2's 3, 4 … 12 × 768. The sizes do not depend on the number of
    processes, so that a run has the same steps on any machine, and a power of two up to 256 divides all of them.
    """
    increment = first // 3
    stages = (last - first) // increment
    assert increment * (3 + stages) == last, f"{last} is not reached from {first} in thirds of it"
    return [[over * stage // stages, (first + stage * increment) * SEQUENCE] for stage in range(stages + 1)]


TRILLION, BILLION = 10**12, 10**9

# The learning rate falls by 0.316 twice, together to a tenth (0.316² = 0.0999).
_TWO_DROPS = (0.316, 0.099856)

PUBLISHED: dict[str, dict[str, Any]] = {
    # arXiv 2412.19437 §4.2
    "deepseek-v3": {
        "tokens": 14_800 * BILLION,
        "lr": 2.2e-4,
        "batch_tokens": ramp(3072, 15360, over=469 * BILLION),
        "warmup_steps": 2000,
        "shape": "v3",
        "gamma": [[0, 0.001], [14_300 * BILLION, 0.0]],  # off for the last 500B tokens
        "alpha": 1e-4,
        "lambda": [[0, 0.3], [10 * TRILLION, 0.1]],
    },
    # arXiv 2405.04434 §3.1.2. alpha is the expert-level factor; no bias and no MTP.
    "deepseek-v2": {
        "tokens": 8_100 * BILLION,
        "lr": 2.4e-4,
        "batch_tokens": ramp(2304, 9216, over=225 * BILLION),
        "warmup_steps": 2000,
        "shape": "multistep",
        "milestones": [[0.6, _TWO_DROPS[0]], [0.9, _TWO_DROPS[1]]],
        "gamma": 0.0,
        "alpha": 0.003,
        "lambda": 0.0,
    },
    # arXiv 2405.04434 appendix B
    "deepseek-v2-lite": {
        "tokens": 5_700 * BILLION,
        "lr": 4.2e-4,
        "batch_tokens": 4608 * SEQUENCE,
        "warmup_steps": 2000,
        "shape": "multistep",
        "milestones": [[0.8, _TWO_DROPS[0]], [0.9, _TWO_DROPS[1]]],
        "gamma": 0.0,
        "alpha": 0.001,
        "lambda": 0.0,
    },
    # arXiv 2401.02954 §2.3 and table 2; dense models, so that nothing is balanced
    "deepseek-llm-7b": {
        "tokens": 2 * TRILLION,
        "lr": 4.2e-4,
        "batch_tokens": 2304 * SEQUENCE,
        "warmup_steps": 2000,
        "shape": "multistep",
        "milestones": [[0.8, 0.316], [0.9, 0.1]],
        "gamma": 0.0,
        "alpha": 0.0,
        "lambda": 0.0,
    },
    "deepseek-llm-67b": {
        "tokens": 2 * TRILLION,
        "lr": 3.2e-4,
        "batch_tokens": 4608 * SEQUENCE,
        "warmup_steps": 2000,
        "shape": "multistep",
        "milestones": [[0.8, 0.316], [0.9, 0.1]],
        "gamma": 0.0,
        "alpha": 0.0,
        "lambda": 0.0,
    },
}


def published(name: str, tokens: int | None = None) -> dict[str, Any]:
    """The schedule section of a published run, its token positions moved in proportion to a run of `tokens`."""
    values = PUBLISHED[name]
    if tokens is None:
        return dict(values)
    curves = {
        key: moved(value, tokens, values["tokens"])
        for key, value in values.items()
        if key in ("gamma", "alpha", "lambda", "batch_tokens") and isinstance(value, list)
    }
    return {**values, **curves, "tokens": tokens}


def moved(points: list[list[Any]], tokens: int, from_tokens: int) -> list[list[Any]]:
    """The positions of a curve of a run of `from_tokens`, in proportion to a run of `tokens`.

    In a run so short that two positions meet, the later value holds.
    """
    return [list(point) for point in {start * tokens // from_tokens: held for start, held in points}.items()]

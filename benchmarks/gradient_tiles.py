"""Why gradients are quantised 1 × 128: the error of Dgrad with square tiles, on gradients of a trained model. DeepSeek-V3, B.2.

    python benchmarks/gradient_tiles.py --run RUN --store STORE [--tokens 16384] [--json FILE] [--plot FILE.png]

A model of about 16 B parameters diverged when activation gradients were quantised in tiles of 128 × 128, as weights are. A token
whose gradient is far above those of its neighbours then sets the scale of 128 tokens at once, and what is small beside it is lost.
Here one backward pass of a run's last checkpoint is taken in fp32, and at every linear map of its blocks, and at its experts,

    dx = dy W,     dy in tiles of 1 × 128 or of 128 × 128 (tokens × channels),     W in tiles of 128 × 128,

is compared with float64. The error of a token is ‖found − exact‖ / ‖exact‖ of its row of dx. Beside it stands the error that W
alone makes (dy exact). Tokens are sorted by how far the largest token of their tile stands above them: with square tiles a token
below everything that the tile's scale can express loses its gradient (100 %).
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.files import replace_file
from data.store import Store
from data.validation import validation_batches
from model.layers import MLP, Linear
from model.moe import Experts
from model.ops.experts import reference_experts
from model.ops.fp8.quantize import TILE, dequantize, quantize_blocks, quantize_rows
from model.ops.grouped_mm import reference_grouped_mm
from model.transformer import Transformer
from train.generate import load_model

EDGES = (1, 4, 16, 64, 256, 1024, 4096, 16384, math.inf)  # of the tile's largest number over the token's


class Product(NamedTuple):
    """One product of the backward pass."""

    name: str
    grad: Tensor  # [M, N]
    weight: Tensor  # [N, K], computing y = x Wᵀ


class Errors(NamedTuple):
    """Of the tokens of some products."""

    name: str
    outlier: Tensor  # [M] how far the largest token of its tile stands above each token
    rows: Tensor  # [M] error with tiles of 1 × 128
    blocks: Tensor  # [M] error with tiles of 128 × 128
    weight: Tensor  # [M] error of the weight alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run, a checkpoint or a Hugging Face folder")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16384, help="of one backward pass")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    model, _ = load_model(arguments.run)
    errors = [errors_of(p) for p in products(model, arguments.store, arguments.tokens, arguments.sequence_length)]
    result = {"by_map": by_map(errors), "by_outlier": by_outlier(errors)}
    print(as_table(result))
    if arguments.json:
        with replace_file(arguments.json) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.plot:
        draw(result, arguments.plot)


def products(model: Transformer, store: Path, tokens: int, length: int) -> Iterator[Product]:
    """Every Dgrad of one backward pass over validation text, those of each expert apart."""
    found: list[Product] = []
    for name, module in model.model.layers.named_modules(prefix="layers"):
        if isinstance(module, Experts):
            # The experts term by term: their one kernel shows nobody the gradients of its products.
            module.backend = partial(reference_experts, grouped_mm=_noting_groups(reference_grouped_mm, name, found))
        elif isinstance(module, MLP):  # whose last map is one function with SwiGLU
            module.register_forward_hook(_noting_last(f"{name}.down_proj", found))
        elif isinstance(module, Linear) and not name.endswith("eh_proj"):
            module.register_forward_hook(_noting(name, found))
    depths, sequences = model.config.num_nextn_predict_layers, max(tokens // length, 1)
    batches = validation_batches(Store.open(store), length, depths, batch=8, max_tokens=sequences * length)
    for _, batch in batches:
        losses = model(batch.tokens, batch.documents).losses
        losses.objective(sequences * losses.counts // len(batch.tokens), sequences, lambda_=0.3, alpha=0.0).backward()
    joined: dict[str, list[Product]] = {}
    for product in found:
        joined.setdefault(product.name, []).append(product)
    for name, parts in joined.items():
        yield Product(name, torch.cat([p.grad for p in parts]), parts[0].weight)


def _noting(name: str, found: list[Product]) -> Callable[..., None]:
    def hook(module: Any, inputs: Any, output: Tensor) -> None:
        weight = module.weight.detach()
        output.register_hook(lambda grad: found.append(Product(name, grad.flatten(0, -2), weight)))

    return hook


def _noting_last(name: str, found: list[Product]) -> Callable[..., None]:
    note = _noting(name, found)
    return lambda network, inputs, output: note(network.down_proj, inputs, output)


def _noting_groups(grouped_mm: Callable[..., Tensor], name: str, found: list[Product]) -> Callable[..., Tensor]:
    def noting(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        output = grouped_mm(x, weight, counts)
        kind = "gate_up" if weight.shape[1] > weight.shape[2] else "down"

        def hook(grad: Tensor) -> None:
            for expert, rows in enumerate(grad.split(counts.tolist())):
                found.append(Product(f"{name}.{expert}.{kind}", rows, weight[expert].detach()))

        output.register_hook(hook)
        return output

    return noting


@torch.no_grad()
def errors_of(product: Product) -> Errors:
    """The error of each token's row of dx, over whole tiles of 128 tokens."""
    m = len(product.grad) // TILE * TILE
    grad, weight = product.grad[:m], product.weight
    exact = grad.double() @ weight.double()
    quantized = dequantize(quantize_blocks(weight)).double()
    size = exact.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)

    def error(dy: Tensor) -> Tensor:
        return (dy.double() @ quantized - exact).norm(dim=-1) / size

    largest = grad.abs().amax(-1).unflatten(0, (-1, TILE))  # [tiles, 128]
    outlier = (largest.amax(-1, keepdim=True) / largest.clamp_min(1e-38)).flatten()
    rows, blocks = dequantize(quantize_rows(grad)), dequantize(quantize_blocks(grad))
    return Errors(product.name, outlier, error(rows), error(blocks), error(grad))


def by_map(errors: list[Errors]) -> list[dict[str, Any]]:
    """Mean errors of each kind of map over layers and experts."""
    kinds: dict[str, list[Errors]] = {}
    for e in errors:
        parts = e.name.split(".")
        kinds.setdefault(".".join(p for p in parts[2:] if not p.isdigit()), []).append(e)
    return [{"map": kind, **_means(_joined(es))} for kind, es in sorted(kinds.items())]


def by_outlier(errors: list[Errors]) -> list[dict[str, Any]]:
    """The same by how far the largest token of its tile stands above a token."""
    every = _joined(errors)
    table = []
    for low, high in pairwise(EDGES):
        inside = (every.outlier >= low) & (every.outlier < high)
        if inside.any():
            part = Errors("", *(getattr(every, field)[inside] for field in Errors._fields[1:]))
            table.append({"from": low, "to": high if high < math.inf else None, **_means(part)})
    return table


def _joined(errors: list[Errors]) -> Errors:
    return Errors("", *(torch.cat([getattr(e, field) for e in errors]) for field in Errors._fields[1:]))


def _means(e: Errors) -> dict[str, float]:
    rows, blocks = float(e.rows.mean()), float(e.blocks.mean())
    worst = torch.tensor([0.999], dtype=torch.float64)
    return {
        "tokens": len(e.rows),
        "weight_alone": float(e.weight.mean()),
        "rows": rows,
        "blocks": blocks,
        "ratio": blocks / rows,
        "rows_worst": float(e.rows.quantile(worst)) if len(e.rows) < 1 << 24 else float(e.rows.max()),
        "blocks_worst": float(e.blocks.quantile(worst)) if len(e.rows) < 1 << 24 else float(e.blocks.max()),
    }


def as_table(result: dict[str, Any]) -> str:
    """Errors in per cent: mean, and that of the worst token in a thousand."""
    head = f"{'tokens':>9}{'W alone':>9}{'1×128':>9}{'128×128':>9}{'ratio':>8}{'worst':>9}{'':>9}"
    lines = [f"{'map':32}{head}"]
    lines += [f"{row['map']:32}{_cells(row)}" for row in result["by_map"]]
    lines += ["", f"{'largest token of the tile / token':32}{head}"]
    lines += [f"{row['from']:>14} to {row['to'] or '∞':<14}{_cells(row)}" for row in result["by_outlier"]]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> str:
    errors = f"{row['weight_alone']:9.2%}{row['rows']:9.2%}{row['blocks']:9.2%}{row['ratio']:8.2f}"
    return f"{row['tokens']:9,}{errors}{row['rows_worst']:9.1%}{row['blocks_worst']:9.1%}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Mean and worst error by how far the largest token stands out, with both kinds of tile."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    table = result["by_outlier"]
    for key, label, style in (
        ("blocks", "128 × 128", "o-"), ("rows", "1 × 128", "s-"),
        ("blocks_worst", "128 × 128, worst token in 1,000", "o:"), ("rows_worst", "1 × 128, worst token in 1,000", "s:"),
    ):  # fmt: skip
        color = "C3" if key.startswith("blocks") else "C0"
        axis.plot([row["from"] for row in table], [100 * row[key] for row in table], style, color=color, label=label)
    axis.set(xscale="log", yscale="log", xlabel="largest token of the tile / this token, from")
    axis.set_title("error of Dgrad, % of a token's gradient", loc="left")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:] or "png")


if __name__ == "__main__":
    main()

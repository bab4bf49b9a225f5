"""How long cells take: from cells that have ended, and before there are any from a few steps of each width."""

import time

import torch

from model.transformer import Transformer
from train.scaling.ladder.cells import Cells, Result
from train.scaling.ladder.wanted import Cell

STEPS = 2  # timed, after one that is not
START = 6.0  # seconds in which a run starts, validates and saves, on the machine that this was written on


class Pace:
    """Seconds per token of each width.

    Args:
        threads: of a cell's process.
    """

    def __init__(self, cells: Cells, threads: int) -> None:
        self._cells, self._threads = cells, threads
        self._measured: dict[int, float] = {}
        self._learnt: dict[int, list[tuple[int, float]]] = {}  # of finished cells: tokens, seconds

    def learn(self, result: Result) -> None:
        new = result.tokens - result.reused_tokens
        self._learnt.setdefault(result.cell.width, []).append((new, max(result.seconds - START, 0.0)))

    def seconds(self, cells: list[Cell]) -> float:
        """Of all these cells, one after the other."""
        return sum(START + self._cells.tokens(cell) * self._per_token(cell) for cell in cells)

    def _per_token(self, cell: Cell) -> float:
        if known := self._learnt.get(cell.width):
            return sum(seconds for _, seconds in known) / max(1, sum(tokens for tokens, _ in known))
        if cell.width not in self._measured:
            self._measured[cell.width] = self._measure(cell)
        return self._measured[cell.width]

    def _measure(self, cell: Cell) -> float:
        """Forward and backward passes of one batch on this machine."""
        recipe, config = self._cells.recipe(cell), self._cells.model(cell)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        length, threads = recipe.data.sequence_length, torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            with torch.device(device):
                model = Transformer(config, compute_dtype=dtype)
                for parameter in model.parameters():
                    torch.nn.init.normal_(parameter, std=config.initializer_range)
                shape = (recipe.parallel.micro_batch, length + 1 + config.num_nextn_predict_layers)
                tokens = torch.randint(config.vocab_size, shape)
            for step in range(1 + STEPS):
                if step == 1:
                    begin = time.perf_counter()
                model(tokens, torch.zeros_like(tokens)).losses.main.backward()
                if device == "cuda":
                    torch.cuda.synchronize()
            return (time.perf_counter() - begin) / STEPS / (recipe.parallel.micro_batch * length)
        finally:
            torch.set_num_threads(threads)

"""The factor on the loss that keeps small fp16 gradients from vanishing (1710.03740 §3.2).

scale ← scale / 2 after a step whose gradient is not finite,    scale · 2 after 2,000 finite steps in a row
"""

import torch
from torch import Tensor

START, GROWTH_INTERVAL = 2.0**16, 2000  # those of torch.amp.GradScaler


class LossScale:
    """A dynamic scale for fp16; 1 for ever where it is not enabled."""

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.scale = START if enabled else 1.0
        self.good_steps = 0  # finite steps since the scale last changed

    def update(self, finite: bool) -> None:
        """What a step's gradient says about the scale."""
        if not self.enabled:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good_steps == GROWTH_INTERVAL:
            self.scale, self.good_steps = self.scale * 2, 0

    def state(self) -> dict[str, Tensor]:
        return {
            "scale": torch.tensor(self.scale, dtype=torch.float32),
            "good_steps": torch.tensor(self.good_steps, dtype=torch.int64),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` handed out; a run that does not scale stays at 1."""
        if self.enabled:
            self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])

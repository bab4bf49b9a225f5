"""The factor on the loss that keeps small fp16 gradients from vanishing (1710.03740 §3.2).

scale ← scale / 2 after a step whose gradient is not finite,    scale · 2 after 2,000 finite steps in a row

It stays at 2⁻¹⁴ or above, the smallest normal number of fp16: a gradient of 1 keeps its bits. Without a floor a long row of such
steps would take it to 0, and the norm of the gradient, which is divided by it, would never be finite again.

Both numbers live where the model computes: the host need not know whether a step was finite to launch the next one.
"""

import torch
from torch import Tensor

START, GROWTH_INTERVAL = 2.0**16, 2000  # those of torch.amp.GradScaler
FLOOR = 2.0**-14


class LossScale:
    """A dynamic scale for fp16; 1 for ever where it is not enabled."""

    def __init__(self, enabled: bool, device: torch.device):
        self.enabled = enabled
        self.scale = torch.full((), START if enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)  # finite steps since the scale last changed

    def update(self, finite: Tensor) -> None:
        """What a step's gradient, finite or not ([] bool), says about the scale."""
        if not self.enabled:
            return
        good_steps = (self.good_steps + 1) * finite
        grows = good_steps == GROWTH_INTERVAL
        factor = torch.where(finite, torch.where(grows, 2.0, 1.0), 0.5)
        self.scale = (self.scale * factor).clamp_min(FLOOR)
        self.good_steps = good_steps * ~grows

    def state(self) -> dict[str, Tensor]:
        return {"scale": self.scale.cpu().clone(), "good_steps": self.good_steps.cpu().clone()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` handed out; a run that does not scale stays at 1."""
        if self.enabled:
            self.scale.copy_(state["scale"])
            self.good_steps.copy_(state["good_steps"])

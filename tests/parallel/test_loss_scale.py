"""The factor on fp16's loss falls, stops at its floor, and rises again."""

import torch

from parallel import loss_scale
from parallel.loss_scale import FLOOR, START, LossScale

YES, NO = torch.tensor(True), torch.tensor(False)


def test_the_scale_never_falls_to_zero_and_rises_again(monkeypatch) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 2)
    scaling, found = LossScale(True, torch.device("cpu")), []
    for finite in [NO] * 200 + [YES] * 3:
        scaling.update(finite)
        found.append(float(scaling.scale))
    assert found[:2] == [START / 2, START / 4]
    assert found[29:200] == [FLOOR] * 171 and found[200:] == [FLOOR, 2 * FLOOR, 2 * FLOOR]


def test_other_formats_are_not_scaled() -> None:
    scaling = LossScale(False, torch.device("cpu"))
    scaling.update(NO)
    assert scaling.scale == 1

"""An Adam optimizer's state under the names of its parameters, never their index or group, so that it outlives any regrouping."""

from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor

NamedParameters = Iterable[tuple[str, Tensor]]


def moments(optimizer: torch.optim.Optimizer, named_parameters: NamedParameters) -> dict[str, Any]:
    """The optimizer's canonical state: `{"exp_avg": {name: Tensor}, "exp_avg_sq": {name: Tensor}, "steps": int64 []}`.

    The moments are the optimizer's own tensors, zeros where no step was taken yet: a checkpoint can be read into them in place.
    `steps` is a copy; `restore` brings it back. One number counts for all, since every parameter takes part in every step
    (an expert without tokens has a gradient of zeros).
    """
    names = {parameter: name for name, parameter in named_parameters}
    exp_avg, exp_avg_sq, steps = {}, {}, []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = start_state(optimizer, group, parameter)
            exp_avg[names[parameter]] = state["exp_avg"]
            exp_avg_sq[names[parameter]] = state["exp_avg_sq"]
            steps.append(state["step"])
    first, last = (int(count) for count in torch.aminmax(torch.stack(steps)))
    assert first == last, f"a parameter took {first} optimizer steps, another {last}: some had no gradient in a step"
    return {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "steps": torch.tensor(last, dtype=torch.int64)}


@torch.no_grad()
def restore(
    optimizer: torch.optim.Optimizer,
    named_parameters: NamedParameters,
    state: Mapping[str, Any],
    elsewhere: Set[str] = frozenset(),
) -> None:
    """Take back what `moments` handed out; tensors that are the optimizer's own already are left as they are.

    Args:
        elsewhere: parameters whose moments come from elsewhere.
    """
    named_parameters = list(named_parameters)
    own = moments(optimizer, named_parameters)
    for key in ("exp_avg", "exp_avg_sq"):
        names = own[key].keys() - elsewhere
        assert names == state[key].keys(), f"{key}: {names ^ state[key].keys()}"
        for name in names:
            if own[key][name] is not state[key][name]:
                own[key][name].copy_(state[key][name])
    for _, parameter in named_parameters:
        if parameter in optimizer.state:
            optimizer.state[parameter]["step"].fill_(int(state["steps"]))


def start_state(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """A parameter's optimizer state, made as `torch.optim.AdamW` makes it at its first step.

    A group may name a `moments_dtype` other than the parameter's.
    """
    state = optimizer.state[parameter]
    if not state:
        dtype = group.get("moments_dtype") or parameter.dtype
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if group.get("fused") else "cpu")
        state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return state

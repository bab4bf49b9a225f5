"""Small models for the tests of this folder. Dimensions differ from one another, so that no two can be mixed up unnoticed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.transformer import Transformer
from tests.small_model import small_config


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_config() -> Callable[..., ModelConfig]:
    """make_config(**changes): `small_config` without MTP."""

    def make(**changes: Any) -> ModelConfig:
        return small_config(**{"num_nextn_predict_layers": 0} | changes)

    return make


@pytest.fixture(scope="session")
def randomize() -> Callable[[torch.nn.Module, float], None]:
    """randomize(module, std): matrices of that deviation, norms around 1, and expert biases of both signs.

    Fresh weights leave norms at 1 and biases at 0, which would hide a norm or a bias that is not applied.
    """

    @torch.no_grad()
    def draw(module: torch.nn.Module, std: float) -> None:
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, std)
        for name, buffer in module.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2)

    return draw


@pytest.fixture(scope="session")
def make_model(make_config: Callable[..., ModelConfig], randomize: Any) -> Callable[..., Transformer]:
    """make_model(options={…}, **changes of the configuration): a model with random weights, norms and biases."""

    def make(options: dict[str, Any] | None = None, **changes: Any) -> Transformer:
        config = make_config(**changes)
        model = Transformer(config, **(options or {}))
        randomize(model, config.initializer_range)
        return model

    return make

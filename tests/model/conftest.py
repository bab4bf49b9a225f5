"""Small models, and the device of the kernels' tests: a GPU where there is one, else a CPU with Triton's interpreter.

The models' dimensions differ from one another, so that no two can be mixed up unnoticed.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.transformer import Transformer
from tests.small_model import small_config
from tests.triton import NO_TRITON

if find_spec("triton") and not torch.cuda.is_available():  # before a kernel is imported
    from tests.triton.interpreter import interpret

    interpret()


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


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU, or the CPU that interprets kernels."""
    pytest.importorskip("triton", reason=NO_TRITON)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

"""Where the kernels run: on a GPU where there is one, else in Triton's interpreter, which must be on before they are imported."""

from importlib.util import find_spec

import pytest
import torch

NO_TRITON = "triton is not installed: pip install --no-deps triton"

if find_spec("triton") and not torch.cuda.is_available():
    from tests.model.fp8.triton_cpu import interpret

    interpret()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU, or the CPU that interprets kernels."""
    pytest.importorskip("triton", reason=NO_TRITON)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

"""Runs for the tests of this folder."""

from pathlib import Path

import pytest

from data.store import Store
from tests.small_run import Run


@pytest.fixture
def run(tiny_store: Store, tmp_path: Path) -> Run:
    """A run that has not started."""
    return Run(tiny_store, tmp_path / "run")


@pytest.fixture(scope="session")
def whole(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of one process that nothing interrupted. It is not to be changed."""
    whole = Run(tiny_store, tmp_path_factory.mktemp("whole") / "run")
    assert whole.train() == [0], whole.said
    return whole

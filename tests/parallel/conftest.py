import pytest

from tests.workers import Workers


@pytest.fixture(scope="session")
def workers():
    pool = Workers(most=4)
    yield pool
    pool.close()

"""What all tests share."""

import os

import pytest
from hypothesis import settings

# The same examples in every run, so that a change breaks tests and chance does not; others are looked for with
# HYPOTHESIS_PROFILE=default, and what is found belongs into an `@example`.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The layer library of the tests and of the processes that they start, apart from the user's."""
    before = os.environ.get("PARETORCH_CACHE")
    os.environ["PARETORCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("PARETORCH_CACHE")
    if before is not None:
        os.environ["PARETORCH_CACHE"] = before

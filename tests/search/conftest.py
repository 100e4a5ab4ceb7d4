"""What all tests of the search share."""

from __future__ import annotations

import signal

import pytest


@pytest.fixture(autouse=True)
def ctrl_c():
    """A worker of pytest-xdist ignores Ctrl-C, which is meant for its parent; here it is tested."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)

"""Hooks on a network's modules that come off again, whatever happens between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def attached(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Take hooks off when the block ends.

    >>> layer, seen = nn.Identity(), []
    >>> with attached([layer.register_forward_hook(lambda *call: seen.append("a call"))]):
    ...     _ = layer(1)
    >>> layer(2), seen
    (2, ['a call'])
    """
    taken = list(handles)
    try:
        yield
    finally:
        for handle in taken:
            handle.remove()


def run_once(model: nn.Module, x: Tensor, handles: Iterable[RemovableHandle]) -> None:
    """Run a network in evaluation mode for what its hooks see; then it has none of them, and the mode that it had."""
    training = model.training
    with attached(handles):
        try:
            model.eval()(x)
        finally:
            model.train(training)

"""The targets that have a name. A new one is a file in this folder and a line of `TARGETS`.

Importing this module imports no runtime and no NumPy, so that the schema of the configuration, the records of artifacts
and the help of the command line can read the names here, too. A target's runtime is imported when the target is made.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ...errors import TargetError

if TYPE_CHECKING:
    from .target import Target


@dataclass(frozen=True)
class Entry:
    """A line of the catalog.

    Attributes:
        title: What computes the outputs, for people.
        module: The file in this folder that makes the target.
        function: The function there; it gets the target's name and returns the `Target`.
        on_cpu: Whether it computes on the CPU, in the thread that calls it when it has one thread.
    """

    title: str
    module: str
    function: str = "make"
    on_cpu: bool = True


DEFAULT = "onnxruntime"
TARGETS = {
    DEFAULT: Entry("ONNX Runtime", "onnxruntime"),
    "openvino": Entry("OpenVINO", "openvino"),
    "torch": Entry("PyTorch", "torch_eager", "make_cpu"),
    "torch-cuda": Entry("PyTorch on CUDA", "torch_eager", "make_cuda", on_cpu=False),
}


def as_target(spec: Target | str | Mapping[str, Any]) -> Target:
    """The target that a name or a profile stands for.

    Args:
        spec: A name in `TARGETS`, the plain data of a `roofline.Profile`, or a target, which is returned as it is.

    Raises:
        TargetError: There is no such target, the data is not a profile, or the runtime or device is missing; the
            message says what to do.

    >>> as_target("onnxruntime").name
    'onnxruntime'
    """
    from .target import Target

    if isinstance(spec, Target):
        return spec
    if isinstance(spec, str):
        return _named(spec)
    from .roofline import Profile, analytic

    return analytic(Profile.from_dict(spec))


def _named(name: str) -> Target:
    if name not in TARGETS:
        close = difflib.get_close_matches(name, TARGETS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise TargetError(
            f"there is no target {name!r}; choose from {', '.join(TARGETS)}, or name the .yaml file of a profile{hint}"
        )
    entry = TARGETS[name]
    target: Target = getattr(import_module(f".{entry.module}", __package__), entry.function)(name)
    return target

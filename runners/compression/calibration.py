"""Statistics of each layer on the calibration images: the Hessian of its inputs and the gradients of its weights.

Some methods of rounding and some sparsity criteria need more than the weights. These statistics come from one pass of
the network over the calibration images (several where the Hessians of all layers would not fit into memory). They are
stored in the layer library by content, and so shared by trials, studies and processes.

The inputs of a layer are those in the float network in evaluation mode, not in a network whose earlier layers are
already compressed. So the result of compressing a layer depends on the layer alone, and is computed once. Where blocks
or channels were removed, the narrowed network is run, after its BatchNorm statistics are re-estimated as they will be
in the end.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import Diverged
from ..operators.fold import reestimate_batchnorms
from ..operators.hessian import gram
from ..operators.hooks import attached
from ..operators.layers import groups_of, layers_of, output_first, parameter_of, rows, weight_of
from ..task import Criterion
from .library import LayerLibrary, LayerStatistics, digest

VERSION = 1  # of the statistics; to be raised when their computation changes
_MEMORY = 1 << 30  # bytes of Hessians that are accumulated in one pass
_TOGETHER = 8  # images per gradient
HESSIAN, FISHER = "hessian", "fisher"


class Calibration:
    """A network and its calibration images.

    Args:
        model: The network, in evaluation mode.
        parts: The images, in batches that are run at once.
        library: Where results are kept; None keeps them in memory.
        seed: The seed of everything random.
        criteria: The user's functions by name, see `Task`.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[Tensor],
        library: LayerLibrary | None = None,
        seed: int = 0,
        criteria: Mapping[str, Criterion] | None = None,
    ) -> None:
        self.model, self.parts, self.library, self.seed = model, parts, library, seed
        self.criteria = criteria or {}

    @cached_property
    def images(self) -> str:
        """The digest of the images."""
        return digest(*self.parts)

    @cached_property
    def untouched(self) -> Statistics:
        """Statistics of the network itself."""
        return Statistics(self.model, self)

    def of(self, model: nn.Module) -> Statistics:
        """Statistics of another network that computes the same; the network is copied."""
        return Statistics(copy.deepcopy(model), self)

    def after(self, model: nn.Module) -> Statistics:
        """Statistics of a network that lost channels, blocks or ranks, with BatchNorm re-estimated in a copy."""
        narrowed = copy.deepcopy(model)
        reestimate_batchnorms(narrowed, self.parts)
        return Statistics(narrowed, self)


class Statistics:
    """Hessians and gradients of a network's layers on calibration images, computed when first asked for.

    Only layers that run exactly once have statistics; computing those of another raises `KeyError`.
    """

    def __init__(self, model: nn.Module, calibration: Calibration) -> None:
        self.model, self.calibration = model.eval(), calibration
        self._in_memory: dict[tuple[str, str], Tensor] = {}

    @cached_property
    def key(self) -> str:
        """The hash of the network (its modules, numbers and outputs, as code cannot be hashed) and its images."""
        with torch.no_grad():
            answer = self.model(self.calibration.parts[0][:2])
        # The number of threads determines the order of sums.
        names, seed = list(self.model.state_dict()), self.calibration.seed
        about = (VERSION, torch.__version__, torch.get_num_threads(), str(self.model), names, seed)
        numbers = digest(*self.model.state_dict().values(), answer)
        return hashlib.sha256(repr((*about, numbers, self.calibration.images)).encode()).hexdigest()

    def __getitem__(self, layer: str) -> LayerStatistics:
        self.model.get_submodule(layer)
        return LayerStatistics(
            f"{self.key}/{layer}",
            self.calibration.seed,
            partial(self._get, HESSIAN, layer),
            partial(self._get, FISHER, layer),
            self.calibration.criteria,
        )

    @cached_property
    def _layers(self) -> dict[str, nn.Module]:
        return layers_of(self.model)

    def _get(self, kind: str, layer: str) -> Tensor:
        """Statistics from the library, or computed, together with those of other layers that fit into memory."""
        stored = self._stored(kind, layer)
        return self._compute(kind, layer) if stored is None else stored

    def _stored(self, kind: str, layer: str) -> Tensor | None:
        if (kind, layer) in self._in_memory:
            return self._in_memory[kind, layer]
        if self.calibration.library is None:
            return None
        entry = self.calibration.library.find(
            self._name(kind, layer), {kind: (torch.float32, self._shape(kind, layer))}
        )
        return None if entry is None else entry[kind]

    def _keep(self, kind: str, layer: str, value: Tensor) -> None:
        library = self.calibration.library
        if library is None or not library.put(self._name(kind, layer), {kind: value}):
            self._in_memory[kind, layer] = value  # the library cannot store it

    def _name(self, kind: str, layer: str) -> str:
        return hashlib.sha256(f"{self.key}/{layer}/{kind}".encode()).hexdigest()

    def _shape(self, kind: str, layer: str) -> tuple[int, ...]:
        module = self._layers[layer]
        weight = weight_of(module)
        inputs = rows(weight).shape[1]
        return (groups_of(module), inputs, inputs) if kind == HESSIAN else tuple(weight.shape)

    def _compute(self, kind: str, layer: str) -> Tensor:
        names, size = [layer], 0
        for name in self._layers:
            need = 8 * torch.Size(self._shape(kind, name)).numel()
            if name != layer and size + need <= _MEMORY and self._stored(kind, name) is None:
                names.append(name)
                size += need
        values = self._hessians(names) if kind == HESSIAN else self._fisher(names)
        for name, value in values.items():
            self._keep(kind, name, value)
        return values[layer]

    @torch.no_grad()
    def _hessians(self, names: Sequence[str]) -> dict[str, Tensor]:
        totals: dict[str, Tensor] = {}

        def watch(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            product = gram(module, args[0])
            totals[name] = totals[name] + product if name in totals else product

        hooks = [self._layers[name].register_forward_pre_hook(partial(watch, name)) for name in names]
        with attached(hooks):
            for part in self.calibration.parts:
                self.model(part)
        for name, total in totals.items():
            if not bool(total.isfinite().all()):
                raise Diverged(f"layer {name!r} is given NaN or infinity on the calibration images")
        return {name: total.float() for name, total in totals.items()}

    def _fisher(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The mean square of the gradients of a divergence from the network's own outputs.

        At these outputs the divergence has gradient zero. Its second derivative is the mean of `g g^T` over gradients g
        of the loss for targets that are drawn from the network's own outputs (Fisher information), so no labels are
        needed. For outputs that are no class scores, the targets are the outputs with normal noise.
        """
        weights = {name: parameter_of(self._layers[name]) for name in names}
        flags = {name: weight.requires_grad for name, weight in weights.items()}
        totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        generator = torch.Generator().manual_seed(self.calibration.seed)
        try:
            for weight in weights.values():
                weight.requires_grad_(True)
            with torch.enable_grad():
                for images in (few for part in self.calibration.parts for few in torch.split(part, _TOGETHER)):
                    loss = _own_loss(self.model(images), generator)
                    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                    for name, gradient in zip(names, gradients, strict=True):
                        if gradient is not None:
                            # Gradients for drawn targets have mean zero, so that on average the square of their sum is
                            # the sum of their squares.
                            totals[name] += (gradient * len(images)).square()
        finally:
            for name, weight in weights.items():
                weight.requires_grad_(flags[name])
        count = sum(map(len, self.calibration.parts))
        return {name: output_first(self._layers[name], total / count).contiguous() for name, total in totals.items()}


def _own_loss(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """The mean loss against targets drawn from the outputs themselves."""
    if outputs.ndim == 2 and outputs.shape[1] > 1:
        drawn = torch.multinomial(outputs.detach().softmax(1), 1, generator=generator)
        return F.cross_entropy(outputs, drawn.squeeze(1))
    noise = torch.randn(outputs.shape, generator=generator)
    return (outputs * noise).flatten(1).sum(1).mean()

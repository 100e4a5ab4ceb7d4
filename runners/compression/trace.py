"""The `Structure` of a live network: its layers, dependency groups and blocks, and what cannot be compressed.

The network is run on real inputs with hooks, so that whatever runs can be traced. Only the dependency groups are read
off the autograd graph, by Torch-Pruning (Fang et al., CVPR 2023). Groups are accepted only after all of them were
really pruned in a copy that still gives outputs of the same shape, and a block only after a copy without it had the
shapes that `spaces.shapes.shapes` predicts.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...errors import ExportFailed, TaskError, TrialError
from ...spaces.recipe import Recipe
from ...spaces.shapes import shapes
from ...spaces.structure import Group, Layer, Structure, inside, kept_channels
from ...spaces.techniques.prune import Prune
from ...spaces.techniques.student import Student
from ..operators.equalize import find_pairs
from ..operators.fold import fold_batchnorms
from ..operators.hooks import attached
from ..operators.layers import (
    BATCHNORMS,
    NORMALIZATIONS,
    TYPES,
    bias_of,
    is_layer,
    kind_of,
    parameter_of,
    weight_of,
)
from ..operators.prune import channel_groups
from ..operators.student import Skip
from .compress import compress

_Part = TypeVar("_Part")


def check_weights(model: nn.Module) -> None:
    """Check that all parameters and buffers are finite.

    Raises:
        TaskError: One holds NaN or infinity; it is named.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise TaskError(
                f"the network's {name} holds NaN or infinity in {bad} of {tensor.numel()} numbers; "
                "check the checkpoint that your model function loads"
            )


def trace(model: nn.Module, example: Tensor) -> Structure:
    """The structure of a network in evaluation mode.

    Args:
        model: The network; it stays as it is.
        example: Real inputs `[n >= 2, ...]`. More of them make the order of `blocks` (least important first) more
            reliable; 64 are enough.

    Raises:
        TaskError: The network does not run on the inputs, returns something else than one tensor, or holds non-finite
            weights.
    """
    check_weights(model)
    model = copy.deepcopy(model).eval()
    calls, output = _run(model, example)
    names = {module: name for name, module in model.named_modules()}
    tied = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))

    layers: list[Layer] = []
    refused: list[tuple[str, str]] = []
    for module, (x, y) in calls.items():
        if is_layer(module):
            layers.append(_layer(names[module], module, x, y))
    counts = _counts(model, example)
    kept = []
    for layer in layers:
        module = model.get_submodule(layer.name)
        if counts[module] > 1:
            refused.append((layer.name, f"is used {counts[module]} times in one forward pass"))
        elif tied[id(parameter_of(module))] > 1:
            refused.append((layer.name, "shares its weights with another module"))
        else:
            kept.append(layer)
    if not kept:
        raise TaskError(
            "the network has no layer that can be compressed: none of its modules is a convolution (1d, 2d) or "
            "a linear layer "
            "that runs once per forward pass" + "".join(f"\n  {name}: {reason}" for name, reason in refused[:10])
        )
    refused += _refused(model, calls, names)
    folds = _folds(model, example, output, names)
    folded = dict(folds)
    kept = [replace(layer, bias=layer.bias or layer.name in folded) for layer in kept]

    pairs, unpaired = find_pairs(model, example[:2])
    structure = Structure(
        tuple(kept),
        blocks=_blocks(model, example, calls, names),
        refused=tuple(refused),
        folds=folds,
        input_shape=tuple(example.shape[1:]),
        pairs=tuple((pair.maker, pair.readers) for pair in pairs),
        unpaired=tuple(unpaired.items()),
    )
    return _with_groups(model, example, output, structure)


def _run(model: nn.Module, example: Tensor) -> tuple[dict[nn.Module, tuple[Tensor, Tensor]], Tensor]:
    """The input and output of each module that maps one tensor to one tensor (its first call), and the output."""
    calls: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if module not in calls and len(args) == 1 and isinstance(args[0], Tensor) and isinstance(result, Tensor):
            calls[module] = (args[0], result)

    hooks = [module.register_forward_hook(record) for module in model.modules()]
    try:
        with torch.no_grad(), attached(hooks):
            output = model(example)
    except Exception as error:  # whatever the user's network raises on the user's own inputs
        raise TaskError(
            f"the network does not run on its validation inputs of shape {tuple(example.shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(output, Tensor) or output.ndim < 1 or len(output) != len(example):
        kind = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise TaskError(
            f"the network must return one tensor with a row per input; for {len(example)} inputs it returned {kind}"
        )
    if not bool(output.isfinite().all()):
        raise TaskError("the network returns NaN or infinity for its own validation inputs")
    return calls, output


def _counts(model: nn.Module, example: Tensor) -> Counter[nn.Module]:
    counts: Counter[nn.Module] = Counter()
    hooks = [m.register_forward_hook(lambda m, a, r: counts.update([m])) for m in model.modules()]
    with torch.no_grad(), attached(hooks):
        model(example[:2])
    return counts


def _layer(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> Layer:
    kind, shape = kind_of(layer), tuple(weight_of(layer).shape)
    macs = kind.macs(layer, x.shape, y.shape)
    return Layer(name, kind.name(layer), shape, macs, bias=bias_of(layer) is not None)


def _refused(
    model: nn.Module, calls: dict[nn.Module, tuple[Tensor, Tensor]], names: dict[nn.Module, str]
) -> list[tuple[str, str]]:
    """The modules that have parameters but cannot be compressed, each with the reason."""
    refused = []
    supported = ", ".join(one.__name__ for one in TYPES)
    for module, name in names.items():
        own = sum(p.numel() for p in module.parameters(recurse=False))
        if not own or isinstance(module, NORMALIZATIONS):
            continue
        if is_layer(module):
            if module not in calls:
                refused.append((name, "is not called as a module in the forward pass"))
        elif type(module).__module__.partition(".")[0] == "torch":
            refused.append((name, f"{type(module).__name__} is not supported; supported: {supported}"))
        else:
            refused.append((name or "(the network)", f"{own} parameters of its own, outside any layer"))
    return refused


def _folds(
    model: nn.Module, example: Tensor, output: Tensor, names: dict[nn.Module, str]
) -> tuple[tuple[str, str], ...]:
    """The `(layer, batchnorm)` pairs that can be folded: nothing but the BatchNorm reads the layer's output."""
    made: dict[int, nn.Module] = {}
    alive: list[Tensor] = []  # keeps the objects alive, because an id is unique only among living objects
    pairs: dict[str, str] = {}

    def after(module: nn.Module, args: tuple[Any, ...], result: Tensor) -> None:
        made[id(result)] = module
        alive.append(result)

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and id(args[0]) in made:
            pairs[names[made[id(args[0])]]] = names[module]

    hooks = []
    for module in model.modules():
        if is_layer(module):
            hooks.append(module.register_forward_hook(after))
        elif isinstance(module, BATCHNORMS) and module.running_mean is not None:  # else there is nothing to fold
            hooks.append(module.register_forward_pre_hook(before))
    with torch.no_grad(), attached(hooks):
        model(example[:2])

    def same(candidates: list[tuple[str, str]]) -> bool:
        other = copy.deepcopy(model)
        fold_batchnorms(other, candidates)
        with torch.no_grad():
            return torch.allclose(other(example[:2]), output[:2], rtol=1e-3, atol=1e-4 * float(output.abs().max()))

    folds = list(pairs.items())
    # The layer's output may have a second reader, which hooks cannot see; folding would then change the network.
    return tuple(folds if same(folds) else [pair for pair in folds if same([pair])])


def _blocks(
    model: nn.Module, example: Tensor, calls: dict[nn.Module, tuple[Tensor, Tensor]], names: dict[nn.Module, str]
) -> tuple[str, ...]:
    """The blocks that may be left out, least important first.

    A block is a module of a class other than torch's containers, whose output has the shape of its input.
    """
    change: dict[str, float] = {}
    for module, (x, y) in calls.items():
        own_class = not isinstance(module, (nn.Sequential, nn.ModuleList)) and any(True for _ in module.children())
        if names[module] and own_class and x.shape == y.shape:
            change[names[module]] = float((y - x).norm() / x.norm().clamp_min(1e-12))
    total = sum(p.numel() for p in model.parameters())

    def parts(within: Sequence[str]) -> list[str]:
        """The outermost modules; one with more than half of the parameters is replaced by the blocks inside it."""
        outermost = []
        for name in within:
            if any(name.startswith(f"{other}.") for other in within):
                continue
            inner = [other for other in change if other.startswith(f"{name}.")]
            large = sum(p.numel() for p in model.get_submodule(name).parameters()) > total / 2
            outermost += parts(inner) if large and len(inner) > 1 else [name]
        return outermost

    def removable(name: str) -> bool:
        other = copy.deepcopy(model)
        other.set_submodule(name, Skip())
        try:
            with torch.no_grad():
                result = other(example[:2])
        except (RuntimeError, ValueError, IndexError, AttributeError, TypeError):
            # What networks raise when a part is missing (torch's encoder reads an attribute of its first layer).
            return False
        return isinstance(result, Tensor) and bool(result.isfinite().all())

    return tuple(sorted((name for name in parts(list(change)) if removable(name)), key=lambda name: change[name]))


def _with_groups(model: nn.Module, example: Tensor, output: Tensor, structure: Structure) -> Structure:
    """The structure with the dependency groups that can really be narrowed, and the blocks that can be left out."""
    order = {layer.name: position for position, layer in enumerate(structure.layers)}
    try:
        groups_there = channel_groups(model, example[:2])
    except TrialError as error:
        return replace(structure, refused=(*structure.refused, ("(channels)", str(error))))
    refused = list(structure.refused)
    candidates: list[Group] = []
    made: dict[str, str] = {}
    read: dict[str, list[tuple[str, int]]] = {}
    for members in groups_there:
        makers = [name for name in members.makers if name in order]
        if len(makers) < len(members.makers) or not makers:
            continue  # a member that is refused itself
        if structure.layers[-1].name in makers:
            refused.append((f"channels of {structure.layers[-1].name}", "they are the network's outputs"))
            continue
        name = min(makers, key=order.__getitem__)
        channels = structure.layer(name).weight_shape[0]
        round_to = members.unit if members.attention else 8 if channels >= 32 else 4 if channels >= 16 else 1
        stranger = next((reader for reader, _ in members.readers if reader not in order), None)
        problem = members.problem or (stranger and f"{stranger} reads them and cannot be compressed")
        if problem:
            refused.append((f"channels of {name}", problem))
            continue
        if members.unit == channels > 1:
            refused.append((f"channels of {name}", "they are the only head of their attention"))
            continue
        candidates.append(Group(name, channels, round_to, members.unit))
        made.update(dict.fromkeys(makers, name))
        for reader, count in members.readers:
            read.setdefault(reader, []).append((name, count))

    def assembled(chosen: Sequence[Group], blocks: tuple[str, ...]) -> Structure:
        names = {group.name for group in chosen}
        layers = tuple(
            replace(
                layer,
                output=made.get(layer.name) if made.get(layer.name) in names else None,
                inputs=tuple((group, n) for group, n in read.get(layer.name, ()) if group in names),
            )
            for layer in structure.layers
        )
        ordered = sorted(chosen, key=lambda group: order[group.name])
        return replace(structure, layers=layers, groups=tuple(ordered), blocks=blocks, refused=tuple(refused))

    def works(chosen: Sequence[Group], blocks: tuple[str, ...]) -> bool:
        return _survives(model, example[:2], output[:2], assembled(chosen, blocks))

    groups = _sound(candidates, lambda chosen: works(chosen, ()))
    kept = {group.name for group in groups}
    refused += [
        (f"channels of {group.name}", "the network changes its output's shape or no longer runs without them")
        for group in candidates
        if group.name not in kept
    ]
    if groups and not works(groups, ()):
        refused.append(("(channels)", "the groups can be narrowed in parts but not together"))
        groups = []
    blocks = _sound(structure.blocks, lambda chosen: works(groups, tuple(chosen)))
    unfit = "cannot be left out: the channels around it would not fit together"
    refused += [(name, unfit) for name in structure.blocks if name not in blocks]
    return assembled(groups, tuple(blocks))


def _survives(model: nn.Module, example: Tensor, output: Tensor, structure: Structure) -> bool:
    """Whether a copy without any block, its groups at their narrowest, still runs and has the predicted shapes."""
    blocks = (Student(structure.blocks),) if structure.blocks else ()
    made = {layer.output for layer in structure.layers if not inside(layer.name, structure.blocks)}
    narrow = [Prune(g.name, kept_channels(g.channels, 0.0, g.round_to)) for g in structure.groups if g.name in made]
    recipe = Recipe((*blocks, *narrow))
    try:
        other = compress(copy.deepcopy(model), recipe, structure, example)
        with torch.no_grad():
            if other(example).shape != output.shape:
                return False
    except (ExportFailed, RuntimeError, ValueError, IndexError, AssertionError):
        # What networks raise after compression passes that break them.
        return False
    return all(
        tuple(weight_of(other.get_submodule(name)).shape[:2]) == shape
        for name, shape in shapes(structure, recipe).items()
    )


def _sound(parts: Sequence[_Part], works: Callable[[Sequence[_Part]], bool]) -> list[_Part]:
    """The parts that work, by bisection, because parts that do not work are rare and each check is expensive."""
    if not parts or works(parts):
        return list(parts)
    if len(parts) == 1:
        return []
    half = len(parts) // 2
    return _sound(parts[:half], works) + _sound(parts[half:], works)

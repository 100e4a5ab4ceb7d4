"""Channels that can only go together, found and really removed by Torch-Pruning (Fang et al., CVPR 2023).

The queries, keys and values of an attention are one group, and in it the channels of a head can only go together.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency import index_mapping

from ...errors import ExportFailed, RecipeError
from ...spaces.structure import Structure
from ...spaces.techniques.prune import Prune
from .attention import Attention
from .layers import TYPES, is_layer, kind_of

_MOST = 1 << 18  # indices of a group; VGG's 512 channels are 25,088 inputs of its first linear layer
_MEMBERS: tuple[type[nn.Module], ...] = (*TYPES, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.PReLU)


@dataclass(frozen=True)
class GroupMembers:
    """A dependency group of a live network: who makes its channels, who reads how many of them, whose heads they are.

    Without `group` it has a problem.
    """

    group: Any
    makers: tuple[str, ...]
    readers: tuple[tuple[str, int], ...]
    problem: str = ""
    attention: Attention | None = None

    @property
    def unit(self) -> int:
        """How many neighbouring channels go at once."""
        return self.attention.head_dim if self.attention else 1


def channel_groups(model: nn.Module, example: Tensor) -> list[GroupMembers]:
    """All dependency groups of a network, the last first.

    Raises:
        ExportFailed: The graph cannot be read.
    """
    gradients = {p: p.requires_grad for p in model.parameters()}
    for parameter in gradients:
        parameter.requires_grad_(True)  # the graph is read off autograd
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # parameters outside layers: `_members` refuses what depends on them
            graph = tp.DependencyGraph().build_dependency(model, example_inputs=example)
            index_mapping.update_index_mapping(graph)
            lost = [m for m in graph.module2node if is_layer(m) and _outgrows(graph, m)]
            groups = list(graph.get_all_groups(lost, root_module_types=list(TYPES)))
    except Exception as error:  # Torch-Pruning reports what it cannot trace by whatever fails inside
        raise ExportFailed(
            f"the dependencies of its channels cannot be traced: {type(error).__name__}: {error}"
        ) from error
    finally:
        for parameter, flag in gradients.items():
            parameter.requires_grad_(flag)
    names = {module: name for name, module in model.named_modules()}
    problem = "they cannot be followed through the reshapes behind it"
    unread = [GroupMembers(None, (names[module],), (), problem) for module in lost if module in names]
    attentions = [module for module in names if isinstance(module, Attention)]
    return [*(_with_heads(_members(group, names), names, attentions) for group in groups), *unread]


def _outgrows(graph: tp.DependencyGraph, module: nn.Module) -> bool:
    """Whether a layer's channels multiply without end on their way through reshapes that Torch-Pruning misreads.

    It would list them all, without an end where they come round again (the shifted windows of Swin). Here they are
    only counted.
    """
    pruner = graph.get_pruner_of_module(module)
    waiting = [(graph.module2node[module], pruner.prune_out_channels, pruner.get_out_channels(module))]
    seen = set(waiting)
    while waiting:
        node, change, count = waiting.pop()
        for dependency in node.dependencies:
            if not dependency.is_triggered_by(change):
                continue
            reached = count
            for mapping in dependency.index_mapping:
                if isinstance(mapping, index_mapping._FlattenIndexMapping):
                    reached = -(-reached // mapping._stride) if mapping.reverse else reached * mapping._stride
            if reached > _MOST:
                return True
            if (here := (dependency.target, dependency.handler, reached)) not in seen:
                seen.add(here)
                waiting.append(here)
    return False


def _with_heads(members: GroupMembers, names: Mapping[nn.Module, str], attentions: list[Attention]) -> GroupMembers:
    """The same group; where it makes queries, keys or values it must be those of one attention, all three."""
    for attention in attentions:
        whole = {f"{names[attention]}.{part}".lstrip(".") for part in ("q_proj", "k_proj", "v_proj")}
        if whole.isdisjoint(members.makers):
            continue
        if others := sorted(whole ^ set(members.makers)):
            problem = f"the heads of {names[attention]} and the channels of {', '.join(others)} do not go together"
            return replace(members, problem=members.problem or problem)
        return replace(members, attention=attention)
    return members


def _members(group: Any, names: Mapping[nn.Module, str]) -> GroupMembers:
    makers, readers, problem = [], [], ""
    for dependency, indices in group:
        module, action = dependency.target.module, dependency.handler.__name__
        if isinstance(module, nn.Parameter):
            problem = "a parameter outside any layer depends on them"
        elif module not in names:
            continue  # an operation without weights
        elif not isinstance(module, _MEMBERS):
            problem = f"{names[module]} ({type(module).__name__}) depends on them"
        elif is_layer(module):
            kind = kind_of(module).name(module)
            if kind == "grouped":
                problem = f"{names[module]} is a grouped convolution"
            elif action == "prune_out_channels" or kind == "depthwise":
                makers.append(names[module])
            else:
                readers.append((names[module], len(set(indices))))
    return GroupMembers(group, tuple(dict.fromkeys(makers)), tuple(readers), problem)


def importance(group: Any) -> Tensor:
    """The importance of each channel of a group: the L2 norm of its weights, in and out, averaged over the layers."""
    scores = tp.importance.GroupMagnitudeImportance(p=2)(group)
    assert isinstance(scores, Tensor)
    return scores


def remove_channels(model: nn.Module, steps: Sequence[Prune], structure: Structure, example: Tensor) -> None:
    """Carry out the steps of a recipe, see `prune_channels`."""
    group_of = {layer.name: layer.output for layer in structure.layers if layer.output}
    prune_channels(model, {step.group: step.keep for step in steps}, group_of, example)


def prune_channels(model: nn.Module, keep: Mapping[str, int], group_of: Mapping[str, str], example: Tensor) -> None:
    """Remove all but the `keep` most important channels of each named group, in place; of an attention whole heads.

    Importance is taken from the weights before any channel is removed; of equally important channels the later ones
    stay.

    Args:
        model: The network.
        keep: By group the number of channels that stay.
        group_of: By layer the group that makes its output, so that a group has one name whatever blocks were left out.
        example: A few inputs.

    Raises:
        RecipeError: A group is not there.
    """
    if not keep:
        return
    plans: dict[str, tuple[GroupMembers, list[int]]] = {}
    for members in channel_groups(model, example):
        name = next((group_of[maker] for maker in members.makers if maker in group_of), None)
        if name is not None and name in keep and not members.problem:
            units = torch.arange(len(scores := importance(members.group))).view(-1, members.unit)
            drop = (len(scores) - keep[name]) // members.unit
            gone = torch.argsort(scores.view(-1, members.unit).sum(1), stable=True)[:drop].sort().values
            plans[name] = (members, units[gone].flatten().tolist())
    if missing := sorted(set(keep) - set(plans)):
        raise RecipeError(f"the recipe does not fit this network: nothing makes the channels of {', '.join(missing)}")
    for members, indices in plans.values():
        if indices:
            # The indices of a group that another one has shifted (a concatenation) are kept up to date by the library.
            members.group.prune(indices)
            if members.attention:
                members.attention.num_heads -= len(indices) // members.unit

"""What is searched and compared when nothing is said: the default space and the recipes that everybody would try
first.
"""

from __future__ import annotations

from .recipe import Recipe
from .rules import Rule
from .space import Space
from .steps import Step
from .structure import Structure, kept_channels
from .techniques.prune import Prune
from .techniques.quantize import Quantize
from .techniques.recover import Recover
from .techniques.sparsify import Sparsify


def default_space(structure: Structure, train_images: int = 0) -> Space:
    """What is searched when nothing is said: every technique but codebooks and low rank, with few choices each.

    The first and the last layer keep at least 6 bits. Activations share one width, because int8 pays in contiguous
    regions only. Recovery sees about 20,000 images (ten epochs at most), so that a trial stays a matter of seconds or
    minutes.
    """
    ends = Rule((6, 8), ("first", "last"))
    recovery: list[Recover | None] = [_untrained(structure)]
    if train_images:
        recovery.append(Recover("finetune", epochs=max(0.001, round(min(10.0, 20_000 / train_images), 3))))
    return Space(
        weight_bits=(Rule((3, 4, 6, 8)), ends),
        activation_bits=(Rule((8, 32), share=True),),
        sparsity=(Rule((0.0, 0.5)),),
        channels=(Rule((0.0, 0.25, 0.5)),),
        width=(1.0, 0.75, 0.5),
        depth=(0, 1) if structure.blocks else (0,),
        recovery=tuple(recovery),
    )


def _untrained(structure: Structure) -> Recover:
    """The recovery that costs next to nothing; where BatchNorm does it all, biases need no look."""
    return Recover("batchnorm" if structure.folds else "statistics")


def reference_recipes(space: Space, structure: Structure) -> list[tuple[str, Recipe]]:
    """The trivial baselines that everybody would try first, so that the front shows what the search adds."""
    widths = {width for rule in space.activation_bits for width in rule.choices} | {32}
    usual = 8 if 8 in widths else max(widths - {32}, default=32)
    untrained = _untrained(structure)
    # A narrowed network is worth nothing before training, and nobody would compare with it.
    trained = max((r for r in space.recovery if r and r.epochs), key=lambda r: r.epochs, default=untrained)

    def recipe(*steps: Step, recovery: Recover | None = untrained) -> Recipe:
        growing = any(isinstance(step, Sparsify) for step in steps)
        return Recipe((*steps, *space.recoveries(recovery, growing)) if steps else steps)

    def uniform(network: Structure, bits: int) -> list[Step]:
        return [Quantize(layer.name, bits, usual if bits <= 8 else 32) for layer in network.layers]

    def narrow(share: float) -> list[Step]:
        kept = ((g.name, kept_channels(g.channels, share, g.round_to), g.channels) for g in structure.groups)
        return [Prune(name, keep) for name, keep, channels in kept if keep < channels]

    listed = [("untouched", Recipe()), ("fp16", recipe(*uniform(structure, 16), recovery=None))]
    for bits in (8, 6, 4):
        listed.append((f"uniform {bits}-bit", recipe(*uniform(structure, bits))))
    listed.append(("uniform 50% sparse", recipe(*(Sparsify(layer.name, 0.5) for layer in structure.layers))))
    listed.append(("uniform 25% pruning", recipe(*narrow(0.75), recovery=trained)))
    listed.append(("width 0.5", recipe(*narrow(0.5), recovery=trained)))
    for student in filter(None, space.students):
        first = untrained if student.epochs else trained  # one that the task gives untrained is worth nothing before
        network = structure.named(student.factory)
        listed.append((f"student {student.factory}", recipe(student, recovery=first)))
        listed.append((f"student {student.factory}, 8-bit", recipe(student, *uniform(network, 8), recovery=first)))
    unique: dict[Recipe, str] = {}
    for name, made in listed:
        unique.setdefault(made, name)
    return [(name, made) for made, name in unique.items()]

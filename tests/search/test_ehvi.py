"""The sampler of our own: it finds known fronts, keeps limits, and depends on nothing but what it was told."""

import itertools

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from paretorch.objectives.pareto import hypervolume
from paretorch.search.ehvi import UNKNOWN, EHVISampler, choices

LAYERS, LEVELS = 5, 4
SPACE = {f"layer{i}": IntDistribution(0, LEVELS - 1) for i in range(LAYERS)}
WEIGHTS = np.array([1.0, 2.0, 4.0, 4.0, 8.0])
OWN = np.array([0.9, 0.2, 0.5, 0.1, 0.3])


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def truth(picks):
    """An error that does not add up (the second and the third layer break together) and a cost that does."""
    picks = np.asarray(picks)
    share = 1 - picks / (LEVELS - 1)
    damage = (OWN * share**2).sum(-1) + 1.5 * share[..., 1] * share[..., 2]
    return 0.05 + 0.85 / (1 + np.exp(5 - 6 * damage)), ((picks + 1) * WEIGHTS).sum(-1) / (LEVELS * WEIGHTS.sum())


def known(picks):
    columns = np.stack([picks[name] for name in SPACE], axis=1)
    return {1: truth(columns)[1]}, {}


def search(sampler, trials, limits=None):
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    points = []
    while len(points) < trials:
        trial = study.ask(SPACE)
        picks = list(trial.params.values())
        error, cost = truth(picks)
        for name, value in (limits(picks) if limits else {}).items():
            trial.set_constraint(name, value)
        study.tell(trial, [error, cost])
        points.append((error, cost))
    return study, points


def test_it_finds_a_front_that_is_known_exactly():
    everything = np.array(list(itertools.product(range(LEVELS), repeat=LAYERS)))
    reference = (0.9, 1.0)
    total = hypervolume(np.stack(truth(everything), axis=1), reference)
    for seed in range(3):
        study, points = search(EHVISampler(seed, known=known, reference=reference), 40)
        assert hypervolume(points, reference) / total > 0.99
        assert len({tuple(trial.params.values()) for trial in study.trials}) == 40, "no recipe is evaluated twice"
        _, points = search(optuna.samplers.RandomSampler(seed), 40)
        assert hypervolume(points, reference) / total < 0.98, "a front that chance finds would prove nothing"


def test_it_needs_no_arithmetic():
    everything = np.array(list(itertools.product(range(LEVELS), repeat=LAYERS)))
    total = hypervolume(np.stack(truth(everything), axis=1), (0.9, 1.0))
    _, points = search(EHVISampler(0, reference=(0.9, 1.0)), 50)
    assert hypervolume(points, (0.9, 1.0)) / total > 0.98


def rebuilt(trials, sampler):
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    for trial in trials:
        study.add_trial(trial)
    return study


def told(amount, seed=0, **more):
    random = np.random.default_rng(seed)
    trials = []
    for row in random.integers(0, LEVELS, (amount, LAYERS)).tolist():
        params = dict(zip(SPACE, row, strict=True))
        trials.append(create_trial(params=params, distributions=SPACE, values=[float(v) for v in truth(row)], **more))
    return trials


@pytest.mark.parametrize("amount", [3, 8, 30])
def test_a_suggestion_depends_on_the_trials_alone(amount):
    trials = told(amount)
    used = EHVISampler(4, known=known)
    study = rebuilt(trials[: amount // 2], used)
    study.tell(study.ask(SPACE), state=TrialState.FAIL)  # something that it could remember
    first = rebuilt(trials, used).ask(SPACE).params
    assert first == rebuilt(trials, EHVISampler(4, known=known)).ask(SPACE).params


def test_a_limit_that_arithmetic_knows_is_kept():
    def limited(picks):
        objectives, _ = known(picks)
        return objectives, {"cost": (objectives[1] - 0.5) / 0.5}

    sampler = EHVISampler(0, known=limited, reference=(0.9, 1.0))
    _, points = search(sampler, 30, lambda picks: {"cost": (truth(picks)[1] - 0.5) / 0.5})
    assert all(cost <= 0.5 for _, cost in points[4:]), (
        "after the first four, which lie between the cheapest and the most costly"
    )


def test_a_limit_that_has_to_be_learned_is_learned():
    """Only recipes with an error below 0.1 count: the search must find many of them, and chance finds few."""
    everything = np.array(list(itertools.product(range(LEVELS), repeat=LAYERS)))
    common = (truth(everything)[0] <= 0.1).mean()
    kept = []
    for seed in range(3):
        sampler = EHVISampler(seed, known=known, reference=(0.9, 1.0))
        _, points = search(sampler, 40, lambda picks: {"error": truth(picks)[0] - 0.1})
        kept += [error <= 0.1 for error, _ in points[10:]]
    assert np.mean(kept) > 0.5 > 2 * common


def test_what_is_infeasible_is_not_on_the_front():
    """The best recipe is forbidden: one that is worse than it must still look like an improvement."""
    trials = told(20)
    best = create_trial(params=dict.fromkeys(SPACE, 0), distributions=SPACE, values=[0.0, 0.0], constraints={"x": 1.0})
    fair = [
        create_trial(params=t.params, distributions=SPACE, values=t.values, constraints={"x": -1.0}) for t in trials
    ]
    study = rebuilt([*fair, best], EHVISampler(0, known=known, reference=(0.9, 1.0)))
    trial = study.ask(SPACE)
    assert trial.params != best.params
    assert hypervolume([t.values for t in fair] + [list(truth(list(trial.params.values())))], (0.9, 1.0)) > hypervolume(
        [t.values for t in fair], (0.9, 1.0)
    )


def test_what_was_never_measured_teaches_nothing():
    """A refused recipe is told with a made-up error and marked: whatever was made up, the suggestion is the same."""
    asked = []
    for made_up in (0.0, 0.9):
        refused = create_trial(
            params=dict.fromkeys(SPACE, 3),
            distributions=SPACE,
            values=[made_up, 1.0],
            constraints={"cost": 0.3, "speed": 0.0},
            user_attrs={UNKNOWN: [0, "speed"]},
        )
        others = told(15, constraints={"cost": -0.1, "speed": -0.1})
        asked.append(rebuilt([*others, refused], EHVISampler(0, known=known)).ask(SPACE).params)
    assert asked[0] == asked[1]


def test_parallel_suggestions_differ():
    study = rebuilt(told(20), EHVISampler(0, known=known, reference=(0.9, 1.0)))
    rows = [tuple(study.ask(SPACE).params.values()) for _ in range(6)]
    assert len(set(rows)) == 6


def test_failures_are_avoided():
    """Every recipe whose first layer has its lowest level fails; after six of them few more are suggested."""
    study = rebuilt([t for t in told(30) if t.params["layer0"]], EHVISampler(0, known=known, reference=(0.9, 1.0)))
    asked = 0
    for _ in range(30):
        trial = study.ask(SPACE)
        picks = list(trial.params.values())
        if picks[0] == 0:
            asked += 1
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, [float(v) for v in truth(picks)])
    assert asked <= 8


def test_any_space_of_steps_and_three_objectives():
    space = {
        "bits": IntDistribution(2, 8, step=2),
        "kind": CategoricalDistribution(["none", "some", "much"]),
        "share": FloatDistribution(0.0, 1.0, step=0.25),
        "rate": FloatDistribution(1e-4, 1e-1, log=True),
    }
    study = optuna.create_study(directions=["maximize", "minimize", "minimize"], sampler=EHVISampler(0))
    for _ in range(14):
        trial = study.ask(space)
        p = trial.params
        kind = ["none", "some", "much"].index(p["kind"])
        study.tell(trial, [p["bits"] + kind - p["share"], p["bits"] * (1 - p["share"]), float(kind)])
    assert all(
        p["bits"] in (2, 4, 6, 8) and p["share"] in (0, 0.25, 0.5, 0.75, 1) for p in (t.params for t in study.trials)
    )
    assert len({t.params["rate"] for t in study.trials}) == 14, "what has no steps is drawn"


def test_choices_of_an_axis():
    assert choices(IntDistribution(1, 7, step=3)) == (1, 4, 7)
    assert choices(FloatDistribution(0.0, 0.5, step=0.25)) == (0.0, 0.25, 0.5)
    assert choices(CategoricalDistribution(["b", "a"])) == ("b", "a")
    assert choices(IntDistribution(0, 1000)) is None
    assert choices(FloatDistribution(0.0, 1.0)) is None


@pytest.mark.parametrize("ladder", [None, "effort"])
@pytest.mark.parametrize("good", [True, False])
def test_the_first_recipes_are_the_front_of_axes_that_are_all_alike(good, ladder):
    """Of axes of a hundred times the bytes fewer are left; those that cost the less the further come down.

    Where the third recipe is one that counts the fourth is cheaper, and more costly where it is not.
    """
    weights, up = np.array([1.0, 100.0, 1.0, 100.0]), np.array([True, True, False, False])

    def cost(columns):
        return (np.where(up, columns, 5 - columns) * weights).sum(-1)

    def told_by_name(picks):
        return {1: cost(np.stack([picks[f"layer{i}"] for i in range(4)], axis=1))}, {}

    layers = [f"layer{i}" for i in range(4)]
    space = dict.fromkeys(layers, IntDistribution(0, 5)) | ({ladder: IntDistribution(0, 3)} if ladder else {})
    sampler = EHVISampler(0, known=told_by_name, reference=(0.9, 2000.0), ladder=ladder)
    study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
    most = np.where(up, 5, 0)
    params = dict(zip(layers, most.tolist(), strict=True)) | ({ladder: 0} if ladder else {})
    study.add_trial(create_trial(params=params, distributions=space, values=[0.1, float(cost(most))]))
    rows = []
    for error in (1.0, 0.2 if good else 0.95, 0.3):
        trial = study.ask(space)
        row = np.array([trial.params[name] for name in layers])
        study.tell(trial, [error, float(cost(row))])
        rows.append(np.where(up, row, 5 - row))
    assert (rows[0] == 0).all()
    for row in rows[1:]:
        assert row[[0, 2]].min() >= row[[1, 3]].max()
        assert row[[0, 2]].sum() > row[[1, 3]].sum()
    first, second = (row @ weights / (5 * weights.sum()) for row in rows[1:])
    assert 0.3 < first < 0.5
    assert 0.1 < second < 0.2 if good else 0.6 < second < 0.8


def two_networks(picks):
    """`truth` for the first network; the second has three layers, costs a fifth and loses more."""
    picks = np.asarray(picks)
    error, cost = truth(picks[..., 1:6])
    share = 1 - picks[..., 6:] / (LEVELS - 1)
    small = 0.3 + 0.6 / (1 + np.exp(4 - 5 * (share**2).mean(-1)))
    other = 0.02 + 0.04 * (picks[..., 6:] + 1).mean(-1)
    second = picks[..., 0] == 1
    return np.where(second, small, error), np.where(second, other, cost)


def test_a_choice_of_networks_with_axes_of_their_own():
    """Axes of the other network never make two recipes of one, and the front of both networks is found."""
    space = {"network": IntDistribution(0, 1)} | SPACE | {f"other{i}": IntDistribution(0, LEVELS - 1) for i in range(3)}
    conditions = {name: ("network", int(name.startswith("other"))) for name in space if name != "network"}
    everything = [(0, *row, 0, 0, 0) for row in itertools.product(range(LEVELS), repeat=LAYERS)]
    everything += [(1, 0, 0, 0, 0, 0, *row) for row in itertools.product(range(LEVELS), repeat=3)]
    reference = (0.9, 1.0)
    total = hypervolume(np.stack(two_networks(np.array(everything)), axis=1), reference)
    means = []
    for conditional in (True, False):
        reached = []
        for seed in range(3):
            sampler = EHVISampler(
                seed,
                known=lambda p: ({1: two_networks(np.stack([p[name] for name in space], axis=1))[1]}, {}),
                reference=reference,
                conditions=conditions if conditional else None,
            )
            study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
            points, seen = [], set()
            for _ in range(40):
                trial = study.ask(space)
                picks = tuple(trial.params[name] for name in space)
                seen.add(
                    tuple(
                        p if conditions.get(n, ("", picks[0]))[1] == picks[0] else 0
                        for n, p in zip(space, picks, strict=True)
                    )
                )
                points.append(tuple(map(float, two_networks(picks))))
                study.tell(trial, points[-1])
            if conditional:
                assert len(seen) == 40, "two suggestions meant the same network"
            reached.append(hypervolume(points, reference) / total)
        means.append(np.mean(reached))
    assert means[0] > 0.99
    assert means[0] > means[1], "knowing which axes count should help"

"""What a configuration may say, and how it becomes a space."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretorch import ConfigError, Recover, Rule, Space, Student
from paretorch.configs.fields import parse_duration
from paretorch.configs.load import config_dict, json_schema, parse
from paretorch.configs.schema import Config, Data

TASK = {"task": "task.py:task"}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), (" 1H 30M ", 5400), ("1d", 86400), ("0.5m", 30)],
)
def test_a_duration_is_seconds(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "30", "1m1h", "-5m", "5 minutes", "1h30", "0s", "9" * 400 + "d"])
def test_any_other_duration_is_refused(text):
    with pytest.raises(ConfigError, match="duration"):
        parse_duration(text)


def test_a_duration_without_unit_says_so():
    with pytest.raises(ConfigError, match=r"'30'; the unit is missing; write .* 1h30m"):
        parse_duration("30")


@given(st.integers(0, 9), st.integers(0, 99), st.integers(0, 99), st.integers(1, 99))
def test_a_duration_adds_up_its_parts(days, hours, minutes, seconds):
    parts = {"d": days, "h": hours, "m": minutes, "s": seconds}
    text = "".join(f"{n}{unit}" for unit, n in parts.items() if n)
    assert parse_duration(text) == ((days * 24 + hours) * 60 + minutes) * 60 + seconds


@given(st.floats(0.001, 1e9))
def test_a_duration_survives_the_snapshot(seconds):
    config = parse({**TASK, "search": {"time": f"{seconds:.3f}s"}})
    assert parse(config_dict(config)).search.time == config.search.time


def test_the_defaults():
    config = parse(TASK)
    assert (config.name, config.objectives, config.budget, config.to_space()) == ("study", None, (), None)
    assert config.search.model_dump() == {
        "sampler": "ehvi",
        "trials": None,
        "time": None,
        "rungs": None,
        "ensembles": False,
        "seed": 0,
    }
    assert config.measure.model_dump() == {
        "threads": 1,
        "batch": 1,
        "seconds": 0.5,
        "calibration_images": 512,
        "target": "onnxruntime",
    }
    assert config.mlflow.uri is None
    assert config.directory == Path.cwd() / "studies" / "study"


def test_a_space_becomes_rules():
    config = parse(
        TASK
        | {
            "space": {
                "weight_bits": [{"choices": [4, 8]}, {"layers": "first", "choices": [8], "share": True}],
                "activation_bits": [8, 32],
                "cluster_bits": [{"layers": "linear", "choices": [4, 32]}],
                "rank": [1, 0.5],
                "sparsity": [0, 0.5],
                "channels": [{"layers": ["layer1.*", "last"], "choices": [0.25]}],
                "width": [1, 0.5],
                "depth": [0, 2],
                "equalize": ["none", "activations"],
                "students": ["teacher", "small", {"name": "tiny", "epochs": 4}],
                "recovery": [
                    None,
                    "batchnorm",
                    "statistics",
                    "finetune",
                    {"finetune": {"epochs": 2, "distill": 0.5, "train": "last"}},
                ],
            }
        }
    )
    assert config.to_space() == Space(
        weight_bits=(Rule((4, 8)), Rule((8,), ("first",), share=True)),
        activation_bits=(Rule((8, 32)),),
        cluster_bits=(Rule((4, 32), ("linear",)),),
        rank=(Rule((1.0, 0.5)),),
        sparsity=(Rule((0.0, 0.5)),),
        channels=(Rule((0.25,), ("layer1.*", "last")),),
        width=(1.0, 0.5),
        depth=(0, 2),
        equalize=("none", "activations"),
        students=(None, Student(factory="small"), Student(factory="tiny", epochs=4)),
        recovery=(
            None,
            Recover("batchnorm"),
            Recover("statistics"),
            Recover("finetune", 1.0, 0.01, 0.9, 2.0),
            Recover("finetune", 2.0, 0.01, 0.5, 2.0, train="last"),
        ),
    )


def test_methods_are_one_choice_for_all_layers_unless_a_rule_says_otherwise():
    space = parse(
        {
            **TASK,
            "space": {
                "sparsity": [0.0, "2:4", 0.7],
                "rounding": ["nearest", "gptq"],
                "criterion": [
                    {"choices": ["obs"]},
                    {"layers": "fc", "choices": ["magnitude", "taylor"], "share": False},
                ],
                "ranges": ["entropy"],
            },
        }
    ).to_space()
    assert space == Space(
        sparsity=(Rule((0.0, "2:4", 0.7)),),
        rounding=(Rule(("nearest", "gptq"), share=True),),
        criterion=(Rule(("obs",), share=True), Rule(("magnitude", "taylor"), ("fc",))),
        ranges=(Rule(("entropy",), share=True),),
    )


def test_a_technique_that_a_space_does_not_name_is_left_out():
    assert parse({**TASK, "space": {"weight_bits": [8]}}).to_space() == Space(weight_bits=(Rule((8,)),))
    assert parse({**TASK, "space": {}}).to_space() == Space()


def test_a_section_with_all_keys_commented_out_is_the_default():
    empty = dict.fromkeys(["objectives", "budget", "space", "search", "measure", "mlflow", "output"])
    assert parse(TASK | empty) == parse(TASK)
    recovery = {**TASK, "space": {"recovery": [{"finetune": None}]}}
    assert parse(recovery).to_space().recovery == (Recover("finetune", 1.0, 0.01, 0.9, 2.0),)


def test_numbers_written_as_yaml_texts_are_numbers():
    space = parse({**TASK, "space": {"recovery": [{"finetune": {"learning_rate": "1e-3"}}]}}).to_space()
    assert space.recovery[0].learning_rate == 0.001


def test_mean_and_std_follow_the_channels():
    assert Data(folder="x").mean == (0.485, 0.456, 0.406)
    assert (Data(folder="x", channels=1).mean, Data(folder="x", channels=1).std) == ((0.5,), (0.5,))


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        parse(TASK).search.trials = 3


def test_the_snapshot_is_plain_and_complete():
    import json

    config = parse(
        TASK
        | {
            "budget": "size_bytes <= 25%",
            "space": {"weight_bits": [4], "recovery": ["finetune"]},
            "search": {"time": "2h"},
        }
    )
    snapshot = json.loads(json.dumps(config_dict(config)))
    assert parse(snapshot) == config
    assert snapshot["search"] == {
        "sampler": "ehvi",
        "trials": None,
        "time": "7200.0s",
        "rungs": None,
        "ensembles": False,
        "seed": 0,
    }
    assert "source" not in snapshot


def test_the_schema_describes_every_key():
    schema = json_schema()
    for name, model in [("Config", schema), *schema["$defs"].items()]:
        for key, value in model["properties"].items():
            assert value.get("description") or "$ref" in value, f"{name}.{key} has no description"
        assert model["additionalProperties"] is False
    assert schema["required"] == ["task"]
    assert "default" not in schema["properties"]["name"]
    assert set(schema["properties"]) == set(Config.model_fields)

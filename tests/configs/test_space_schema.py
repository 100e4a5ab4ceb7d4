"""The section `space` is made of what the techniques say of their keys."""

import pytest
from pydantic import ValidationError

from paretorch.configs.load import json_schema
from paretorch.configs.space_schema import SpaceConfig, to_space
from paretorch.spaces.space import Space
from paretorch.spaces.techniques.table import KEYS
from paretorch.spaces.values import OneOf


def test_every_key_of_the_table_is_described_in_its_words():
    section = json_schema()["$defs"]["SpaceConfig"]
    assert list(section["properties"])[-1] == "recovery"
    for key in KEYS:
        assert section["properties"][key.name]["description"] == key.about
        if key.rule:
            rule = json_schema()["$defs"][key.rule.name]
            assert rule["description"] == key.rule.about
            assert rule["properties"]["choices"]["description"] == key.rule.choices
            assert rule["properties"]["share"]["default"] is key.share


@pytest.mark.parametrize("key", [key for key in KEYS if isinstance(key.value, OneOf)], ids=lambda key: key.name)
def test_a_choice_is_accepted_just_when_the_space_would_take_it(key):
    SpaceConfig(**{key.name: key.value.values})
    with pytest.raises(ValidationError):
        SpaceConfig(**{key.name: (33,)})


def test_an_empty_section_is_an_empty_space():
    assert to_space(SpaceConfig()) == Space()

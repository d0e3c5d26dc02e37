from dataclasses import fields

import pytest
from tyro._docstrings import get_field_docstring

from coalign.errors import UserError
from coalign.methods import METHODS, config_class
from coalign.recipes import recipe, recipes


def test_every_recipe_is_of_a_method_and_explains_itself():
    for name, make in recipes().items():
        for pairs in (1, 300, 10_000, 50_000, 500_000, 12_000_000):
            config = make(pairs)
            assert isinstance(config.method_config, config_class(config.method)), name
        assert make.__doc__
    assert {make(1).method for make in recipes().values()} == set(METHODS)


def test_small_data_defaults_follow_the_size():
    batches = [recipe("clip")(pairs).batch_size for pairs in (2, 20, 100, 1000, 5000, 50_000, 500_000)]
    assert batches == [2, 2, 8, 64, 256, 256, 1024]
    assert [recipe("clip")(pairs).model for pairs in (100, 50_000, 500_000, 3_000_000)] == [
        "tiny",
        "small",
        "ViT-S-32",
        "ViT-B-32",
    ]


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_has_a_help_of_its_own(method):
    """A field's comment is its help: tyro reads it from above the field or from the end of its line, but not from within brackets, and
    a field without one would get its neighbour's."""
    config = config_class(method)
    helps = {field.name: get_field_docstring(config, field.name, ()) for field in fields(config)}
    assert all(helps.values()), helps
    assert len(set(helps.values())) == len(helps), helps


def test_misspelt_recipe():
    with pytest.raises(UserError, match="did you mean clip-cc3m"):
        recipe("clip-cc3")

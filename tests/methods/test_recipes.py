from dataclasses import fields

import pytest
from tyro._docstrings import get_field_docstring

from coalign.errors import UserError
from coalign.methods import METHODS, config_class, recipe, recipes


def test_recipes_belong_to_a_method_and_are_documented():
    for name, make in recipes().items():
        for pairs in (1, 300, 10_000, 50_000, 500_000, 12_000_000):
            config = make(pairs)
            assert isinstance(config.method_config, config_class(config.method)), name
        assert make.__doc__
    assert {make(1).method for make in recipes().values()} == set(METHODS)


def test_defaults_by_dataset_size():
    batches = [recipe("clip")(pairs).batch_size for pairs in (2, 20, 100, 1000, 5000, 50_000, 500_000)]
    assert batches == [2, 2, 8, 64, 256, 256, 1024]
    assert [recipe("clip")(pairs).model for pairs in (100, 50_000, 500_000, 3_000_000)] == [
        "tiny",
        "small",
        "ViT-S-32",
        "ViT-B-32",
    ]


@pytest.mark.parametrize("method", METHODS)
def test_every_option_has_its_own_help_text(method):
    """A field's comment is its help text. tyro reads it from the line above or from the end of the field's line, but not from inside
    brackets, and a field without a comment gets the previous field's."""
    config = config_class(method)
    helps = {field.name: get_field_docstring(config, field.name, ()) for field in fields(config)}
    assert all(helps.values()), helps
    assert len(set(helps.values())) == len(helps), helps


def test_misspelled_recipe_gets_a_suggestion():
    with pytest.raises(UserError, match="did you mean clip-cc3m"):
        recipe("clip-cc3")

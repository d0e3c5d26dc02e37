from __future__ import annotations

import json

import pytest

from coalign.data.text import prompts
from coalign.errors import UserError


def test_imagenet_has_the_eighty_clip_templates():
    templates = prompts.templates("imagenet")
    assert len(set(templates)) == 80
    assert all(template.count("{}") == 1 for template in templates)
    assert "itap of my {}." in templates


# numbers of templates published with CLIP for the papers' other ten datasets
PUBLISHED = {
    "caltech101": 34,
    "cifar10": 18,
    "cifar100": 18,
    "dtd": 8,
    "fgvc_aircraft": 2,
    "flowers102": 1,
    "food101": 1,
    "oxford_pets": 1,
    "stanford_cars": 8,
    "sun397": 2,
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_template_counts_match_the_published_ones(name, count):
    templates = prompts.templates(name)
    assert len(templates) == len(set(templates)) == count
    assert all(template.count("{}") == 1 and "*" not in template for template in templates)


def test_published_templates_are_verbatim():
    assert "a {} in a video game." in prompts.templates("caltech101")
    assert "graffiti of the {}." in prompts.templates("caltech101")
    assert "a origami {}." in prompts.templates("caltech101")
    assert "a black and white photo of the {}." in prompts.templates("cifar100")
    assert "a photo of my dirty {}." in prompts.templates("stanford_cars")
    assert prompts.templates("dtd")[0] == "a photo of a {} texture."


def test_templates_from_a_file(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("a drawing of {}.\n\n  {} in {} style  \n", encoding="utf-8")
    assert prompts.templates(str(path)) == ["a drawing of {}.", "{} in {} style"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a {}\nno place\n", "no place"), (b"\n \n", "no template"), (b"caf\xe9 {}", "UTF-8")],
)
def test_invalid_template_files_raise(tmp_path, content, message):
    path = tmp_path / "templates.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        prompts.templates(str(path))


def test_unknown_template_name_lists_the_known_ones():
    with pytest.raises(
        UserError, match=r"'imagnet' is neither a template.* nor a file, nor one of .*oxford_pets.*imagenet"
    ):
        prompts.templates("imagnet")


def test_read_classes(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("\ufeffcat\n\nn02084071 = dog\nbird, small \n", encoding="utf-8")
    expected = [("cat", "cat", ()), ("n02084071", "dog", ()), ("bird, small", "bird, small", ())]
    assert prompts.read_classes(path) == expected


def test_read_classes_with_prompts(tmp_path):
    path = tmp_path / "classes.json"
    content = {"cat": ["a tabby", " a photo of a {} "], "dog ": "a puppy", "bird": []}
    path.write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    classes = prompts.read_classes(path, ["a {}"])
    own = {"cat": ("a tabby", "a photo of a {}"), "dog": ("a puppy",), "bird": ()}
    assert classes == [(name, name, texts) for name, texts in own.items()]
    assert prompts.class_prompts([entry.name for entry in classes], ["a {}", "the {}"], own) == [
        ["a tabby", "a photo of a cat"],
        ["a puppy"],
        ["a bird", "the bird"],
    ]
    path.write_text(json.dumps(["cat", "dog"]))
    assert prompts.read_classes(path) == [("cat", "cat", ()), ("dog", "dog", ())]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"cat": ["a"], "cat": ["b"]}', "label in .*'cat' is repeated"),
        ('{"cat": ["a"], "dog": ["a"]}', "list of prompts in .*'a' is repeated"),
        ('{"cat": ["a"], "dog": [3]}', "The prompts of 'dog'"),
        ('{"cat": ["a", ""]}', "The prompts of 'cat'"),
        ('{"cat": {"prompts": ["a"]}}', "The prompts of 'cat'"),
        ('{"": ["a"]}', "the class ''"),
        ("[1, 2]", "the class 1"),
        ('"cat"', "must be an object"),
        ("{", "not valid JSON"),
        ("[]", "no label"),
    ],
)
def test_invalid_json_classes_raise(tmp_path, content, message):
    path = tmp_path / "classes.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        prompts.read_classes(path)


def test_templates_for_classes_that_all_have_prompts_are_refused(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text('{"cat": "a tabby", "dog": "a puppy"}')
    with pytest.raises(UserError, match="--prompts has no effect"):
        prompts.read_classes(path, ["a {}"])


def test_class_prompts_reject_repeated_names_and_invalid_templates():
    with pytest.raises(UserError, match="'cat' is repeated"):
        prompts.class_prompts(["cat", "dog", "cat"], ["{}"])
    assert prompts.class_prompts(["cat", "cat"], ["a {}"], allow_duplicates=True) == [["a cat"], ["a cat"]]
    with pytest.raises(UserError, match=r"has no \{\}"):
        prompts.class_prompts(["cat"], ["a photo"])
    with pytest.raises(UserError, match="no class name"):
        prompts.class_prompts([], ["{}"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cat\ndog\ncat\n", r"'cat' is repeated \(entries 1 and 3\)"),
        ("a = cat\nb = cat\n", "class name .*'cat' is repeated"),
        ("cat\n = dog\n", "Line 2"),
        ("cat =\n", "Line 1"),
        ("", "no label"),
    ],
)
def test_invalid_classes_files_raise(tmp_path, content, message):
    path = tmp_path / "classes.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        prompts.read_classes(path)


def test_missing_classes_file_raises(tmp_path):
    with pytest.raises(UserError, match=r"Cannot read the classes file .*gone\.txt"):
        prompts.read_classes(tmp_path / "gone.txt")

from __future__ import annotations

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
    assert prompts.read_classes(path) == [("cat", "cat"), ("n02084071", "dog"), ("bird, small", "bird, small")]


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

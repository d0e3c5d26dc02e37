"""Runs on class-labeled data: folders with --captions-from, class columns in disguise, file names, and tiny held-out sets."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from helpers import tiny
from PIL import Image

from coalign.cli import main as cli
from coalign.config import DataConfig
from coalign.data.sources.open import open_source
from coalign.experiments.compare.compare import compare
from coalign.runs.run import load
from coalign.workflows.evaluate.samples import reading_of


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model"))


def write_image(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(number)
    color = [(number * 67) % 256, (number * 131) % 256, (number * 29) % 256]
    Image.fromarray(np.clip(rng.normal(color, 15, (16, 16, 3)), 0, 255).astype(np.uint8)).save(path)


def class_folders(root, classes=8, images=15):
    for number in range(classes * images):
        write_image(root / f"class_{'abcdefghijklmnop'[number % classes]}" / f"IMG_{number:04d}.png", number)
    return root


def table(root, captions):
    rows = []
    for number, caption in enumerate(captions):
        write_image(root / f"{number}.png", number)
        rows.append((f"{number}.png", caption))
    with open(root / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    return root / "pairs.csv"


def trained(data, out, model, **options):
    options = {"epochs": 1, "evals": 1, "val_fraction": 0.05} | options
    captions_from = options.pop("captions_from", None)
    args = tiny.train_args(data, out, model, **options)
    assert cli.main([*args, *(["--captions-from", captions_from] if captions_from else [])]) == 0
    return json.loads((out / "results.json").read_text())


def metrics_of(results):
    """(task, metric) -> values; checks what holds for all results."""
    found = {}
    for task, result in results["tasks"].items():
        assert result["main_metric"] is None or result["main_metric"] in result["metrics"]
        for name, metric in result["metrics"].items():
            assert metric["chance"] is None or metric["chance"] != pytest.approx(1), (
                task,
                name,
            )  # the best rate and rank
            found[task, name] = metric
    return found


def test_class_folders_become_captions_and_classes(tmp_path, model, capsys):
    data = class_folders(tmp_path / "data")
    results = trained(data, tmp_path / "run", model, captions_from="folder")
    printed = capsys.readouterr().out
    assert "Zero-shot top-1 on" in printed
    assert "8 ('class a', 'class b', 'class c' …)" in printed
    assert metrics_of(results)["zeroshot", "acc1"]["chance"] == 1 / 8
    zero_shot = results["tasks"]["zeroshot"]
    assert set(zero_shot["per_class"]) == {f"class {letter}" for letter in "abcdefgh"}
    assert None not in zero_shot["per_class"].values()  # every class is held out
    confusion = np.array(zero_shot["confusion"])
    assert confusion.shape == (8, 8)
    recalls = confusion.diagonal() / confusion.sum(1)
    assert recalls.tolist() == pytest.approx(list(zero_shot["per_class"].values()))
    mistakes = {(each["true"], each["predicted"]): each["images"] for each in zero_shot["most_confused"]}
    names = list(zero_shot["per_class"])
    expected = {(names[i], names[j]): n for (i, j), n in np.ndenumerate(confusion) if i != j and n}
    assert mistakes.items() <= expected.items()
    assert (tmp_path / "run" / "confusion.png").exists()

    # `coalign eval` on the run's data reads it, and splits it, as the run does
    out = tmp_path / "eval.json"
    tasks = [f"{task}:{data}" for task in ("zeroshot", "retrieval")]
    page = tmp_path / "eval.html"
    assert cli.main(["eval", str(tmp_path / "run"), "--tasks", *tasks, "--json", str(out), "--report", str(page)]) == 0
    evaluated = json.loads(out.read_text())
    for task in ("zeroshot", "retrieval"):
        ours = {name: m["value"] for name, m in results["tasks"][task]["metrics"].items()}
        theirs = {name: m["value"] for name, m in evaluated[f"{task}:{data}"]["metrics"].items()}
        assert theirs == pytest.approx(ours, abs=1e-4)
    assert "true class" in page.read_text() or "class, worst first" in page.read_text()
    other = ["--prompts", "a {} here", "--json", str(out)]
    assert cli.main(["eval", str(tmp_path / "run"), "--tasks", *tasks, *other]) == 0
    assert json.loads(out.read_text())[f"retrieval:{data}"]["captions"] == evaluated[f"retrieval:{data}"]["captions"]


@pytest.mark.parametrize(("classes", "images"), [(8, 15), (200, 5)])
def test_a_class_column_in_disguise_is_evaluated_by_classification(tmp_path, model, capsys, classes, images):
    data = table(tmp_path, [f"kind {number % classes}" for number in range(classes * images)])
    results = trained(data, tmp_path / "run", model)
    assert "taken as class labels" in capsys.readouterr().out
    assert metrics_of(results)["zeroshot", "acc1"]["chance"] == 1 / classes
    assert None not in results["tasks"]["zeroshot"]["per_class"].values()
    assert ("confusion" in results["tasks"]["zeroshot"]) == (classes <= 30)
    account = tmp_path / "check.json"
    assert cli.main(["data", "check", str(data), "--json", str(account), "--samples", str(classes * images)]) == 0
    sides = {}
    for sample in json.loads(account.read_text())["samples"]:
        sides.setdefault(sample["captions"][0], set()).add(sample["split"])
    assert len(sides) == classes
    assert all(found == {"train", "val"} for found in sides.values())


def test_what_is_left_out_and_classes_of_one_split_are_said_and_reported(tmp_path, model, capsys):
    data = class_folders(tmp_path / "data", 3, 10)
    write_image(data / "class_dodo" / "IMG_9999.png", 9999)
    (data / "class_a" / "[x] plan.svg").write_text("<svg/>")
    (data / "labels.csv").write_text("name,kind\n1,2\n")
    results = trained(data, tmp_path / "run", model, captions_from="folder")
    printed, page = capsys.readouterr().out, (tmp_path / "run" / "report.html").read_text()
    for text in ("Left out 1 of 32: .svg files cannot be opened", "labels.csv", "Classes without held-out images"):
        assert text in printed
        assert text in page
    assert "1 (&#x27;class dodo&#x27;)" in page or "1 ('class dodo')" in page
    assert "class_a/[x] plan.svg" in page
    assert "captions are the file names" not in printed + page  # they are made of the classes
    assert results["tasks"]["zeroshot"]["per_class"]["class dodo"] is None
    check = tmp_path / "check.html"
    assert cli.main(["data", "check", str(data), "--captions-from", "folder", "--report", str(check)]) == 0
    assert "Classes without held-out images" in capsys.readouterr().out
    query = ["--text", "a photo of a class a.", "--report", str(tmp_path / "search.html")]
    assert cli.main(["search", str(tmp_path / "run"), "--data", str(data), *query]) == 0
    assert "Left out 1 of 32" in capsys.readouterr().out
    assert "Left out 1 of 32" in (tmp_path / "search.html").read_text()
    assert cli.main(["eval", str(tmp_path / "run"), "--tasks", f"zeroshot:{data}"]) == 0
    assert "Left out 1 of 32" in capsys.readouterr().out


def test_benchmark_says_what_is_left_out(tmp_path, capsys):
    data = class_folders(tmp_path / "data", 3, 7)
    (data / "class_a" / "plan.svg").write_text("<svg/>")
    args = ["benchmark", "--data", str(data), "--out", str(tmp_path / "benchmark"), "--captions-from", "folder"]
    assert cli.main([*args, "--epochs", "1", "--fractions", "0.1"]) == 2  # too few pairs
    printed = capsys.readouterr().out
    assert "Left out 1 of 22" in printed
    assert "Classes: 3" in printed


def test_class_labels_in_captions_are_evaluated_likewise(tmp_path, model, capsys):
    data = table(tmp_path / "one", [["an owl", "a crow", "a wren"][n % 3] for n in range(48)])
    results = trained(data, tmp_path / "run", model)
    out = tmp_path / "eval.json"
    task = f"zeroshot:{data}"
    assert cli.main(["eval", str(tmp_path / "run"), "--tasks", task, "--json", str(out)]) == 0
    ours, theirs = results["tasks"]["zeroshot"], json.loads(out.read_text())[task]
    assert theirs["metrics"]["acc1"]["value"] == pytest.approx(ours["metrics"]["acc1"]["value"])
    assert theirs["per_class"].keys() == {"an owl", "a crow", "a wren"}
    other = table(tmp_path / "two", [["an owl", "a crow"][n % 2] for n in range(24)])
    assert cli.main(["eval", str(tmp_path / "run"), "--tasks", f"zeroshot:{other}", "--json", str(out)]) == 0
    assert json.loads(out.read_text())[f"zeroshot:{other}"]["per_class"].keys() == {"an owl", "a crow"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "imagenet"], "--prompts needs names of classes"),
        (["--captions-from", "kind", "--caption-column", "caption"], "both set the captions"),
        (["--captions-from", "caption", "--prompts", "no place"], "has no {} for the class name"),
    ],
)
def test_options_without_an_effect_are_rejected(tmp_path, model, capsys, options, message):
    data = table(tmp_path, [f"{letter} thing" for letter in "abcdefghijklmnopqrst"])
    assert cli.main([*tiny.train_args(data, tmp_path / "run", model), *options]) == 2
    assert message in capsys.readouterr().err


def test_file_names_stop_a_run_a_benchmark_and_a_table(tmp_path, model, capsys):
    data = class_folders(tmp_path / "data", 4, 10)
    commands = {
        "train": tiny.train_args(data, tmp_path / "run", model),
        "benchmark": ["benchmark", "--data", str(data), "--out", str(tmp_path / "benchmark"), "--epochs", "1"],
        "reproduce": ["reproduce", "mct-openclipart", "--data", str(data), "--out", str(tmp_path / "table")],
    }
    for args in commands.values():
        assert cli.main(args) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "'IMG' of class_a/IMG_" in error
        assert "--captions-from folder" in error
        assert "--skip-data-checks" in error
    assert cli.main(["data", "check", str(data)]) == 0
    assert "Warning: All" in capsys.readouterr().out
    assert cli.main([*commands["train"], "--skip-data-checks"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert not [name for _, name in metrics_of(results) if name != "modality_gap"]
    assert results["tasks"]["retrieval"]["main_metric"] is None
    assert "not reported: " in results["tasks"]["retrieval"]["notes"][0]
    assert "hold out more with --val-fraction" in capsys.readouterr().out


def test_metrics_equal_to_chance_are_left_out_with_a_note(tmp_path, model, capsys):
    """Among eight captions, R@10 is 100 %, whatever the model; R@1 and R@5 are not."""
    letters = "abcdefgh"
    data = table(tmp_path, [f"{letters[n % 8]}{letters[n // 8]} thing" for n in range(64)])
    runs = []
    for seed in range(2):
        results = trained(data, tmp_path / f"run{seed}", model, val_fraction=0.2, seed=seed)
        found = metrics_of(results)
        assert 5 < results["tasks"]["retrieval"]["images"] <= 10
        assert ("retrieval", "image_to_text.r1") in found
        assert ("retrieval", "image_to_text.r10") not in found
        (note,) = results["tasks"]["retrieval"]["notes"]
        assert note.startswith("not reported: Image → text R@10")
        assert "R@1," not in note
        runs.append(tmp_path / f"run{seed}")
    assert "Image → text R@1 on" in capsys.readouterr().out
    comparison = compare(runs, tmp_path / "compare.html")
    assert "retrieval.image_to_text.r10" not in comparison.groups[0].metrics


def test_what_a_run_read_is_read_alike_afterwards(tmp_path, model):
    data = class_folders(tmp_path / "data", 4, 6)
    trained(data, tmp_path / "run", model, captions_from="folder")
    run = load(tmp_path / "run")
    assert reading_of(str(data), run) == DataConfig(captions_from="folder")
    assert reading_of(str(data), run, DataConfig(prompts=("imagenet",))) == DataConfig(
        captions_from="folder", prompts=("imagenet",)
    )
    assert reading_of("other", run) == DataConfig()
    assert open_source(str(data), reading=reading_of(str(data), run)).classes is not None

"""evaluate(): the samples of a task, its results, and what it skips."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import tiny
from PIL import Image

from coalign.cli import main as cli
from coalign.config import DataConfig
from coalign.data.loading.eval import image_batches
from coalign.data.sources.open import open_source
from coalign.data.splits import assign_splits
from coalign.data.text.prompts import class_prompts
from coalign.errors import UserError
from coalign.evaluation.embed import embed_images
from coalign.evaluation.finetune import classification as finetune
from coalign.evaluation.finetune.classification import FineTuneConfig
from coalign.evaluation.retrieval import retrieve
from coalign.evaluation.zero_shot import classify
from coalign.runs.folder import SavedConfig, read_config
from coalign.runs.run import load
from coalign.training.distributed import join_world
from coalign.types import DualEncoder
from coalign.workflows.evaluate.config import EvalConfig
from coalign.workflows.evaluate.eval_model import open_eval_model
from coalign.workflows.evaluate.eval_report import print_results
from coalign.workflows.evaluate.evaluate import evaluate
from coalign.workflows.evaluate.samples import Samples, captions_of, read_labels, select_split
from coalign.workflows.models.export import export
from coalign.workflows.train.setup import open_data


@pytest.fixture(scope="module")
def run(trained):
    return load(trained)


class Oracle:
    """Stands for a run with perfect encoders: images and texts of the same color have the same embedding."""

    def __init__(self, data="other data", swapped=False):
        self.data, self.config, self.swapped = data, SimpleNamespace(val_fraction=0.1, val_data=None), swapped

    def encoder(self):
        colors = torch.tensor(list(tiny.COLORS.values())) / 255

        def encode_image(pixels):
            color = pixels.float().mean(dim=(2, 3)) / 255  # [batch, 3]
            nearest = torch.cdist(color, colors).argmin(dim=1)
            return torch.eye(4)[nearest]

        def encode_text(texts):
            names = list(tiny.COLORS)
            color = torch.tensor([next(i for i, name in enumerate(names) if name in text) for text in texts])
            return torch.eye(4)[(color + 1) % 4 if self.swapped else color]

        return DualEncoder(encode_image, encode_text, 32)


def value(result, name):
    return result["metrics"][name]["value"]


@pytest.fixture
def four(tmp_path):
    """One image of each color."""
    return tiny.write_pairs(tmp_path / "four", 4)


# ---------------------------------------------------------------- splits


def test_default_split_is_the_runs_held_out_pairs(run, pairs, trained):
    source = open_source(str(pairs))
    splits = assign_splits(source, 0.1)[0]
    name, indices = select_split(source, str(pairs), run, None)
    assert name == "val"
    assert indices.tolist() == splits["val"].tolist()
    assert not set(indices.tolist()) & set(splits["train"].tolist())
    config = json.loads((trained / "config.json").read_text())
    assert len(indices) == config["num_val"]
    assert len(splits["train"]) == config["num_train"]


def test_val_fraction_is_the_runs(run, pairs):
    source = open_source(str(pairs))
    other = replace(run, config=replace(run.config, val_fraction=0.4))
    expected = assign_splits(source, 0.4)[0]["val"]
    assert select_split(source, str(pairs), other, None)[1].tolist() == expected.tolist()


def test_training_data_is_recognized_by_another_path(run, pairs, monkeypatch):
    monkeypatch.chdir(pairs.parent)
    assert select_split(open_source("pairs"), "pairs", run, None)[0] == "val"
    assert select_split(open_source("./pairs/"), "./pairs/", run, None)[0] == "val"


def test_other_splits(run, pairs, four):
    source = open_source(str(pairs))
    train = select_split(source, str(pairs), run, "train")[1]
    val = select_split(source, str(pairs), run, "val")[1]
    assert sorted([*train, *val]) == list(range(64))
    assert select_split(source, str(pairs), run, "all")[1].tolist() == list(range(64))
    assert select_split(open_source(str(four)), str(four), run, None)[0] == "all"
    with pytest.raises(UserError, match="no split named 'test'"):
        select_split(source, str(pairs), run, "test")
    splits = [select_split(open_source(str(four)), str(four), run, name)[1].tolist() for name in ("train", "val")]
    assert splits == [indices.tolist() for indices in assign_splits(open_source(str(four)))[0].values()]


def test_splits_of_the_data(run, tmp_path):
    for number, name in enumerate(("train", "val", "test")):
        tiny.write_pairs(tmp_path / "parts" / name, 4 * (number + 1))
    data = str(tmp_path / "parts")
    source = open_source(data)
    assert select_split(source, data, run, None)[0] == "test"
    assert len(select_split(source, data, run, None)[1]) == 12
    assert len(select_split(source, data, run, "val")[1]) == 8
    (tmp_path / "parts" / "test").rename(tmp_path / "away")
    assert select_split(open_source(data), data, run, None)[0] == "val"


def test_data_of_the_same_name_that_has_other_splits(trained, tmp_path):
    """An export only knows the name of its run's data."""
    tiny.write_pairs(tmp_path / "pairs" / "test", 12)
    data, saved = str(tmp_path / "pairs"), read_config(trained)
    for split in ("test", None):
        name, indices = select_split(open_source(data), data, saved, split)
        assert (name, len(indices)) == ("test", 12)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_test_split_of_a_run_with_separate_validation_data(run, pairs, four, tmp_path, fraction):
    """It is the one that training held out, also for an export."""
    table = tmp_path / "pairs.csv"
    images = sorted(pairs.rglob("*.png"))
    rows = [f"{path},pair {number},author {number % 9}" for number, path in enumerate(images)]
    table.write_text("\n".join(["image,caption,author", *rows]) + "\n")
    data, source = str(table), open_source(str(table))
    config = replace(
        run.config, val_data=str(four), val_by="author", val_fraction=0.2, test_fraction=0.3, train_fraction=fraction
    )
    held_out, _ = open_data(data, lambda _: replace(config, test_splits=("test",)), join_world("cpu"))
    saved = SavedConfig(table.name, config, len(held_out.train), len(held_out.val))
    for origin in (replace(run, data=data, config=config), saved):
        for split in ("test", None):
            name, indices = select_split(source, data, origin, split)
            assert (name, indices.tolist()) == ("test", held_out.test_splits["test"].tolist())
        train = select_split(source, data, origin, "train")[1]
        assert set(held_out.train.tolist()) <= set(train.tolist())
        assert sorted([*train, *indices]) == list(range(64))
        with pytest.raises(UserError, match=r"no split named 'val'; choose from .*test"):
            select_split(source, data, origin, "val")
    assert select_split(source, data, replace(saved, num_train=5), None)[0] == "all"  # other data of the same name


def test_options_on_columns_need_an_effect_on_the_data_of_one_task(run, four, tmp_path):
    table = tmp_path / "pairs.csv"
    rows = [f"{path},no,{path.stem.replace('_', ' ')}" for path in sorted(four.rglob("*.png"))]
    table.write_text("\n".join(["image,caption,words", *rows]) + "\n")
    config = EvalConfig(reading=DataConfig(caption_column=("words",)))
    results = evaluate(run, [f"retrieval:{table}", f"retrieval:{four}"], config)
    ours, theirs = (results[f"retrieval:{data}"]["metrics"] for data in (table, four))
    assert value({"metrics": ours}, "modality_gap") == pytest.approx(value({"metrics": theirs}, "modality_gap"))
    with pytest.raises(UserError, match="four has no table with columns, which --caption-column needs"):
        evaluate(run, [f"retrieval:{four}", f"zeroshot:{four}"], config)


def test_a_run_that_held_out_nothing_has_no_default_split(run, pairs):
    source, data = open_source(str(pairs)), str(pairs)
    for changes in ({"val_fraction": 0.0}, {"val_data": "elsewhere"}):
        other = replace(run, config=replace(run.config, **changes))
        with pytest.raises(UserError, match=r"No pairs of .* were held out of training; set --split train"):
            select_split(source, data, other, None)
        assert len(select_split(source, data, other, "train")[1]) == 64


# ---------------------------------------------------------------- results


def test_results_of_a_run(run, pairs):
    retrieval, zero_shot = f"retrieval:{pairs}", f"zeroshot:{pairs}"
    results = evaluate(run, [retrieval, zero_shot])
    num_val = len(assign_splits(open_source(str(pairs)), 0.1)[0]["val"])
    for values in results.values():
        assert (values["data"], values["split"], values["samples"]) == (str(pairs), "val", num_val)
        assert values["unreadable"] == {}
    for side in ("image_to_text", "text_to_image"):
        names = {name for name in results[retrieval]["metrics"] if name.startswith(side)}
        kept = {"r1", "median_rank", *(f"r{k}" for k in (5, 10) if k < num_val)}  # R@5 among five captions is 100 %
        assert names == {f"{side}.{name}" for name in kept}
    assert results[retrieval]["main_metric"] == "image_to_text.r1"
    assert set(results[zero_shot]["metrics"]) == {"acc1", "mean_per_class_recall"}
    (note,) = results[zero_shot]["notes"]  # the words of the prompts are not in the small vocabulary
    assert "are longer than the context of 12 tokens" in note
    fields = {"title", "kind", "value", "low", "high", "chance", "count"}
    for values in results.values():
        assert all(set(metric) == fields for metric in values["metrics"].values())
        assert values["main_metric"] in values["metrics"]


def test_results_match_the_end_of_training(run, trained, pairs):
    expected = json.loads((trained / "results.json").read_text())["tasks"]["retrieval"]
    result = evaluate(run, [f"retrieval:{pairs}"])[f"retrieval:{pairs}"]
    assert {name: result[name] for name in expected} == expected


@pytest.mark.parametrize("swapped", [False, True])
def test_perfect_and_wrong_models(four, pairs, swapped):
    oracle = Oracle(swapped=swapped)
    results = evaluate(oracle, [f"retrieval:{four}", f"zeroshot:{pairs}"])
    retrieval, zero_shot = results.values()
    for side in ("image_to_text", "text_to_image"):
        assert value(retrieval, f"{side}.r1") == (not swapped)
        assert (value(retrieval, f"{side}.median_rank") == 1) == (not swapped)
    assert zero_shot["samples"] == 64
    assert value(zero_shot, "acc1") == (not swapped)


def test_unreadable_images_are_skipped_and_counted(four):
    (four / "red" / "red_apple_standing.png").write_bytes(b"")
    (four / "blue" / "blue_apple_standing.png").write_bytes(b"<html>")
    result = evaluate(Oracle(), [f"retrieval:{four}"])[f"retrieval:{four}"]
    assert result["unreadable"] == {"empty file": 1, "not an image": 1}
    assert result["notes"][:2] == ["skipped samples: 1 (not an image)", "skipped samples: 1 (empty file)"]
    assert value(result, "image_to_text.r1") == 1
    assert result["metrics"]["image_to_text.r1"]["chance"] == 1 / 2


def test_equal_captions_are_correct_for_every_image(tmp_path):
    data = tiny.write_pairs(tmp_path / "data", 8)  # two of each color
    for path in data.rglob("*.png"):
        path.with_suffix(".txt").write_text(f"{path.parent.name}\na {path.parent.name} thing\n")
    result = evaluate(Oracle(), [f"retrieval:{data}"])[f"retrieval:{data}"]
    assert value(result, "image_to_text.r1") == value(result, "text_to_image.r1") == 1


def test_workers_do_not_change_results(run, pairs):
    task = f"retrieval:{pairs}"
    assert evaluate(run, [task], EvalConfig(workers=2)) == evaluate(run, [task])


def test_images_are_center_cropped(four):
    """The evaluation view of a wide red image with a green center is green."""
    pixels = np.zeros((32, 96, 3), np.uint8) + np.array(tiny.COLORS["red"], np.uint8)
    pixels[:, 32:64] = tiny.COLORS["green"]
    Image.fromarray(pixels).save(four / "green" / "green_apple_standing.png")
    source = open_source(str(four))
    images = embed_images(Oracle().encoder(), image_batches(source, np.arange(4), 32))
    evaluation = retrieve(Oracle().encoder(), images, captions_of(source))
    assert evaluation.result.image_to_text.recall[1].value == 1


# ---------------------------------------------------------------- classes


def test_classes_file_renames_classes(four, tmp_path):
    classes = tmp_path / "classes.txt"
    classes.write_text("red = my red\nblue = my blue\n")
    source = open_source(str(four))
    labels = read_labels([Samples(source, np.arange(4))], classes)[0]
    assert labels.classnames == ["my red", "my blue"]
    assert {source.record(index).facts["folder"]: labels.classnames[row] for index, row in labels.class_of.items()} == {
        "red": "my red",
        "blue": "my blue",
    }
    assert labels.unlabeled == 2
    result = evaluate(Oracle(), [f"zeroshot:{four}"], EvalConfig(classes=classes))[f"zeroshot:{four}"]
    assert result["notes"] == ["skipped samples: 2 (without one of the classes)"]
    accuracy = result["metrics"]["acc1"]
    assert (accuracy["value"], accuracy["chance"], accuracy["count"]) == (1, 1 / 2, 2)
    assert result["per_class"] == {"my red": 1, "my blue": 1}


def test_classes_with_prompts_of_their_own(four, tmp_path):
    """Prompts that name the other color turn every prediction around; --prompts serves the classes without any."""
    classes, task = tmp_path / "classes.json", f"zeroshot:{four}"
    for prompts, accuracy in (({"red": ["red", "my red"], "blue": []}, 1), ({"red": "blue", "blue": ["red"]}, 0)):
        classes.write_text(json.dumps(prompts))
        result = evaluate(Oracle(), [task], EvalConfig(classes=classes))[task]
        assert (result["metrics"]["acc1"]["value"], result["metrics"]["acc1"]["count"]) == (accuracy, 2)
    with pytest.raises(UserError, match="--prompts has no effect"):
        evaluate(Oracle(), [task], EvalConfig(classes=classes, reading=DataConfig(prompts=("a {}",))))


def test_images_without_captions_have_classes(four):
    """As in most folders of classes, file names such as 00001.jpg give no caption."""
    for number, path in enumerate(sorted(four.rglob("*.png"))):
        path.rename(path.with_name(f"{number:05d}.png"))
    result = evaluate(Oracle(), [f"zeroshot:{four}"])[f"zeroshot:{four}"]
    assert result["notes"] == []
    assert (result["metrics"]["acc1"]["count"], value(result, "acc1")) == (4, 1)


def write_table(folder, four, rows):
    images = sorted(path.relative_to(folder) for path in four.rglob("*.png"))
    lines = [json.dumps({"image": str(path), "caption": path.stem, **row}) for path, row in zip(images, rows)]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return open_source(str(folder / "pairs.jsonl"))


def test_labels_of_a_table(four, tmp_path):
    """Labels may be numbers, including zero; samples without one are counted."""
    source = write_table(tmp_path, four, [{"label": 0}, {"label": 1}, {"label": 0}, {"label": ""}])
    labels = read_labels([Samples(source, np.arange(4))])[0]
    assert labels.classnames == ["0", "1"]
    assert labels.class_of == {0: 0, 1: 1, 2: 0}
    assert labels.unlabeled == 1


def test_labels_from_another_column_and_from_tags(four, tmp_path):
    source = write_table(
        tmp_path, four, [{"breed": "big_cat", "tags": "x, red"}, {"breed": "dog"}, {"breed": "dog"}, {}]
    )
    labels = read_labels([Samples(source, np.arange(4))], label="breed")[0]
    assert labels.classnames == ["big cat", "dog"]
    assert labels.class_of == {0: 0, 1: 1, 2: 1}
    classes = tmp_path / "classes.txt"
    classes.write_text("red\ngreen\n")
    assert read_labels([Samples(source, np.arange(4))], classes)[0].class_of == {0: 0}


def test_zero_shot_skips_samples_without_a_class(four):
    source = open_source(str(four))
    labels = read_labels([Samples(source, np.arange(4))])[0]
    class_of = {index: row for index, row in labels.class_of.items() if index != 2}
    images = embed_images(Oracle().encoder(), image_batches(source, np.arange(4), 32))
    evaluation = classify(
        Oracle().encoder(), images, class_of, labels.classnames, class_prompts(labels.classnames, ["{}"])
    )
    assert [metric.count for metric in evaluation.result.metrics] == [3, 3]


# ---------------------------------------------------------------- command line


def test_command_prints_and_writes_results(trained, pairs, tmp_path, capsys):
    out = tmp_path / "out.json"
    tasks = [f"retrieval:{pairs}", f"zeroshot:{pairs}"]
    assert cli.main(["eval", str(trained), "--tasks", *tasks, "--json", str(out), "--weights", "best"]) == 0
    printed = capsys.readouterr().out
    written = json.loads(out.read_text())
    assert list(written) == tasks
    assert written == json.loads(json.dumps(evaluate(str(trained), tasks, EvalConfig(weights="best"))))
    assert "R@10" in printed
    assert "top-1" in printed
    assert f"{100 * value(written[tasks[0]], 'image_to_text.r1'):.1f} %" in printed


def test_run_does_not_need_its_model_file(trained, four, tmp_path):
    moved = shutil.copytree(trained, tmp_path / "moved")
    config = json.loads((moved / "config.json").read_text())
    config["config"]["model"] = str(tmp_path / "gone.json")
    (moved / "config.json").write_text(json.dumps(config))
    task = f"retrieval:{four}"
    assert evaluate(str(moved), [task]) == evaluate(str(trained), [task])


def test_results_are_written_after_each_task(trained, four, tmp_path, capsys):
    """The second task fails when its data is read; the first one's results are kept."""
    (tmp_path / "bad").mkdir()
    for path in sorted(four.rglob("*.png")):
        (tmp_path / "bad" / path.name).write_bytes(b"")
    out, tasks = tmp_path / "out.json", [f"retrieval:{four}", f"retrieval:{tmp_path / 'bad'}"]
    assert cli.main(["eval", str(trained), "--tasks", *tasks, "--json", str(out)]) == 2
    printed = capsys.readouterr()
    assert "no readable image" in printed.err
    assert "R@10" in printed.out
    assert list(json.loads(out.read_text())) == tasks[:1]


def test_run_can_be_moved_without_its_data(trained, four, tmp_path):
    moved = shutil.copytree(trained, tmp_path / "moved")
    results = evaluate(str(moved), [f"retrieval:{four}"])
    assert results == evaluate(str(trained), [f"retrieval:{four}"])


# ---------------------------------------------------------------- foils


@pytest.mark.parametrize("swapped", [False, True])
def test_sugarcrepe(tmp_path, capsys, swapped):
    data = tiny.write_pairs(tmp_path / "data", 8)
    names = [str(path.relative_to(data)) for path in sorted(data.rglob("*.png"))]
    for kind, wrong in (("replace_att", "blue"), ("replace_obj", "red"), ("swap_att", "green")):
        items = [
            {"filename": name, "caption": f"a {name.split('/')[0]} thing", "negative_caption": f"a {wrong} thing"}
            for name in names
            if not name.startswith(wrong)
        ]
        (data / f"{kind}.json").write_text(json.dumps(dict(enumerate(items))))
    task = f"foils:sugarcrepe:{data}"
    result = evaluate(Oracle(swapped=swapped), [task])[task]
    print_results({task: result})
    assert "Foils: replace, all kinds" in capsys.readouterr().out
    assert result["samples"] == 8
    values = {kind: value(result, f"{kind}.accuracy") for kind in ("replace_obj", "replace_att", "swap_att")}
    hows = {how: value(result, f"{how}.mean_per_kind") for how in ("replace", "swap")}
    assert len(result["metrics"]) == 1 + len(values) + len(hows)
    if not swapped:
        assert set(values.values()) == {1}
    assert value(result, result["main_metric"]) == pytest.approx(sum(values.values()) / 3)
    assert hows["replace"] == (values["replace_obj"] + values["replace_att"]) / 2
    assert hows["swap"] == values["swap_att"]
    if swapped:  # a tie for every color but one, which is wrong
        assert 0 < values["replace_att"] < 1


# ---------------------------------------------------------------- probes


def test_probe_trains_on_the_train_split_only(trained, tmp_path, capsys):
    """Images of four colors in folders of their names, which any features separate."""
    data = tiny.write_pairs(tmp_path / "photos", 120)
    source = open_source(str(data))
    test_indices = assign_splits(source, 0.3)[0]["val"]
    folder = tmp_path / "split"
    for index in range(len(source)):
        part = "test" if index in test_indices else "train"
        target = folder / part / source.record(index).facts["folder"]
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(source.image_path(index), target)
    task = f"probe:{folder}"
    assert cli.main(["eval", str(trained), "--tasks", task, "--json", str(tmp_path / "out.json")]) == 0
    assert "mean per class" in capsys.readouterr().out
    values = json.loads((tmp_path / "out.json").read_text())[task]
    assert (values["split"], values["samples"]) == ("test", len(test_indices))
    accuracy = values["metrics"]["acc1"]
    assert accuracy["count"] == len(test_indices)
    assert accuracy["value"] > 0.9
    assert accuracy["chance"] == 0.25


@pytest.mark.parametrize("kind", ["knn", "probe-mct", "probe-slip", "fewshot"])
def test_other_probes(trained, tmp_path, capsys, kind):
    data = tiny.write_pairs(tmp_path / "photos", 60)
    (data / "red" / "red_apple_standing.png").write_bytes(b"")
    task = f"{kind}:{data}"
    held_out = assign_splits(open_source(str(data)), 0.3)[0]["val"]
    for number, path in enumerate(sorted(data.rglob("*.png"))):
        part = tmp_path / "split" / ("test" if number in held_out else "train") / path.parent.name
        part.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, part)
    task = f"{kind}:{tmp_path / 'split'}"
    result = evaluate(str(trained), [task])[task]
    assert sum(result["unreadable"].values()) == 1
    best = max(entry["value"] for entry in result["metrics"].values())
    assert best > 0.7
    print_results({task: result})
    assert ("8-shot" if kind == "fewshot" else "mean per class") in capsys.readouterr().out


def test_slip_probe_draws_new_crops_in_every_epoch(run, tmp_path, monkeypatch):
    data = tiny.write_pairs(tmp_path / "photos", 40)
    for number, path in enumerate(sorted(data.rglob("*.png"))):
        part = tmp_path / "split" / ("train", "test")[number % 4 == 0] / path.parent.name
        part.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, part)
    batches = []
    encoder = run.encoder()
    features = encoder.image_features
    encoder.image_features = lambda pixels: batches.append(pixels.clone()) or features(pixels)
    evaluate(encoder, [f"probe-slip:{tmp_path / 'split'}"])
    (test,), train = batches[:1], batches[1:]
    assert (len(test), len(train), {len(pixels) for pixels in train}) == (10, 90, {30})
    assert not torch.equal(train[0], train[1])


@pytest.mark.parametrize("kind", ["knn", "probe-mct"])
def test_train_split_too_small_for_a_val_split(trained, tmp_path, kind):
    data = tiny.write_pairs(tmp_path / "photos", 8)
    for number, path in enumerate(sorted(data.rglob("*.png"))):
        part = tmp_path / "split" / ("train", "test")[number % 2] / path.parent.name
        part.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, part)
    task = f"{kind}:{tmp_path / 'split'}"
    assert evaluate(str(trained), [task])[task]["metrics"]["acc1"]["count"] == 4


def test_probe_without_train_samples_raises(trained, four):
    with pytest.raises(UserError, match="has nothing to train on"):
        evaluate(str(trained), [f"probe:{four}"], EvalConfig(split="all"))


def test_features_precede_the_projection(run):
    encoder = run.encoder()
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    features = encoder.image_features(pixels)
    projected = torch.nn.functional.normalize(run.method.image.projection(features), dim=-1)
    torch.testing.assert_close(projected, encoder.encode_image(pixels))


def untitled(metric):
    return {key: value for key, value in metric.items() if key != "title"}


@pytest.fixture(scope="module")
def models(trained, oner, tmp_path_factory):
    """A two-tower run, a OneR run, and exports of the first."""
    folder = tmp_path_factory.mktemp("models")
    for library in ("open_clip", "transformers"):
        export(trained, library, folder / library)
    return {"run": trained, "oner": oner, "open_clip": folder / "open_clip", "transformers": folder / "transformers"}


@pytest.mark.parametrize("name", ["run", "oner", "open_clip", "transformers"])
def test_fine_tuning_any_model(models, tmp_path, capsys, monkeypatch, name):
    """From wrong class names, on which zero-shot fails. Such small models need a higher learning rate."""
    monkeypatch.setattr(finetune, "recipe", lambda images, epochs: FineTuneConfig(epochs, lr=1e-2, batch_size=16))
    data = tiny.write_pairs(tmp_path / "photos", 160)
    (data / "red" / "red_apple_standing.png").write_bytes(b"")
    for number, path in enumerate(sorted(data.rglob("*.png"))):
        part = tmp_path / "split" / ("train" if number % 4 or not path.stat().st_size else "test") / path.parent.name
        part.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, part)
    model, data = str(models[name]), tmp_path / "split"
    tasks = [f"finetune:{data}", f"zeroshot:{data}"]
    (tmp_path / "prompts.txt").write_text("{}\n")  # these models have a context of few tokens
    wrong = zip(tiny.COLORS, [*list(tiny.COLORS)[1:], "red"])
    (tmp_path / "classes.txt").write_text("".join(f"{label} = {name}\n" for label, name in wrong))
    options = {"preprocess": "coalign", "classes": tmp_path / "classes.txt"}
    options["reading"] = DataConfig(prompts=(str(tmp_path / "prompts.txt"),))
    tuned, zero_shot = evaluate(model, tasks, EvalConfig(epochs=12, **options)).values()
    # up to one image whose two best classes are tied within rounding
    assert value(tuned, "alpha_0.acc1") == pytest.approx(value(zero_shot, "acc1"), abs=1 / 40)
    assert tuned["metrics"]["alpha_0.acc1"]["count"] == zero_shot["metrics"]["acc1"]["count"] == 40
    assert tuned["unreadable"] == {"empty file": 1}
    assert tuned["main_metric"] == "acc1"
    assert value(tuned, "acc1") > value(zero_shot, "acc1") + 0.2
    print_results({tasks[0]: tuned})
    assert "0.5 of the way" in capsys.readouterr().out
    with pytest.raises(UserError, match="has nothing to train on"):
        evaluate(model, tasks[:1], EvalConfig(split="all"))
    for path in (tmp_path / "split" / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no training image could be read"):
        evaluate(model, tasks[:1], EvalConfig(epochs=1, **options))


@pytest.mark.parametrize("name", ["run", "oner", "open_clip", "transformers"])
def test_fine_tuning_any_model_for_retrieval(models, tmp_path, capsys, monkeypatch, name):
    """On captions that swap the colors."""
    monkeypatch.setattr(finetune, "recipe", lambda images, epochs: FineTuneConfig(epochs, lr=1e-2, batch_size=16))
    photos = tiny.write_pairs(tmp_path / "photos", 160)
    wrong = dict(zip(tiny.COLORS, [*list(tiny.COLORS)[1:], "red"]))
    rows = [
        {
            "image": str(path.relative_to(tmp_path)),
            "caption": wrong[path.parent.name],
            "split": "train" if number % 4 else "test",
        }
        for number, path in enumerate(sorted(photos.rglob("*.png")))
    ]
    (photos / "red" / "red_apple_standing.png").write_bytes(b"")
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    tasks = [f"{kind}:{tmp_path / 'data.jsonl'}" for kind in ("finetune-retrieval", "retrieval")]
    tuned, before = evaluate(str(models[name]), tasks, EvalConfig(epochs=12, preprocess="coalign")).values()
    recall = "image_to_text.r1"
    assert tuned["metrics"][f"alpha_0.{recall}"].items() >= untitled(before["metrics"][recall]).items()
    assert value(tuned, recall) > value(before, recall) + 0.2
    assert tuned["unreadable"] == {"empty file": 1}
    print_results({tasks[0]: tuned})
    assert "Text → image R@1, 0.5 of the way" in capsys.readouterr().out
    for split, message in (("train", "the train split has 0 pairs"), ("test", "the test split has no captions")):
        bare = [{**row, "caption": ""} if row["split"] == split else row for row in rows]
        (tmp_path / "bare.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in bare))
        with pytest.raises(UserError, match=message):
            evaluate(str(models[name]), [f"finetune-retrieval:{tmp_path / 'bare.jsonl'}"])


@pytest.mark.parametrize("name", ["run", "oner", "open_clip", "transformers"])
def test_layers_of_any_model_are_ordered_by_depth(models, name):
    """The stem and the token embedding come first, the projections last."""
    encoder = open_eval_model(str(models[name])).encoder
    image, text = encoder.modules()
    frozen = finetune.frozen_parameters(image, text)
    pixels = torch.zeros(2, 3, encoder.image_size, encoder.image_size, dtype=torch.uint8)
    finetune.unfreeze_used_parameters(image, pixels, frozen)
    image_layers = finetune.layers_by_depth(image)
    finetune.unfreeze_used_parameters(text, ["a text", "another"], frozen)
    text_layers = finetune.layers_by_depth(text)
    names = {id(parameter): name for module in (image, text) for name, parameter in module.named_parameters()}
    assert not any(
        "momentum" in name for key, name in names.items() if key in {id(p) for layer in image_layers for p in layer}
    )
    first, last = ({names[id(p)] for layer in (image_layers[end], text_layers[end]) for p in layer} for end in (0, -1))
    assert any("embedding" in name for name in first)
    assert any("conv" in name or "stem" in name or "patch_embedding" in name for name in first)
    assert not any("project" in name for name in first)
    assert any("project" in name for name in last)
    assert not any("embedding" in name or "conv1" in name or "stem" in name for name in last)


@pytest.mark.parametrize("swapped", [False, True])
def test_winoground(tmp_path, capsys, swapped):
    data = tiny.write_pairs(tmp_path / "data", 8)
    (data / "images").mkdir()
    lines = []
    for number, (one, other) in enumerate((("red", "blue"), ("green", "grey"), ("blue", "green"))):
        entry = {"id": number}
        for i, name in enumerate((one, other)):
            shutil.copy(data / name / f"{name}_apple_standing.png", data / "images" / f"ex_{number}_img_{i}.png")
            entry |= {f"image_{i}": f"ex_{number}_img_{i}", f"caption_{i}": f"a {name} thing"}
        lines.append(json.dumps(entry))
    (data / "examples.jsonl").write_text("\n".join(lines))
    (data / "images" / "ex_2_img_1.png").write_bytes(b"")
    task = f"pairs:winoground:{data}"
    result = evaluate(Oracle(swapped=swapped), [task])[task]
    assert {name: metric["value"] for name, metric in result["metrics"].items()} == dict.fromkeys(
        ("text", "image", "group"), 0 if swapped else 1
    )
    assert (result["metrics"]["group"]["count"], result["unreadable"]) == (2, {"empty file": 1})
    print_results({task: result})
    assert "16.7 %" in capsys.readouterr().out
    (data / "examples.jsonl").write_text((data / "examples.jsonl").read_text() + "\n\n")
    assert evaluate(Oracle(swapped=swapped), [task])[task] == result
    for damage, message in (
        (lambda: (data / "examples.jsonl").write_bytes(b"\xff\xfe"), "Cannot read"),
        (lambda: (data / "examples.jsonl").write_text("{}"), "Line 1 of"),
        (lambda: (data / "examples.jsonl").write_text(""), "contains no examples"),
        (lambda: (data / "examples.jsonl").unlink(), "is not a Winoground folder"),
    ):
        damage()
        with pytest.raises(UserError, match=message):
            evaluate(Oracle(), [task])
    with pytest.raises(UserError, match="has no pairs of images"):
        evaluate(Oracle(), [f"pairs:{tmp_path / 'data' / 'red'}"])


def test_tagging_of_a_dataset(run, tmp_path, capsys):
    """Eight tags, two per color; features that were misaligned with the tags would score at chance."""
    data = tiny.write_pairs(tmp_path / "photos", 80)
    images = sorted(path.relative_to(tmp_path) for path in data.rglob("*.png"))
    lines = [
        {
            "image": str(p),
            "caption": p.stem,
            "tags": [p.parent.name, f"{p.parent.name}ish"],
            "split": ("train", "test")[i % 5 == 0],
        }
        for i, p in enumerate(images)
    ]
    lines[0]["tags"] = ["seen once"]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = f"tagging:{tmp_path / 'pairs.jsonl'}"
    result = evaluate(run, [task])[task]
    assert (result["tags"], result["samples"], result["metrics"]["miou5"]["count"]) == (8, 16, 15)
    assert value(result, "miou5") > 0.35  # at most 2 / 5; by chance 0.22
    print_results({task: result})
    printed = capsys.readouterr().out
    assert "mIOU@20" in printed
    assert "skipped samples: 1 (without any of the 8 tags" in printed
    with pytest.raises(UserError, match="has nothing to train on"):
        evaluate(run, [task], EvalConfig(split="all"))

"""The registry of tasks, what is checked before any task runs, and what the tasks of one evaluation share."""

import shutil

import pytest
import torch
from helpers import tiny

from coalign.config import DataConfig
from coalign.data.scenes.source import Scenes
from coalign.errors import UserError
from coalign.types import DualEncoder
from coalign.workflows.evaluate import needs
from coalign.workflows.evaluate.config import EvalConfig
from coalign.workflows.evaluate.evaluate import evaluate
from coalign.workflows.evaluate.tasks import SUITES, TASKS, help_table, parse_task

COLORS = torch.tensor(list(tiny.COLORS.values())) / 255


class Counting:
    """A model that recognizes colors, and counts the images that it embeds."""

    def __init__(self):
        self.num_images = self.num_features = 0

    def encoder(self, with_features=False):
        def one_hot(pixels):
            return torch.eye(4)[torch.cdist(pixels.float().mean((2, 3)) / 255, COLORS).argmin(1)]

        def encode_image(pixels):
            self.num_images += len(pixels)
            return one_hot(pixels)

        def features(pixels):
            self.num_features += len(pixels)
            return one_hot(pixels)

        def encode_text(texts):
            rows = [[float(name in text) + 0.01 for name in tiny.COLORS] for text in texts]
            return torch.tensor(rows)

        return DualEncoder(encode_image, encode_text, 32, image_features=features if with_features else None)


# ---------------------------------------------------------------- registry


@pytest.mark.parametrize("name", TASKS)
def test_every_task_loads(name):
    task = TASKS[name]
    assert callable(task.load())
    assert set(task.needs) <= needs._PROBLEMS.keys()
    assert parse_task(f"{name}:scenes:8,size=32") == (task, "scenes:8,size=32")
    assert any(line.split()[0] == name and task.help in line for line in help_table().splitlines())


def test_suites_run_tasks_of_the_registry():
    assert set(SUITES.values()) <= TASKS.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("retreival:photos", "'retreival:photos' is not a task; did you mean retrieval or retrieval-1k?"),
        ("zero-shot:photos", "'zero-shot:photos' is not a task; did you mean zeroshot or fewshot?"),
        ("linear", "'linear' is not a task; use TASK:DATA, such as retrieval:my-images, or suite11 or suite11-probe."),
        ("knn", "The task 'knn' has no data; use TASK:DATA, such as knn:my-images."),
        ("retrieval:", "The task 'retrieval:' has no data; use TASK:DATA"),
        ("", "'' is not a task; use TASK:DATA"),
    ],
)
def test_errors_of_unknown_tasks(text, message):
    with pytest.raises(UserError) as error:
        parse_task(text)
    assert str(error.value).startswith(message)
    assert ("The tasks are retrieval, retrieval-1k, " in str(error.value)) == ("is not a task; use" in message)


# ---------------------------------------------------------------- needs


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("foils:PAIRS", "pairs has no false captions; use scenes:… or sugarcrepe:FOLDER."),
        ("pairs:PAIRS", "pairs has no pairs of images with two captions; use winoground:FOLDER."),
        ("localization:scenes:8,size=32", "is not a coalign run; only runs support localization maps, which"),
        ("bootstrap:PAIRS", "cannot embed an image and a text jointly, which bootstrap needs"),
        ("guided:scenes:8,size=32", "cannot embed an image and a text jointly, which guided needs"),
        ("finetune:PAIRS", "does not expose its encoders, which finetune needs."),
        ("detection:scenes:8,size=32", "does not expose its encoders, which detection needs."),
        ("probe:PAIRS", "probe:PAIRS has nothing to train on: all of its samples are evaluated; add a train split"),
        ("knn:PAIRS", "knn:PAIRS has nothing to train on"),
    ],
)
def test_nothing_runs_if_the_last_task_cannot(pairs, task, message):
    model, results = Counting(), []
    tasks = [f"retrieval:{pairs}", f"zeroshot:{pairs}", task.replace("PAIRS", str(pairs))]
    with pytest.raises(UserError) as error:
        evaluate(model.encoder(with_features=True), tasks, on_result=results.append)
    assert message.replace("PAIRS", str(pairs)) in str(error.value)
    assert (model.num_images, model.num_features, results) == (0, 0, [])


def test_probes_need_image_features(pairs):
    model = Counting()
    with pytest.raises(UserError, match="does not expose image features, which probe needs"):
        evaluate(model.encoder(), [f"retrieval:{pairs}", f"probe:{pairs}"])
    assert model.num_images == 0


def test_scene_tasks_need_scenes(trained, pairs):
    results = []
    with pytest.raises(
        UserError, match="localization needs the ground truth of every object, which only scenes:… have"
    ):
        evaluate(trained, [f"retrieval:{pairs}", f"localization:{pairs}"], on_result=results.append)
    assert results == []


# ---------------------------------------------------------------- training data


def write_folders(root, data, colors):
    for color in colors:
        shutil.copytree(data / color, root / color)
    return root


@pytest.mark.parametrize("kind", ["probe", "knn"])
def test_probe_trains_on_other_data(pairs, tmp_path, kind):
    """A perfect encoder is right about every class of the training data, and wrong about one that only the test data has."""
    train = write_folders(tmp_path / "train", pairs, ("red", "green", "blue"))
    test = write_folders(tmp_path / "test", pairs, ("green", "blue", "grey"))
    task, model = f"{kind}:{test}", Counting()
    result = evaluate(model.encoder(with_features=True), [task], EvalConfig(train_data=str(train)))[task]
    count = {color: len(list((pairs / color).glob("*.png"))) for color in tiny.COLORS}
    num_test = count["green"] + count["blue"] + count["grey"]
    accuracy = result["metrics"]["acc1"]
    assert (result["data"], result["split"], result["samples"]) == (str(test), "all", num_test)
    assert accuracy["chance"] == 1 / 4  # four classes: those of both
    assert accuracy["value"] == pytest.approx((count["green"] + count["blue"]) / num_test)
    assert result["metrics"]["mean_per_class_recall"]["value"] == pytest.approx(2 / 3)
    assert model.num_features == num_test + count["red"] + count["green"] + count["blue"]


def test_tables_with_columns_of_other_names_as_training_data(pairs, tmp_path):
    for name, colors in {"train": ("red", "green"), "test": ("green", "red")}.items():
        rows = [
            f"{path};{color};x" for color in colors for path in sorted((pairs / color).glob("*.png"))[name == "test" :]
        ]
        (tmp_path / f"{name}.csv").write_text("\n".join(["where;label;words", *rows]))
    config = EvalConfig(train_data=str(tmp_path / "train.csv"), reading=DataConfig("where", ("words",)))
    task = f"knn:{tmp_path / 'test.csv'}"
    result = evaluate(Counting().encoder(with_features=True), [task], config)[task]
    assert result["metrics"]["acc1"]["value"] == 1
    assert result["samples"] == sum(len(list((pairs / color).glob("*.png"))) - 1 for color in ("red", "green"))


def test_a_probe_never_trains_on_the_samples_it_is_evaluated_on(pairs, tmp_path):
    """Also if --train-data is the same data, under another name."""
    write_folders(tmp_path / "own", pairs, ("red", "green"))
    for spelling in (tmp_path / "own", tmp_path / "own" / ".." / "own"):
        with pytest.raises(UserError, match="has nothing to train on"):
            evaluate(
                Counting().encoder(with_features=True),
                [f"probe:{tmp_path / 'own'}"],
                EvalConfig(train_data=str(spelling)),
            )


def test_training_data_without_any_of_the_classes_is_refused(pairs, tmp_path):
    train = write_folders(tmp_path / "train", pairs, ("red", "green"))
    test = write_folders(tmp_path / "test", pairs, ("blue", "grey"))
    with pytest.raises(UserError, match=r"No training sample of .*train has one of the classes of .*test"):
        evaluate(Counting().encoder(with_features=True), [f"knn:{test}"], EvalConfig(train_data=str(train)))


def test_a_task_given_twice_runs_once(pairs):
    model, shown = Counting(), []
    tasks = [f"{kind}:{pairs}" for kind in ("retrieval", "zeroshot", "retrieval")]
    results = evaluate(model.encoder(), tasks, on_result=lambda found: shown.append(list(found)))
    assert list(results) == tasks[:2]
    assert shown == [tasks[:1], tasks[:2]]


# ---------------------------------------------------------------- shared embeddings


@pytest.mark.parametrize("kinds", [("retrieval", "zeroshot"), ("zeroshot", "retrieval")])
def test_images_are_embedded_once(pairs, kinds):
    model = Counting()
    evaluate(model.encoder(), [f"{kind}:{pairs}" for kind in kinds])
    assert model.num_images == 64


def test_scenes_are_embedded_once():
    model = Counting()
    data = "scenes:24,size=32"
    retrieval, foils = evaluate(model.encoder(), [f"retrieval:{data}", f"foils:{data}"]).values()
    assert model.num_images == retrieval["samples"] == foils["samples"] > 0


@pytest.mark.parametrize("level", ["simple", "standard", "hard"])
def test_scenes_have_classes_and_prompts(level):
    """Without options, the classes are the shapes and colors of single objects, and the prompts have the words of the captions."""
    texts, model = [], Counting().encoder()

    def encode_text(batch):
        texts.extend(batch)
        return model.encode_text(batch)

    task = f"zeroshot:scenes:24:{level},size=32"
    result = evaluate(DualEncoder(model.encode_image, encode_text, 32), [task])[task]
    source = Scenes(24, level=level, split="test")
    names = {facts["label"] for index in range(2000) if "label" in (facts := source.record(index).facts)}
    assert set(result["per_class"]) == names
    assert result["unlabeled"] == 2000 - result["metrics"]["acc1"]["count"]
    if level == "hard":
        assert set(texts) == {f"a photo of a {name}." for name in names}
    elif level == "simple":
        assert set(texts) == {f"a {name} on the {side}" for name in names for side in ("left", "right")}
    else:
        assert len(texts) == 27 * len(names)
        assert {
            f"a {place}" for name in names for place in (f"big {name} at the center", f"small {name} at the upper left")
        } <= {*texts}


def test_images_of_other_data_are_embedded_too(pairs, tmp_path):
    model, other = Counting(), tiny.write_pairs(tmp_path / "other", 8)
    results = evaluate(model.encoder(), [f"retrieval:{pairs}", f"retrieval:{other}", f"zeroshot:{other}"])
    assert model.num_images == 64 + 8
    assert [result["samples"] for result in results.values()] == [64, 8, 8]


def test_results_do_not_depend_on_earlier_tasks(tmp_path):
    """Retrieval embeds all images, of which classification uses those with a class, and counts only their unreadable ones."""
    data = tiny.write_pairs(tmp_path / "data", 16)
    for color in ("red", "grey"):
        (data / color / f"{color}_apple_standing.png").write_bytes(b"")
    classes = tmp_path / "classes.txt"
    classes.write_text("red\ngreen\n")
    retrieval, zero_shot = f"retrieval:{data}", f"zeroshot:{data}"
    config = EvalConfig(classes=classes)
    alone = evaluate(Counting().encoder(), [zero_shot], config)
    both = evaluate(Counting().encoder(), [retrieval, zero_shot], config)
    assert alone[zero_shot] == both[zero_shot]
    assert alone[zero_shot]["unreadable"] == {"empty file": 1}
    assert both[retrieval]["unreadable"] == {"empty file": 2}
    for path in [*data.glob("red/*.png"), *data.glob("green/*.png")]:
        path.write_bytes(b"")
    for tasks in ([zero_shot], [retrieval, zero_shot]):
        with pytest.raises(UserError, match=r"the data has no readable image \(8 bad\)"):
            evaluate(Counting().encoder(), tasks, config)

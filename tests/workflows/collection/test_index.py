"""`coalign index` and `coalign search` on real runs: updates, killed and failed writes, damaged and outdated indexes."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from helpers import tiny
from helpers.token_wise import TokenWise
from PIL import Image

from coalign.cli import main as cli
from coalign.errors import UserError
from coalign.runs import run as runs
from coalign.runs.run import load
from coalign.workflows.collection import embed as embed_module
from coalign.workflows.collection import index as index_module
from coalign.workflows.collection import nearest
from coalign.workflows.collection.embedding_files import is_readable
from coalign.workflows.collection.index import Changes, build_index
from coalign.workflows.collection.query import Query, open_collection
from coalign.workflows.explore.search import search


@pytest.fixture
def photos(pairs, tmp_path):
    """A copy of the pairs that may be changed."""
    return Path(shutil.copytree(pairs, tmp_path / "photos"))


@pytest.fixture
def shelf(trained, photos, tmp_path):
    build_index(trained, str(photos), tmp_path / "shelf")
    return tmp_path / "shelf"


def add(folder, name, color=(250, 250, 0)):
    path = folder / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (32, 24), color).save(path)
    return path


def found(index, **options):
    return [(hit.key, round(hit.score, 3)) for hit in search(index, **{"text": "a red thing", **options}).hits]


def vectors(index):
    shelf = open_collection(index)
    return {shelf.records.key(row): vector for row, vector in enumerate(shelf.embeddings())}


def assert_same_vectors(one, other):
    assert one.keys() == other.keys()
    for key, vector in one.items():
        np.testing.assert_allclose(vector, other[key], atol=2e-3)  # float16


def test_index_finds_what_a_search_of_the_data_finds(trained, photos, shelf):
    image = next(photos.rglob("*.png"))
    for query in ({"text": "a red thing"}, {"image": image}, {"text": "blue", "image": image, "exclude": "green"}):
        one, other = search(shelf, **query, top=64), search(trained, str(photos), **query, top=64)
        scores = {hit.key: hit.score for hit in other.hits}
        assert {hit.key for hit in one.hits} == scores.keys()
        for hit in one.hits:
            assert hit.score == pytest.approx(scores[hit.key], abs=0.02)
            assert hit.captions == (Path(hit.key).stem.replace("_", " "),)
        assert (one.query, one.num_images) == (other.query, other.num_images)
    assert {hit.key.split("/")[0] for hit in search(shelf, text="red", folder="green").hits} == {"green"}


def test_updates_embed_what_is_new_and_count_what_changed(trained, photos, shelf, tmp_path):
    again = build_index(trained, str(photos), shelf)
    assert again.changes == Changes(0, 0, 0, 64)
    first = (shelf / "v1").stat().st_ino
    assert (shelf / again.info.current).stat().st_ino == first  # nothing was written
    add(photos, "new/one")
    add(photos, "new/two")
    gone, *_, changed = sorted(photos.rglob("red_*.png"))
    gone.unlink()
    Image.new("RGB", (32, 24), (0, 0, 0)).save(changed)
    updated = build_index(trained, str(photos), shelf)
    assert updated.changes == Changes(2, 1, 1, 62)
    assert updated.lines()[0] == "Images: 2 new, 1 changed, 1 deleted, 62 kept"
    assert [path.name for path in shelf.iterdir() if path.is_dir()] == ["v2"]
    build_index(trained, str(photos), tmp_path / "fresh")
    assert_same_vectors(vectors(shelf), vectors(tmp_path / "fresh"))


def test_image_is_found_in_data_whose_order_changed(photos, shelf):
    add(photos, "aaa/first")
    collection = open_collection(shelf)
    for row in (0, 40):
        expected = Image.open(photos / collection.records.key(row)).convert("RGB")
        np.testing.assert_array_equal(np.asarray(collection.image_file(row)), np.asarray(expected))


def test_unreadable_images_are_counted_and_not_found(trained, photos, tmp_path):
    (photos / "broken.png").write_bytes(b"no image")
    (photos / "empty.png").write_bytes(b"")
    indexed = build_index(trained, str(photos), tmp_path / "shelf")
    assert (indexed.info.size, indexed.info.bad) == (64, 2)
    assert sum(indexed.skipped.values()) == 2
    assert any("Skipped: 1 (empty file)" in line for line in indexed.lines())
    collection = open_collection(tmp_path / "shelf")
    assert {"broken.png", "empty.png"}.isdisjoint(collection.records.key(row) for row in range(collection.size))
    key = collection.search(Query("a red thing"), 1)[0].key
    np.testing.assert_array_equal(
        np.asarray(collection.image_file(collection.records.row(key))), np.asarray(Image.open(photos / key))
    )
    only_bad = tmp_path / "bad"
    only_bad.mkdir()
    (only_bad / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"nothing to index: .* has no readable image"):
        build_index(trained, str(only_bad), tmp_path / "none")


def test_approximate_index_is_stored_with_its_recall(trained, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(nearest, "EXACT_BELOW", 20)
    indexed = build_index(trained, str(photos), tmp_path / "shelf")
    info = json.loads((tmp_path / "shelf/index.json").read_text())
    assert (info["kind"], info["recall"]) == ("ivf", indexed.info.recall)
    assert info["recall"] >= nearest.MIN_RECALL
    assert "approximate search, recall@10" in indexed.lines()[-1]
    build_index(trained, str(photos), tmp_path / "shelf")
    monkeypatch.undo()
    build_index(trained, str(photos), tmp_path / "exact")
    assert_same_vectors(vectors(tmp_path / "shelf"), vectors(tmp_path / "exact"))
    folder = {"folder": "green", "top": 16}
    assert {key for key, _ in found(tmp_path / "shelf", **folder)} == {
        key for key, _ in found(tmp_path / "exact", **folder)
    }
    opened = open_collection(tmp_path / "shelf")
    shutil.rmtree(next((tmp_path / "shelf").rglob("embeddings")))
    with pytest.raises(UserError, match="were updated or damaged since it was opened; open it again"):
        opened.embeddings()


# ---------------------------------------------------------------- killed, full disk

KILLED = """
import os, sys, time
from coalign.workflows.collection import {module} as module
original = module.{name}
def stop(*args, **options):
    {before}
    print("reached", flush=True)
    time.sleep(600)
module.{name} = stop
from coalign.cli.main import main
main(["index", *sys.argv[1:]])
"""
STAGES = {
    "before the first part": ("embed", "write_part", ""),
    "after the first part": ("embed", "write_part", "original(*args, **options)"),
    "before the embeddings' manifest": ("embed", "_finish", ""),
    "while links are made": ("index_files", "_link_readable", "original(*args, **options)"),
    "after the faiss index": ("index", "write_info", ""),
    "before the old version is removed": ("index", "remove_other_versions", ""),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_update_leaves_the_index_usable(trained, photos, shelf, tmp_path, stage):
    before = found(shelf, top=64)
    add(photos, "new/one")
    next(photos.rglob("green_*.png")).unlink()
    module, name, call = STAGES[stage]
    code = KILLED.format(module=module, name=name, before=call or "pass")
    command = [sys.executable, "-c", code, str(trained), str(photos), "--out", str(shelf), "--workers", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("reached"):
                break
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    if stage != "before the old version is removed":
        assert found(shelf, top=64) == before
    indexed = build_index(trained, str(photos), shelf)
    if stage != "before the old version is removed":
        assert indexed.changes == Changes(1, 0, 1, 63)
    assert len([path for path in shelf.iterdir() if path.is_dir()]) == 1
    build_index(trained, str(photos), tmp_path / "fresh")
    assert_same_vectors(vectors(shelf), vectors(tmp_path / "fresh"))


def test_a_killed_first_build_is_resumed(trained, photos, tmp_path):
    module, name, _ = STAGES["after the faiss index"]
    code = KILLED.format(module=module, name=name, before="pass")
    command = [
        sys.executable,
        "-c",
        code,
        str(trained),
        str(photos),
        "--out",
        str(tmp_path / "shelf"),
        "--workers",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while not process.stdout.readline().startswith("reached"):
            pass
        process.send_signal(signal.SIGKILL)
    with pytest.raises(UserError, match="is not an index; build it with"):
        open_collection(tmp_path / "shelf")
    parts = [path.stat().st_mtime_ns for path in tmp_path.glob("shelf/v1/embeddings/part-*")]
    assert build_index(trained, str(photos), tmp_path / "shelf").changes == Changes(64, 0, 0, 0)
    assert [path.stat().st_mtime_ns for path in tmp_path.glob("shelf/v1/embeddings/part-*")] == parts


def limited(function):
    """Fails as on a full disk, by a limit on the size of files."""

    def with_limit(*args, **options):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
        try:
            return function(*args, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return with_limit


def test_a_full_disk_is_one_sentence_and_keeps_the_index(trained, photos, shelf, monkeypatch):
    before = found(shelf)
    for number in range(40):
        add(photos, f"more/{number}", (number, 0, 0))
    for module, name, what in (
        (embed_module, "write_part", r"part-000000\.parquet"),
        (index_module, "write_faiss", "The index"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, limited(getattr(module, name)))
            with pytest.raises(UserError, match=rf"{what} could not be written .*File too large\).* kept: ") as error:
                build_index(trained, str(photos), shelf, workers=0)
        assert "\n" not in str(error.value)
        assert found(shelf) == before
    assert build_index(trained, str(photos), shelf).changes == Changes(40, 0, 0, 64)


# ---------------------------------------------------------------- damaged, outdated, moved


def edit_info(shelf, **changes):
    info = json.loads((shelf / "index.json").read_text())
    (shelf / "index.json").write_text(json.dumps({**info, **changes}))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def overwrite(path):
    """Damages rows, but not the description at the end of the file."""
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\xff" * 60 + content[64:])


DAMAGES = {
    "no info": (lambda shelf: (shelf / "index.json").unlink(), "is not an index; build it with"),
    "cut info": (lambda shelf: truncate(shelf / "index.json"), r"index\.json cannot be read: .*; delete .* and build"),
    "version": (lambda shelf: edit_info(shelf, version=99), "it has the layout 99, and this version of coalign reads 1"),
    "no faiss": (lambda shelf: (shelf / "v1/index.faiss").unlink(), r"faiss cannot be used: it is missing; run `coalign index` again"),
    "cut faiss": (lambda shelf: truncate(shelf / "v1/index.faiss"), "bytes instead of .*; run `coalign index` again"),
    "no embeddings": (lambda shelf: shutil.rmtree(shelf / "v1/embeddings"), "is damaged: .*embeddings"),
    "no part": (lambda shelf: next(shelf.rglob("part-*")).unlink(), "are not those of the index; run `coalign index` again"),
    "cut part": (lambda shelf: truncate(next(shelf.rglob("part-*"))), "is damaged: .*not a readable file.*; run `coalign index`"),
    "damaged rows": (lambda shelf: overwrite(next(shelf.rglob("part-*"))), r"is damaged: .*part-\d+\.parquet .*, which repairs it"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_sentence_and_repaired(trained, photos, shelf, name, capsys):
    damage, message = DAMAGES[name]
    before = found(shelf)
    damage(shelf)
    with pytest.raises(UserError, match=message) as error:
        open_collection(shelf)
    assert "\n" not in str(error.value)
    if name not in ("cut info", "version"):  # the sentence says to delete the folder
        assert cli.main(["index", str(trained), str(photos), "--out", str(shelf)]) == 0
        assert found(shelf) == before
        assert all(map(is_readable, shelf.rglob("part-*")))


def test_data_and_model_that_moved_or_changed(trained, photos, tmp_path):
    model = shutil.copytree(trained, tmp_path / "run")
    build_index(model, str(photos), tmp_path / "shelf")
    before = found(tmp_path / "shelf")
    photos.rename(tmp_path / "moved")
    assert found(tmp_path / "shelf") == before  # the search itself needs no data
    with pytest.raises(UserError, match=r"The images of the index .* cannot be read: No such file or folder"):
        open_collection(tmp_path / "shelf").image_file(0)
    model.rename(tmp_path / "gone")
    with pytest.raises(UserError, match=r"The model of the index .* cannot be opened: .*run does not exist"):
        open_collection(tmp_path / "shelf")


def test_a_model_that_was_trained_further_is_refused(trained, photos, shelf, tmp_path, monkeypatch):
    other = load(trained)
    with torch.no_grad():
        next(other.method.parameters()).add_(1.0)
    monkeypatch.setattr("coalign.workflows.evaluate.eval_model.load", lambda *_: other)
    with pytest.raises(UserError, match=r"has changed since .*shelf was built; build an index of it in another folder"):
        open_collection(shelf)
    with pytest.raises(UserError, match=r"shelf holds embeddings of run.* with other weights.*; choose another --out"):
        build_index(trained, str(photos), shelf)


def test_other_folders_are_refused(trained, photos, shelf, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes is not an index and has other files, such as a\.txt"):
        build_index(trained, str(photos), tmp_path / "notes")
    with pytest.raises(UserError, match="is inside the data"):
        build_index(trained, str(photos), photos / "shelf")
    other = tiny.write_pairs(tmp_path / "other", 8)
    with pytest.raises(UserError, match=r"shelf holds embeddings of other data .*; choose another --out"):
        build_index(trained, str(other), shelf)
    with pytest.raises(UserError, match="is an index, which has its data and split; omit"):
        search(shelf, str(photos), "red")
    with pytest.raises(UserError, match="is not an index; give the folder of one, or a model with --data"):
        search(trained, text="red")


# ---------------------------------------------------------------- other models


def test_open_clip_model_by_name(photos, tmp_path, capsys):
    """By the path of `open_clip:ViT-B-32:laion2b_s34b_b79k`, with a small model and weights in a file."""
    (tmp_path / "configs").mkdir()
    config = {**tiny.MODEL, "text_cfg": {**tiny.MODEL["text_cfg"], "vocab_size": 49408, "context_length": 77}}
    (tmp_path / "configs/stand-in-for-index.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "configs")
    from safetensors.torch import save_file

    weights = tmp_path / "weights.safetensors"
    save_file(open_clip.create_model("stand-in-for-index").state_dict(), weights)
    model = f"open_clip:stand-in-for-index:{weights}"
    assert cli.main(["index", model, str(photos), "--out", str(tmp_path / "shelf")]) == 0
    image = next(photos.rglob("*.png"))
    command = ["search", str(tmp_path / "shelf"), "--image", str(image), "--top", "3"]
    assert cli.main([*command, "--report", str(tmp_path / "found.html")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "Images: 64 new, 0 changed, 0 deleted, 0 kept" in lines
    assert f"  1  1.000  {image.relative_to(photos)}" in "\n".join(lines)
    assert (tmp_path / "found.html").read_text().count("<img") == 4


def test_own_similarity_reads_the_images_again(trained, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "method_class", lambda name: TokenWise)
    build_index(trained, str(photos), tmp_path / "shelf")
    expected = found(trained, data=str(photos), top=64)
    assert found(tmp_path / "shelf", top=64) == expected
    (photos / expected[0][0]).unlink()
    result = search(tmp_path / "shelf", text="a red thing", top=64, report=tmp_path / "found.html")
    assert [hit.key for hit in result.hits] == [key for key, _ in expected[1:]]
    assert "Skipped images near the query that cannot be read again: 1" in result.account

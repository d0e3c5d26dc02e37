"""embed() and update_embeddings(): what is in the files, which samples are embedded, and what is refused."""

import io
import json
import os
import resource
import shutil
import tracemalloc

import faiss
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from helpers import tiny
from helpers.data_files import write_tar
from helpers.letters import DIM, Letters, expected_image, expected_text, write_image, write_images
from PIL import Image
from rich.console import Console

import coalign
from coalign.cli import main as cli
from coalign.data.sources.base import Source
from coalign.errors import BadSample, UserError
from coalign.runs.run import load
from coalign.training.checkpoint import RunLock
from coalign.types import Record, dot_product
from coalign.workflows.collection import embed as embed_module
from coalign.workflows.collection.embed import Update, embed, update_embeddings
from coalign.workflows.collection.embedding_files import LOCK, MANIFEST, EmbeddingFiles
from coalign.workflows.image_files import load_images
from coalign.workflows.models.export import export

PROBE = 2  # images that are embedded to identify the model


def rows(path):
    return {row["key"]: row for row in EmbeddingFiles.open(path).table().to_pylist()}


def assert_same(one, other):
    """The same samples; embeddings that were computed in other batches may differ by rounding."""
    assert one.keys() == other.keys()
    for key, row in one.items():
        for column, value in row.items():
            if column in ("image", "text") and value is not None:
                np.testing.assert_allclose(value, other[key][column], atol=1e-5)
            else:
                assert value == other[key][column]


def states(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*")}


def letters(folder, out, **options):
    return embed(Letters().encoder(), str(folder), out, **{"chunk": 4, "precision": "float32", **options})


def numbered(path):
    return int(path.removesuffix(".png").rpartition("/")[2])


# ---------------------------------------------------------------- what is in the files


def test_rows_are_what_the_arithmetic_says(tmp_path):
    data = write_images(tmp_path / "data", 10)
    (data / "0003.txt").write_text("zebra\nyak and zebu\n")
    (data / "0004.txt").write_text("")
    embedded = letters(data, tmp_path / "out")
    assert embedded.manifest["counts"] == {"samples": 10, "images": 10, "texts": 9, "unusable": 0}
    table = rows(tmp_path / "out")
    assert len(table) == 10
    for key, row in table.items():
        assert row["path"] == key
        np.testing.assert_allclose(row["image"], expected_image(numbered(key)), atol=1e-6)
        captions = (data / key).with_suffix(".txt").read_text().split("\n")
        captions = [caption for caption in captions if caption]
        assert row["captions"] == captions
        if captions:
            np.testing.assert_allclose(row["text"], expected_text(captions), atol=1e-6)
        else:
            assert row["text"] is None


def test_a_run_embeds_as_its_encoder_does(trained, pairs, tmp_path):
    assert cli.main(["embed", str(trained), str(pairs), "--out", str(tmp_path / "out"), "--chunk", "20"]) == 0
    encoder = load(trained).encoder()
    for row in list(rows(tmp_path / "out").values())[::13]:
        image = encoder.encode_image(load_images(pairs / row["path"], encoder))[0]
        text = encoder.encode_text(row["captions"])[0]
        np.testing.assert_allclose(row["image"], image / image.norm(), atol=1e-3)
        np.testing.assert_allclose(row["text"], text / text.norm(), atol=1e-3)


def test_an_export_embeds_as_the_run(trained, pairs, tmp_path):
    export(trained, "open_clip", tmp_path / "export")
    for name, model in (("run", trained), ("export", tmp_path / "export")):
        embed(model, str(pairs), tmp_path / name / "out", precision="float32")
    ours, theirs = (EmbeddingFiles.open(tmp_path / name / "out").texts()[0] for name in ("run", "export"))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("precision", ["float16", "float32"])
@pytest.mark.parametrize("out", ["out", "out.parquet"])
def test_other_libraries_read_the_files(tmp_path, precision, out):
    data, out = write_images(tmp_path / "data", 30), tmp_path / out
    (data / "0007.png").write_bytes(b"broken")
    letters(data, out, precision=precision)
    files = EmbeddingFiles.open(out)
    images, at = files.images()
    assert images.dtype == np.float32
    assert at.tolist() == [row for row in range(30) if row != 7]
    np.testing.assert_allclose(images, [expected_image(number) for number in at], atol=1e-3)

    frame = pd.read_parquet(out)
    assert frame["image"].isna().tolist() == [row == 7 for row in range(30)]
    vectors = np.stack(frame["image"].dropna()).astype("float32")
    assert frame["image"][0].dtype == precision
    assert np.array_equal(vectors, images)

    index = faiss.IndexFlatIP(DIM)
    index.add(vectors)
    query = np.stack([expected_image(11)]).astype("float32")
    scores, found = index.search(query, 5)
    assert found[0].tolist() == np.argsort(-(images @ query[0]))[:5].tolist()
    assert at[found[0, 0]] == 11
    assert scores[0, 0] == pytest.approx(1, abs=1e-3)

    columns = pa.dataset.dataset(out, format="parquet").schema  # what LanceDB ingests
    vector = pa.list_(getattr(pa, precision)(), DIM)
    assert columns.field("image").type.equals(vector)
    assert columns.field("text").type.equals(vector)


def test_a_file_has_the_rows_of_a_folder(tmp_path):
    data = write_images(tmp_path / "data", 11)
    letters(data, tmp_path / "out")
    letters(data, tmp_path / "out.parquet")
    folder, file = (EmbeddingFiles.open(tmp_path / name) for name in ("out", "out.parquet"))
    assert file.table().equals(folder.table())
    assert file.keys() == folder.keys()
    assert (len(file), file.dim, file.manifest["state"]) == (11, DIM, folder.manifest["state"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out", "out.parquet"]


@pytest.mark.parametrize(("kind", "other"), [("images", "texts"), ("texts", "images")])
def test_one_kind_alone(tmp_path, kind, other):
    data, model = write_images(tmp_path / "data", 6), Letters()
    embed(model.encoder(), str(data), tmp_path / "out", **{other: False})
    files = EmbeddingFiles.open(tmp_path / "out")
    assert other.removesuffix("s") not in files.table().column_names
    assert len(getattr(files, kind)()[0]) == 6
    with pytest.raises(UserError, match=f"without embeddings of {other}"):
        getattr(files, other)()
    assert getattr(model, other) <= 3  # to identify the model
    with pytest.raises(UserError, match="nothing to embed"):
        embed(model.encoder(), str(data), tmp_path / "none", images=False, texts=False)


def test_bad_images_are_counted_and_listed(tmp_path, capsys, trained, pairs):
    data = shutil.copytree(pairs, tmp_path / "data")
    first, second, third = sorted(data.rglob("*.png"))[:3]
    first.write_bytes(first.read_bytes()[:150])
    second.write_bytes(b"")
    third.write_bytes(b"<html>not found</html>")
    assert cli.main(["embed", str(trained), str(data), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    files = EmbeddingFiles.open(tmp_path / "out")
    keys = [path.relative_to(data).as_posix() for path in (first, second, third)]
    table = rows(tmp_path / "out")
    assert [key for key, row in table.items() if row["image"] is None] == keys
    for key in keys:
        assert table[key]["text"] is not None
        assert table[key]["problem"] in files.manifest["skipped"]
        assert f"such as {key}" in printed
    assert files.manifest["counts"] == {"samples": 64, "images": 61, "texts": 64, "unusable": 3}
    assert [entry["keys"] for entry in files.manifest["skipped"].values()] == [[key] for key in keys]


def test_texts_longer_than_the_context_are_reported(tmp_path):
    data = write_images(tmp_path / "data", 9)
    (data / "0005.txt").write_text("one two three four five six")
    encoder = Letters().encoder(num_tokens=lambda text: len(text.split()), context_length=5)
    embedded = embed(encoder, str(data), tmp_path / "out", chunk=4)
    assert embedded.account[0].startswith("1 of 9 texts")


# ---------------------------------------------------------------- updates


def test_an_update_embeds_what_is_new_or_changed_alone(tmp_path):
    data, out = write_images(tmp_path / "data", 16), tmp_path / "out"
    letters(data, out)
    before = states(out)
    write_image(data, "0001", 101)  # another image
    (data / "0009.txt").write_text("another caption")
    (data / "0010.png").unlink()
    write_image(data, "0200", 200, "new")
    model = Letters()
    update = update_embeddings(model.encoder(), str(data), out)
    assert update == Update(added=1, changed=2, deleted=1, unchanged=13, bad=0)
    assert model.images == 3 + PROBE
    assert states(out).keys() == {*before, "part-000004.parquet"}
    changed = {name for name in before if states(out)[name] != before[name]}
    assert changed == {"part-000000.parquet", "part-000002.parquet"}
    letters(data, tmp_path / "again")
    assert_same(rows(out), rows(tmp_path / "again"))
    np.testing.assert_allclose(rows(out)["0001.png"]["image"], expected_image(101), atol=1e-6)

    state = EmbeddingFiles.open(out).manifest["state"]
    before = states(out)
    assert update_embeddings(model.encoder(), str(data), out) == Update(0, 0, 0, 16, 0)
    assert states(out) == before
    assert EmbeddingFiles.open(out).manifest["state"] == state


def test_new_samples_fill_the_last_part(tmp_path):
    data, out = write_images(tmp_path / "data", 6), tmp_path / "out"
    letters(data, out)
    for number in range(6, 13):
        write_image(data, f"{number:04d}", number, "more")
        assert letters(data, out).update.added == 1
    assert [pq.read_metadata(path).num_rows for path in EmbeddingFiles.open(out).files] == [4, 4, 4, 1]
    assert EmbeddingFiles.open(out).keys() == [f"{number:04d}.png" for number in range(13)]


@pytest.mark.parametrize("seed", range(8))
def test_any_sequence_of_changes(tmp_path, seed):
    """After every update, the folder has a row for each image, with the embedding of its content."""
    rng = np.random.default_rng(seed)
    data, out = write_images(tmp_path / "data", 12), tmp_path / "out"
    content = {f"{number:04d}": number for number in range(12)}
    for step in range(8):
        edited = set()
        for _ in range(rng.integers(0, 12)):
            name = str(rng.choice([*content, f"{rng.integers(40):04d}"]))
            if name in content and rng.random() < 0.4 and len(content) > 1:
                (data / f"{name}.png").unlink()
                (data / f"{name}.txt").unlink()
                del content[name]
            else:
                content[name] = int(rng.integers(1000))
                write_image(data, name, content[name], f"step {step}")
                os.utime(data / f"{name}.png", ns=(0, int(rng.integers(10**18))))
                edited.add(name)
        model = Letters()
        update = embed(model.encoder(), str(data), out, chunk=int(rng.integers(2, 6)), precision="float32").update
        assert update.added + update.changed == len(edited & content.keys()) if step else len(content)
        assert update.added + update.changed == model.images - PROBE
        table = rows(out)
        assert table.keys() == {f"{name}.png" for name in content}
        for name, number in content.items():
            np.testing.assert_allclose(table[f"{name}.png"]["image"], expected_image(number), atol=1e-6)


def test_everything_is_replaced(tmp_path):
    data, out = write_images(tmp_path / "data", 9), tmp_path / "out"
    letters(data, out)
    shutil.rmtree(data)
    for number in range(20, 25):
        write_image(data, f"{number:04d}", number, "new")
    assert letters(data, out).update == Update(5, 0, 9, 0, 0)
    assert sorted(rows(out)) == [f"{number:04d}.png" for number in range(20, 25)]


def _shard_entries(numbers):
    entries = []
    for number in numbers:
        image = io.BytesIO()
        Image.new("RGB", (8, 8), (number, 2 * number, 0)).save(image, "PNG")
        entries += [(f"{number:04d}.png", image.getvalue()), (f"{number:04d}.txt", f"caption {number}".encode())]
    return entries


def test_shards_that_are_added_or_rewritten(tmp_path):
    data, out, model = tmp_path / "data", tmp_path / "out", Letters()
    write_tar(data / "00000.tar", _shard_entries(range(6)))
    letters(data, out)
    write_tar(data / "00001.tar", _shard_entries(range(6, 9)))
    entries = _shard_entries(range(6))
    entries[4] = ("0002.png", _shard_entries([77])[0][1])
    write_tar(data / "00000.tar", entries)
    assert update_embeddings(model.encoder(), str(data), out) == Update(3, 1, 0, 5, 0)
    assert model.images == 4 + PROBE


def test_images_in_a_parquet_table(tmp_path):
    images = [entry[1] for entry in _shard_entries(range(5))[::2]]
    data, out = tmp_path / "table.parquet", tmp_path / "out"
    pq.write_table(pa.table({"image": images, "caption": list("abcde")}), data)
    letters(data, out)
    assert letters(data, out).update == Update(0, 0, 0, 5, 0)
    images[3] = _shard_entries([99])[0][1]
    pq.write_table(pa.table({"image": images, "caption": list("abcde")}), data)
    assert letters(data, out).update == Update(0, 1, 0, 4, 0)
    assert rows(out)["table.parquet row 0"]["path"] is None


def test_samples_that_share_a_key_keep_a_row_each(tmp_path, monkeypatch):
    class Same(Colors):
        def record(self, index):
            return Record("same", (f"caption {index}",))

    monkeypatch.setattr(embed_module, "open_as_trained", lambda *_, **__: Same(5))
    for expected in (Update(5, 0, 0, 0, 0), Update(0, 0, 0, 5, 0)):
        assert letters("same", tmp_path / "out").update == expected
    captions = EmbeddingFiles.open(tmp_path / "out").table()["captions"].to_pylist()
    assert captions == [[f"caption {index}"] for index in range(5)]


def test_links_keep_the_rows_of_before(tmp_path):
    data, out = write_images(tmp_path / "data", 10), tmp_path / "out"
    letters(data, out)
    EmbeddingFiles.open(out).link_to(tmp_path / "kept")
    before = rows(out)
    write_image(data, "0001", 101)
    (data / "0002.png").unlink()
    letters(data, out)
    assert rows(tmp_path / "kept") == before
    assert rows(out) != before


# ---------------------------------------------------------------- interruptions and limits


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, monkeypatch):
    data, out = write_images(tmp_path / "data", 16), tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    write_part = embed_module.write_part

    def write(path, table):
        if path.name == "part-000002.parquet":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # the file system refuses larger files
        write_part(path, table)

    monkeypatch.setattr(embed_module, "write_part", write)
    sentence = r"part-000002.parquet could not be written \(.*File too large.*\); what is complete is kept"
    try:
        with pytest.raises(UserError, match=sentence) as error:
            letters(data, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        monkeypatch.undo()
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in out.glob("[!.]*")) == [MANIFEST, "part-000000.parquet", "part-000001.parquet"]
    before = states(out)
    with pytest.raises(UserError, match="not finished"):
        EmbeddingFiles.open(out)
    assert letters(data, out).update == Update(8, 0, 0, 8, 0)
    assert {name: states(out)[name] for name in before} == before
    letters(data, tmp_path / "again")
    assert_same(rows(out), rows(tmp_path / "again"))


class Colors(Source):
    """Images of one color, made when they are read."""

    name = "colors"

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def record(self, index):
        if index % 1000 == 999:
            raise BadSample("unusable row")
        return Record(f"{index:06d}", (f"caption {index}",))

    def image(self, index):
        return np.full((8, 8, 3), index % 251, np.uint8)


def test_memory_is_bounded_by_a_chunk(tmp_path, monkeypatch):
    peaks = []
    for count in (1000, 2000, 8000):  # the first one also loads modules
        monkeypatch.setattr(embed_module, "open_as_trained", lambda *_, count=count, **__: Colors(count))
        encoder = Letters().encoder(image_size=32)  # 3 kB of pixels per image
        tracemalloc.start()
        embed(encoder, "colors", tmp_path / f"{count}", chunk=500, workers=0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[2] - peaks[1]) / 6000 < 100  # bytes per sample: some numbers for each
    skipped = EmbeddingFiles.open(tmp_path / "8000").manifest["skipped"]
    assert skipped["unusable row"]["count"] == 8


def test_progress_has_the_time_left(tmp_path, monkeypatch, capsys):
    times = iter(range(0, 100_000, 16))
    monkeypatch.setattr("coalign.progress._clock", lambda: float(next(times)))
    out = io.StringIO()
    letters(write_images(tmp_path / "data", 8), tmp_path / "out", images=False, console=Console(file=out, width=100))
    assert out.getvalue().startswith("Device: ")
    lines = capsys.readouterr().err.splitlines()
    assert "Reading samples: 3 of 8, 1 min 20 s left" in lines
    assert any(line.startswith("Embedding: ") and line.endswith(" left") for line in lines)


# ---------------------------------------------------------------- refusals


@pytest.fixture
def made(tmp_path):
    data = write_images(tmp_path / "data", 6)
    letters(data, tmp_path / "out")
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": Letters().encoder(name="other", image_size=16)}, r"of another model \(letters, not other\)"),
        ({"model": Letters().encoder(preprocess=lambda image: image)}, r"of letters with other weights or settings"),
        ({"data": "scenes:8"}, r"of other data \(.*data, not scenes:8\)"),
        ({"precision": "float16"}, r"with another --precision \(float32\)"),
        ({"texts": False}, r"with another --texts \(True\)"),
        ({"reading": coalign.config.DataConfig(group_column="folder")}, r"with another --group-column \(None\)"),
    ],
)
def test_a_folder_of_other_embeddings_is_refused_by_name(made, changes, sentence):
    options = {"model": Letters().encoder(), "data": str(made / "data"), "precision": "float32", **changes}
    before = states(made / "out")
    with pytest.raises(UserError, match=f"holds embeddings {sentence}; choose another --out"):
        embed(out=made / "out", **options)
    assert states(made / "out") == before
    EmbeddingFiles.open(made / "out")


def test_other_weights_are_refused(tmp_path, trained, pairs):
    run = load(trained)
    embed(run, str(pairs), tmp_path / "out")
    for parameter in run.method.parameters():
        parameter.data.mul_(1.5)
    with pytest.raises(UserError, match="with other weights"):
        embed(run, str(pairs), tmp_path / "out")
    with pytest.raises(UserError, match="with other weights"):
        update_embeddings(run, str(pairs), tmp_path / "out")


def test_other_outputs_are_refused(made):
    file = made / "file"
    file.write_text("")
    other = made / "other"
    other.mkdir()
    (other / "notes.txt").write_text("")
    (made / "vectors.parquet").write_text("")
    for out, sentence in (
        (file, "is a file"),
        (other, "holds no embeddings"),
        (made / "vectors.parquet", "exists; delete it"),
        (made / "data" / "vectors", "is inside the data"),
        (file / "out", "cannot be used: Not a directory"),
    ):
        with pytest.raises(UserError, match=sentence):
            letters(made / "data", out)
    for options, sentence in (
        ({"precision": "float64"}, "float16 or float32"),
        ({"chunk": 0}, "--chunk is 0"),
        ({"split": "test"}, "no split named 'test'"),
        ({"device": "gpu"}, "no device 'gpu'"),
    ):
        with pytest.raises(UserError, match=sentence):
            letters(made / "data", made / "new", **options)
    assert not (made / "new").exists()


def test_a_folder_in_use_is_refused(made):
    before = states(made / "out")
    write_image(made / "data", "0001", 101)
    with RunLock(made / "out", LOCK), pytest.raises(UserError, match=r"out is in use by process .*: wait until"):
        letters(made / "data", made / "out")
    assert states(made / "out") == before
    with RunLock(made / "new", LOCK):  # as a killed command leaves it
        pass
    letters(made / "data", made / "new")
    letters(made / "data", made / "out")
    assert_same(rows(made / "out"), rows(made / "new"))


def test_a_model_with_another_similarity_is_refused(tmp_path):
    encoder = Letters().encoder(similarity=lambda images, texts: dot_product(images, texts))
    with pytest.raises(UserError, match="by a similarity of its own"):
        embed(encoder, str(write_images(tmp_path / "data", 3)), tmp_path / "out")


def test_folders_that_cannot_be_read(made):
    out = made / "out"
    with pytest.raises(UserError, match="holds no embeddings"):
        EmbeddingFiles.open(made / "data")
    with pytest.raises(UserError, match=r"none\.parquet does not exist"):
        EmbeddingFiles.open(made / "none.parquet")
    pq.write_table(pa.table({"a": [1]}), made / "other.parquet")
    with pytest.raises(UserError, match=r"other\.parquet is not a readable file of embeddings"):
        EmbeddingFiles.open(made / "other.parquet")
    part = out / "part-000001.parquet"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(UserError, match=r"part-000001\.parquet is not a readable"):
        EmbeddingFiles.open(out).table()
    part.unlink()
    assert letters(made / "data", out).update == Update(2, 0, 0, 4, 0)
    manifest = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps({**manifest, "version": 0}))
    with pytest.raises(UserError, match="of this version"):
        EmbeddingFiles.open(out)
    (out / MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"_manifest\.json cannot be read"):
        EmbeddingFiles.open(out)


def test_oner_has_vectors_with_its_projector(oner, pairs, tmp_path):
    with pytest.raises(UserError, match="add --similarity projector"):
        embed(oner, str(pairs), tmp_path / "out")
    embed(oner, str(pairs), tmp_path / "out", similarity="projector", precision="float32")
    encoder = load(oner, similarity="projector").encoder()
    row = next(iter(rows(tmp_path / "out").values()))
    np.testing.assert_allclose(
        row["image"], encoder.encode_image(load_images(pairs / row["path"], encoder))[0], atol=1e-5
    )
    assert update_embeddings(oner, str(pairs), tmp_path / "out") == Update(0, 0, 0, 64, 0)


def test_the_command_refuses_a_model_without_vectors(tmp_path, capsys, pairs, model_file):
    run = tmp_path / "filip"
    assert cli.main(tiny.train_args(pairs, run, model_file, recipe="filip", epochs=0.5, evals=0)) == 0
    capsys.readouterr()
    assert cli.main(["embed", str(run), str(pairs), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "by a similarity of its own" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()

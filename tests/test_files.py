import ast
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import coalign
from coalign.files import save_tensors, write_atomically, write_json, write_text

SWAP_FOLDERS = {
    "data/prepare/writing.py",
    "data/scenes/source.py",
    "experiments/tables/trials.py",
    "training/checkpoint.py",
    "workflows/collection/index_files.py",
    "workflows/models/export.py",
    "workflows/models/import_model.py",
    "workflows/models/interpolate.py",
}


def test_readers_never_see_half_a_file(tmp_path):
    path = tmp_path / "out.txt"
    texts = {letter * 200_000 for letter in "ab"}
    write_text(path, "a" * 200_000)
    seen, done = set(), threading.Event()

    def read():
        while not done.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for text in [*texts] * 20:
        write_text(path, text)
    done.set()
    reader.join()
    assert seen
    assert seen <= texts


@pytest.mark.parametrize("failure", ["write", "fsync", "replace"])
def test_failed_write_keeps_the_old_file_and_no_temporary_file(tmp_path, monkeypatch, failure):
    path = tmp_path / "out.txt"
    write_text(path, "old")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    def write(temporary):
        temporary.write_text("half")
        if failure == "write":
            full_disk()

    if failure != "write":
        monkeypatch.setattr(os, failure, full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_numpy_finds_its_suffix(tmp_path):
    path = tmp_path / "arrays.npz"
    write_atomically(path, lambda temporary: np.savez(temporary, numbers=np.arange(3)))
    assert np.load(path)["numbers"].tolist() == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [path]


def test_a_fixed_temporary_overwrites_what_a_killed_process_left(tmp_path):
    path, temporary = tmp_path / "shard.tar", tmp_path / "shard.tar.part"
    temporary.write_text("half of it")
    write_atomically(path, lambda to: to.write_text("whole"), temporary=temporary)
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_json_options_and_an_unserializable_value(tmp_path):
    path = tmp_path / "values.json"
    write_json(path, {"where": Path("a")}, indent=1, default=str)
    assert path.read_text() == '{\n "where": "a"\n}\n'
    write_json(path, {"a": [1]})
    assert path.read_text() == json.dumps({"a": [1]}, indent=2) + "\n"
    with pytest.raises(TypeError):
        write_json(path, {"a": Path("a")})
    assert json.loads(path.read_text()) == {"a": [1]}


def test_only_the_atomic_writer_replaces_files():
    root = Path(coalign.__file__).parent
    found = {path.relative_to(root).as_posix() for path in root.rglob("*.py") if replaces_paths(path)}
    assert found == {"files.py", *SWAP_FOLDERS}


def replaces_paths(module):
    """Whether the module uses os.replace, os.rename, or these methods of Path. With one argument they are Path's: str.replace takes two."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        match node:
            case ast.Attribute(value=ast.Name("os"), attr="replace" | "rename"):
                return True
            case ast.ImportFrom(module="os"):
                return True
            case ast.Call(func=ast.Attribute(attr="replace" | "rename"), args=[_], keywords=[]):
                return True
    return False


def test_tensor_files_have_the_usual_permissions(tmp_path):
    """Colleagues can read checkpoints and exports on a shared disk."""
    tensors = {"a": torch.arange(3)}
    save_tensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    (tmp_path / "usual").write_text("")
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [0, 1, 2]


def test_only_one_function_writes_tensor_files():
    sources = Path(coalign.__file__).parent.rglob("*.py")
    assert [path.name for path in sources if "import save_file" in path.read_text()] == ["files.py"]

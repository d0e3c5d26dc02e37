"""The command line: help without importing torch, and one-line error messages with exit code 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny

from coalign.cli import main as cli

HELP = """
import contextlib, io, json, sys
from coalign.cli import main as cli
texts = {}
for name in ["", *cli.COMMANDS, "data"]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            code = cli.main([*name.split(), "--help"])
        except SystemExit as error:
            code = error.code or 0
    texts[name] = [code, out.getvalue()]
heavy = [module for module in ("torch", "torchvision", "open_clip", "timm", "sklearn", "matplotlib") if module in sys.modules]
print(json.dumps([texts, heavy]))
"""


@pytest.fixture(scope="module")
def helps():
    """Command -> (exit code, help), all from one process; and the heavy packages that it imported."""
    environment = {**os.environ, "COLUMNS": "120"}
    result = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True, env=environment)
    return json.loads(result.stdout)


def test_help_imports_no_torch(helps):
    assert helps[1] == []


def test_every_command_has_help_and_is_listed(helps):
    texts = helps[0]
    for name in cli.COMMANDS:
        code, text = texts[name]
        assert code == 0
        assert f"usage: coalign {name}" in text
        assert f"coalign {name}" in texts[""][1]
        assert cli.COMMANDS[name].summary in texts[""][1]
        if name.startswith("data "):
            assert f"coalign {name}" in texts["data"][1]
    assert (texts[""][0], texts["data"][0]) == (0, 0)
    assert "coalign eval" not in texts["data"][1]
    assert texts[""][1].endswith("\n  coalign demo\n")
    assert "coalign train --data scenes" not in texts["data"][1]


OPTIONS = {
    "train": "data out recipe resume dry-run device model pretrained image-tower text-tower init-from image-size context-length "
    "tokenizer batch-size micro-batch epochs optimizer lr start-lr final-lr warmup-fraction warmup-steps weight-decay betas eps "
    "momentum max-grad-norm test-fraction "
    "precision compile batch-norm-group seed workers val-fraction val-data classes evals patience save-every max-bad-fraction "
    "max-non-finite probe train-fraction unpaired-captions val-by captions-from prompts skip-data-checks group-column "
    "gradient-checkpointing group-look-alikes image-cache device-views temperature max-logit-scale multi-positive",
    "profile": "data recipe steps device model batch-size micro-batch workers lr temperature",
    "eval": "tasks weights split classes label captions-from prompts data-root preprocess similarity precision cache epochs train-data "
    "json report device workers",
    "compare": "report json",
    "demo": "data out",
    "benchmark": "data out methods minutes epochs fractions seeds jobs report json context-length captions-from "
    "skip-data-checks",
    "classify": "labels out top prompts device workers",
    "localize": "image text out device",
    "space": "data out pairs similarity device",
    "index": "out split device workers captions-from",
    "search": "data text image exclude tags folder top split report device workers",
    "embed": "out split precision images texts chunk similarity device workers image-column caption-column tag-column",
    "serve": "port host token device",
    "export": "to out weights similarity",
    "import": "out",
    "interpolate": "alpha out device",
    "card": "out",
    "reproduce": "data out seeds jobs arms",
    "data scenes": "out level size train seed swap",
    "data openclipart": "out download from max-side",
    "data emoji": "out vendors language max-side",
    "data check": "report limit",
    "data curate": "out min-side drop-chinese",
    "data paraphrase": "out apertium marian device",
    "data queries": "out",
    "data tokenizer": "out vocab-size",
    "models": "",
    "recipes": "",
}


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help_explains_every_option(helps, name):
    explanations = parse_help(helps[0][name][1])
    expected = {f"--{option}" for option in OPTIONS[name].split()}
    assert expected <= explanations.keys(), expected - explanations.keys()
    for option, explanation in explanations.items():
        words = explanation.split("(default")[0].split("(required")[0].split()
        assert len(words) >= 2, f"{option} is not explained: {explanation!r}"


def parse_help(text):
    """Option -> explanation, from the boxes that tyro prints."""
    explanations, current = {}, None
    for line in text.replace("│", " ").splitlines():
        if line.startswith("  -") and line.strip("- "):
            names, _, explanation = line.strip().partition("  ")
            current = next(word.strip(",") for word in names.split() if word.startswith("--"))
            explanations[current] = explanation
        elif current and line.startswith("     "):
            explanations[current] += " " + line.strip()
        else:
            current = None
    return {name: explanation.strip() for name, explanation in explanations.items() if name != "--help"}


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("coalign 0.")


# ---------------------------------------------------------------- errors


def error_of(capsys, *args):
    """The one-line error message of a command that fails."""
    assert cli.main([str(word) for word in args]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("coalign: ")
    assert "Traceback" not in captured.err + captured.out
    return captured.err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("trian --data x --out y", "did you mean 'train'?"),
        ("data scens --out y", "did you mean 'data scenes'?"),
        ("frobnicate", "`coalign --help`"),
        ("train --out y", "--data"),
        ("train --data x", "--out"),
        ("train --data x --out y --batchsize 4", "--batch-size"),
        ("train --data x --out y --bath-size 4", "--batch-size"),
        ("train --data x --out y --no-such-thing 4", "--no-such-thing"),
        ("train --data x --out y --batch-size many", "many"),
        ("train --data x --out y --precision bf17", "bf17"),
        ("train --data x --out y --resume yes", "yes"),
        ("train --data x --out y --epochs 0", "coalign: --epochs is 0.0, but must be more than 0.\n"),
        ("train --data x --out y --probe", "coalign: --probe needs classes; give them with --classes FILE.\n"),
        ("profile --data x --workers -1", "coalign: --workers is -1, but must be at least 0.\n"),
        ("train --data x --out y --recipe clop", "did you mean clip"),
        ("train --data x --out y --recipe", "--recipe"),
        ("train --data x --out y extra", "extra"),
        ("eval --tasks retrieval:x", "--tasks"),
        ("eval runs/x", "--tasks"),
        ("eval runs/x --tasks", "--tasks"),
        ("eval", "required"),
        ("eval runs/x --tasks retrieval", "TASK:DATA"),
        ("eval runs/x --tasks retrieval:", "TASK:DATA"),
        ("eval runs/x --tasks retreival:x", "did you mean retrieval"),
        ("eval no/such/run --tasks retrieval:x", "no/such/run does not exist"),
        ("compare", "two runs or more"),
        ("compare runs/x", "two runs or more"),
        ("compare no/such/run no/other/run", "no/such/run does not exist"),
        ("compare runs/x ./runs/x", "runs/x is given twice"),
        ("compare runs/x runs/y --data z", "--data"),
        ("benchmark --out y", "--data"),
        ("benchmark --data x", "--out"),
        ("benchmark runs/x --data x --out y", "runs/x"),
        ("data check no/such/data", "No such file or folder: no/such/data"),
        ("data check scenes:many", "scenes"),
        ("data tokenizer no/such/data --out t.json", "No such file or folder: no/such/data"),
        ("data openclipart --out x", "--from"),
        ("data scenes --out x --size big", "big"),
        ("data scenes", "--out"),
    ],
)
def test_invalid_commands_and_options(capsys, monkeypatch, tmp_path, words, hint):
    monkeypatch.chdir(tmp_path)
    error = error_of(capsys, *words.split())
    assert hint in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"model": "ViT-B-33"}, "ViT-B-32"),
        ({"model": "timm:resnet51"}, "resnet"),
        ({"model": "absent.json"}, "absent.json"),
        ({"data": "no/such/data"}, "No such file or folder: no/such/data"),
        ({"val_data": "no/such/data"}, "No such file or folder: no/such/data"),
        ({"tokenizer": "no-such.json"}, "no-such.json"),
        ({"pretrained": "no-such"}, "no-such"),
        ({"classes": "no-such.txt"}, "no-such.txt"),
        ({"device": "gpu"}, "cpu, cuda, cuda:N or mps"),
        ({"device": "cuda:99"}, "CUDA devices"),
        ({"batch_size": 1}, "--batch-size 2 or more"),
        ({"batch_size": 1000}, "--batch-size"),
        ({"precision": "fp16"}, "bf16"),
        ({"lr": -1}, "lr is -1"),
        ({"final_lr": 1}, "final_lr"),
        ({"epochs": 0}, "--epochs"),
        ({"epochs": "nan"}, "--epochs"),
        ({"save_every": 0}, "--save-every"),
        ({"micro_batch": -1}, "--micro-batch"),
        ({"val_fraction": 1.5}, "--val-fraction"),
        ({"workers": -1}, "--workers"),
        ({"evals": -2}, "--evals"),
        ({"patience": 0}, "--patience"),
        ({"context_length": 1}, "--context-length"),
        ({"max_non_finite": 0}, "--max-non-finite"),
        ({"max_bad_fraction": 2}, "--max-bad-fraction"),
        ({"batch_norm_group": 0}, "--batch-norm-group"),
        ({"image_size": 0}, "--image-size"),
        ({"max_grad_norm": 0}, "--max-grad-norm"),
        ({"temperature": 0}, "temperature"),
        ({"max_logit_scale": 0.5}, "max_logit_scale"),
    ],
)
def test_invalid_training_settings(capsys, tmp_path, pairs, model_file, changes, hint):
    args = tiny.train_args(pairs, tmp_path / "run", model_file, **changes)
    assert hint in error_of(capsys, *args)
    assert not (tmp_path / "run" / "config.json").exists()  # so that the corrected command can use the folder


def test_batch_sizes_that_do_not_fit_the_batch_norm_groups(capsys, tmp_path, pairs):
    model = tmp_path / "bn.json"
    model.write_text(json.dumps({**tiny.MODEL, "vision_cfg": {"image_size": 32, "timm_model_name": "test_resnet"}}))
    error = error_of(capsys, *tiny.train_args(pairs, tmp_path / "run", model, batch_norm_group=3))
    assert "groups of 3 samples" in error
    assert "--batch-norm-group" in error
    error = error_of(capsys, *tiny.train_args(pairs, tmp_path / "run", model, batch_norm_group=4, micro_batch=3))
    assert "--micro-batch, 3" in error


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"embed_dim": 16}', '{"embed_dim": 16, "vision_cfg": {}, "text_cfg": {"wdth": 3}}']
)
def test_invalid_model_files(capsys, tmp_path, pairs, content):
    model = tmp_path / "model.json"
    model.write_text(content)
    assert "model.json" in error_of(capsys, *tiny.train_args(pairs, tmp_path / "run", model))


def test_unusable_output_folders(capsys, tmp_path, pairs, model_file, trained):
    error = error_of(capsys, *tiny.train_args(pairs, trained, model_file))
    assert "already contains a run" in error
    assert "--resume auto" in error
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in error_of(capsys, *tiny.train_args(pairs, file, model_file))
    assert str(file) in error_of(capsys, *tiny.train_args(pairs, file / "run", model_file))
    other = tmp_path / "weights"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"")
    assert "other files" in error_of(capsys, *tiny.train_args(pairs, other, model_file))


def test_invalid_class_files(capsys, tmp_path, pairs, trained):
    classes = tmp_path / "classes.txt"
    task = ("--tasks", f"zeroshot:{pairs}", "--classes", classes)
    assert "classes.txt" in error_of(capsys, "eval", trained, *task)
    classes.write_text("red\nblue\nred\n")
    error = error_of(capsys, "eval", trained, *task)
    assert "'red' is repeated" in error
    classes.write_text("zebra\nyak\n")
    error = error_of(capsys, "eval", trained, *task)
    assert "No sample" in error
    assert "'blue'" in error
    classes.write_bytes(b"caf\xe9\n")
    assert "UTF-8" in error_of(capsys, "eval", trained, *task)
    classes.write_text("\n\n")
    assert "classes" in error_of(capsys, "eval", trained, *task)


def test_invalid_evaluations(capsys, tmp_path, pairs, trained):
    unlabeled = tmp_path / "flat"
    unlabeled.mkdir()
    for path in sorted(pairs.rglob("*.png"))[:4]:
        (unlabeled / path.name).write_bytes(path.read_bytes())
    assert "--label" in error_of(capsys, "eval", trained, "--tasks", f"zeroshot:{unlabeled}")
    assert "no split named 'vall'" in error_of(
        capsys, "eval", trained, "--tasks", f"retrieval:{pairs}", "--split", "vall"
    )
    assert "first" in error_of(capsys, "eval", trained, "--weights", "first", "--tasks", f"retrieval:{pairs}")
    assert "no-such" in error_of(capsys, "eval", trained, "--prompts", "no-such", "--tasks", f"zeroshot:{pairs}")
    assert "colour" in error_of(capsys, "eval", trained, "--label", "colour", "--tasks", f"zeroshot:{pairs}")
    assert "is not a run" in error_of(capsys, "eval", pairs, "--tasks", f"retrieval:{pairs}")
    assert "--device" in error_of(capsys, "eval", trained, "--device", "gpu", "--tasks", f"retrieval:{pairs}")
    (tmp_path / "file").touch()
    json_path = tmp_path / "file" / "out.json"
    assert "out.json" in error_of(capsys, "eval", trained, "--tasks", f"retrieval:{pairs}", "--json", json_path)


def test_unwritable_outputs_of_data_commands(capsys, tmp_path, pairs):
    file = tmp_path / "file"
    file.write_text("")
    for words in (
        "check {data} --report {out}",
        "queries {data} --out {out}",
        "tokenizer {data} --vocab-size 300 --out {out}",
    ):
        args = ["data", *words.format(data=pairs, out=file / "x").split()]
        assert str(file / "x") in error_of(capsys, *args)
    for words in ("curate {data} --out {out}", "scenes --train 8 --out {out}"):
        args = ["data", *words.format(data=pairs, out=file).split()]
        assert str(file) in error_of(capsys, *args)


def test_a_closed_stdout_is_not_an_error(tmp_path):
    result = subprocess.run(
        f"{sys.executable} -m coalign recipes | true",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path.cwd(),
    )
    assert result.stderr == ""


def test_every_command_is_in_one_group_of_the_help(helps):
    grouped = [name for names in cli.GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(cli.COMMANDS)
    assert len(set(grouped)) == len(grouped)
    lines = cli._help().splitlines()
    assert [line[:-1] for line in lines if line.endswith(":") and line[:-1] in cli.GROUPS] == list(cli.GROUPS)
    data = cli._help("Data")
    assert "coalign data check" in data
    assert "  coalign train" not in data

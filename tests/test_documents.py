"""What is handed in and compared: the hand-in and its checklist, lists of runs, one report of both notebooks."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import nbformat
import pytest

import helpers
import notebooks
import toy
from tests import documents


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with both notebooks, as a student saved them, and a finished run of each lab below `runs/`."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB_RUNS", str(folder / "runs"))
        for lab, note, seed in (("mnist", "", 1), ("mnist", "wider, C1", 2), ("cifar", "", 1)):
            model = toy.Net(6) if note else toy.Net()
            training = toy.Training(lab=lab, model=model, EPOCHS=2, NOTE=note, SEED=seed).train()
            training.finish()
            training.run.close()
    for name in notebooks.NAMES:
        notebook = notebooks.read(name)
        for count, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
            cell.execution_count = count
        for cell in notebook.cells:
            if "### In my own words" in cell.source:
                cell.source = cell.source.replace("…", "I saw it, <b>really</b>.")
        nbformat.write(notebook, folder / f"Li Wei {name}")
    return folder


@pytest.fixture
def at_home(home, monkeypatch):
    monkeypatch.setenv("LAB_RUNS", str(home / "runs"))
    monkeypatch.setattr(helpers, "HERE", home)
    return home


def test_the_hand_in_holds_all_and_changes_nothing(at_home, tmp_path):
    before = {path: path.read_bytes() for path in at_home.rglob("*") if path.is_file()}
    path, text = documents.hand_in("Li Wei 12345", tmp_path / "it.zip")
    assert before == {path: path.read_bytes() for path in at_home.rglob("*") if path.is_file()}
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        page = archive.read("report.html").decode()
        program = archive.read("code/Li Wei MNIST.py").decode()
        assert archive.read("checklist.txt").decode().strip() == text
    runs = documents.finished_runs(at_home / "runs")
    newest = [runs[1], runs[2]]
    assert {"Li Wei MNIST.ipynb", "Li Wei CIFAR.ipynb", "code/Li Wei CIFAR.py"} <= names
    for run in newest:
        inside = f"runs/{run.parent.name}/{run.name}"
        assert {
            f"{inside}/{name}" for name in ("metrics.json", "config.json", "history.json", "nvidia-smi.txt")
        } <= names
        assert any(name.startswith(f"{inside}/events") for name in names)
    assert not any(runs[0].name in name for name in names), "only the newest counts"
    assert page.count("I saw it, &lt;b&gt;really&lt;/b&gt;.") >= 8
    assert page.index("In my own words") < page.index("Process") < page.index("Code of Li Wei MNIST.ipynb")
    assert "def train_one_epoch(" in program
    assert program.count("# %%") == len(notebooks.code_cells("MNIST.ipynb"))


def test_the_checklist_says_what_is_missing(at_home):
    _, text = documents.hand_in("x", at_home / "runs" / "x.zip")
    lines = text.splitlines()
    (at_home / "runs" / "x.zip").unlink()
    for good in (
        "MNIST: code of Li Wei MNIST.ipynb.",
        "MNIST: own words are written.",
        "CIFAR: no ready-made network.",
    ):
        assert f"✓ {good}" in lines
    assert "✓ CIFAR: executed from top to bottom." in lines
    for bad in ("is a smoke run, no result.", "not on MNIST.", "no NVIDIA GPU in use."):
        assert sum(line.startswith("✗ ") and line.endswith(bad) for line in lines) == 2, bad


def test_without_anything_it_still_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(helpers, "HERE", tmp_path)
    path, text = documents.hand_in()
    assert text.count("there is no notebook") == 2
    assert path.name.startswith("hand-in-")
    assert zipfile.ZipFile(path).namelist() == ["checklist.txt"]


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ("Replace each … by your answer.\n\n1. Pooling: …\n2. Mine: …", "Nothing is written"),
        ("1. Pooling: the maximum.\n2. Mine: …", "1 of the questions"),
        ("1. Pooling: the maximum.\n2. Mine: faster.", ""),
        ("", "Nothing is written"),
    ],
)
def test_own_words_that_are_not_there_are_missed(words, missing):
    cells = [dict(type="markdown", source=f"## 11 Report\n\nText.\n\n### In my own words 我的结论\n\n{words}")]
    text, sentence = documents.own_words(cells)
    assert text == words
    assert sentence.startswith(missing)
    assert bool(sentence) == bool(missing)


@pytest.mark.parametrize(
    ("program", "found"),
    [
        ("from torchvision.models import resnet18", ["torchvision.models.resnet18"]),
        ("from torchvision import models", ["torchvision.models"]),
        (
            "import timm\nmodel = timm.create_model('x', pretrained=True)",
            ["timm", "timm.create_model", "timm.pretrained="],
        ),
        ("import torch\nnet = torch.hub.load('a', 'b')", ["torch.hub", "torch.hub.load"]),
        ("from torchvision import datasets\nimport torch.nn as nn\nloss = nn.CrossEntropyLoss(weight=w)", []),
        ("this is no Python", []),
    ],
)
def test_ready_made_networks_are_found(program, found):
    assert documents.ready_made(program) == found


def test_runs_are_listed_and_compared(at_home, capsys):
    assert documents.main(["runs"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "note", "data", "validation", "test", "seconds"]
    assert len(lines) == 3
    assert "wider-C1" in lines[1].split("  ")[0], "the note is in the run's name"
    assert "wider, C1" in lines[1]
    assert all("MNIST (stand-in)" in line and line.endswith("smoke run") for line in lines)
    first, second = documents.finished_runs(at_home / "runs", "mnist")
    output = at_home / "runs" / "c.html"
    assert documents.main(["compare", str(first), str(second), "--output", str(output)]) == 0
    page = output.read_text(encoding="utf-8")
    assert "Lines of the model that differ" in page
    assert "Conv2d(1, 6, kernel_size=(5, 5), stride=(4, 4))" in page
    assert "BatchNorm2d(4" in page
    assert page.index("validation accuracy") < page.index("test accuracy")
    assert page.index("train seconds") < page.index("test accuracy")
    assert documents.main(["compare", "--last", "2"]) == 0
    assert documents.main(["compare", str(first)]) == 1
    assert "two or more" in capsys.readouterr().err
    for name in ("c.html", "compare.html"):
        (at_home / "runs" / name).unlink()


def test_the_last_runs_are_yours_not_the_reference(at_home, tmp_path, monkeypatch, capsys):
    shutil.copytree(at_home / "runs", tmp_path / "runs")
    shutil.copytree(notebooks.ROOT / "runs" / "reference", tmp_path / "runs" / "reference")
    monkeypatch.setenv("LAB_RUNS", str(tmp_path / "runs"))
    assert documents.main(["compare", "--last", "2"]) == 0
    page = (tmp_path / "runs" / "compare.html").read_text(encoding="utf-8")
    assert all(path.name in page for path in documents.finished_runs(tmp_path / "runs")[-2:])
    assert documents.main(["compare", "--last", "-1"]) == 1
    assert "two or more runs" in capsys.readouterr().err


def test_what_others_left_among_the_results_is_passed_over(at_home, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(documents.finished_runs(at_home / "runs")[0], run)
    for name in (".DS_Store", "Thumbs.db", ".x.png.123.part", "mine.jpg", ".ipynb_checkpoints/x.md"):
        (run / "results" / name).parent.mkdir(parents=True, exist_ok=True)
        (run / "results" / name).write_bytes(b"\xff\xfe")
    (run / "results" / "a.png").mkdir()
    (run / "results" / "kept.md").write_text("| a |\n|---|\n| here |")
    assert "here" in documents.write_report(run).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["metrics", "config", "history"])
def test_a_run_of_another_kind_is_named_and_hides_no_other(name, at_home, tmp_path, monkeypatch):
    shutil.copytree(at_home / "runs", tmp_path / "runs")
    monkeypatch.setenv("LAB_RUNS", str(tmp_path / "runs"))
    damaged, *others = documents.finished_runs(tmp_path / "runs")
    for content in ("null", "3", "[3]", '{"a": 1}', '[{"epoch": 1}]'):
        (damaged / f"{name}.json").write_text(content)
        with pytest.raises(ValueError, match=rf"{damaged.name}/{name}.json is damaged"):
            documents.write_report(damaged)
        listed = documents.list_runs(tmp_path / "runs")
        assert all(run.name in listed for run in others)
    assert documents.hand_in(output=tmp_path / "it.zip")[0].is_file()


def test_a_browser_that_prints_nothing_is_no_success(at_home, tmp_path, monkeypatch, capsys):
    browser = tmp_path / "chromium"
    browser.write_text("#!/bin/sh\nexit 0\n")
    browser.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    page = tmp_path / "report.html"
    page.with_suffix(".pdf").write_bytes(b"an older one")
    run = documents.finished_runs(at_home / "runs")[0]
    assert documents.main(["report", str(run), "--output", str(page), "--pdf"]) == 1
    assert "wrote no" in capsys.readouterr().err
    assert not page.with_suffix(".pdf").exists()


def test_a_terminal_in_another_encoding_gets_the_checklist(at_home, tmp_path):
    """With files as old as some copies make them, which zip cannot date."""
    variables = os.environ | {"PYTHONIOENCODING": "gbk"}
    command = [sys.executable, "-m", "helpers", "handin", "--output", str(tmp_path / "it.zip")]
    copy = tmp_path / "runs"
    shutil.copytree(at_home / "runs", copy)
    for file in copy.rglob("events*"):
        os.utime(file, (0, 0))
    variables["LAB_RUNS"] = str(copy)
    done = subprocess.run(command, env=variables, cwd=notebooks.ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode("gbk").rstrip().endswith("it.zip")


def test_tensorboard_gets_the_note_and_ten_settings(at_home):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    run = documents.finished_runs(at_home / "runs", "mnist")[1]
    events = EventAccumulator(str(run)).Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    values = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert values["NOTE"].string_value == "wider, C1"
    assert values["EPOCHS"].number_value == 2
    assert "RESUME" not in values
    assert len(values) <= 11


def test_help_needs_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    command = [sys.executable, "-m", "helpers", "handin", "--help"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=helpers.HERE, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--output" in result.stdout


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_the_set_up_cell_fetches_the_kit_on_colab_alone(name, tmp_path, monkeypatch):
    source = notebooks.code_cells(name)[0].source
    assert "set-up" in notebooks.code_cells(name)[0].metadata.tags
    monkeypatch.chdir(tmp_path)
    fetched, commands = [], []
    monkeypatch.setattr("urllib.request.urlretrieve", lambda url, file: fetched.append((url, file)))
    monkeypatch.setattr("subprocess.run", lambda command, check: commands.append(command))
    monkeypatch.setenv("LAB_REPOSITORY", "someone/lab")
    exec(source, {})
    assert (fetched, commands) == ([], []), "at home it does nothing"
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    exec(source, {})
    base = "https://raw.githubusercontent.com/someone/lab/HEAD"
    files = "requirements.txt helpers.py tests/__init__.py tests/checks.py tests/documents.py".split()
    assert fetched == [(f"{base}/{file}", file) for file in files]
    assert commands[0][1:] == ["-m", "pip", "install", "-q", "-r", "requirements.txt"]
    monkeypatch.delenv("LAB_REPOSITORY")
    exec(source, {})
    assert len(commands) == 1, "nor without a repository"


def test_a_damaged_run_is_named(at_home, tmp_path, capsys):
    run = tmp_path / "mnist" / "damaged"
    run.mkdir(parents=True)
    (run / "metrics.json").write_text(json.dumps({})[:1])
    assert documents.main(["report", str(run)]) == 1
    assert "metrics.json is damaged" in capsys.readouterr().err

"""The report and the comparison, from runs that a test writes with the writer and the functions that the pages use."""

import json
import re
import subprocess
import sys

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

import helpers

CLASSES = ("cat", "dog", "<b>灰</b>")


def write_run(folder, *, source="official", gpu=None, classes=CLASSES, seed=1, confusion=True):
    folder.mkdir(parents=True)
    config = {"lab": "cifar", "tag": "x", "settings": {"EPOCHS": 2, "NOTE": "<script>alert(1)</script>", "SEED": seed}}
    config |= {"versions": {"torch": "2.9"}, "git": None, "classes": list(classes)}
    (folder / "config.json").write_text(json.dumps(config))
    writer, monitor = SummaryWriter(folder), helpers.Monitor(torch.device("cpu"))
    for epoch in (1, 2):
        for part in ("train", "validation"):
            writer.add_scalar(f"loss/{part}", 1 / epoch, epoch)
            writer.add_scalar(f"accuracy/{part}", 0.4 * epoch, epoch)
        writer.add_scalar("train_seconds", 1.5 * epoch, epoch)
    monitor.samples = [{"seconds": 0.2 * k, "time": 1e9 + k, "utilization": 50.0 + k} for k in range(10)]
    monitor.log(writer)
    matrix = torch.tensor([[80, 15, 5], [10, 90, 0], [0, 0, 100]])
    if confusion:
        writer.add_tensor("test/confusion_counts", matrix)
    writer.add_image("mistakes/00 cat → <i>dog</i>, 99%", torch.zeros(3, 8, 8, dtype=torch.uint8), 2)
    writer.add_text(
        "tables/loaders", helpers.table(["loader", "images/s"], [["classic", "1,000"], ["a|b", "<u>5</u>"]])
    )
    writer.close()
    values = dict(lab="cifar", dataset="CIFAR10", source=source, verified=source == "official", parameters=1234)
    values |= dict(epochs=2, world_size=1, device="a card", precision="bf16", test_accuracy=0.9, test_loss=0.3123)
    values |= dict(train_seconds=3.0, images_per_second=4321.0, gpu_utilization=gpu, seed=seed)
    values |= dict(gpu_utilization_reason=None if gpu else "no NVIDIA GPU in use", started="s", finished="f")
    helpers.write_metrics(folder, **values)
    return folder


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "cifar" / "20260101-000000-x")


def test_report_has_what_the_lab_asks_for_and_nothing_from_elsewhere(run):
    path = helpers.write_report(run, words="# Mine\n\nI *think* <b>so</b>: 我的结论.")
    page = path.read_text(encoding="utf-8")
    assert path == run / "report.html"
    low, high = helpers.confidence_interval(0.9, 300)
    for text in ("90.00 %", "300 images", f"{100 * low:.2f}", f"{100 * high:.2f}", "1,234", "a card", "bf16", "4,321"):
        assert text in page, text
    for text in ("Confusion matrix", "80.0%", "Mistakes", "cat → ", "classic", "1,000", "<em>think</em>", "我的结论"):
        assert text in page, text
    assert "no NVIDIA GPU in use" in page
    assert "CPU utilisation of this process" in page
    assert not re.search(r"<script|<link|@import|(src|href)=.(?!data:|#)", page)
    assert len(page) < 500_000


def test_text_from_files_is_escaped(run):
    page = helpers.write_report(run, words="<script>alert(2)</script>").read_text(encoding="utf-8")
    for raw in ("<script", "<b>灰", "<i>dog", "<u>5", "<b>so"):
        assert raw not in page, raw
    assert "&lt;b&gt;灰&lt;/b&gt;" in page


def test_stand_in_says_so(tmp_path):
    page = helpers.write_report(write_run(tmp_path / "a", source="stand-in"), words="").read_text(encoding="utf-8")
    assert "STAND-IN DATA, NOT CIFAR10" in page
    assert "nothing written yet" in page


def test_many_classes_and_no_confusion(tmp_path):
    many = tuple(f"class {k}" for k in range(100))
    assert "Confusion matrix" not in helpers.write_report(
        write_run(tmp_path / "b", classes=many, confusion=False), words=""
    ).read_text(encoding="utf-8")


def test_words_come_from_the_notebooks_cell(run, monkeypatch, tmp_path):
    cell = {"id": "my-words", "cell_type": "markdown", "source": ["## Mein ", "Bericht"]}
    (tmp_path / "CIFAR.ipynb").write_text(json.dumps({"cells": [{"id": "x"}, cell]}))
    monkeypatch.setattr(helpers, "HERE", tmp_path)
    assert "<h2>Mein Bericht</h2>" in helpers.write_report(run).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("accuracy", "count", "expected"),
    [(0.9, 100, (0.8256, 0.9448)), (1.0, 10, (0.7225, 1.0)), (0.0, 10, (0.0, 0.2775))],
)
def test_confidence_interval(accuracy, count, expected):
    assert helpers.confidence_interval(accuracy, count) == pytest.approx(expected, abs=1e-4)


def command(*arguments, cwd):
    variables = [sys.executable, "-m", "helpers", *map(str, arguments)]
    return subprocess.run(variables, cwd=helpers.HERE, capture_output=True, text=True, check=False)


def test_command_line_rebuilds_and_compares(run, tmp_path):
    words = tmp_path / "words.md"
    words.write_text("my own **words**", encoding="utf-8")
    result = command("report", run, "--words", words, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "<strong>words</strong>" in (run / "report.html").read_text(encoding="utf-8")
    other = write_run(tmp_path / "cifar" / "20260102-000000-x", seed=2)
    result = command("compare", run, other, "--output", tmp_path / "c.html", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert page.count("cifar/2026010") >= 2
    assert "SEED" in page
    assert "EPOCHS" not in page
    assert "<script" not in page


def test_command_line_names_what_is_missing(tmp_path):
    result = command("report", tmp_path / "nowhere", cwd=tmp_path)
    assert result.returncode == 1
    assert "nowhere is no finished run" in result.stderr
    assert "Traceback" not in result.stderr


def test_show_report_never_fails(run, tmp_path, fault, capsys):
    helpers.show_report(tmp_path)
    assert "could not be written" in capsys.readouterr().out
    (run / "config.json").write_text("{")
    with fault("report fails") as seen:
        helpers.show_report(run)
        printed = capsys.readouterr().out
        seen(printed)
    assert printed.count("\n") == 1
    assert "To try again: python -m helpers report" in printed

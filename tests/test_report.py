"""The report and the comparison, from the files of a run: its events are deleted first."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import helpers
import toy
from tests import documents

CLASSES = ("cat", "dog", "<b>灰</b>", *map(str, range(3, 10)))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A finished run on images of a folder whose name and classes are HTML, without its events."""
    provenance = helpers.Provenance("<i>photos</i>", "image-folder", False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB_RUNS", str(tmp_path_factory.mktemp("report")))
        data = replace(toy.digits(), provenance=provenance, classes=CLASSES)
        training = toy.Training(data, lab="cifar", NOTE="<script>alert(1)</script>").train()
        run = training.run
        run.add("test/confusion", helpers.confusion(torch.eye(10, dtype=torch.int64), CLASSES))
        run.add("tables/loaders", [["loader", "images/s"], ["classic", "1,000"], ["<u>mine</u>", "5"]])
        run.add("mistakes", helpers.image_grid(data.images[:4], ["cat → <i>dog</i>"] * 4, columns=4))
        training.finish()
        run.close()
    for events in run.path.glob("events*"):
        events.unlink()
    return run.path


@pytest.fixture
def run(original, tmp_path):
    """A copy of it."""
    return shutil.copytree(original, tmp_path / "cifar" / original.name)


def change(run, name, **changes):
    """Change what a JSON file of the run says."""
    content = json.loads((run / name).read_text(encoding="utf-8"))
    (run / name).write_text(json.dumps(content | changes), encoding="utf-8")
    return run


def report(run, words=""):
    """The text of the run's report."""
    path = run / "words.md"
    path.write_text(words, encoding="utf-8")
    return documents.write_report(run, words=path).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(original, tmp_path_factory):
    """The report of the run, with words of the reader's own."""
    copy = shutil.copytree(original, tmp_path_factory.mktemp("page") / original.name)
    return report(copy, "# Mine\n\nI *think* so: 我的结论. <script>alert(2)</script> <b>so</b>")


def test_it_has_what_the_lab_asks_for_and_nothing_from_elsewhere(page, original):
    metrics = json.loads((original / "metrics.json").read_text(encoding="utf-8"))
    facts = [f"{metrics['test_accuracy']:.2%}", f"{metrics['test_loss']:,.4g}", f"{metrics['parameters']}"]
    facts += [f"{metrics['images_per_second']:,.4g}", metrics["device"], "fp32", "nvidia-smi: n/a ("]
    for text in (*facts, "no NVIDIA GPU in use", original.name, metrics["started"], torch.__version__.split("+")[0]):
        assert text in page, text
    for text in ("<em>think</em>", "我的结论", "<h3>test/confusion</h3>", "<h3>tables/loaders</h3>", "<td>1,000</td>"):
        assert text in page, text
    for name in toy.SETTINGS:
        assert f"<td>{name}</td>" in page, name
    pictures = re.findall(r'<img src="data:image/png;base64,[^"]+" alt="([^"]*)"', page)
    assert pictures == ["accuracy, loss and utilisation over time", "test/confusion", "mistakes"]
    assert not re.search(r"<script|<link|@import|(src|href)=.(?!data:|#)", page)
    assert "STAND-IN" not in page
    assert len(page) < 500_000


def test_my_own_words_come_first(page):
    headings = re.findall(r"<h2>(.+?)</h2>", page)
    assert headings[0].startswith("In my own words")
    assert page.index("<em>think</em>") < page.index("Process")


def test_html_of_classes_datasets_settings_and_words_is_escaped(page):
    for raw in ("<script", "<b>", "<i>", "<u>"):
        assert raw not in page, raw
    for escaped in ("&lt;script&gt;alert(2)", "&lt;i&gt;photos&lt;/i&gt;", "&lt;u&gt;mine", "&lt;script&gt;alert(1)"):
        assert escaped in page, escaped


def test_a_stand_in_says_so_first(run):
    changes = dict(source="stand-in", dataset="CIFAR10", unfinished="stopped after 2 of 3 epochs")
    page = report(change(run, "metrics.json", **changes))
    assert re.search(r"<blockquote>\s*<p>STAND-IN DATA, NOT CIFAR10", page)
    assert page.index("<blockquote>") < page.index("<h2>")
    assert "stopped after 2 of 3 epochs" in page
    assert "The file of words is empty" in page


def test_the_utilisation_or_the_reason(run):
    history = json.loads((run / "history.json").read_text())
    for place, entry in enumerate(history):
        entry["samples"] = [{"seconds": entry["seconds"], "time": 1.0, "gpu/utilization_percent": 60.0 + 10 * place}]
    (run / "history.json").write_text(json.dumps(history))
    change(run, "metrics.json", gpu_utilization_reason=None)
    assert "GPU utilisation: mean 70 %, median 70 %, max 80 %, 3 samples" in report(run)
    change(run, "metrics.json", gpu_utilization_reason="NVMLError_NotSupported")
    page = report(run)
    assert "GPU: NVMLError_NotSupported" in page
    assert "mean 70 %" not in page


def test_the_mean_is_of_one_device_where_a_run_went_on_on_another():
    history = [{"samples": [{"cpu/utilization_percent": 90.0}]}, {"samples": [{"gpu/utilization_percent": 20.0}]}]
    assert helpers.utilization(history)[1]["mean"] == 20


def test_words_come_from_the_notebook_saved_last_whatever_it_is_called(run, monkeypatch, tmp_path):
    def save(name, lab, words, seconds):
        cells = [("code", ["x = 1"]), ("code", [f'run = helpers.Run("{lab}", SETTINGS)'])]
        cells += [("markdown", ["## 11 Report\n", "### In my own words 我的结论\n", words])]
        path = tmp_path / name
        path.write_text(json.dumps({"cells": [dict(cell_type=kind, source=source) for kind, source in cells]}))
        os.utime(path, (seconds, seconds))

    save("CIFAR.ipynb", "cifar", "as it was", 1)
    save("Li Wei 12345 (2).ipynb", "cifar", "Mein *Bericht*", 2)
    save("MNIST.ipynb", "mnist", "of another page", 3)
    (tmp_path / "torn.ipynb").write_text('{"cells": [')
    monkeypatch.setattr(helpers, "HERE", tmp_path)
    page = documents.write_report(run).read_text(encoding="utf-8")
    assert "Mein <em>Bericht</em>" in page
    assert page.count("<h2>In my own words") == 1
    assert "as it was" not in page
    assert "of another page" not in page
    assert "helpers.Run(&quot;cifar&quot;, SETTINGS)" in page, "the code is the appendix"
    assert "was not saved since the test" in page


def test_a_run_without_validation_and_results(run):
    history = json.loads((run / "history.json").read_text())
    entries = [{k: v for k, v in entry.items() if "validation" not in k} | {"samples": []} for entry in history]
    (run / "history.json").write_text(json.dumps(entries))
    shutil.rmtree(run / "results")
    headings = [heading.split()[0] for heading in re.findall("<h3>(.+?)</h3>", report(run))]
    assert headings == ["Process", "Curves", "Utilisation", "Test", "All"]


class TestComparison:
    def compare(self, runs, tmp_path):
        return documents.write_comparison(runs, tmp_path / "compare.html").read_text(encoding="utf-8")

    def test_shows_the_settings_that_differ_and_no_others(self, run, tmp_path):
        other = shutil.copytree(run, run.with_name("20260102-000000-other"))
        config = json.loads((other / "config.json").read_text(encoding="utf-8"))
        change(other, "config.json", settings=config["settings"] | {"RATE": 0.75, "NEW": "<b>"})
        change(other, "metrics.json", test_accuracy=0.4321)
        page = self.compare([run, other], tmp_path)
        cells = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page, re.S)]
        rows = {name: values for name, *values in cells}
        assert rows["run"] == [run.name, other.name]
        assert rows["RATE"] == ["0.1", "0.75"]
        assert rows["NEW"] == ["", "&lt;b&gt;"]
        assert {name for name in rows if name.isupper()} == {"RATE", "NEW"}
        assert rows["test accuracy"][1] == "43.21%"
        assert page.count("<img") == 1
        assert not re.search(r"<script|<b>|<link|(src|href)=.(?!data:|#)", page)

    def test_of_many_runs(self, run, tmp_path):
        runs = [run, *(shutil.copytree(run, run.with_name(f"other-{number}")) for number in range(7))]
        assert "8 runs compared" in self.compare(runs, tmp_path)


class TestCommandLine:
    def test_writes_a_report(self, run, tmp_path):
        words = tmp_path / "words.md"
        words.write_text("my own **words**", encoding="utf-8")
        command = [sys.executable, "-m", "helpers", "report", str(run), "--words", str(words)]
        result = subprocess.run(command, cwd=helpers.HERE, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stdout, result.stderr) == (0, f"{run / 'report.html'}\n", "")
        assert "<strong>words</strong>" in (run / "report.html").read_text(encoding="utf-8")

    def test_writes_a_comparison(self, run, tmp_path, capsys):
        assert documents.main(["compare", str(run), str(run), "--output", str(tmp_path / "c.html")]) == 0
        assert capsys.readouterr().out == f"{tmp_path / 'c.html'}\n"
        assert "2 runs compared" in (tmp_path / "c.html").read_text(encoding="utf-8")

    def test_names_what_is_missing(self, tmp_path, capsys):
        assert documents.main(["report", str(tmp_path / "nowhere")]) == 1
        assert "nowhere/metrics.json" in capsys.readouterr().err


def test_a_full_disk_costs_the_report_alone(small_disk, run, capsys):
    disk = small_disk(200)
    copy = shutil.copytree(run, disk / run.name)
    toy.fill(disk)
    assert documents.main(["report", str(copy)]) == 1
    assert "No space left" in capsys.readouterr().err
    assert not {"report.html", f".report.html.{os.getpid()}.part"} & {path.name for path in copy.iterdir()}

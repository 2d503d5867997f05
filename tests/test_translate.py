"""The Chinese edition: complete, never stale, with every number, formula, link and name of its source."""

import json
import os
import re
import subprocess
import sys

import nbformat
import pytest

import helpers
import notebooks
from tests import checks, release, translate


@pytest.mark.parametrize("page", translate.PAGES)
def test_each_cell_has_its_translation(page):
    english = translate.prose((translate.ROOT / f"{page}.ipynb").read_text(encoding="utf-8"))
    chinese = translate.entries((translate.ZH / f"{page}.md").read_text(encoding="utf-8"))
    assert translate.faults(english, chinese) == {}
    assert list(chinese) == list(english), "in the order of the page"
    for name, (_, text) in chinese.items():
        assert re.search("[\u4e00-\u9fff]", text), f"{name} is not Chinese"


def test_each_message_has_its_translation():
    rows = translate.table((translate.ZH / "messages.md").read_text(encoding="utf-8"))
    assert translate.message_faults(translate.messages(), rows) == {}


def test_a_word_changed_in_the_source_is_found():
    english = {"a": "Train for 3 epochs with `SEED`, see [here](#x): $x^2$.", "b": "Two."}
    good = {
        "a": (translate.digest(english["a"]), "用 `SEED` 训练 3 轮,见[这里](#x):$x^2$。"),
        "b": (translate.digest("Two."), "二。"),
    }
    assert translate.faults(english, good) == {}
    assert translate.faults(english | {"b": "Three."}, good) == {"b": "stale: the English text has changed"}
    assert translate.faults(english | {"c": "New."}, good) == {"c": "not translated"}
    assert translate.faults({"a": english["a"]}, good) == {"b": "there is no such cell any more"}
    for broken, why in [
        ("用 `SEED` 训练 4 轮,见[这里](#x):$x^2$。", "number '3' is missing; number '4' is added"),
        ("用 SEED 训练 3 轮,见[这里](#x):$x^2$。", "code 'SEED' is missing"),
        ("用 `SEED` 训练 3 轮,见这里:$x^2$。", "link '#x' is missing"),
        ("用 `SEED` 训练 3 轮,见[这里](#x):$x^3$。", "formula 'x^2' is missing; formula 'x^3' is added"),
    ]:
        assert translate.faults(english, good | {"a": (good["a"][0], broken)}) == {"a": why}


def test_a_message_that_is_missing_or_takes_other_values_is_found():
    rows = {"English": "中文", "{} of {} done": "{1} 中的 {0}", "gone": "没了", "{} left": "剩下", "new": "?"}
    assert translate.message_faults(["{} of {} done", "{} left", "new"], rows) == {
        "gone": "no message says so any more",
        "{} left": "1 places to fill, 0 in the translation",
        "new": "not translated",
    }


def test_the_command_says_what_changed(tmp_path, monkeypatch, capsys):
    for name in ("MNIST.ipynb", "CIFAR.ipynb", *translate.SOURCES):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((translate.ROOT / name).read_bytes())
    (tmp_path / "tests" / "zh").mkdir()
    for file in translate.ZH.glob("*.md"):
        (tmp_path / "tests" / "zh" / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(translate, "ROOT", tmp_path)
    monkeypatch.setattr(translate, "ZH", tmp_path / "tests" / "zh")
    assert translate.main([]) == 0
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True, env=os.environ | {"GIT_CONFIG_GLOBAL": os.devnull})
    notebook = json.loads((tmp_path / "MNIST.ipynb").read_text(encoding="utf-8"))
    cell = next(cell for cell in notebook["cells"] if cell["id"] == "backward")
    cell["source"] = "".join(cell["source"]).replace("Learning asks", "Training asks")
    notebook["cells"].append(dict(cell, id="another", source="Another cell."))
    (tmp_path / "MNIST.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    assert translate.main(["--add"]) == 1
    said = capsys.readouterr().out
    assert "MNIST.md, backward: stale" in said
    assert re.search(r"^-Learning asks:", said, re.MULTILINE)
    assert re.search(r"^\+Training asks:", said, re.MULTILINE)
    assert "MNIST.md, another: not translated" in said
    file = (tmp_path / "tests" / "zh" / "MNIST.md").read_text(encoding="utf-8")
    assert f"<!-- another {translate.digest('Another cell.')} -->\n" in file


@pytest.fixture(scope="module")
def edition(tmp_path_factory):
    """A folder with the Chinese student edition."""
    out = tmp_path_factory.mktemp("zh") / "out"
    assert release.main([str(out), "--lang", "zh"]) == 0
    return out


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_the_edition_is_chinese_with_the_same_code(name, edition, tmp_path):
    assert release.main([str(tmp_path / "en")]) == 0
    made, source = (nbformat.read(folder / name, as_version=4) for folder in (edition, tmp_path / "en"))
    for cell, english in zip(made.cells, source.cells, strict=True):
        assert cell.id == english.id
        if cell.cell_type == "code":
            assert cell.source == english.source
        else:
            assert re.search("[\u4e00-\u9fff]", cell.source)
            assert "<summary>提示" not in cell.source, "hints stay with the teacher"
            assert "分钟后" not in cell.source or "提示" not in cell.source
            for word in re.findall(r"^## (\d+)", english.source, re.MULTILINE):
                assert re.search(rf"^## {word} [\u4e00-\u9fff]", cell.source, re.MULTILINE)


def test_the_edition_speaks_chinese_by_default(edition):
    program = """
import torch
from tests import checks
import helpers
for function in (lambda step, steps: 1.0, lambda step, steps: max(1 - step / steps, 0.0)):
    checks.schedule(function, strict=False)
try:
    helpers.Loader(helpers.load("MNIST", True, (1, 28, 28)), 0, torch.device("cpu"), torch.ones(1), torch.ones(1))
except helpers.LabError as error:
    print(error)
"""
    for language, words in (("", ("没有下降", "训练图像", "✓")), ("en", ("it does not fall", "training images", "✓"))):
        environment = (
            os.environ | {"PYTHONPATH": str(edition), "LAB_FAST": "1"} | ({"LAB_LANG": language} if language else {})
        )
        result = subprocess.run(
            [sys.executable, "-c", program], cwd=edition, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        for word in words:
            assert word in result.stdout, result.stdout


def test_figures_are_labelled_where_a_font_has_the_characters(monkeypatch):
    def label(fonts):
        monkeypatch.setattr(helpers.font_manager, "get_font_names", lambda: fonts)
        drawn, axis = helpers.figure()
        axis.set_xlabel("time spent training (s)")
        helpers.png(drawn)
        return axis.get_xlabel()

    monkeypatch.setenv("LAB_LANG", "zh")
    helpers._templates.cache_clear()
    try:
        assert label(["DejaVu Sans"]) == "time spent training (s)", "no font: no empty boxes"
        assert re.search("[\u4e00-\u9fff]", label(["DejaVu Sans", "Noto Sans CJK SC"]))
    finally:
        monkeypatch.delenv("LAB_LANG")
        helpers._templates.cache_clear()


def test_a_blank_speaks_chinese_and_keeps_its_sign(edition):
    sentence = checks.UNWRITTEN.format(3, 10)
    rows = translate.table((edition / "tests" / "zh" / "messages.md").read_text(encoding="utf-8"))
    assert sentence == "not written yet: exercise 3, about 10 minutes"
    assert "not written yet" in rows[checks.UNWRITTEN]

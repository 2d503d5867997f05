import subprocess
import sys
from pathlib import Path

import pytest
import torch

import helpers
import notebooks

CALL = "SETTINGS = helpers.settings(globals())"


class Page:
    """A notebook with these settings cells; `run` runs one, with the lines that it has by default."""

    FIRST = 'EPOCHS = 6  # passes\nRATE = 0.1\nWIDTHS = (64, 128)\nNAMES = ["a", "b"]\nCOMPILE = False\nNOTE = "x"'
    LAST = "SEED = 1"

    def __init__(self):
        self.namespace = {"helpers": helpers}

    def run(self, lines=FIRST, call=CALL):
        notebooks.execute(f"{lines}\n\n{call}\n", self.namespace)
        return self.namespace["SETTINGS"]

    def run_last(self, lines=LAST, **options):
        given = "".join(f", {name}={value!r}" for name, value in options.items())
        return self.run(lines, f"SETTINGS = helpers.settings(globals(), last=True{given})")


@pytest.fixture
def page(monkeypatch):
    for name in ("FAST", "OFFLINE", "DATA", "RUNS"):  # those of the tests must be known on any page
        monkeypatch.setenv(f"LAB_{name}", "1")
    return Page()


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("EPOCHS", "3", 3),
        ("RATE", "1e-3", 0.001),
        ("RATE", "1", 1.0),
        ("COMPILE", "on", True),
        ("COMPILE", "0", False),
        ("NOTE", "a b", "a b"),
        ("NOTE", "", ""),
        ("WIDTHS", "(8, 16,32)", (8, 16, 32)),
        ("WIDTHS", "8", (8,)),
        ("NAMES", "[c, d]", ("c", "d")),
    ],
)
def test_the_environment_replaces_by_the_type_of_the_default(name, text, expected, page, monkeypatch):
    monkeypatch.setenv(f"LAB_{name}", text)
    value = page.run().now()[name]
    assert page.namespace[name] == expected
    assert type(page.namespace[name]) is type(expected)
    assert value == (list(expected) if isinstance(expected, tuple) else expected)  # as JSON has it


@pytest.mark.parametrize(
    ("name", "text"),
    [("EPOCHS", "ten"), ("EPOCHS", "1.5"), ("EPOCHS", ""), ("COMPILE", "maybe"), ("RATE", "x"), ("WIDTHS", "1,b")],
)
def test_a_value_that_cannot_be_parsed_is_refused_by_name(name, text, page, monkeypatch):
    monkeypatch.setenv(f"LAB_{name}", text)
    with pytest.raises(helpers.LabError, match=f"LAB_{name}=.* is not a valid"):
        page.run()


def test_an_override_is_announced_beside_what_the_cell_says(page, monkeypatch, capsys):
    monkeypatch.setenv("LAB_EPOCHS", "2")
    monkeypatch.setenv("LAB_RATE", "0.1")  # as in the cell: nothing to say
    page.run()
    assert capsys.readouterr().out == "from the environment: EPOCHS=2, the cell says 6\n"
    page.run()  # again, and not "the cell says 2"
    assert capsys.readouterr().out == "from the environment: EPOCHS=2, the cell says 6\n"


def test_only_the_names_of_the_settings_cells_count(page):
    page.namespace |= {"OTHER": 1, "LAST": object()}
    assert page.run() == dict(EPOCHS=6, RATE=0.1, WIDTHS=[64, 128], NAMES=["a", "b"], COMPILE=False, NOTE="x")
    notebooks.execute("SECONDS = 2.0\nMODEL = object()", page.namespace)  # another cell of the page
    assert list(page.run_last("lower = 1\nSEED = 1")) == [*"EPOCHS RATE WIDTHS NAMES COMPILE NOTE SEED".split()]
    page.run()  # after Run All
    assert "SECONDS" not in page.namespace["SETTINGS"].now()
    assert "SEED" in page.namespace["SETTINGS"].now()


def test_what_follows_the_call_is_no_setting(page):
    assert list(page.run("A = 1", f"{CALL}\nB = 2")) == ["A"]


def test_now_is_the_value_on_the_page(page):
    settings = page.run()
    page.namespace["EPOCHS"] = 20
    assert settings["EPOCHS"] == 6
    assert settings.now()["EPOCHS"] == 20


@pytest.mark.parametrize(
    ("line", "words"),
    [
        *[(f"EPOCHS = {value}", "a whole number is wanted, 1 or more") for value in ("2.5", "0", "-1", "'3'", "True")],
        *[(f"SEED = {value}", "0 or more|a number, a text") for value in ("1.5", "-1", "None")],
        *[(f"LEARNING_RATE = {value}", "a number is wanted, 0 or more") for value in ("'0.1'", "-1", "float('inf')")],
        *[(f"WIDTHS = {value}", "a tuple is wanted") for value in ("64", "'16,32'")],
        *[(f"WIDTHS = {value}", "a whole number is wanted, 1 or more") for value in ("()", "(16, 0)", "(16.0, 32)")],
        ("RESOLUTIONS = (4, 32)", "a whole number is wanted, 16 or more"),
        ("VALIDATION = 2.0", "a whole number is wanted, 0 or more"),
        ("SEED = 2**63", "a whole number is wanted, 0 or more, below"),
        *[
            (f"{name} = {value}", "True or False is wanted")
            for name, value in (("COMPILE", "'no'"), ("DETERMINISTIC", "0"))
        ],
        ("MOMENTUM = -0.9", "a number is wanted, 0 or more"),
        ("LABEL_SMOOTHING = '0.2'", "a number is wanted, 0 or more"),
        *[(f"{name} = {value}", "below 1") for name in ("MOMENTUM", "LABEL_SMOOTHING") for value in (1, 1.5)],
        *[(f"{name} = 5", "a text in quotes") for name in ("NOTE", "AUTHOR", "PRECISION", "DATASET", "EXPERIMENTS")],
    ],
)
def test_a_value_of_the_wrong_kind_is_named_in_its_cell(line, words, page):
    with pytest.raises(helpers.LabError, match=f"^{line.split()[0]} = .*({words})"):
        page.run(line)


@pytest.mark.parametrize(
    "line", ["MOMENTUM = 0", "BATCH_SIZE = 1", "WIDTHS = [4, 4]", "SEED = 0", "WEIGHT_DECAY = 0.0"]
)
def test_a_valid_value_at_the_edge_is_taken(line, page):
    page.run(line)


def test_those_that_a_resumed_run_may_change_are_kept_from_cell_to_cell(page):
    page.run("A = 1", 'SETTINGS = helpers.settings(globals(), free="A")')
    assert page.run_last("B = 1\nC = 2", free="B C").free == {"A", "B", "C"}


def test_an_unknown_variable_is_refused_by_name_once_all_settings_are_known(page, monkeypatch):
    monkeypatch.setenv("LAB_SEED", "7")
    monkeypatch.setenv("LAB_EPOCS", "7")
    page.run()  # it may belong to the second cell
    with pytest.raises(helpers.LabError, match=r"LAB_EPOCS is no setting .* EPOCHS, .* SEED"):
        page.run_last()
    monkeypatch.delenv("LAB_EPOCS")
    assert page.run_last()["SEED"] == 7


@pytest.mark.parametrize(
    "value", [None, {"a": 1}, {1}, ((1, 2), (3, 4)), Path("x"), torch.device("cpu"), torch.ones(2), int, 1j, b"x"]
)
def test_what_is_no_setting_is_refused_by_name(value, page):
    page.namespace["value"] = value
    with pytest.raises(helpers.LabError, match=r"ODD = .*: a setting is a number"):
        page.run("EPOCHS = 6\nODD = value")


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_each_page_has_a_short_cell_and_a_last_one(name):
    calls = [cell.source for cell in notebooks.code_cells(name) if "helpers.settings(globals()" in cell.source]
    assert ["last=True" in source for source in calls] == [False, True]
    namespace = notebooks.definitions(name)
    notebooks.execute(calls[0], namespace)
    assert 3 <= len(namespace["SETTINGS"]) <= 8, "a student reads the first one"
    first = set(namespace["SETTINGS"])
    notebooks.execute(calls[1], namespace)
    assert first | {"SEED"} < set(namespace["SETTINGS"])
    assert namespace["SETTINGS"].free <= set(namespace["SETTINGS"])
    assert namespace["SETTINGS"].now() == namespace["SETTINGS"]


def test_budget(monkeypatch):
    assert helpers.budget(smoke=1, cpu=2, full=3) == 1
    monkeypatch.setenv("LAB_FAST", "0")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert helpers.budget(smoke=1, cpu=2, full=3) == 2
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert helpers.budget(smoke=1, cpu=2, full=3) == 3
    monkeypatch.setenv("LAB_DEVICE", "cpu")
    assert helpers.budget(smoke=1, cpu=2, full=3) == 2


def test_flag(monkeypatch):
    assert helpers.flag("FAST") is True
    assert helpers.flag("NOTHING_OF_THE_KIND") is False
    monkeypatch.setenv("LAB_FAST", "perhaps")
    with pytest.raises(helpers.LabError, match="LAB_FAST='perhaps'"):
        helpers.flag("FAST")


def test_import_loads_nothing_that_a_wheel_may_break_and_prints_nothing():
    later = "torchvision torch.utils.tensorboard tensorboard pycurl".split()
    code = f"import sys, helpers; print([name for name in {later} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=helpers.HERE, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("WIDTHS", "8,16", "give both one entry for each block"),
        ("REFINE", "1,a,33", "texts of odd digits"),
        ("REFINE", "2,4,22", "texts of odd digits"),
        ("TRANSLATE", "32", "15 pixels at most"),
        ("HEAD_RATE", "0", "more than 0"),
        ("ABLATION", "plian", "ABLATION: no"),
    ],
)
def test_what_does_not_fit_is_named_in_the_settings_of_cifar(name, text, words, monkeypatch):
    monkeypatch.setenv(f"LAB_{name}", text)
    with pytest.raises(helpers.LabError, match=words):
        notebooks.settings("CIFAR.ipynb")

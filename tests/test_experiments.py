"""The experiments of section 10: what is trained, what is shown, and that the store knows the same variants."""

import json
import re
import statistics
import unittest.mock

import pytest

import experiments
import helpers
import notebooks

VARIANTS = {"max": dict(to=0.2), 0.1: dict(to=0.3), "mine": dict(to=0.4)}


@pytest.fixture(params=notebooks.NAMES)
def page(request, monkeypatch):
    """A page whose trainings return what their options say; it notes every training."""
    monkeypatch.setenv("LAB_FAST", "0")
    page = notebooks.page(request.param, EXPERIMENT_SEEDS=2, EXPERIMENTS="pooling, other")
    page |= dict(run=unittest.mock.Mock(), provenance="photos", summary={}, trained=[])

    def train(seed, to):
        page["trained"].append((seed, to))
        return to + seed / 16

    page["train_variant"] = train
    return page


def test_an_experiment_that_is_named_trains_every_variant_with_every_seed(page, capsys):
    page["experiment"]("pooling", VARIANTS)
    assert page["trained"] == [(seed, options["to"]) for options in VARIANTS.values() for seed in (1, 2)]
    assert "26.25" in capsys.readouterr().out
    [call] = page["run"].add.call_args_list
    assert call.args[0].endswith("/pooling")


def test_one_that_is_not_named_says_how_to_train_it(page, capsys):
    page["experiment"]("learning rate", VARIANTS)
    assert capsys.readouterr().out == "not trained here; LAB_EXPERIMENTS='learning rate' trains it\n"
    assert page["trained"] == []
    page["run"].add.assert_not_called()


def test_a_smoke_run_trains_two_variants(page, monkeypatch):
    monkeypatch.setenv("LAB_FAST", "1")
    page["experiment"]("pooling", VARIANTS)
    assert [to for _, to in page["trained"]] == [0.2, 0.2, 0.3, 0.3]


def test_the_dots_are_the_seeds_and_the_bar_their_mean():
    drawn = notebooks.page("MNIST.ipynb")["dots"]({"max": [0.7, 0.8, 0.75], 0.1: [0.5]}, "5 images")
    [axis] = drawn.axes
    assert drawn.get_supxlabel() == "5 images"
    assert [text.get_text() for text in axis.texts] == ["75.00 ± 5.00", "50.00"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["max", "0.1"]
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in dots] == [pytest.approx([70, 80, 75]), pytest.approx([50])]


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_the_tables_on_the_page_are_those_of_the_store(name):
    path = helpers.HERE / "runs" / "reference" / name.split(".")[0].lower() / "experiments.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored.pop("recipe", None)  # the ablation, which has a cell of its own
    assert stored.keys() <= notebooks.experiment_cells(name).keys()
    rows = set()
    for entry in stored.values():
        assert entry["source"] in ("official", "image-folder")
        for variant, values in entry["variants"].items():
            percent = [100 * value for value in values]
            rows.add((variant, f"{statistics.mean(percent):.2f} ± {statistics.stdev(percent):.2f}"))
    [known] = [cell.source for cell in notebooks.code_cells(name) if "known = " in cell.source]
    assert all(experiment in known for experiment in notebooks.experiment_cells(name)), "the settings know every name"
    text = "\n".join(cell.source for cell in notebooks.read(name).cells if cell.cell_type == "markdown")
    there = re.findall(r"^\| (.+?) \| (\d+\.\d\d ± \d+\.\d\d) \|$", text, re.MULTILINE)
    assert len(there) > 5
    assert set(there) <= rows


def test_the_script_trains_a_page_s_cell_and_stores_it(tmp_path, monkeypatch):
    store = tmp_path / "store.json"
    arguments = ["experiments.py", "mnist", "--seeds", "1", "--names", "pooling", "--store", str(store)]
    monkeypatch.setattr("sys.argv", arguments)
    experiments.main()
    [(name, stored)] = json.loads(store.read_text(encoding="utf-8")).items()
    assert (name, stored["source"]) == ("pooling", "stand-in")
    assert [len(values) for values in stored["variants"].values()] == [1, 1]

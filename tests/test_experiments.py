"""The experiments of section 10: what is trained, what comes from the store, and that both know the same variants."""

import json
from dataclasses import replace

import pytest

import experiments
import helpers
import notebooks
import toy

PROVENANCE = helpers.Provenance("cifar10-jpeg", "image-folder", False)
STORED = {"measured": "5 images, 3 seeds, in 1998", **vars(PROVENANCE), "seconds": 2.0}


@pytest.fixture
def run(runs, tmp_path, monkeypatch):
    """A function that runs an experiment whose training returns what its options say; it notes every training."""
    training = toy.Training(data=replace(toy.digits(), provenance=PROVENANCE))
    monkeypatch.setenv("LAB_FAST", "0")
    monkeypatch.setattr(helpers, "HERE", tmp_path)
    store = {"pooling": STORED | {"variants": {"max": [0.7, 0.8, 0.75], "0.1": [0.5, 0.5, 0.5]}}}
    path = tmp_path / "runs" / "reference" / "toy" / "experiments.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(store), encoding="utf-8")
    add = training.run.add
    monkeypatch.setattr(training.run, "add", lambda tag, drawn: (call.added.append((tag, drawn)), add(tag, drawn)))

    def call(variants, again="", seeds=2, name="pooling"):
        def train(seed, to):
            call.trained.append((seed, to))
            return to + seed / 16

        call.trained, call.added = [], []
        options = dict(again=again, seeds=seeds, setting="5 images")
        return helpers.experiment(training.run, name, variants, train, **options)

    call.path = training.run.path
    return call


VARIANTS = {"max": dict(to=0.2), 0.1: dict(to=0.3), "mine": dict(to=0.4)}


def test_only_what_the_store_lacks_is_trained(run, capsys):
    assert run(VARIANTS) == {"max": [0.7, 0.8, 0.75], 0.1: [0.5, 0.5, 0.5], "mine": [0.4625, 0.525]}
    assert run.trained == [(1, 0.4), (2, 0.4)]
    assert capsys.readouterr().out.startswith("pooling, mine: 46.25  52.50 %, ")


def test_without_a_store_all_are_trained(run):
    assert list(run(VARIANTS, name="new one")) == list(VARIANTS)
    assert run.trained == [(seed, options["to"]) for options in VARIANTS.values() for seed in (1, 2)]


@pytest.mark.parametrize("again", ["all", "pooling", "all, pooling"])
def test_a_named_experiment_is_trained_again(run, again):
    assert run(VARIANTS, again)["max"] == [0.2625, 0.325]
    assert len(run.trained) == 6


def test_a_smoke_run_trains_two_variants(run, monkeypatch):
    monkeypatch.setenv("LAB_FAST", "1")
    assert list(run(VARIANTS, "all", seeds=1)) == ["max", 0.1]


def test_unknown_names_are_refused(run):
    with pytest.raises(helpers.LabError, match=r"poolnig.*all, pooling"):
        run(VARIANTS, "poolnig")


def test_the_figure_is_kept_and_says_what_is_stored(run):
    run(VARIANTS)
    [(tag, drawn)] = run.added
    [axis] = drawn.axes
    words = drawn.get_supxlabel()
    assert f"filled, trained here: {PROVENANCE}; 5 images" in words
    assert "hollow, STORED, not from this run: 5 images, 3 seeds, in 1998" in words
    assert [text.get_text() for text in axis.texts] == ["75.00 ± 5.00", "50.00 ± 0.00", "49.38 ± 4.42"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["max", "0.1", "mine"]
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in dots] == [
        *(pytest.approx([70, 80, 75]), pytest.approx([50, 50, 50]), pytest.approx([46.25, 52.5]))
    ]
    assert [line.get_markerfacecolor() for line in dots] == ["white", "white", helpers.COLORS[0]]
    assert tag == "experiments/pooling"
    assert (run.path / "results" / f"{tag}.png").exists()


@pytest.mark.parametrize(("again", "there", "missing"), [("all", "filled", "STORED"), ("", "STORED", "filled")])
def test_the_figure_speaks_of_what_it_shows_only(run, again, there, missing):
    run({"max": dict(to=0.2)}, again, name="pooling")
    words = run.added[0][1].get_supxlabel()
    assert there in words
    assert missing not in words


def test_the_axis_is_stretched_where_a_variant_fails(run):
    """Else differences of tenths could not be seen beside a variant at 10 %."""
    scales = []
    for fails in (0.0, 0.7):  # each training adds a sixteenth for each seed
        run({"works": dict(to=0.84), "another": dict(to=fails)}, name="new one")
        [(tag, drawn)] = run.added
        scales.append(drawn.axes[0].get_xscale())
        if not fails:
            places = drawn.axes[0].transData.transform([(a, 0) for a in (10, 50, 90, 98, 100)])[:, 0]
            assert (places[1:] > places[:-1] + 20).all(), "the axis should keep the order, and show both ends"
    assert scales == ["function", "linear"]
    assert tag == "experiments/new_one"


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_the_store_has_the_page_s_experiments(name):
    """The cells are executed with a stand-in for `experiment` that only notes what it is asked for."""
    asked = {}

    class Stop(Exception):
        pass

    def experiment(name, variants):
        asked[name] = [str(variant) for variant in variants]
        raise Stop

    page = notebooks.page(name) | {"experiment": experiment}
    for source in notebooks.experiment_cells(name).values():
        with pytest.raises(Stop):
            exec(source, page)
    path = helpers.HERE / "runs" / "reference" / name.split(".")[0].lower() / "experiments.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored.pop("recipe", None)  # the ablation of CIFAR.ipynb has a cell of its own
    assert asked
    assert {key: list(entry["variants"]) for key, entry in stored.items()} == asked
    for entry in stored.values():
        assert set(entry) == {"measured", "dataset", "source", "verified", "seconds", "variants"}
        assert entry["source"] in ("official", "image-folder")
        assert {len(values) for values in entry["variants"].values()} in ({3}, {5})
        assert all(0 <= value <= 1 for values in entry["variants"].values() for value in values)


def test_the_script_trains_a_page_s_cell_and_stores_it(tmp_path, monkeypatch):
    store = tmp_path / "store.json"
    arguments = ["experiments.py", "mnist", "--seeds", "1", "--names", "connected", "--store", str(store)]
    monkeypatch.setattr("sys.argv", arguments)
    experiments.main()
    [(name, stored)] = json.loads(store.read_text(encoding="utf-8")).items()
    assert (name, stored["source"]) == ("connected", "stand-in")
    assert [len(values) for values in stored["variants"].values()] == [1, 1]

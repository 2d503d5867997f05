"""The experiments of section 10: what is trained, what comes from the store, and that both know the same variants."""

import json

import pytest
import torch

import experiments
import helpers
import notebooks

PROVENANCE = helpers.Provenance("cifar10-jpeg", "image-folder", False)
STORED = {"measured": "5 images, 3 seeds", **PROVENANCE.as_metrics(), "seconds": 2.0}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs an experiment whose training returns what its options say; it notes every training."""
    monkeypatch.setenv("LAB_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("LAB_FAST")
    monkeypatch.setattr(helpers, "HERE", tmp_path)
    store = {"pooling": STORED | {"variants": {"max": [0.7, 0.8, 0.75], "0.1": [0.5, 0.5, 0.5]}}}
    path = tmp_path / "runs" / "reference" / "toy" / "experiments.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(store), encoding="utf-8")

    def call(variants, again="", seeds=2, name="pooling"):
        def train(seed, **options):
            call.trained.append((seed, options))
            return [0.1, options["to"] + seed / 16]

        call.trained = []
        options = dict(seeds=seeds, provenance=PROVENANCE, device=torch.device("cpu"), setting="5 images")
        return helpers.experiment("toy", name, variants, train, again=again, **options)

    return call


VARIANTS = {"max": dict(to=0.2), 0.1: dict(to=0.3), "mine": dict(to=0.4)}


def test_only_what_the_store_lacks_is_trained(run, tmp_path):
    results = run(VARIANTS)
    assert results == {"max": [0.7, 0.8, 0.75], 0.1: [0.5, 0.5, 0.5], "mine": [0.4625, 0.525]}
    assert results.trained == ["mine"]
    assert run.trained == [(1, dict(to=0.4)), (2, dict(to=0.4))]
    assert not list(tmp_path.glob("runs/toy-experiments/*/max*"))


def test_nothing_trained_nothing_written(run, tmp_path):
    assert run({"max": dict(to=0.2)}).trained == []
    assert not (tmp_path / "runs" / "toy-experiments").exists()


@pytest.mark.parametrize("again", ["all", "depth, pooling"])
def test_a_named_experiment_is_trained_again(run, again, monkeypatch):
    monkeypatch.setattr(helpers, "stored_experiments", lambda lab: {"pooling": STORED | {"variants": {}}, "depth": {}})
    results = run(VARIANTS, again)
    assert results.trained == list(VARIANTS)
    assert results["max"] == [0.2625, 0.325]


def test_a_smoke_run_trains_two_variants(run, monkeypatch):
    monkeypatch.setenv("LAB_FAST", "1")
    assert list(run(VARIANTS, "all", seeds=1)) == ["max", 0.1]


def test_unknown_names_are_refused(run):
    with pytest.raises(helpers.LabError, match=r"poolnig.*all, pooling"):
        run(VARIANTS, "poolnig")


def test_each_training_has_one_events_file_of_its_own(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(VARIANTS, "all")
    [home] = (tmp_path / "runs" / "toy-experiments").iterdir()
    names = {path.name for path in home.iterdir() if path.is_dir()}
    assert names == {f"{variant}-seed-{seed}" for variant in ("max", "0.1", "mine") for seed in (1, 2)}
    for name in names:
        assert len(list((home / name).iterdir())) == 1
    reader = EventAccumulator(str(home / "mine-seed-2"))
    reader.Reload()
    assert [event.value for event in reader.Scalars("accuracy/validation")] == pytest.approx([0.1, 0.525])


@pytest.mark.parametrize("variants", [VARIANTS, {1: dict(to=0.2), 10: dict(to=0.3), 100: dict(to=0.5)}])
def test_the_figure_says_what_is_stored(run, variants, monkeypatch):
    shown = []
    monkeypatch.setattr(helpers, "show", lambda canvas, provenance: shown.append((canvas, provenance)))
    results = run(variants)
    canvas = helpers.show_experiment(results, xlabel="batch size")
    assert shown == [(canvas, PROVENANCE)]
    [axis] = canvas.axes
    words = canvas.get_supxlabel()
    assert "trained here: cifar10-jpeg" in words
    assert ("STORED" in words) == (variants is VARIANTS)
    written = [text.get_text() for text in axis.texts]
    assert (axis.get_xscale() == "log") == (variants is not VARIANTS)
    if variants is VARIANTS:
        assert written == ["75.00 ± 5.00", "50.00 ± 0.00", "49.38 ± 4.42"]
        assert [label.get_text() for label in axis.get_yticklabels()] == ["max", "0.1", "mine"]


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
    stored = helpers.stored_experiments(name.split(".")[0].lower())
    assert {key: list(entry["variants"]) for key, entry in stored.items()} == asked
    for entry in stored.values():
        assert set(entry) == {"measured", "dataset", "source", "verified", "seconds", "variants"}
        assert entry["source"] in ("official", "image-folder")
        assert {len(values) for values in entry["variants"].values()} in ({3}, {5})
        assert all(0 <= value <= 1 for values in entry["variants"].values() for value in values)


def test_the_axis_is_stretched_where_a_variant_fails(run, monkeypatch):
    """Else differences of tenths could not be seen beside a variant at 10 %."""
    axes = []
    monkeypatch.setattr(helpers, "show", lambda canvas, provenance: axes.extend(canvas.axes))
    for fails in (0.0, 0.7):  # each training adds a sixteenth for each seed
        canvas = helpers.show_experiment(run({"works": dict(to=0.84), "another": dict(to=fails)}, name="new"))
        assert ("stretched" in canvas.get_supxlabel()) == (fails == 0.0)
    assert [axis.get_xscale() for axis in axes] == ["function", "linear"]
    places = axes[0].transData.transform([(a, 0) for a in (10, 50, 90, 98, 100)])[:, 0]
    assert (places[1:] > places[:-1] + 20).all(), "the axis should keep the order, and show both ends"


@pytest.mark.parametrize("lab", ["mnist", "cifar"])
def test_the_script_trains_a_page_s_cells_and_stores_them(lab, tmp_path, monkeypatch):
    name, store = {"mnist": "connected", "cifar": "schedule"}[lab], tmp_path / "store.json"
    monkeypatch.setattr("sys.argv", ["experiments.py", lab, "--seeds", "1", "--names", name, "--store", str(store)])
    experiments.main()
    stored = json.loads(store.read_text(encoding="utf-8"))
    assert list(stored) == [name]
    assert stored[name]["source"] == "stand-in"
    assert [len(values) for values in stored[name]["variants"].values()] == [1, 1]

"""The notebooks as `python -m IPython` runs them, with settings other than the defaults, and what they leave behind."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import helpers
import notebooks

CURVES = {
    "loss/train",
    "accuracy/train",
    "loss/validation",
    "accuracy/validation",
    "learning_rate",
    "images_per_second",
    "train_seconds",
    "gradient_norm",
}
TEST = {"loss/step", "test/accuracy", "test/loss"}
PICTURES = {"samples/training", "samples/augmented", "filters/first_layer", "test/confusion", "test/classes"}


def run(name, runs, **settings):
    """Run a notebook headless in the smoke mode; return the finished process."""
    variables = {f"LAB_{setting}": str(value) for setting, value in settings.items()}
    environment = {**os.environ, **variables, "LAB_RUNS": str(runs)}
    command = [sys.executable, "-m", "IPython", "--colors=NoColor", str(notebooks.ROOT / name)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def read_run(runs, lab):
    """Return the only run's metrics and scalars by tag, after a look at its files."""
    [directory] = (runs / lab).iterdir()
    [events] = directory.glob("events.out.tfevents.*")
    files = {"checkpoint.pt", "config.json", "metrics.json", "report.html", events.name}
    assert {path.name for path in directory.iterdir() if path.is_file()} - {
        "projector_config.pbtxt",
        "checkpoint.previous.pt",
    } == files
    accumulator = EventAccumulator(str(events)).Reload()
    tags = accumulator.Tags()
    scalars = {tag: accumulator.Scalars(tag) for tag in tags["scalars"] if not tag.startswith("cpu/")}
    assert set(tags["images"]) >= PICTURES
    assert any(tag.startswith("feature_maps/") for tag in tags["images"])
    assert any(tag.startswith("gradients/") for tag in tags["histograms"])
    assert tags["graph"]
    assert set(tags["tensors"]) >= {"test/confusion_counts", "custom_scalars__config__"}
    assert accumulator.SummaryMetadata("_hparams_/session_start_info")
    assert any(tag.startswith("precision_recall/") for tag in tags["tensors"])
    metrics = json.loads((directory / "metrics.json").read_text())
    assert list(metrics) == helpers.METRICS
    assert 0 <= metrics["test_accuracy"] <= 1
    assert [point.value for point in scalars["test/accuracy"]] == [pytest.approx(metrics["test_accuracy"])]
    assert [point.step for point in scalars["loss/train"]] == list(range(1, metrics["epochs"] + 1))
    assert all(math.isfinite(point.value) for points in scalars.values() for point in points)
    config = json.loads((directory / "config.json").read_text())
    assert config["seed"] == metrics["seed"] == config["settings"]["SEED"]
    return metrics, scalars


def test_mnist_page_on_an_image_folder(tmp_path):
    random = np.random.default_rng(0)
    for part, count in (("train", 60), ("test", 20)):
        for name, brightness in (("dark", 60), ("bright", 255), ("灰", 150)):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(brightness // 2, brightness, (40, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / part / name / f"{number}.png")
    shorter = dict(EXPERIMENTS="", LIGHTNING=0, OWN_IMAGES=tmp_path / "photos" / "test" / "bright")
    settings = dict(DATASET=tmp_path / "photos", VALIDATION=20, BATCH_SIZE=16, EPOCHS=3)
    process = run("MNIST.ipynb", tmp_path / "runs", **settings, **shorter)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stderr == ""
    metrics, scalars = read_run(tmp_path / "runs", "mnist")
    assert (metrics["dataset"], metrics["source"], metrics["verified"]) == ("photos", "image-folder", False)
    assert metrics["epochs"] == 3
    assert set(scalars) == CURVES | TEST
    [report] = (tmp_path / "runs").glob("mnist/*/report.html")
    page = report.read_text(encoding="utf-8")
    assert f"{metrics['test_accuracy']:.2%}".replace("%", " %") in page
    assert "灰" in page


def test_cifar_page_on_cifar100_without_validation(tmp_path):
    process = run("CIFAR.ipynb", tmp_path / "runs", DATASET="CIFAR100", VALIDATION=0, EPOCHS=1, SEED=5)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stderr == ""
    assert "coarse accuracy (20 classes)" in process.stdout
    assert "STAND-IN, not CIFAR100" in process.stdout
    metrics, scalars = read_run(tmp_path / "runs", "cifar")
    assert (metrics["dataset"], metrics["source"], metrics["seed"]) == ("CIFAR100", "stand-in", 5)
    assert set(scalars) == (CURVES - {"loss/validation", "accuracy/validation"}) | TEST | {
        "test/accuracy_averaged_views"
    }


@pytest.mark.parametrize(
    ("settings", "named"), [({"EPOCHS": "ten"}, "LAB_EPOCHS='ten'"), ({"EPOCS": "3"}, "LAB_EPOCS is no setting")]
)
def test_bad_setting_stops_before_anything_is_created(tmp_path, settings, named):
    process = run("MNIST.ipynb", tmp_path / "runs", **settings)
    assert process.returncode != 0
    assert named in process.stdout + process.stderr
    assert not (tmp_path / "runs").exists()

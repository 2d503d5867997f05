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

import notebooks

VALIDATION = {"loss/validation", "accuracy/validation"}
EPOCH = {"loss/train", "accuracy/train", "learning_rate", "images_per_second"} | VALIDATION
ONCE = {"loss/step", "loss/test", "accuracy/test"}
METRICS = "lab dataset source verified parameters epochs world_size device precision test_accuracy test_loss "
METRICS += "train_seconds images_per_second gpu_utilization gpu_utilization_reason seed started finished"


def run(name, runs, **settings):
    """Run a notebook headless in the smoke mode; return the finished process."""
    variables = {f"LAB_{setting}": str(value) for setting, value in settings.items()}
    environment = {**os.environ, **variables, "LAB_RUNS": str(runs)}
    command = [sys.executable, "-m", "IPython", "--colors=NoColor", str(notebooks.ROOT / name)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def read_run(runs, lab):
    """Return the only run's metrics, history and tags of TensorBoard, after a look at its files."""
    [directory] = (runs / lab).iterdir()
    [events] = directory.glob("events.out.tfevents.*")
    files = {"checkpoint.pt", "config.json", "history.json", "metrics.json", "nvidia-smi.txt"}
    files |= {"report.html", events.name}
    others = {".lock", "projector_config.pbtxt", "trace.json.gz"}
    assert {path.name for path in directory.iterdir() if path.is_file()} - others == files
    config, history, metrics = (
        json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("config", "history", "metrics")
    )
    assert set(METRICS.split()) <= set(metrics)
    assert config["seed"] == metrics["seed"] == config["settings"]["SEED"]
    assert [entry["epoch"] for entry in history] == list(range(1, metrics["epochs"] + 1))
    assert history[-1]["seconds"] == metrics["train_seconds"]

    accumulator = EventAccumulator(str(events)).Reload()
    tags = accumulator.Tags()
    scalars = {tag: accumulator.Scalars(tag) for tag in tags["scalars"] if not tag.startswith("cpu/")}
    assert all(math.isfinite(point.value) for points in scalars.values() for point in points)
    for tag in set(scalars) - ONCE:  # one axis: the training steps done
        assert [(point.step, point.value) for point in scalars[tag]] == [
            (entry["step"], pytest.approx(entry[tag])) for entry in history
        ]
    for name in ("accuracy", "loss"):
        [point] = scalars[f"{name}/test"]
        assert (point.step, point.value) == (history[-1]["step"], pytest.approx(metrics[f"test_{name}"]))
    assert "settings/text_summary" in tags["tensors"]
    results = directory / "results"
    figures = {path.relative_to(results).with_suffix("").as_posix() for path in results.rglob("*.png")}
    assert {"test/confusion", "test/mistakes"} <= figures <= set(tags["images"])
    closed = (directory / "report.html").stat().st_mtime  # what optional experiments add later is in no events file
    tables = [path for path in results.rglob("*.md") if path.stat().st_mtime <= closed]
    tables = {path.relative_to(results).with_suffix("").as_posix() for path in tables}
    assert tables
    assert {f"{name}/text_summary" for name in tables} <= set(tags["tensors"])
    return metrics, set(scalars), tags


def test_mnist_page_on_an_image_folder(tmp_path):
    random = np.random.default_rng(0)
    for part, count in (("train", 60), ("test", 20)):
        for name, brightness in (("dark", 60), ("bright", 255), ("灰", 150)):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(brightness // 2, brightness, (40, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / part / name / f"{number}.png")
    shorter = dict(EXPERIMENTS="", OWN_IMAGES=tmp_path / "photos" / "test" / "bright")
    settings = dict(DATASET=tmp_path / "photos", VALIDATION=20, BATCH_SIZE=16, EPOCHS=3)
    process = run("MNIST.ipynb", tmp_path / "runs", **settings, **shorter)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stderr == ""
    assert "from the environment: EPOCHS=3, the cell says 2" in process.stdout
    metrics, scalars, tags = read_run(tmp_path / "runs", "mnist")
    assert (metrics["dataset"], metrics["source"], metrics["verified"]) == ("photos", "image-folder", False)
    assert metrics["epochs"] == 3
    assert scalars == EPOCH | ONCE
    assert "tables/guesses/text_summary" in tags["tensors"]
    [directory] = (tmp_path / "runs" / "mnist").iterdir()
    assert f"{metrics['test_accuracy']:.2%}" in (directory / "report.html").read_text(encoding="utf-8")
    assert json.loads((directory / "config.json").read_text(encoding="utf-8"))["classes"] == ["bright", "dark", "灰"]


def test_cifar_page_on_cifar100_without_validation(tmp_path):
    choice = dict(DATASET="CIFAR100", VALIDATION=0, EPOCHS=1, SEED=5, EXPERIMENTS="schedule")  # one of five, for time
    process = run("CIFAR.ipynb", tmp_path / "runs", **choice)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stderr == ""
    assert "STAND-IN, not CIFAR100" in process.stdout
    metrics, scalars, _ = read_run(tmp_path / "runs", "cifar")
    assert (metrics["dataset"], metrics["source"], metrics["seed"]) == ("CIFAR100", "stand-in", 5)
    assert scalars == (EPOCH - VALIDATION) | {"image_size"} | ONCE
    assert 0 <= metrics["six_views_accuracy"] <= 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"EPOCHS": "ten"}, "LAB_EPOCHS='ten'"),
        ({"EPOCS": "3"}, "LAB_EPOCS is no setting"),
        ({"EXPERIMENTS": "poolingg"}, "no ['poolingg']"),
    ],
)
def test_bad_setting_stops_before_anything_is_created(tmp_path, settings, named):
    process = run("MNIST.ipynb", tmp_path / "runs", **settings)
    assert process.returncode != 0
    assert named in process.stdout + process.stderr
    assert not (tmp_path / "runs").exists()

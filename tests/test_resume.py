"""A run that is killed and resumed equals one that was not, bit for bit on a CPU.

RUNS_TO_KILL=20 python -m pytest tests/test_resume.py kills that many at random moments, by three signals in turn.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import helpers
import notebooks

KILLS = int(os.environ.get("RUNS_TO_KILL", "1"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SETTINGS = {"LAB_EPOCHS": "6", "LAB_BATCH_SIZE": "20", "LAB_EMBEDDINGS": "0"}


def start(runs, **variables):
    command = [sys.executable, "-m", "IPython", "--colors=NoColor", str(notebooks.ROOT / "MNIST.ipynb")]
    environment = os.environ | SETTINGS | {"LAB_RUNS": str(runs)} | variables
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def outcome(runs):
    """Everything that must not depend on an interruption."""
    [run] = (runs / "mnist").iterdir()
    checkpoint = helpers.load_checkpoint(run / "checkpoint.pt")
    [events] = run.glob("events*")
    scalars = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload()
    kept = ("loss/", "accuracy/", "learning_rate", "gradient_norm", "test/")
    series = {tag: scalars.Scalars(tag) for tag in scalars.Tags()["scalars"] if tag.startswith(kept)}
    series = {tag: [(point.step, point.value) for point in points] for tag, points in series.items()}
    metrics = json.loads((run / "metrics.json").read_text())
    return checkpoint, series, {name: metrics[name] for name in ("test_accuracy", "test_loss", "epochs", "parameters")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    runs = tmp_path_factory.mktemp("whole")
    process = start(runs)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "new run" in output
    return outcome(runs)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_and_resumed_equals_uninterrupted(number, whole, tmp_path):
    process = start(tmp_path)
    end = time.monotonic() + 60
    while not list(tmp_path.glob("mnist/*/checkpoint.pt")) and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(random.uniform(0, 1.5))
    process.send_signal(SIGNALS[number % len(SIGNALS)])
    process.communicate(timeout=60)
    [run] = (tmp_path / "mnist").iterdir()
    reached = helpers.load_checkpoint(run / "checkpoint.pt")["epoch"]
    steps = EventAccumulator(str(run)).Reload().Scalars("loss/train")
    assert len(steps) >= reached, "the curves keep every finished epoch"
    if not (run / "metrics.json").exists():
        again = start(tmp_path, LAB_RESUME="latest")
        output, _ = again.communicate(timeout=120)
        assert again.returncode == 0, output
        assert f"resuming {run.name} from epoch {reached}" in output
    expected, (checkpoint, series, metrics) = whole, outcome(tmp_path)
    for part in ("epoch", "model", "optimizers", "schedulers", "rng"):
        assert same(checkpoint[part], expected[0][part]), part
    assert checkpoint["progress"]["history"] == expected[0]["progress"]["history"]
    assert series == expected[1]
    assert metrics == expected[2]


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A run with two checkpoints in LAB_RUNS, its model and its optimizer."""
    monkeypatch.setenv("LAB_RUNS", str(tmp_path))
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    run, checkpoint = helpers.open_run("mnist", "", "x", {"EPOCHS": 3, "SEED": 1}, torch.device("cpu"), ())
    assert checkpoint is None
    for epoch in (1, 2):
        helpers.save_checkpoint(run, epoch, model, [optimizer], [schedule], history=[{"train_loss": 0.5}] * epoch)
    return run, model, optimizer, schedule


def reopen(resume, settings=None):
    settings = settings or {"EPOCHS": 3, "SEED": 1}
    return helpers.open_run("mnist", resume, "x", settings, torch.device("cpu"), ())


def test_a_new_run_never_trains_on(saved, capsys):
    run, checkpoint = reopen("")
    assert checkpoint is None
    assert run != saved[0]
    assert "new run" in capsys.readouterr().out


@pytest.mark.parametrize("resume", ["latest", "path"])
def test_resuming_says_from_where(saved, resume, capsys):
    run, checkpoint = reopen("latest" if resume == "latest" else str(saved[0]))
    assert run == saved[0]
    assert checkpoint["epoch"] == 2
    assert checkpoint["progress"]["history"] == [{"train_loss": 0.5}] * 2
    assert f"resuming {run.name} from epoch 2" in capsys.readouterr().out


def test_a_finished_run_is_not_latest(saved):
    (saved[0] / "metrics.json").write_text("{}")
    with pytest.raises(helpers.LabError, match="no unfinished run"):
        reopen("latest")


def test_other_settings_are_refused_with_the_difference(saved):
    with pytest.raises(helpers.LabError, match="SEED was 1, is 2"):
        reopen("latest", {"EPOCHS": 3, "SEED": 2})


def test_nothing_to_resume_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_RUNS", str(tmp_path))
    with pytest.raises(helpers.LabError, match="LAB_RESUME=latest"):
        reopen("latest")
    with pytest.raises(helpers.LabError, match=r"LAB_RESUME=.*nowhere"):
        reopen(str(tmp_path / "nowhere"))


def damage_middle(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [lambda d: d[: len(d) // 2], lambda d: b"", damage_middle, lambda d: b"x" * len(d)])
def test_a_damaged_checkpoint_is_refused_and_the_previous_one_offered(saved, damage):
    path = saved[0] / "checkpoint.pt"
    model = nn.Linear(400, 400)  # so that the middle of the file is weights
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    helpers.save_checkpoint(saved[0], 3, model, [optimizer], [])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(helpers.LabError, match=r"checkpoint\.pt is no readable") as error:
        reopen("latest")
    assert "checkpoint.previous.pt" in str(error.value)
    shutil.copy(saved[0] / "checkpoint.previous.pt", path)
    assert reopen("latest")[1]["epoch"] == 2


def test_a_checkpoint_of_another_model_is_refused_in_words(saved):
    _, checkpoint = reopen("latest")
    other = nn.Linear(4, 2)
    loader = type("Loader", (), {"epoch": 0})()
    with pytest.raises(helpers.LabError, match=r"weight: \(2, 3\) there, \(2, 4\) here"):
        helpers.restore(checkpoint, other, [], [], loader)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "checkpoint.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(helpers.LabError):
        helpers.load_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "ran").exists()


class TestTrainingThatGoesWrong:
    def test_a_loss_that_is_not_finite_names_step_rate_and_checkpoint(self, saved):
        helpers.check_finite([0.5, 0.4], 1, 0.1, saved[0])
        with pytest.raises(helpers.LabError, match=r"nan in epoch 3, step 3 of 4 .*0\.4.* rate 0\.1.*checkpoint\.pt"):
            helpers.check_finite([0.5, 0.4, float("nan"), float("nan")], 3, 0.1, saved[0])

    def test_out_of_memory_names_the_setting_and_frees_the_memory(self):
        kept = []

        def step():
            activations = torch.zeros(1000)
            kept.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        with pytest.raises(helpers.LabError, match="LAB_BATCH_SIZE=250") as caught, helpers.memory_advice(500):
            step()
        assert "Tried to allocate" in str(caught.value)
        assert kept[0]() is None

    def test_other_errors_pass(self):
        with pytest.raises(ZeroDivisionError), helpers.memory_advice(500):
            raise ZeroDivisionError

    @pytest.mark.parametrize(
        ("name", "value"),
        [("EPOCHS", "0"), ("BATCH_SIZE", "0"), ("LEARNING_RATE", "-0.1"), ("MOMENTUM", "2"), ("VALIDATION", "-1")],
    )
    def test_absurd_settings_are_refused_by_name(self, name, value, monkeypatch):
        monkeypatch.setenv(f"LAB_{name}", value)
        namespace = {"EPOCHS": 1, "BATCH_SIZE": 10, "LEARNING_RATE": 0.1, "MOMENTUM": 0.9, "VALIDATION": 5}
        with pytest.raises(helpers.LabError, match=f"LAB_{name}={value}"):
            helpers.override_settings(namespace)


class TestSideParts:
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_a_writer_that_fails_midway_says_so_once_and_the_rest_goes_on(self, tmp_path, capsys):
        writer = helpers.event_writer(tmp_path)
        writer.add_scalar("a", 1, 1)
        writer.flush()
        inner = writer.writer.file_writer.event_writer._async_writer._writer._writer
        inner.write = inner.flush = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        for step in range(50):
            writer.add_scalar("a", step, step)
            writer.flush()
        writer.add_image("b", torch.zeros(3, 4, 4), 1)
        writer.close()
        assert capsys.readouterr().out.count("No space left on device") == 1
        assert "No space left" in writer.failure

    def test_metrics_say_what_is_missing(self, tmp_path):
        numbers = dict.fromkeys(helpers.METRICS, 0)
        helpers.write_metrics(tmp_path, missing=[None], **numbers)
        assert "missing" not in json.loads((tmp_path / "metrics.json").read_text())
        helpers.write_metrics(tmp_path, missing=["OSError: no space"], **numbers)
        assert json.loads((tmp_path / "metrics.json").read_text())["missing"] == ["OSError: no space"]

    def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(self, saved, capsys):
        run, model, optimizer, schedule = saved
        (run / f".checkpoint.pt.{os.getpid()}.part").mkdir()  # the kernel refuses to open it for writing
        with contextlib.suppress(OSError):
            helpers.save_checkpoint(run, 3, model, [optimizer], [schedule])
        assert helpers.load_checkpoint(run / "checkpoint.pt")["epoch"] == 2

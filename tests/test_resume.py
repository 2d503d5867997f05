"""A run that is killed and resumed equals one that was not, bit for bit on a CPU.

The long form (`python tests/faults.py --kills 20`) kills that many at random moments, by three signals in turn.
"""

import contextlib
import functools
import json
import os
import pickle
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
from rights import NOBODY, in_child, needs_fork, write_protect

LONG = bool(os.environ.get("FAULTS_LONG"))
KILLS = int(os.environ.get("RUNS_TO_KILL", "1"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SETTINGS = {
    "MNIST.ipynb": {"LAB_EPOCHS": "6", "LAB_BATCH_SIZE": "20", "LAB_EXPERIMENTS": "", "LAB_LIGHTNING": "0"},
    "CIFAR.ipynb": {"LAB_EPOCHS": "4", "LAB_ABLATION": ""},  # an epoch of each size of the images
}
SECONDS = 300  # for a whole run, on a machine that others use too


class Page:
    """A notebook that runs headless in a process of its own, with its output in a file. Leaving the context ends it."""

    def __init__(self, name, runs, **variables):
        self.runs, self.lab, self.log = runs, name.split(".")[0].lower(), runs.with_suffix(".log")
        command = [sys.executable, "-u", "-m", "IPython", "--colors=NoColor", str(notebooks.ROOT / name)]
        variables = SETTINGS[name] | {"LAB_RUNS": str(runs), "LAB_EMBEDDINGS": "0"} | variables
        variables.setdefault("OMP_NUM_THREADS", "1")  # several would wait for each other where others compute too
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command,
                env=os.environ | variables,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # background jobs ignore it
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    @property
    def output(self):
        return self.log.read_text(encoding="utf-8")

    @property
    def run(self):
        """The directory of the newest run."""
        return max((self.runs / self.lab).iterdir(), key=lambda run: run.stat().st_ctime_ns)

    def wait_for(self, *texts):
        """Wait until one of the texts is printed, or the process has ended."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end and self.process.poll() is None and not any(t in self.output for t in texts):
            time.sleep(0.02)

    def finish(self):
        """Wait for the end of a run that nobody disturbs; return its output."""
        self.process.wait(SECONDS)
        assert self.process.returncode == 0, self.output
        return self.output


def outcome(run):
    """Everything that must not depend on an interruption."""
    checkpoint = helpers.load_checkpoint(run / "checkpoint.pt")
    [events] = run.glob("events*")
    scalars = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload()
    clocks = ("cpu/", "images_per_second", "train_seconds")
    series = {tag: scalars.Scalars(tag) for tag in scalars.Tags()["scalars"] if not tag.startswith(clocks)}
    series = {tag: [(point.step, point.value) for point in points] for tag, points in series.items()}
    metrics = json.loads((run / "metrics.json").read_text())
    return checkpoint, series, {name: metrics[name] for name in ("test_accuracy", "test_loss", "epochs", "parameters")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A function: the outcome of an uninterrupted run of a notebook, and the seconds that its training took."""

    @functools.cache
    def run(name, deterministic):
        with Page(name, tmp_path_factory.mktemp("whole") / "runs", LAB_DETERMINISTIC=deterministic) as page:
            page.wait_for("new run")
            start = time.monotonic()
            page.wait_for("trained for")
            seconds = time.monotonic() - start
            assert "new run" in page.finish()
            return outcome(page.run), seconds

    return run


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def check_same(expected, got, tested=True):
    """Compare two outcomes; what came from the test set only if it was `tested`."""
    for part in ("epoch", "model", "optimizers", "schedulers", "rng"):
        assert same(got[0][part], expected[0][part]), part
    assert got[0]["progress"]["history"] == expected[0]["progress"]["history"]
    wanted = expected[1] if tested else {tag: s for tag, s in expected[1].items() if not tag.startswith("test/")}
    assert {tag: got[1][tag] for tag in wanted} == wanted
    assert got[2] == expected[2]


NUMBERED = [("MNIST.ipynb", n) for n in range(KILLS)] + [("CIFAR.ipynb", n) for n in range(KILLS // 4)]


def finished_epochs(run):
    """How many epochs of an interrupted run are safe, after a look at its files."""
    assert json.loads((run / "config.json").read_text())["started"]
    if not (run / "checkpoint.pt").exists():
        return 0
    reached = helpers.load_checkpoint(run / "checkpoint.pt")["epoch"]
    curve = EventAccumulator(str(run)).Reload().Scalars("loss/train")
    assert [point.step for point in curve][:reached] == list(range(1, reached + 1)), "every finished epoch is kept"
    return reached


@pytest.mark.once
@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize(("name", "number"), NUMBERED)
def test_killed_and_resumed_equals_uninterrupted(name, number, whole, tmp_path, fault):
    deterministic = str(1 - number // 2 % 2)
    (expected, seconds), runs = whole(name, deterministic), tmp_path / "runs"
    variables = {"LAB_DETERMINISTIC": deterministic, "LAB_RESUME": ""}
    kills = [SIGNALS[number % len(SIGNALS)]]
    kills += [random.choice(SIGNALS)] * (LONG and number % 2)  # every second one is interrupted twice
    reached, complete, epochs = 0, False, int(SETTINGS[name]["LAB_EPOCHS"])
    for chosen in kills:
        with Page(name, runs, **variables) as page:
            page.wait_for("new run", "resuming")
            epoch = random.randrange(reached, max(epochs, reached + 1))
            if epoch > reached:
                page.wait_for(f"\nepoch {epoch:>2} ")  # is finished; however slow this machine is just now
            time.sleep(random.uniform(0, seconds / epochs))
            page.process.send_signal(chosen)
            page.process.wait(60)
        reached, complete = finished_epochs(page.run), (page.run / "metrics.json").exists()
        variables["LAB_RESUME"] = "latest" if reached else ""
        if complete:
            break
    how = "killed twice" if len(kills) > 1 else kills[0].name
    with fault(f"{name}: {how} at random, resumed") as seen:
        if complete:
            seen("nothing: the signal came after the training")
        else:
            with Page(name, runs, **variables) as page:
                page.finish()
            line = f"resuming {page.run.name} from epoch {reached}" if reached else f"new run {page.run.name}"
            assert line in page.output
            seen(line)
        check_same(expected, outcome(page.run), tested=not complete)


def test_cifars_two_optimizers_resume_bit_for_bit(tmp_path):
    page = notebooks.page("CIFAR.ipynb", BATCH_SIZE=20)
    split = helpers.stand_in("CIFAR10", True, (3, 32, 32), 60)
    options = dict(batch_size=20, device=torch.device("cpu"), mean=torch.full((3,), 0.5), std=torch.full((3,), 0.25))

    def train(interrupted_after):
        helpers.set_seed(1)
        model, scaler = page["FastCNN"]((8, 8, 8)), torch.amp.GradScaler("cpu", enabled=False)
        loader = helpers.ResidentLoader(split, **options, shuffle=True, flip=True, alternate=True, translate=2, seed=1)
        optimizers, schedulers = page["make_optimizers"](model, 3 * len(loader), page["BATCH_SIZE"])
        checkpoint = tmp_path / "checkpoint.pt"
        begin, _ = helpers.restore(
            helpers.load_checkpoint(checkpoint) if checkpoint.exists() else None, model, optimizers, schedulers, loader
        )
        for epoch in range(begin, interrupted_after):
            page["train_one_epoch"](
                model, loader, nn.CrossEntropyLoss(), optimizers, schedulers, 20 + 4 * epoch, "fp32", scaler
            )
        helpers.save_checkpoint(tmp_path, interrupted_after, model, optimizers, schedulers)
        return helpers.load_checkpoint(checkpoint)

    train(1)
    train(2)
    resumed = train(3)
    (tmp_path / "checkpoint.pt").unlink()
    whole = train(3)
    assert resumed["epoch"] == whole["epoch"] == 3
    for part in ("model", "optimizers", "schedulers", "rng"):
        assert same(resumed[part], whole[part]), part


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


def test_other_data_are_refused_with_the_difference(saved):
    with pytest.raises(helpers.LabError, match="they were x, and are x-stand-in"):
        helpers.open_run("mnist", "latest", "x-stand-in", {"EPOCHS": 3, "SEED": 1}, torch.device("cpu"), ())


def test_running_the_training_cell_again_is_no_silent_training(saved, capsys):
    split = helpers.stand_in("MNIST", True, (1, 28, 28), 20)
    loader = helpers.ResidentLoader(split, 5, torch.device("cpu"), torch.zeros(1), torch.ones(1))
    _, model, optimizer, schedule = saved

    def training_cell(finished):
        progress = helpers.Progress(3, finished)
        for _ in range(finished, 3):
            for _ in progress(loader):
                pass

    training_cell(helpers.restore(None, model, [optimizer], [schedule], loader)[0])
    with pytest.raises(helpers.LabError, match="train it on, unasked"):
        training_cell(0)
    helpers.restore(None, model, [optimizer], [schedule], loader)
    next(iter(helpers.Progress(3)(loader)))  # interrupted in the first epoch
    with pytest.raises(helpers.LabError, match="train it on, unasked"):
        training_cell(0)
    training_cell(helpers.restore(reopen("latest")[1], model, [optimizer], [schedule], loader)[0])


def test_other_settings_are_refused_with_the_difference(saved):
    with pytest.raises(helpers.LabError, match="SEED was 1, is 2"):
        reopen("latest", {"EPOCHS": 3, "SEED": 2})


def test_the_curves_survive_a_second_interruption_before_the_next_checkpoint(saved):
    run, model, optimizer, schedule = saved
    writer = helpers.event_writer(run)
    for epoch in (1, 2, 3):
        writer.add_scalar("loss/train", 1 / epoch, epoch)
        writer.add_image("noise", torch.rand(3, 8, 8), epoch)
    helpers.save_checkpoint(run, 3, model, [optimizer], [schedule], writer)
    writer.close()
    for _ in range(3):  # resumed, and killed in the middle of epoch 4, which had logged something
        checkpoint = reopen("latest")[1]
        writer = helpers.event_writer(run, checkpoint)
        [events] = run.glob("events*")
        assert events.stat().st_size == checkpoint["events"][1]
        writer.add_scalar("loss/train", 0.1, 4)
        writer.flush()
        (run / "events.out.tfevents.9999999999.half").write_bytes(b"?")  # and while the events were copied
    (run / "events.out.tfevents.9999999999.half").unlink()
    points = EventAccumulator(str(run)).Reload().Scalars("loss/train")
    assert [point.step for point in points] == [1, 2, 3, 4]


def test_curves_cut_short_by_a_power_cut_are_kept_as_far_as_they_go(saved):
    run, model, optimizer, schedule = saved
    writer = helpers.event_writer(run)
    for epoch in range(1, 31):
        writer.add_scalar("loss/train", 1 / epoch, epoch)
    helpers.save_checkpoint(run, 3, model, [optimizer], [schedule], writer)
    writer.close()
    [events] = run.glob("events*")
    os.truncate(events, events.stat().st_size - 10)  # in the middle of the last event
    helpers.event_writer(run, reopen("latest")[1]).close()
    points = EventAccumulator(str(run)).Reload().Scalars("loss/train")
    assert [point.step for point in points] == list(range(1, 30))


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
def test_a_damaged_checkpoint_is_refused_and_the_previous_one_offered(saved, damage, fault):
    path = saved[0] / "checkpoint.pt"
    model = nn.Linear(400, 400)  # so that the middle of the file is weights
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    helpers.save_checkpoint(saved[0], 3, model, [optimizer], [])
    path.write_bytes(damage(path.read_bytes()))
    with fault("checkpoint cut short or altered") as seen:
        with pytest.raises(helpers.LabError, match=r"checkpoint\.pt is no readable") as error:
            reopen("latest")
        seen(error.value)
    assert "checkpoint.previous.pt" in str(error.value)
    shutil.copy(saved[0] / "checkpoint.previous.pt", path)
    assert reopen("latest")[1]["epoch"] == 2


def test_a_checkpoint_of_another_model_is_refused_in_words(saved, fault):
    _, checkpoint = reopen("latest")
    other = nn.Linear(4, 2)
    loader = type("Loader", (), {"epoch": 0})()
    with fault("checkpoint of another model") as seen:
        with pytest.raises(helpers.LabError, match=r"weight: \(2, 3\) there, \(2, 4\) here") as error:
            helpers.restore(checkpoint, other, [], [], loader)
        seen(error.value)


def test_a_file_that_is_no_checkpoint_of_a_run_is_refused(saved):
    torch.save({"weight": torch.zeros(3)}, saved[0] / "checkpoint.pt")
    with pytest.raises(helpers.LabError, match=r"no readable checkpoint.*it is no dictionary of epoch, model"):
        reopen("latest")


@pytest.mark.parametrize("container", [lambda evil, path: path.write_bytes(pickle.dumps(evil)), torch.save])
def test_a_checkpoint_that_would_run_code_is_refused(container, tmp_path, fault):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    container(Evil(), tmp_path / "checkpoint.pt")
    with fault("checkpoint that would run code") as seen:
        with pytest.raises(helpers.LabError, match="no readable checkpoint") as error:
            helpers.load_checkpoint(tmp_path / "checkpoint.pt")
        assert "weights_only" not in str(error.value), "no advice to load it nevertheless"
        seen(error.value)
        assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "checkpoint.pt", weights_only=False) if container is torch.save else pickle.loads(
        (tmp_path / "checkpoint.pt").read_bytes()
    )
    assert (tmp_path / "ran").exists(), "and it would have run, had it been trusted"


class TestTrainingThatGoesWrong:
    @pytest.mark.once
    @pytest.mark.skipif(not LONG, reason="a whole page; the next test is the quick form")
    def test_a_page_whose_loss_is_not_finite_stops(self, tmp_path, fault):
        with (
            fault("loss not finite (LAB_LEARNING_RATE=1e6)") as seen,
            Page("MNIST.ipynb", tmp_path / "runs", LAB_LEARNING_RATE="1e6") as page,
        ):
            page.process.wait(SECONDS)
            [line] = [line for line in page.output.splitlines() if line.startswith("LabError")]
            seen(line)
            assert page.process.returncode != 0
            assert "Traceback" not in page.output
            assert "epoch 1, step" in line
            assert not (page.run / "metrics.json").exists()

    def test_a_loss_that_is_not_finite_names_step_rate_and_checkpoint(self, saved):
        helpers.check_finite([0.5, 0.4], 1, 0.1, saved[0])
        with pytest.raises(helpers.LabError, match=r"nan in epoch 3, step 3 of 4 .*0\.4.* rate 0\.1.*checkpoint\.pt"):
            helpers.check_finite([0.5, 0.4, float("nan"), float("nan")], 3, 0.1, saved[0])

    def test_out_of_memory_names_the_setting_and_frees_the_memory(self, fault):
        kept = []

        def step():
            activations = torch.zeros(1000)
            kept.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        with fault("CUDA out of memory (the error is raised, there is no GPU)") as seen:
            with pytest.raises(helpers.LabError, match="LAB_BATCH_SIZE=250") as caught, helpers.memory_advice(500):
                step()
            seen(caught.value)
        assert "Tried to allocate" in str(caught.value)
        assert kept[0]() is None

    def test_other_errors_pass(self):
        with pytest.raises(ZeroDivisionError), helpers.memory_advice(500):
            raise ZeroDivisionError

    ABSURD = "EPOCHS=0 EPOCHS=ten BATCH_SIZE=0 LEARNING_RATE=-0.1 LEARNING_RATE=nan MOMENTUM=2 VALIDATION=-1 WIDTHS=8,0"
    ABSURD += " SEED=10000000000000000000 EPOCS=3"

    @pytest.mark.parametrize("setting", ABSURD.split())
    def test_absurd_settings_are_refused_by_name(self, setting, fault, monkeypatch):
        name, value = setting.split("=")
        monkeypatch.setenv(f"LAB_{name}", value)
        namespace = {"EPOCHS": 1, "BATCH_SIZE": 10, "LEARNING_RATE": 0.1, "MOMENTUM": 0.9, "VALIDATION": 5, "SEED": 1}
        namespace["WIDTHS"] = (8, 16)
        with fault("absurd settings, ten of them") as seen:
            with pytest.raises(helpers.LabError, match=f"LAB_{name}") as error:
                helpers.override_settings(namespace)
            seen(error.value)


class TestSideParts:
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

    def test_a_disk_that_fills_up_while_logging_costs_the_curves_and_nothing_else(self, small_disk, fault, capsys):
        run = small_disk(64)
        model = nn.Linear(3, 2)
        with fault("disk full while TensorBoard's events are written") as seen:
            writer = helpers.event_writer(run)
            for step in range(100):
                writer.add_image("noise", torch.rand(3, 32, 32), step)
                writer.flush()
            printed = capsys.readouterr().out
            seen(printed)
        assert printed.count("\n") == 1
        assert "No space left" in printed
        helpers.save_checkpoint(run, 7, model, [], [], writer)
        assert "Epoch 7 has no checkpoint, the training goes on" in capsys.readouterr().out
        assert [path.name[:6] for path in run.iterdir()] == ["events"], "no half a checkpoint"
        assert writer.failure.startswith("events: OSError: [Errno 28] No space left")
        assert "; checkpoint of epoch 7: " in writer.failure
        [events] = run.iterdir()
        events.unlink()  # somebody made room
        helpers.save_checkpoint(run, 8, model, [], [], writer)
        assert "checkpoint" not in writer.failure, "a later one took its place"
        with pytest.raises(helpers.LabError, match=r"Cannot write .*metrics\.json: No space left.*Make room"):
            helpers.write_metrics(run, **dict.fromkeys(helpers.METRICS, "?" * 10_000))
        assert not (run / "metrics.json").exists()

    @pytest.mark.once
    @pytest.mark.skipif(not LONG, reason="a whole page; the test before is the quick form")
    def test_a_page_on_a_disk_that_fills_up_trains_to_its_end(self, small_disk, tmp_path, fault):
        (tmp_path / "runs").symlink_to(small_disk(1000))
        with fault("MNIST.ipynb on a disk that fills up") as seen, Page("MNIST.ipynb", tmp_path / "runs") as page:
            page.wait_for('"missing"')
            seen(next(line for line in page.output.splitlines() if "the training goes on" in line))
            metrics = json.loads((page.run / "metrics.json").read_text())
            assert any("No space left" in text for text in metrics["missing"])
            assert metrics["epochs"] == 6

    @needs_fork
    def test_a_run_folder_that_nobody_may_write_is_named_first(self, common_folder, fault, monkeypatch):
        write_protect(common_folder)
        monkeypatch.setenv("LAB_RUNS", str(common_folder))
        with fault("read-only runs folder") as seen:
            with pytest.raises(helpers.LabError, match=r"Permission denied.*Set LAB_RUNS") as error:
                in_child(lambda: helpers.new_run("mnist", "x", {}, torch.device("cpu")), nobody=True)
            seen(error.value)

    @needs_fork
    def test_a_run_directory_that_becomes_read_only_midway_costs_the_checkpoint(self, common_folder, fault, capfd):
        run = common_folder / "run"
        run.mkdir()
        run.chmod(0o777)

        def train():
            writer = helpers.event_writer(run)
            helpers.save_checkpoint(run, 1, nn.Linear(3, 2), [], [], writer)
            os.chmod(common_folder / "run", 0o555)
            helpers.save_checkpoint(run, 2, nn.Linear(3, 2), [], [], writer)
            writer.close()
            return writer.failure

        with fault("run directory becomes read-only midway") as seen:
            if os.geteuid() == 0:
                os.chown(run, NOBODY, NOBODY)
            failure = in_child(train, nobody=True)
            seen(failure)
        assert failure.startswith("checkpoint of epoch 2: ")
        assert helpers.load_checkpoint(run / "checkpoint.pt")["epoch"] == 1

    def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(self, saved, capsys):
        run, model, optimizer, schedule = saved
        (run / f".checkpoint.pt.{os.getpid()}.part").mkdir()  # the kernel refuses to open it for writing
        with contextlib.suppress(OSError):
            helpers.save_checkpoint(run, 3, model, [optimizer], [schedule])
        assert helpers.load_checkpoint(run / "checkpoint.pt")["epoch"] == 2

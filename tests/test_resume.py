"""A run that is killed or interrupted, and goes on, equals one that was not, bit for bit on a CPU.

The long form (`python tests/faults.py --kills 20`) kills that many pages at random moments, by three signals in turn.
"""

import copy
import functools
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import filelock
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import helpers
import notebooks
import ranks
import toy
from rights import NOBODY, in_child, needs_fork, write_protect

LONG = bool(os.environ.get("FAULTS_LONG"))
KILLS = int(os.environ.get("RUNS_TO_KILL", "1"))
TIMES = ("seconds", "images_per_second", "samples")  # what an interruption may change, in history.json


def read(path, name):
    """The content of a JSON file of a run."""
    return json.loads((path / name).read_text(encoding="utf-8"))


def scalars(path):
    """{tag: [(step, value)]} as TensorBoard shows the run."""
    events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    return {tag: [(p.step, p.value) for p in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def without_times(history):
    """The history without what an interruption may change."""
    return [{tag: value for tag, value in entry.items() if tag not in TIMES} for entry in history]


def outcome(path):
    """Everything of a finished run that must not depend on interruptions."""
    state, metrics = helpers.load_checkpoint(path / "checkpoint.pt"), read(path, "metrics.json")
    history = without_times(read(path, "history.json"))
    assert without_times(state["history"]) == history
    curves = {tag: points for tag, points in scalars(path).items() if not tag.startswith(("cpu/", *TIMES))}
    results = {name: metrics[name] for name in ("test_accuracy", "test_loss", "epochs", "parameters", "seed")}
    assert "unfinished" not in metrics
    return {k: state[k] for k in ("epoch", "parts", "rng")} | dict(history=history, curves=curves, results=results)


def same(a, b):
    """Whether two structures are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def check_same(expected, got):
    """Compare two outcomes, part by part."""
    for part in expected:
        assert same(got[part], expected[part]), part


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The outcome of a training that nothing disturbed. A forked process without rights finds what it imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB_RUNS", str(tmp_path_factory.mktemp("undisturbed")))
        training = toy.Training().train()
        training.finish()
        training.run.close()
    expected = outcome(training.run.path)
    assert [entry["step"] for entry in expected["history"]] == [5, 10, 15]
    return expected


@pytest.fixture
def interrupted(runs):
    """A training that was interrupted in its second epoch."""
    training = toy.Training()
    with pytest.raises(KeyboardInterrupt):
        training.train(toy.interrupt("step 3 of epoch 2"))
    return training


KILLS_OF_THE_TOY = {  # moment → the epochs that are safe then
    "step 2 of epoch 1": 0,
    "step 3 of epoch 2": 1,
    "epoch 2 is logged": 1,
    "epoch 2 has no history": 1,
    "epoch 2 has no checkpoint": 1,
    "epoch 2 is saved": 2,
    "epoch 3 has no checkpoint": 2,
    "epoch 3 is saved": 3,  # but not tested
    "epoch 2 has no checkpoint, step 4 of epoch 3": 2,
    "step 1 of epoch 2, step 5 of epoch 2, epoch 3 has no history": 2,
}


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("moments", KILLS_OF_THE_TOY)
def test_killed_and_resumed_equals_undisturbed(moments, undisturbed, runs, start, fault):
    safe, resume = KILLS_OF_THE_TOY[moments], ""
    with fault("a training killed by SIGKILL, resumed") as seen:
        for moment in moments.split(", "):
            assert start(toy.train, kill=moment, RESUME=resume).end() == -signal.SIGKILL
            resume = "latest"
            time.sleep(1 - time.time() % 1)  # TensorBoard reads events files in the order of their names' seconds
        [path] = (runs / "toy").iterdir()
        if not safe:
            path = start(toy.train, RESUME="latest").result()  # which begins a new one, as there is none
        else:
            assert helpers.load_checkpoint(path / "checkpoint.pt")["epoch"] == safe
            last = start(toy.train, RESUME="latest")
            assert last.result() == path
            seen(last.output.splitlines()[0])
            assert last.output.startswith(f"resuming {path.name}")
            assert [line[:8] for line in last.output.splitlines() if line.startswith("epoch")] == [
                f"epoch {epoch:>2}" for epoch in range(safe + 1, 4)
            ]
        check_same(undisturbed, outcome(path))


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_a_page_resumed_in_the_middle_of_an_epoch_equals_an_undisturbed_one(name, runs, start, fault):
    """What a page gives to Run is all that must be saved: model, optimizers, schedules."""
    copy = runs / "copy"
    whole = start(ranks.train_page, name, copy).result()
    with fault(f"{name}: its directory as in the middle of an epoch, resumed") as seen:
        resumed = start(ranks.train_page, name, variables={"LAB_RESUME": str(copy)})
        assert resumed.result() == copy
        assert resumed.output.count("resuming copy") == 1
        seen("resuming copy")
    expected, got = (helpers.load_checkpoint(path / "checkpoint.pt") for path in (whole, copy))
    for part in ("epoch", "parts", "rng"):
        assert same(got[part], expected[part]), part
    assert without_times(got["history"]) == without_times(expected["history"])
    assert scalars(copy)["loss/step"] == scalars(whole)["loss/step"]


@pytest.mark.parametrize("moment", ["step 1 of epoch 1", "step 3 of epoch 2", "step 5 of epoch 3"])
def test_interrupted_in_an_epoch_it_is_as_after_the_last_whole_one(moment, undisturbed, runs, capsys):
    training, done = toy.Training(), int(moment[-1]) - 1
    with pytest.raises(KeyboardInterrupt):
        training.train(toy.interrupt(moment))
    assert f"Stopped: the network is as after epoch {done} of 3; this cell goes on there." in capsys.readouterr().out
    if done:
        parts = helpers.load_checkpoint(training.run.path / "checkpoint.pt")["parts"]
        for name in ("model", "optimizer", "scheduler"):
            assert same([getattr(training, name).state_dict()], parts[name]), name
    else:
        fresh = toy.Training().model.state_dict()
        assert same(training.model.state_dict(), fresh)
        training = toy.Training()  # the one before was closed by the fresh one
    assert len(training.run.history) == done
    training.train().finish()  # the cell again
    training.run.close()
    check_same(undisturbed, outcome(training.run.path))


@pytest.mark.parametrize(("moment", "done"), [("epoch 2 is logged", 1), ("epoch 2 is saved", 2)])
def test_interrupted_beside_an_epoch(moment, done, undisturbed, runs, capsys):
    training = toy.Training()
    with pytest.raises(KeyboardInterrupt):
        training.train(toy.interrupt(moment))
    assert len(training.run.history) == done
    assert ("Stopped" in capsys.readouterr().out) == (done == 1), "nothing is lost after save"
    training.train().finish()
    training.run.close()
    check_same(undisturbed, outcome(training.run.path))


def test_what_an_interrupted_run_finishes_with_is_what_happened(interrupted, undisturbed, capsys):
    metrics, run = interrupted.finish(), interrupted.run
    assert metrics == read(run.path, "metrics.json")
    assert metrics["unfinished"] == "stopped after 1 of 3 epochs"
    assert "; stopped after 1 of 3 epochs" in capsys.readouterr().out
    assert metrics["epochs"] == 1
    seconds = read(run.path, "history.json")[0]["seconds"]
    assert (metrics["train_seconds"], metrics["images_per_second"]) == (seconds, pytest.approx(200 / seconds))
    assert str(run).startswith(f"1 epochs in {seconds:.1f} s, {200 / seconds:,.0f} images/s")
    metrics = interrupted.train().finish()  # it can still go on, and the metrics are those of the whole run
    run.close()
    assert metrics["epochs"] == 3
    assert "unfinished" not in metrics
    assert same(helpers.load_checkpoint(run.path / "checkpoint.pt")["parts"], undisturbed["parts"])


def test_a_run_that_trained_nothing_has_no_rate(runs):
    training = toy.Training()
    assert "nothing trained" in str(training.run)
    with pytest.raises(KeyboardInterrupt):
        training.train(toy.interrupt("step 2 of epoch 1"))
    metrics = training.finish()
    assert (metrics["epochs"], metrics["train_seconds"], metrics["images_per_second"]) == (0, 0, None)
    assert metrics["unfinished"] == "stopped after 0 of 3 epochs"


class TestWhichRun:
    def test_a_new_run_by_default(self, interrupted):
        assert toy.Training().run.path != interrupted.run.path

    @pytest.mark.parametrize("resume", ["latest", "path"])
    def test_the_latest_unfinished_one_or_the_named_one(self, interrupted, resume, capsys):
        path, weights = interrupted.run.path, copy.deepcopy(interrupted.model.state_dict())
        again = toy.Training(RESUME="latest" if resume == "latest" else str(path))
        assert again.run.path == path
        assert again.run.history == interrupted.run.history
        assert same(again.model.state_dict(), weights)
        assert f"resuming {path.name}" in capsys.readouterr().out

    def test_a_finished_one_only_by_name(self, interrupted):
        interrupted.finish()
        assert toy.Training(RESUME="latest").run.path != interrupted.run.path
        assert toy.Training(RESUME=str(interrupted.run.path)).run.path == interrupted.run.path

    @pytest.mark.parametrize("name", ["~nosuchuser/run", "x" * 300])
    def test_a_path_that_cannot_be(self, name, runs):
        with pytest.raises(helpers.LabError, match="LAB_RESUME="):
            toy.Training(RESUME=name)

    def test_nothing_to_resume_is_named(self, runs):
        with pytest.raises(helpers.LabError, match="LAB_RESUME=nowhere"):
            toy.Training(RESUME="nowhere")


class TestOneProcess:
    def test_a_run_that_another_process_trains_is_refused_until_that_is_dead(self, runs, start, fault):
        other = start(toy.train, wait="step 2 of epoch 2")
        end = time.monotonic() + 30
        while "waiting" not in other.output and time.monotonic() < end:
            time.sleep(0.05)
        [path] = (runs / "toy").iterdir()
        with fault("a run that another process trains") as seen:
            for resume in ("latest", str(path)):
                with pytest.raises(helpers.LabError, match=f"{path.name} is in use: another process") as error:
                    toy.Training(RESUME=resume)
            seen(error.value)
        other.process.kill()
        other.end()
        again = toy.Training(RESUME="latest")
        assert again.run.path == path
        assert len(again.train().run.history) == 3

    def test_a_second_run_in_this_process_closes_the_first(self, interrupted, start):
        path, hook = interrupted.run.path, threading.excepthook
        second = toy.Training()
        assert helpers.Run.current is second.run
        assert threading.excepthook is hook, "the hook for threads should be replaced once, not by each run"
        interrupted.run.event("scalar", "late", 1.0, 1)  # nothing, and no error
        other = start(toy.train, RESUME=str(path))
        assert other.result() == path, "the first one's lock should be free"
        assert "late" not in scalars(path)
        second.train()

    def test_what_was_refused_is_not_kept_from_others(self, interrupted, start):
        path = interrupted.run.path
        with pytest.raises(helpers.LabError, match="RATE was"):
            toy.Training(RESUME="latest", RATE=0.2)
        assert start(toy.train, RESUME=str(path)).result() == path

    def test_a_file_system_without_locks_is_no_obstacle(self, runs, monkeypatch):
        def refuse(*_, **__):
            raise NotImplementedError("no locks here")

        monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
        assert toy.Training().train().run.step == 15


def relabelled(split):
    """The split as if the folders of the classes 0 and 1 had been swapped."""
    return replace(split, labels=torch.where(split.labels < 2, 1 - split.labels, split.labels))


OTHERS = {  # what is different → (how to make it so, what the error says)
    "setting": (lambda: dict(RATE=0.2), "  RATE was 0.1, is 0.2"),
    "seed": (lambda: dict(SEED=2), "  SEED was 1, is 2"),
    "epochs": (lambda: dict(EPOCHS=4), "  EPOCHS was 3, is 4"),
    "tuple": (lambda: dict(WIDTHS=(4, 9)), r"  WIDTHS was \[4, 8\], is \[4, 9\]"),
    "precision": (lambda: dict(precision="bf16"), "  precision was fp32, is bf16"),
    "ten images fewer": (lambda: dict(data=toy.digits(count=230)), "  fingerprint was"),
    "swapped class folders": (lambda: dict(data=relabelled(toy.digits())), "  fingerprint was"),
    "dataset": (
        lambda: dict(data=replace(toy.digits(), provenance=helpers.Provenance("photos", "image-folder", False))),
        "  dataset was MNIST, is photos\n  source was stand-in, is image-folder",
    ),
    "model": (
        lambda: dict(model=toy.Net(kernel_size=4)),
        r"  model, line 1 was   \(conv\): Conv2d\(1, 4, kernel_size=\(5, 5\).*, is .*kernel_size=\(4, 4\)",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_different_is_refused_and_shown(what, interrupted, fault):
    different, message = OTHERS[what]
    before = {file.name: file.read_bytes() for file in interrupted.run.path.iterdir() if file.name[0] != "e"}
    with fault("resumed with another setting, model or precision, or with other data") as seen:
        with pytest.raises(helpers.LabError, match=message) as error:
            toy.Training(RESUME="latest", **different())
        seen(error.value)
    assert interrupted.run.path.name in str(error.value)
    assert str(error.value).count("\n") == message.count("\n") + 1, "only what differs should be shown"
    assert all((interrupted.run.path / name).read_bytes() == content for name, content in before.items())


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (dict(nesterov=True), "SGD, group 0: nesterov was False, is True"),
        (dict(weight_decay=0.01), "weight_decay was 0"),
    ],
)
def test_an_optimizer_edited_in_the_code_is_refused(option, words, interrupted, monkeypatch):
    monkeypatch.setattr(torch.optim, "SGD", functools.partial(torch.optim.SGD, **option))
    with pytest.raises(helpers.LabError, match=words):
        toy.Training(RESUME="latest")


def test_a_loader_of_another_batch_size_is_refused(interrupted, monkeypatch):
    made = toy.loader
    monkeypatch.setattr(toy, "loader", lambda split, size=40, **options: made(split, 20, **options))
    with pytest.raises(helpers.LabError, match="batch_size was 40, is 20"):
        toy.Training(RESUME="latest", built={"SEED": 1})


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"settings": 3, "started": ""}', "\ud800"])
def test_a_run_with_a_damaged_config_is_named(content, interrupted):
    (interrupted.run.path / "config.json").write_text(content, errors="surrogatepass")
    with pytest.raises(helpers.LabError, match=f"LAB_RESUME=latest: .*{interrupted.run.path.name} cannot be read: "):
        toy.Training(RESUME="latest")


def test_a_resumed_run_keeps_the_time_of_its_start(interrupted):
    path = interrupted.run.path
    config = read(path, "config.json")
    (path / "config.json").write_text(json.dumps(config | {"started": "2026-01-01T00:00:00+0000"}))
    training = toy.Training(RESUME="latest").train()
    assert training.finish()["started"] == "2026-01-01T00:00:00+0000"


def test_free_settings_may_differ(interrupted):
    assert len(toy.Training(RESUME="latest", NOTE="second half").train().run.history) == 3


DAMAGES = {
    "half of it": lambda data: data[: len(data) // 2],
    "the end": lambda data: data[:-200],
    "nothing": lambda data: b"",
    "one bit": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
    "text": lambda data: b"x" * len(data),
}


class TestCheckpoint:
    def test_holds_all_parts_as_plain_types(self, interrupted):
        state = helpers.load_checkpoint(interrupted.run.path / "checkpoint.pt")
        assert set(state) == {"epoch", "parts", "rng", "history"}
        assert state["epoch"] == 1
        assert set(state["parts"]) == {"model", "optimizer", "scheduler"}
        model = toy.Net()
        model.load_state_dict(*state["parts"]["model"])
        assert same(model.state_dict(), interrupted.model.state_dict())
        assert state["history"] == read(interrupted.run.path, "history.json")

    def test_of_lists_of_parts(self, runs):
        """Two optimizers, as CIFAR.ipynb has them."""
        training = toy.Training(EPOCHS=2)
        model = toy.Net()
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model.conv, model.output)]
        options = dict(model=model, optimizer=optimizers)
        run = helpers.Run("toy", training.settings, training.train_loader, **options)
        for epoch in run.epochs(2):
            if epoch == 1:
                model(torch.rand(2, 1, 28, 28)).sum().backward()
                for optimizer in optimizers:
                    optimizer.step()
            with run.training():
                pass
            run.log({}, torch.zeros(5))
            run.save()
            break
        states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
        for optimizer in optimizers:
            optimizer.step()
        training.page["RESUME"] = "latest"
        helpers.Run("toy", training.settings, training.train_loader, resume="latest", **options)
        assert same([optimizer.state_dict() for optimizer in optimizers], states)

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_a_damaged_one_is_refused(self, interrupted, damage, fault):
        path = interrupted.run.path / "checkpoint.pt"
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
        with fault("checkpoint cut short or altered") as seen:
            with pytest.raises(helpers.LabError, match=r"checkpoint\.pt is no readable checkpoint") as error:
                toy.Training(RESUME="latest")
            seen(error.value)

    @pytest.mark.parametrize(
        "content", [{"weight": torch.zeros(3)}, torch.zeros(3), dict(epoch=1, model={}, optimizers=[], progress={})]
    )
    def test_one_of_an_earlier_version_is_refused(self, interrupted, content):
        torch.save(content, interrupted.run.path / "checkpoint.pt")
        with pytest.raises(helpers.LabError, match=r"no readable checkpoint: .*another version of this kit"):
            toy.Training(RESUME="latest")

    @pytest.mark.parametrize("container", [lambda evil, path: path.write_bytes(pickle.dumps(evil)), torch.save])
    def test_one_with_code_is_refused(self, container, tmp_path, fault):
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

    def test_one_that_cannot_be_written_leaves_the_one_before(self, runs, monkeypatch, capsys):
        replacing, training = os.replace, toy.Training()

        def refuse(source, target):
            if target.name == "checkpoint.pt" and training.run.history[-1]["epoch"] == 2:
                raise OSError(28, "No space left on device")
            replacing(source, target)

        monkeypatch.setattr(os, "replace", refuse)
        with pytest.raises(KeyboardInterrupt):
            training.train(toy.interrupt("epoch 2 is saved"))
        assert "goes on without checkpoint of epoch 2: OSError: [Errno 28]" in capsys.readouterr().out
        assert helpers.load_checkpoint(training.run.path / "checkpoint.pt")["epoch"] == 1
        assert not list(training.run.path.glob(".*.part"))
        assert "missing" not in training.train().finish(), "a later one took its place"

    def test_a_run_without_its_config_is_refused(self, interrupted):
        (interrupted.run.path / "config.json").unlink()
        with pytest.raises(helpers.LabError, match=r"there is no checkpoint.pt with its config.json"):
            toy.Training(RESUME=str(interrupted.run.path))


class TestTrainingThatGoesWrong:
    def test_a_loss_that_is_not_finite_names_the_step_and_the_epoch_leaves_no_trace(self, runs, fault):
        training = toy.Training()

        def spoil(values, losses):
            if training.run.history:
                losses[2] = math.nan
            return values, losses

        with fault("loss not finite") as seen:
            with pytest.raises(helpers.LabError, match=r"epoch 2 is nan in step 3.*rate") as error:
                training.train(log=spoil)
            seen(error.value)
        assert len(training.run.history) == 1
        parts = helpers.load_checkpoint(training.run.path / "checkpoint.pt")["parts"]
        assert same([training.model.state_dict()], parts["model"])
        assert {tag: points[-1][0] for tag, points in scalars(training.run.path).items()}["loss/train"] == 5

    @pytest.mark.once
    @pytest.mark.skipif(not LONG, reason="a whole page; the test before is the quick form")
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
            assert "The loss of epoch 1 is" in line
            assert not (page.run / "metrics.json").exists()


class TestDisk:
    def test_one_that_fills_up_costs_what_cannot_be_written_and_nothing_else(self, small_disk, start, fault):
        disk = small_disk(400)
        with fault("disk full while a run is trained") as seen:
            filled = start(toy.train_on_a_full_disk, str(disk), variables={"LAB_RUNS": str(disk)})
            lost, saved = filled.result()
            expected = ("epoch", "new run", "STAND-IN")
            lines = [line for line in filled.output.splitlines() if not line.startswith(expected)]
            seen(lines[0])
        said = [line.split(":")[0] for line in lines]
        assert [line for line in said if "without events" not in line] == [  # events are small, and may still fit
            "The training goes on without checkpoint of epoch 2",
            "The training goes on without checkpoint of epoch 3",
            "LabError",
        ]
        assert all("No space left on device" in line for line in lines)
        assert "metrics.json" in lines[-1]
        assert "Make room and run this cell again" in lines[-1]
        assert "checkpoint of epoch 3" in [text.split(":")[0] for text in lost["missing"]]
        assert lost["epochs"] == 3
        assert "unfinished" not in lost
        assert saved == 1

    @pytest.mark.once
    @pytest.mark.skipif(not LONG, reason="a whole page; the test before is the quick form")
    def test_a_page_on_one_that_fills_up_trains_to_its_end(self, small_disk, tmp_path, fault):
        (tmp_path / "runs").symlink_to(small_disk(1000))
        with fault("MNIST.ipynb on a disk that fills up") as seen, Page("MNIST.ipynb", tmp_path / "runs") as page:
            page.process.wait(SECONDS)
            seen(next(line for line in page.output.splitlines() if "The training goes on" in line))
            assert "Exception in thread" not in page.output
            if (page.run / "metrics.json").exists():
                metrics = read(page.run, "metrics.json")
                assert any("No space left" in text for text in metrics["missing"])
                assert metrics["epochs"] == int(SETTINGS["MNIST.ipynb"]["LAB_EPOCHS"])
            else:
                assert "Make room and run this cell again" in page.output

    @needs_fork
    def test_a_folder_that_nobody_may_write_is_named_first(self, undisturbed, common_folder, fault, monkeypatch):
        write_protect(common_folder)
        monkeypatch.setenv("LAB_RUNS", str(common_folder))
        with fault("read-only runs folder") as seen:
            with pytest.raises(helpers.LabError, match=r"Permission denied.*Set LAB_RUNS") as error:
                in_child(toy.Training, nobody=True)
            seen(error.value)

    @needs_fork
    def test_a_run_read_only_from_midway_costs_the_checkpoint(self, undisturbed, common_folder, fault, monkeypatch):
        monkeypatch.setenv("LAB_RUNS", str(common_folder / "runs"))
        (common_folder / "runs").mkdir()
        if os.geteuid() == 0:
            os.chown(common_folder / "runs", NOBODY, NOBODY)

        def train():
            training = toy.Training()
            close = {"epoch 2 is logged": 0o555, "epoch 3 is saved": 0o755}
            training.train(lambda moment: moment in close and training.run.path.chmod(close[moment]))
            return training.finish()["missing"]

        with fault("run directory becomes read-only midway") as seen:
            [missing] = in_child(train, nobody=True)
            seen(missing)
        assert missing.startswith("checkpoint of epoch 3: PermissionError")


# ------------------------------------------------------------------------------------------------- whole pages, killed

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SETTINGS = {
    "MNIST.ipynb": dict(LAB_EPOCHS="6", LAB_BATCH_SIZE="20", LAB_EXPERIMENTS=""),
    "CIFAR.ipynb": dict(LAB_EPOCHS="4", LAB_EXPERIMENTS="", LAB_ABLATION=""),  # an epoch of each size of the images
}
SECONDS = 300  # for a whole run, on a machine that others use too


class Page:
    """A notebook that runs headless in a process of its own, with its output in a file. Leaving the context ends it."""

    def __init__(self, name, runs, **variables):
        self.runs, self.lab, self.log = runs, name.split(".")[0].lower(), runs.with_suffix(".log")
        command = [sys.executable, "-u", "-m", "IPython", "--colors=NoColor", str(notebooks.ROOT / name)]
        variables = SETTINGS[name] | {"LAB_RUNS": str(runs)} | variables
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


@functools.cache
def whole(name, deterministic, folder):
    """The outcome of an uninterrupted run of a page, and the seconds that its training took."""
    with Page(name, folder / f"whole-{name}-{deterministic}", LAB_DETERMINISTIC=deterministic) as page:
        page.wait_for("new run")
        begin = time.monotonic()
        page.wait_for("; trained for")
        seconds = time.monotonic() - begin
        page.finish()
        return outcome(page.run), seconds


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where the uninterrupted runs are."""
    return tmp_path_factory.mktemp("pages")


@pytest.mark.once
@pytest.mark.skipif(not LONG, reason="many whole pages; the training at the top of this file is the quick form")
@pytest.mark.parametrize(
    ("name", "number"), [("MNIST.ipynb", n) for n in range(KILLS)] + [("CIFAR.ipynb", n) for n in range(KILLS // 4)]
)
def test_a_killed_page_resumed_equals_an_undisturbed_one(name, number, folder, tmp_path, fault):
    deterministic = str(1 - number // 2 % 2)
    (expected, seconds), runs = whole(name, deterministic, folder), tmp_path / "runs"
    variables = {"LAB_DETERMINISTIC": deterministic, "LAB_RESUME": ""}
    kills = [SIGNALS[number % len(SIGNALS)]]
    kills += [random.choice(SIGNALS)] * (number % 2)  # every second one is interrupted twice
    saved, epochs = 0, int(SETTINGS[name]["LAB_EPOCHS"])
    with fault(f"{name}: {'killed twice' if len(kills) > 1 else kills[0].name} at random, resumed") as seen:
        for chosen in kills:
            with Page(name, runs, **variables) as page:
                page.wait_for("new run", "resuming")
                epoch = random.randrange(saved, max(epochs, saved + 1))
                if epoch > saved:
                    page.wait_for(f"\nepoch {epoch:>2} ")  # is finished; however slow this machine is just now
                time.sleep(random.uniform(0, seconds / epochs))
                page.process.send_signal(chosen)
                page.process.wait(60)
            if (page.run / "metrics.json").exists():
                return seen("nothing: the signal came after the training")
            safe = (page.run / "checkpoint.pt").exists()
            saved = helpers.load_checkpoint(page.run / "checkpoint.pt")["epoch"] if safe else 0
            variables["LAB_RESUME"] = "latest" if safe else ""
        with Page(name, runs, **variables) as page:
            line = f"resuming {page.run.name}" if safe else "new run"
            assert line in page.finish()
            seen(line)
        check_same(expected, outcome(page.run))


@pytest.mark.once
@pytest.mark.skipif(not LONG, reason="two whole pages")
@pytest.mark.parametrize("name", notebooks.NAMES)
def test_a_page_twice_is_the_same_in_every_number(name, folder, tmp_path, fault):
    expected, _ = whole(name, "1", folder)
    with (
        fault(f"{name} twice with LAB_DETERMINISTIC=1, on a CPU") as seen,
        Page(name, tmp_path / "runs", LAB_DETERMINISTIC="1") as page,
    ):
        page.finish()
        check_same(expected, got := outcome(page.run))
        seen(f"identical: {sum(map(len, got['curves'].values()))} logged numbers")

"""What a run keeps, and what it says of what happened."""

import json
import math
import os
import subprocess
import time
from dataclasses import replace
from datetime import datetime

import pytest
import torch
from torch import nn

import helpers
import ranks
import toy
from tests import documents

# The contract's keys of metrics.json, in its order.
KEYS = "lab dataset source verified parameters epochs world_size device precision test_accuracy test_loss"
KEYS += " train_seconds images_per_second gpu_utilization gpu_utilization_reason seed started finished"


def read(path, name):
    """The content of a JSON file of a run."""
    return json.loads((path / name).read_text(encoding="utf-8"))


@pytest.fixture
def trained(runs):
    """A training of three epochs, not yet finished."""
    return toy.Training().train()


class TestFiles:
    def test_every_run_has_a_directory_of_its_own(self, runs):
        paths = {toy.Training().run.path for _ in range(3)}
        assert len(paths) == 3
        assert {path.parent for path in paths} == {runs / "toy"}
        assert all("MNIST-stand-in" in path.name for path in paths)

    def test_an_unwritable_folder_is_named(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("LAB_RUNS", str(tmp_path / "file"))
        with pytest.raises(helpers.LabError, match=r"cannot be made: .*Set LAB_RUNS"):
            toy.Training()

    def test_all_of_them(self, trained):
        trained.finish()
        documents.write_report(trained.run.path)
        names = {path.name for path in trained.run.path.iterdir()}
        events = {name for name in names if name.startswith("events.out.tfevents")}
        assert len(events) == 1
        assert names - events - {".lock"} == {
            *("config.json", "history.json", "checkpoint.pt", "metrics.json", "nvidia-smi.txt", "report.html")
        }

    def test_config_records_settings_model_data_versions_and_git(self, runs):
        training = toy.Training(NOTE="灰 first", RATE=0.25)
        config = read(training.run.path, "config.json")
        assert config == training.run.config
        assert config["settings"] == toy.SETTINGS | {"NOTE": "灰 first", "RATE": 0.25, "WIDTHS": [4, 8]}
        assert config["model"] == str(training.model)
        assert (config["lab"], config["seed"], config["note"], config["precision"]) == ("toy", 1, "灰 first", "fp32")
        assert (config["dataset"], config["source"], config["verified"]) == ("MNIST", "stand-in", False)
        assert config["classes"] == list("0123456789")
        assert config["device"] == helpers.device_name(toy.CPU)
        assert config["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
        assert {"python", "torchvision", "tensorboard", "numpy"} < config["versions"].keys()
        git = ["git", "-C", str(helpers.HERE), "describe", "--always", "--dirty"]
        git = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
        assert config["versions"].get("git") == git  # none in a downloaded folder

    def test_the_revision_is_that_of_the_kit_whatever_the_environment_names(self, runs, tmp_path, monkeypatch):
        before = toy.Training().run.config["versions"].get("git")
        subprocess.run(["git", "init", "-q", str(tmp_path / "other")], check=True)
        monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
        assert toy.Training().run.config["versions"].get("git") == before

    def test_the_fingerprint_is_of_images_and_labels(self, runs):
        def fingerprint(split):
            return toy.Training(data=split).run.config["fingerprint"]

        data = toy.digits()
        images, labels = data.images.clone(), data.labels.clone()
        images[:60, 0, 3, 3] ^= 1
        labels[:60] = (labels[:60] + 1) % 10
        others = [replace(data, images=images), replace(data, labels=labels), toy.digits(count=230)]
        assert fingerprint(data) == fingerprint(data)
        assert len({fingerprint(split) for split in (data, *others)}) == 4

    def test_history_has_an_entry_for_each_epoch(self, trained):
        history = read(trained.run.path, "history.json")
        assert history == trained.run.history
        assert [(entry["epoch"], entry["step"]) for entry in history] == [(1, 5), (2, 10), (3, 15)]
        seconds = [entry["seconds"] for entry in history]
        assert seconds == sorted(seconds)
        for entry, start in zip(history, [0, *seconds], strict=False):
            assert entry["images_per_second"] == pytest.approx(200 / (entry["seconds"] - start))
            assert set(entry) - {"epoch", "step", "seconds", "images_per_second", "samples"} == {
                *("loss/train", "accuracy/train", "loss/validation", "accuracy/validation", "learning_rate")
            }
        loss, accuracy = helpers.evaluate(trained.model, trained.validation_loader)
        assert (history[-1]["loss/validation"], history[-1]["accuracy/validation"]) == (loss, accuracy)

    def test_values_that_are_no_number_are_left_out(self, runs):
        training = toy.Training()
        training.train(log=lambda values, losses: (values | {"loss/validation": math.nan}, losses))
        assert not any("loss/validation" in entry for entry in read(training.run.path, "history.json"))

    def test_tables_and_figures_are_kept_as_results(self, trained):
        trained.run.add("tables/loaders", [["loader", "images/s"], ["classic", 1000], ["resident", 9000]])
        trained.run.add("curves", documents.curves(trained.run.history))
        results = trained.run.path / "results"
        table = "| loader | images/s |\n| --- | --- |\n| classic | 1000 |\n| resident | 9000 |"
        assert (results / "tables" / "loaders.md").read_text(encoding="utf-8") == table
        assert (results / "curves.png").read_bytes().startswith(b"\x89PNG")


class TestMetrics:
    def test_have_the_contracts_keys_and_come_from_what_happened(self, trained, capsys):
        before = trained.page | {}
        trained.page |= dict(SEED=9, NOTE="changed after the training", EPOCHS=7)
        metrics = trained.finish(gain=0.5)
        trained.page |= before
        assert metrics == read(trained.run.path, "metrics.json")
        assert set(metrics) == {*KEYS.split(), "gain", "smoke"}
        history, seconds = trained.run.history, trained.run.history[-1]["seconds"]
        loss, accuracy = helpers.evaluate(trained.model, trained.test_loader)
        expected = dict(lab="toy", dataset="MNIST", source="stand-in", verified=False, epochs=len(history), seed=1)
        expected |= dict(parameters=sum(p.numel() for p in trained.model.parameters()), world_size=1, precision="fp32")
        expected |= dict(test_accuracy=accuracy, test_loss=loss, train_seconds=seconds, gain=0.5)
        expected |= dict(images_per_second=3 * 200 / seconds, device=helpers.device_name(toy.CPU))
        expected |= dict(gpu_utilization=None, gpu_utilization_reason="no NVIDIA GPU in use")
        assert {key: metrics[key] for key in expected} == expected
        assert metrics["started"] <= metrics["finished"]
        line = f"STAND-IN, not MNIST: test accuracy {accuracy:.2%}, loss {loss:.4f}; trained for {seconds:.1f} s"
        assert capsys.readouterr().out.splitlines()[-1] == f"{line}; smoke run"

    def test_say_what_is_missing(self, trained):
        assert "missing" not in trained.finish()
        with pytest.raises(TypeError):
            trained.run.event("scalar")  # a mistake is no full disk
        trained.run.writer.add_scalar = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        missing = trained.finish()["missing"]
        assert missing == ["events of epoch 3: OSError: [Errno 28] No space left on device"]
        assert trained.finish()["missing"] == missing, "it is said once, and not tried again"

    def test_a_longer_training_is_no_part_of_them(self, runs):
        """Clock and monitor run in `training` alone."""
        training = toy.Training()
        training.train(lambda moment: moment.endswith("logged") and torch.randn(900, 900) @ torch.randn(900, 900))
        entry = training.run.history[-1]
        assert training.finish()["train_seconds"] == entry["seconds"]
        assert training.run.monitor.seconds == entry["seconds"]


class TestOrderOfCells:
    def test_a_section_that_was_run_with_other_settings_is_named(self, runs):
        with pytest.raises(helpers.LabError, match=r"BATCH_SIZE was 40 there and is 60 now\. .* from section 2 Data\."):
            toy.Training(BATCH_SIZE=60, built=dict(BATCH_SIZE=40))
        toy.Training(BATCH_SIZE=60, built=dict(BATCH_SIZE=60, WIDTHS=(4, 8)))
        assert len(list((runs / "toy").iterdir())) == 1, "what was refused should leave no directory"

    def test_settings_that_changed_since_the_opening_are_named(self, runs):
        training = toy.Training()
        training.page |= dict(RATE=0.2, NOTE="may change")
        with pytest.raises(
            helpers.LabError, match=r"^RATE changed since this run was opened\. Run the cell that opens"
        ):
            training.train()
        training.page["RATE"] = 0.1
        assert len(training.train().run.history) == 3

    def test_the_loop_run_again_trains_nothing(self, trained):
        weights = [parameter.detach().clone() for parameter in trained.model.parameters()]
        with pytest.raises(helpers.LabError, match=r"^All 3 epochs were trained since this run was opened\. Run the"):
            trained.train()
        assert all(map(torch.equal, weights, trained.model.parameters()))
        assert len(trained.run.history) == 3

    def test_the_loop_of_a_run_that_was_closed_is_refused(self, runs):
        first = toy.Training()
        second = toy.Training()
        with pytest.raises(helpers.LabError, match=r"^Another run was opened"):
            first.train()
        with pytest.raises(KeyboardInterrupt):
            second.train(toy.interrupt("step 1 of epoch 2"))
        second.finish()
        second.run.close()
        with pytest.raises(helpers.LabError, match="or the report written"):
            second.train()

    def test_what_is_tested_is_what_was_trained(self, trained):
        model, trained.model = trained.model, toy.Net()  # an experiment that uses the page's name
        assert trained.run.model is model
        assert trained.finish()["test_loss"] == helpers.evaluate(model, trained.test_loader)[0]


# ----------------------------------------------------------------------------------------------------------- evaluation


class Constant(nn.Module):
    """Gives the logits [0, value of the image's first pixel] and remembers its mode."""

    def forward(self, images):
        self.mode_in_forward = self.training
        return torch.stack([torch.zeros(len(images)), images[:, 0, 0, 0]], dim=1)


def loader(values, labels, batch_size=3):
    images, provenance = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1), helpers.Provenance("t", "", False)
    split = helpers.Split(images, torch.tensor(labels, dtype=torch.int64), ("a", "b"), provenance)
    return helpers.Loader(split, batch_size, toy.CPU, torch.zeros(1), torch.ones(1) / 255)


def test_evaluate_counts_every_image_once():
    model = Constant().train()
    loss, accuracy = helpers.evaluate(model, loader([0, 1, 2, 3, 4], [1, 1, 0, 1, 1]))
    assert accuracy == pytest.approx(3 / 5)  # a tie goes to class 0
    logits = torch.tensor([[0.0, v] for v in range(5)])
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, torch.tensor([1, 1, 0, 1, 1])).item())
    assert model.training  # restored
    assert not model.mode_in_forward


def test_predict_keeps_order_and_restores_mode_after_a_failure():
    assert helpers.predict(Constant(), loader([5, 6, 7, 8], [0] * 4)).tolist() == [[0, 5], [0, 6], [0, 7], [0, 8]]
    broken = nn.Linear(7, 2).train()
    with pytest.raises(RuntimeError):
        helpers.predict(broken, loader([1], [0]))
    assert broken.training


def test_evaluate_of_nothing_is_nan():
    assert all(math.isnan(number) for number in helpers.evaluate(Constant(), loader([], [])))


def test_forty_students_at_once_get_forty_runs(tmp_path):
    """One folder of runs, the same name and note, the same moment: as on a shared drive."""
    moment = time.time() + 6
    started = [
        toy.Process(tmp_path / "log", os.environ | {"LAB_RUNS": str(tmp_path / "runs")}, ranks.open_at, moment)
        for _ in range(40)
    ]
    names = [process.result() for process in started]
    assert len({*names}) == 40
    for name in names:
        assert read(tmp_path / "runs" / "toy" / name, "config.json")["note"] == "the same"


def test_a_name_that_is_taken_in_the_same_microsecond_is_given_up(tmp_path, monkeypatch):
    class Clock(datetime):
        moments = iter([datetime(2026, 1, 1), datetime(2026, 1, 1), datetime(2026, 1, 2)])

        @classmethod
        def now(cls):
            return next(cls.moments)

    monkeypatch.setenv("LAB_RUNS", str(tmp_path))
    monkeypatch.setattr(helpers, "datetime", Clock)
    assert [toy.Training().run.path.name[:8] for _ in range(2)] == ["20260101", "20260102"]

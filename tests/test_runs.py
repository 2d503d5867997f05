import json
import math
import os
import pickle

import pytest
import torch
from torch import nn

import helpers

CPU = torch.device("cpu")
NUMBERS = {
    "lab": "mnist",
    "dataset": "MNIST",
    "source": "stand-in",
    "verified": False,
    "parameters": 61_706,
    "epochs": 1,
    "world_size": 1,
    "device": "cpu",
    "precision": "fp32",
    "test_accuracy": 0.5,
    "test_loss": 1.0,
    "train_seconds": 2.0,
    "images_per_second": 3.0,
    "gpu_utilization": None,
    "gpu_utilization_reason": "none here",
    "seed": 1,
    "started": "2026-01-01T00:00:00+00:00",
    "finished": "2026-01-01T00:01:00+00:00",
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_RUNS", str(tmp_path))
    return helpers.new_run("mnist", "tag", {"SEED": 3, "RATES": (1, 2)}, CPU)


def test_every_run_has_a_directory_of_its_own(run, tmp_path):
    others = {helpers.new_run("mnist", "tag", {}, CPU) for _ in range(3)}
    assert len(others | {run}) == 4
    assert all(path.parent == tmp_path / "mnist" for path in others)
    config = json.loads((run / "config.json").read_text())
    assert (config["lab"], config["seed"], config["settings"]["RATES"]) == ("mnist", 3, [1, 2])
    assert config["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in config["versions"]["torch"]


def test_unwritable_runs_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAB_RUNS", str(tmp_path / "file"))
    with pytest.raises(helpers.LabError, match="LAB_RUNS"):
        helpers.new_run("mnist", "tag", {}, CPU)


def test_metrics_are_the_contracts(run):
    helpers.write_metrics(run, **NUMBERS)
    assert json.loads((run / "metrics.json").read_text()) == NUMBERS
    with pytest.raises(helpers.LabError, match="seed"):
        helpers.write_metrics(run, **{k: v for k, v in NUMBERS.items() if k != "seed"})
    with pytest.raises(helpers.LabError, match="extra"):
        helpers.write_metrics(run, **NUMBERS, extra=1)


def test_checkpoint_round_trip(run):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    helpers.save_checkpoint(run, 4, model, [optimizer], [scheduler])
    checkpoint = helpers.load_checkpoint(run / "checkpoint.pt")
    assert checkpoint["epoch"] == 4
    other = nn.Linear(3, 2)
    other.load_state_dict(checkpoint["model"])
    assert torch.equal(other.weight, model.weight)
    optimizer.load_state_dict(checkpoint["optimizers"][0])
    scheduler.load_state_dict(checkpoint["schedulers"][0])
    torch.set_rng_state(checkpoint["rng"]["cpu"])
    assert sorted(p.name for p in run.iterdir()) == ["checkpoint.pt", "config.json"]


def test_damaged_or_malicious_checkpoint_is_refused(run, tmp_path):
    helpers.save_checkpoint(run, 1, nn.Linear(3, 2), [], [])
    path = run / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(helpers.LabError, match=r"checkpoint\.pt"):
        helpers.load_checkpoint(path)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it-ran"),)

    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(helpers.LabError, match=r"checkpoint\.pt"):
        helpers.load_checkpoint(path)
    assert not (tmp_path / "it-ran").exists()


class Constant(nn.Module):
    """Gives the logits [0, value of the image's first pixel] and remembers its mode."""

    def forward(self, images):
        self.mode_in_forward = self.training
        return torch.stack([torch.zeros(len(images)), images[:, 0, 0, 0]], dim=1)


def loader(values, labels, batch_size=3):
    images = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1)
    split = helpers.Split(images, torch.tensor(labels), ("a", "b"), helpers.Provenance("t", "stand-in", False))
    return helpers.ResidentLoader(split, batch_size, CPU, torch.zeros(1), torch.ones(1) / 255)


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
    split = helpers.Split(torch.zeros(0, 1, 1, 1, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), ("a",), None)
    empty = helpers.ResidentLoader(split, 3, CPU, torch.zeros(1), torch.ones(1))
    assert all(math.isnan(number) for number in helpers.evaluate(Constant(), empty))


def test_confusion_matrix():
    logits = torch.tensor([[2.0, 1, 0], [0, 2, 1], [0, 2, 1], [0, 1, 2]])
    matrix = helpers.confusion_matrix(logits, torch.tensor([0, 1, 2, 2]))
    assert matrix.tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]


class TestProgress:
    def test_silent_where_nobody_watches(self, capsys, monkeypatch):
        monkeypatch.setattr(helpers, "watched", lambda: False)
        assert list(helpers.Progress(epochs=1)([1, 2, 3])) == [1, 2, 3]
        assert list(helpers.Progress(epochs=1)(iter([1, 2, 3]), [1, 2, 3])) == [1, 2, 3]
        captured = capsys.readouterr()
        assert captured.out + captured.err == ""

    def test_one_live_line_on_a_terminal_that_disappears(self, capsys, monkeypatch):
        monkeypatch.setattr(helpers, "watched", lambda: True)
        list(helpers.Progress(epochs=2)([1, 2, 3]))
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "remaining" in captured.err
        assert captured.err.endswith("\r\033[K")
        assert "\n" not in captured.err

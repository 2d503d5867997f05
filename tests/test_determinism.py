"""The same seed, the same run: always for what the seed draws, to the last bit with DETERMINISTIC."""

import os

import pytest
import torch

import helpers
import notebooks
import test_resume

CPU = torch.device("cpu")
whole = test_resume.whole  # the fixture


@pytest.fixture(autouse=True)
def restore(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    benchmark = torch.backends.cudnn.benchmark
    yield
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_the_seed_fixes_initial_weights_and_order_without_it(name):
    page, labels = notebooks.definitions(name), torch.arange(100)
    images = labels.to(torch.uint8).view(-1, 1, 1, 1)
    split = helpers.Split(images, labels, ("a",), helpers.Provenance("t", "stand-in", False))

    def drawn(seed):
        helpers.set_seed(seed)
        model = (page.get("LeNet5") or page["FastCNN"])()
        loader = helpers.ResidentLoader(split, 10, CPU, torch.zeros(1), torch.ones(1), shuffle=True, seed=seed)
        return [*model.parameters(), torch.cat([labels for _ in range(2) for _, labels in loader])]

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[-1], other[-1])
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_forbids_what_may_differ_and_can_be_taken_back(monkeypatch):
    torch.backends.cudnn.benchmark = True
    helpers.set_seed(1, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(helpers, "_block_seconds", None)  # nothing is decided by a measurement
    assert helpers.pick_precision(CPU) == "fp32"
    helpers.set_seed(1)
    assert not torch.are_deterministic_algorithms_enabled()


def test_too_late_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    allocated = {}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: allocated)
    helpers.set_seed(1, deterministic=True)  # CUDA was asked for its name only
    helpers.set_seed(1, deterministic=True)  # the cell again
    del os.environ["CUBLAS_WORKSPACE_CONFIG"]
    allocated["allocation.all.allocated"] = 3
    with pytest.raises(helpers.LabError, match="LAB_DETERMINISTIC=1 comes too late"):
        helpers.set_seed(1, deterministic=True)


@pytest.mark.once
@pytest.mark.skipif(not test_resume.LONG, reason="two whole runs; the quick form is one run and a resumed one")
@pytest.mark.parametrize("name", notebooks.NAMES)
def test_two_runs_are_identical_in_every_logged_number(name, whole, tmp_path, fault):
    expected, _ = whole(name, "1")
    with (
        fault(f"{name} twice with LAB_DETERMINISTIC=1, on a CPU") as seen,
        test_resume.Page(name, tmp_path / "runs", LAB_DETERMINISTIC="1") as page,
    ):
        page.finish()
        test_resume.check_same(expected, got := test_resume.outcome(page.run))
        seen(f"identical: {sum(map(len, got[1].values()))} logged numbers")

"""The same seed, the same run: always for what the seed draws, to the last bit with DETERMINISTIC.

test_resume.py compares whole trainings bit by bit, and in its long form whole pages.
"""

import os

import pytest
import torch

import helpers
import notebooks
import toy


@pytest.fixture(autouse=True)
def restore(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    benchmark = torch.backends.cudnn.benchmark
    yield
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_the_seed_fixes_initial_weights_order_and_chances(name):
    page = notebooks.definitions(name)

    def drawn(seed):
        helpers.set_seed(seed)
        model, chances = (page.get("LeNet5") or page["FastCNN"])(), []
        loader = toy.loader(toy.digits(), shuffle=True, seed=seed, augment=lambda i, c, e: chances.append(c) or i)
        labels = torch.cat([labels for epoch in (1, 2) for _, labels in loader.epoch(epoch)])
        return next(model.parameters()), labels, torch.cat(chances)

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_forbids_what_may_differ_and_can_be_taken_back():
    torch.backends.cudnn.benchmark = True
    helpers.set_seed(1, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    helpers.set_seed(1)
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_seed_draws_the_same_with_it_and_without():
    helpers.set_seed(7)
    numbers = torch.rand(5)
    helpers.set_seed(7, deterministic=True)
    assert torch.equal(torch.rand(5), numbers)


def test_too_late_is_said(monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)  # where there is a GPU it would ask it
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    helpers.set_seed(1, deterministic=True)  # CUDA was asked for its name only
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3)
    helpers.set_seed(1, deterministic=True)  # the cell again
    del os.environ["CUBLAS_WORKSPACE_CONFIG"]
    with pytest.raises(helpers.LabError, match="LAB_DETERMINISTIC=1 comes too late"):
        helpers.set_seed(1, deterministic=True)

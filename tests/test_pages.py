"""The definitions on the pages: pulled out of the notebooks and tested as any code."""

import functools
import importlib.metadata

import pytest
import torch
from torch import nn

import helpers
import notebooks

mnist, cifar = (functools.cache(lambda name=name: notebooks.definitions(name)) for name in notebooks.NAMES)


class TestLeNet5:
    @pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
    @pytest.mark.parametrize("pool", [nn.MaxPool2d, nn.AvgPool2d])
    def test_parameters_and_shapes(self, activation, pool):
        model = mnist()["LeNet5"](activation=activation, pool=pool)
        assert sum(p.numel() for p in model.parameters()) == 61_706
        shapes = [shape for _, _, shape in helpers.trace_shapes(model, torch.zeros(2, 1, 28, 28))]
        assert shapes == [(6, 28, 28), (6, 14, 14), (16, 10, 10), (16, 5, 5), (120,), (84,), (10,)]

    def test_other_class_counts(self):
        assert mnist()["LeNet5"](classes=3)(torch.zeros(2, 1, 28, 28)).shape == (2, 3)


def make_mnist(device):
    torch.manual_seed(0)
    model = mnist()["LeNet5"]().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.003, total_steps=100)
    return mnist()["train_one_epoch"], model, optimizer, scheduler, (1, 28, 28)


MAKERS = [make_mnist]


def batches(shape, device, count=3, size=32):
    torch.manual_seed(1)
    images, labels = torch.randn(size, *shape), torch.arange(size) % 10
    return [(images.to(device), labels.to(device))] * count


@pytest.mark.parametrize("make", MAKERS)
class TestTrainingStep:
    def test_lowers_the_loss_and_sums_over_images(self, make):
        train_one_epoch, model, optimizer, scheduler, shape = make("cpu")
        loader = batches(shape, "cpu", count=30)
        losses, loss_sum, correct = train_one_epoch(model, loader, nn.CrossEntropyLoss(), optimizer, scheduler)
        assert losses.shape == (30,)
        assert losses[-1] < 0.8 * losses[0]
        assert loss_sum.item() == pytest.approx(losses.sum().item() * 32, rel=1e-4)
        assert 0 <= correct.item() <= 30 * 32
        assert not losses.requires_grad

    def test_never_waits_for_the_device(self, make):
        """Meta tensors have no values: whatever reads one, or makes one on another device, fails here."""
        with pytest.raises(RuntimeError, match="meta"):
            torch.zeros(1, device="meta").item()
        train_one_epoch, model, optimizer, scheduler, shape = make("meta")
        results = train_one_epoch(model, batches(shape, "meta"), nn.CrossEntropyLoss(), optimizer, scheduler)
        assert all(result.is_meta for result in results)

    def test_same_seed_same_weights(self, make):
        weights = []
        for _ in range(2):
            train_one_epoch, model, optimizer, scheduler, shape = make("cpu")
            train_one_epoch(model, batches(shape, "cpu"), nn.CrossEntropyLoss(), optimizer, scheduler)
            weights.append(torch.cat([p.flatten() for p in model.parameters()]))
        assert torch.equal(*weights)


def test_requirements_are_met_and_each_has_a_bound_and_a_reason():
    from packaging.requirements import Requirement

    for line in (helpers.HERE / "requirements.txt").read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        text, _, reason = line.partition("#")
        requirement = Requirement(text.strip())
        assert any(bound.operator == ">=" for bound in requirement.specifier), line
        assert len(reason.split()) >= 3, line
        assert importlib.metadata.version(requirement.name) in requirement.specifier

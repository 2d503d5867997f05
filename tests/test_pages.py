"""The definitions on the pages: pulled out of the notebooks and tested as any code."""

import functools
import importlib.metadata
import math
import unittest.mock

import pytest
import torch
from torch import nn

import helpers
import notebooks

mnist, cifar = (functools.cache(lambda name=name: notebooks.definitions(name)) for name in notebooks.NAMES)


def shapes_of(layers, model, images):
    """The shape of each layer's output, without the batch, when the model gets the images."""
    shapes = []
    for layer in layers:
        layer.register_forward_hook(lambda layer, inputs, output: shapes.append(tuple(output.shape[1:])))
    model(images)
    return shapes


class TestLeNet5:
    @pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
    @pytest.mark.parametrize("pool", [nn.MaxPool2d, nn.AvgPool2d])
    def test_parameters_and_shapes(self, activation, pool):
        model = mnist()["LeNet5"](activation=activation, pool=pool)
        assert sum(p.numel() for p in model.parameters()) == 61_706
        layers = [layer for name, layer in model.named_children() if name != "activation"]
        shapes = shapes_of(layers, model, torch.zeros(2, 1, 28, 28))
        assert shapes == [(6, 28, 28), (6, 14, 14), (16, 10, 10), (16, 5, 5), (120,), (84,), (10,)]

    def test_other_class_counts(self):
        assert mnist()["LeNet5"](classes=3)(torch.zeros(2, 1, 28, 28)).shape == (2, 3)


def make_mnist(device):
    torch.manual_seed(0)
    page = mnist()
    page |= notebooks.settings("MNIST.ipynb") | {"LEARNING_RATE": 0.03}  # 32 images are a small batch
    model = page["LeNet5"]().to(device)
    optimizer, scheduler = page["make_optimizer"](model, 50)
    return page["train_one_epoch"], model, optimizer, scheduler, (1, 28, 28)


def make_cifar(device):
    torch.manual_seed(0)
    page = cifar()
    page |= notebooks.settings("CIFAR.ipynb") | {"MUON_RATE": 0.1, "BIAS_RATE": 0.05}
    model = page["FastCNN"](widths=(8, 16, 16)).to(device)
    page["whiten"](model.whiten, torch.randn(50, 3, 32, 32, device=device)) if device == "cpu" else None
    optimizers, schedulers = page["make_optimizers"](model, 100, page["BATCH_SIZE"])
    scaler = torch.amp.GradScaler(device, enabled=False)

    def train_one_epoch(model, loader, criterion, optimizers, schedulers, size=32):
        return page["train_one_epoch"](model, loader, criterion, optimizers, schedulers, size, "fp32", scaler)

    return train_one_epoch, model, optimizers, schedulers, (3, 32, 32)


MAKERS = [make_mnist, make_cifar]


def batches(shape, device, count=3, size=32):
    torch.manual_seed(1)
    labels = torch.arange(size) % 10
    images = 0.3 * torch.randn(size, *shape) + torch.randn(10, *shape)[labels]  # a pattern for each class
    return [(images.to(device), labels.to(device))] * count


@pytest.mark.parametrize("make", MAKERS)
class TestTrainingStep:
    def test_lowers_the_loss_and_sums_over_images(self, make):
        train_one_epoch, model, optimizer, scheduler, shape = make("cpu")
        loader = batches(shape, "cpu", count=45)
        losses, loss_sum, correct = train_one_epoch(model, loader, nn.CrossEntropyLoss(), optimizer, scheduler)
        assert losses.shape == (45,)
        assert losses[-1] < 0.8 * losses[0]
        assert loss_sum.item() == pytest.approx(losses.sum().item() * 32, rel=1e-4)
        assert 0 <= correct.item() <= 45 * 32
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


class TestFastCNN:
    def test_parameters_and_shapes(self):
        model = cifar()["FastCNN"](widths=(64, 128, 256))
        shapes = shapes_of(model.blocks, model.blocks, torch.zeros(2, 24, 31, 31))
        assert shapes == [(64, 15, 15), (128, 7, 7), (256, 3, 3)]
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
        assert sum(p.numel() for p in model.parameters()) == 1_735_456

    @pytest.mark.parametrize("size", [20, 24, 28, 32])
    def test_any_resolution(self, size):
        assert cifar()["FastCNN"](widths=(8, 16), refine=("1", "3"), classes=7)(
            torch.zeros(2, 3, size, size)
        ).shape == (
            2,
            7,
        )

    def test_block_begins_near_the_identity(self):
        block = cifar()["Block"](8, 8)
        x = torch.randn(4, 8, 6, 6)
        assert torch.allclose(block.conv(x), x, atol=1e-5)
        assert torch.allclose(block.refine[0][0](x), x, atol=1e-5)

    def test_whitened_channels_are_uncorrelated(self):
        model = cifar()["FastCNN"](widths=(8,), refine=("3",))
        base = torch.randn(200, 3, 9, 9)
        images = base + base.roll(1, dims=-1) + base.roll(1, dims=1)  # neighbours and colours are correlated
        cifar()["whiten"](model.whiten, images)
        channels = model.whiten(images)[:, :12].detach().transpose(0, 1).flatten(start_dim=1)
        assert torch.allclose(channels @ channels.T / channels.shape[1], torch.eye(12), atol=0.02)
        assert torch.equal(model.whiten.weight[12:], -model.whiten.weight[:12])
        assert not model.whiten.weight.requires_grad


class TestMuon:
    @pytest.mark.parametrize("shape", [(16, 90), (90, 16), (32, 32)])
    def test_singular_values_are_pulled_to_one(self, shape):
        matrix = torch.randn(*shape)
        result = cifar()["orthogonalise"](matrix, iterations=6)
        values = torch.linalg.svdvals(result)
        assert result.shape == matrix.shape
        assert values.max() < 1.3
        assert values.median() > 0.6

    def test_step_ignores_the_gradients_size_and_resets_the_weights_length(self):
        results = []
        for factor in (1.0, 1000.0):
            torch.manual_seed(0)
            weight = nn.Parameter(torch.randn(8, 4, 3, 3))
            weight.grad = factor * torch.randn(8, 4, 3, 3)
            cifar()["Muon"]([weight], lr=0.0).step()
            assert weight.norm().item() == pytest.approx(8**0.5, rel=1e-5)
            cifar()["Muon"]([weight], lr=0.1).step()
            results.append(weight.detach().clone())
        assert torch.allclose(*results, atol=1e-5)

    def test_state_survives_a_checkpoint(self):
        weight = nn.Parameter(torch.randn(8, 4, 3, 3))
        optimizer = cifar()["Muon"]([weight], lr=0.1)
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        other = cifar()["Muon"]([weight], lr=0.2)
        other.load_state_dict(optimizer.state_dict())
        assert torch.equal(other.state[weight]["momentum"], optimizer.state[weight]["momentum"])
        assert other.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_curves_can_be_drawn_before_the_first_epoch_is_whole(name):
    [cell] = [cell for cell in notebooks.code_cells(name) if "documents.curves(run.history)" in cell.source]
    run, shown = unittest.mock.Mock(history=[]), unittest.mock.Mock()
    names = dict(helpers=shown, documents=shown, run=run, provenance=None, math=math, classes="0123456789", chance=2.3)
    exec(cell.source, names)
    shown.show.assert_called_once()
    run.history.append({"loss/train": 99.0})
    with pytest.raises(AssertionError, match="the training diverged"):
        exec(cell.source, names)


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

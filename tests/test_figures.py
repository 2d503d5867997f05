"""Figures as a kernel would show them: caught as PNG and looked at by size and text."""

import io
import struct

import pytest
import torch
from torch import nn

import helpers

REAL = helpers.Provenance("MNIST", "official", True)
STAND_IN = helpers.Provenance("MNIST", "stand-in", False)
HISTORY = [
    {"train_loss": 2.0 / e, "train_accuracy": 1 - 0.5 / e, "validation_loss": float("nan"), "validation_accuracy": 0.6}
    for e in range(1, 4)
]
IMAGES = torch.zeros(12, 1, 28, 28, dtype=torch.uint8)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.activation, self.pool, self.head = (
            nn.Conv2d(1, 4, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Linear(4 * 169, 10),
        )

    def forward(self, images):
        return self.head(self.pool(self.activation(self.conv(images))).flatten(1))


@pytest.fixture
def shown(monkeypatch):
    """The figures that were shown, with the kernel's display caught."""
    figures, show = [], helpers.show

    def catch(canvas, provenance):
        show(canvas, provenance)
        figures.append(canvas)

    monkeypatch.setattr(helpers, "show", catch)
    return figures


DRAW = {
    "images": lambda provenance: helpers.show_images(IMAGES, ["title"] * 12, provenance, columns=5),
    "curves": lambda provenance: helpers.show_curves(HISTORY, provenance),
    "confusion": lambda provenance: helpers.show_confusion(
        torch.eye(10, dtype=torch.int64), tuple("0123456789"), provenance
    ),
    "confusion of 100": lambda provenance: helpers.show_confusion(
        torch.eye(100), tuple(map(str, range(100))), provenance
    ),
    "model": lambda provenance: helpers.draw_model(Small(), torch.zeros(1, 1, 28, 28), provenance),
}


@pytest.mark.parametrize("name", DRAW)
def test_figure_is_drawn_modest_in_size_and_says_stand_in(name, shown):
    for provenance in (REAL, STAND_IN):
        DRAW[name](provenance)
    real, stand_in = shown
    assert real.get_suptitle() == ""
    assert "STAND-IN DATA, NOT MNIST" in stand_in.get_suptitle()
    buffer = io.BytesIO()
    stand_in.savefig(buffer, format="png")
    width, height = struct.unpack(">II", buffer.getvalue()[16:24])
    assert 300 < width < 1600
    assert 100 < height < 1000
    assert len(buffer.getvalue()) < 300_000


def test_curves_have_axes_with_units(shown):
    helpers.show_curves(HISTORY, REAL)
    axes = shown[0].axes
    assert [axis.get_xlabel() for axis in axes] == ["", "epoch"]
    assert [axis.get_ylabel() for axis in axes] == ["accuracy (%)", "loss (nats)"]


def test_trace_shapes():
    model = Small().train()
    stages = helpers.trace_shapes(model, torch.zeros(2, 1, 28, 28))
    assert [(name, shape) for name, _, shape in stages] == [
        ("conv", (4, 26, 26)),
        ("pool", (4, 13, 13)),
        ("head", (10,)),
    ]
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_the_names_of_lines_stand_at_their_ends_and_apart(shown):
    """As after a training of CIFAR.ipynb: 2.9 points apart on an axis from 50 to 95."""
    rows = [(1.6, 0.55, 1.5, 0.50), (1.3, 0.75, 1.0, 0.70), (1.07, 0.899, 0.56, 0.87)]
    names = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
    helpers.show_curves([dict(zip(names, row, strict=True)) for row in rows], REAL)
    for axis in shown[0].axes:
        places = sorted(text.xy[1] for text in axis.texts)  # in shares of the axis's height
        assert -0.05 <= places[0] < places[1] <= 1
        assert places[1] - places[0] >= 0.12
    assert shown[0].axes[1].get_yscale() == "linear"
    helpers.show_curves([dict(zip(names, row, strict=True)) for row in [*rows, (0.02, 0.99, 0.03, 0.99)]], REAL)
    assert shown[1].axes[1].get_yscale() == "log", "small late losses differ by little"

"""Figures as a kernel would show them: looked at by size, text and place."""

import io
import math

import numpy as np
import PIL.Image
import pytest
import torch

import helpers
from tests import documents

REAL = helpers.Provenance("MNIST", "official", True)
STAND_IN = helpers.Provenance("MNIST", "stand-in", False)
SAMPLES = [{"seconds": 0.2 * k, "time": 1e9 + k, "cpu/utilization_percent": 50.0 + k} for k in range(10)]


def history(*rows, samples=()):
    """A history of epochs of a second each: loss and accuracy in training, then in validation."""
    tags = ("loss/train", "accuracy/train", "loss/validation", "accuracy/validation")
    entries = [dict(zip(tags, row, strict=False)) for row in rows]
    entries = [dict(epoch=n, step=10 * n, seconds=1.5 * n, samples=[]) | entry for n, entry in enumerate(entries, 1)]
    entries[-1]["samples"] = list(samples)
    return entries


ROWS = [(2.0, 0.5, 2.1, 0.4), (1.0, 0.7, 1.2, 0.6), (0.7, 0.8, 1.0, 0.7)]
FIGURES = {
    "images": lambda: helpers.image_grid(torch.zeros(12, 1, 28, 28, dtype=torch.uint8), ["title"] * 12, columns=5),
    "no image": lambda: helpers.image_grid(torch.zeros(0, 1, 28, 28, dtype=torch.uint8), []),
    "curves": lambda: documents.curves(history(*ROWS, samples=SAMPLES)),
    "curves of one epoch": lambda: documents.curves(history(ROWS[0])),
    "curves of three runs": lambda: documents.curves(
        history(*ROWS), history(*ROWS), history(ROWS[0]), names=tuple("abc")
    ),
    "confusion": lambda: helpers.confusion(torch.eye(10, dtype=torch.int64), tuple("0123456789")),
    "confusion of 100": lambda: helpers.confusion(torch.eye(100, dtype=torch.int64), tuple(map(str, range(100)))),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_modest_in_size_and_says_stand_in(name):
    drawn = FIGURES[name]()
    content = helpers.show(drawn, STAND_IN)
    assert drawn.get_suptitle() == "STAND-IN DATA, NOT MNIST"
    width, height = PIL.Image.open(io.BytesIO(content)).size
    assert 300 < width < 1600
    assert 30 < height < 1000
    assert len(content) < 300_000


def test_a_figure_of_real_data_has_no_banner():
    drawn, _ = helpers.figure()
    helpers.show(drawn, REAL)
    assert drawn.get_suptitle() == ""


def test_a_drawing_keeps_its_colours():
    drawn, axis = helpers.figure(size=(2, 1))
    axis.axhspan(0, 1, color=helpers.COLORS[1])
    pixels = np.array(PIL.Image.open(io.BytesIO(helpers.show(drawn, REAL))).convert("RGB")).reshape(-1, 3)
    assert np.abs(pixels - np.array([0xD5, 0x5E, 0x00])).sum(axis=1).min() <= 6
    assert np.abs(pixels - 255).sum(axis=1).min() == 0


class TestImageGrid:
    def test_each_image_stands_under_its_title(self):
        images = torch.randint(0, 255, (7, 3, 8, 8), dtype=torch.uint8)
        [axis] = helpers.image_grid(images, [f"title {n}" for n in range(7)], columns=3).axes
        assert len(axis.images) == len(axis.texts) == 7
        for number, (shown, text) in enumerate(zip(axis.images, axis.texts, strict=True)):
            assert np.array_equal(shown.get_array(), images[number].permute(1, 2, 0).numpy())
            left, right, bottom, top = shown.get_extent()
            assert text.get_text() == f"title {number}"
            assert left < text.get_position()[0] < right
            assert text.get_position()[1] < top < bottom, "rows grow downwards"
            assert int(left) == number % 3


class TestCurves:
    def test_have_axes_with_units_lines_and_a_legend(self):
        drawn = documents.curves(history(*ROWS, samples=SAMPLES))
        axes = drawn.axes
        assert [axis.get_ylabel() for axis in axes] == [
            *("accuracy (%)", "loss (nats)", "process CPU\nutilisation (%)")
        ]
        assert axes[-1].get_xlabel() == "time spent training (s)"
        assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["train", "validation"]
        train, validation = axes[0].lines
        assert list(train.get_xdata()) == [1.5, 3.0, 4.5]
        assert list(train.get_ydata()) == pytest.approx([50, 70, 80])
        assert list(validation.get_ydata()) == pytest.approx([40, 60, 70])
        assert list(axes[1].lines[0].get_ydata()) == [2.0, 1.0, 0.7]
        [usage] = axes[2].lines
        assert list(usage.get_xdata()) == pytest.approx([sample["seconds"] for sample in SAMPLES])
        assert list(usage.get_ydata()) == [50.0 + k for k in range(10)]

    def test_of_a_gpu_say_so(self):
        samples = [{"seconds": 1.0, "time": 1e9, "gpu/utilization_percent": 97.0}]
        assert documents.curves(history(*ROWS, samples=samples)).axes[2].get_ylabel().startswith("GPU")

    def test_without_validation(self):
        drawn = documents.curves(history(*(row[:2] for row in ROWS)))
        assert all(math.isnan(value) for value in drawn.axes[0].lines[1].get_ydata())

    def test_of_several_runs_show_their_validation(self):
        lost = history(*((*row[:3], row[3] / 2) for row in ROWS))
        drawn = documents.curves(history(*ROWS), lost, names=("one", "灰"))
        assert len(drawn.axes) == 2
        texts = [text.get_text() for text in drawn.axes[0].get_legend().get_texts()]
        assert texts == ["one", "灰"]
        assert [list(line.get_ydata()) for line in drawn.axes[0].lines] == [
            *(pytest.approx([40, 60, 70]), pytest.approx([20, 30, 35]))
        ]


class TestConfusion:
    MATRIX = torch.tensor([[80, 15, 5], [10, 90, 0], [0, 0, 0]])

    def test_shows_shares_of_the_true_class_and_counts(self):
        [axis, _] = helpers.confusion(self.MATRIX, ("cat", "dog", "灰")).axes
        [shown] = axis.images
        assert np.allclose(shown.get_array(), [[80, 15, 5], [10, 90, 0], [0, 0, 0]])
        written = {text.get_position(): text.get_text() for text in axis.texts}  # (column, row)
        assert written == {(0, 0): "80", (1, 0): "15", (2, 0): "5", (0, 1): "10", (1, 1): "90"}
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted class", "true class")
        names = ["cat", "dog", "灰"]
        assert [label.get_text() for label in axis.get_yticklabels()] == names

    def test_many_classes_have_no_counts(self):
        [axis, _] = helpers.confusion(torch.ones(100, 100, dtype=torch.int64), tuple(map(str, range(100)))).axes
        assert not axis.texts


def test_text_is_drawn_as_it_is_written():
    drawn, axis = helpers.figure()
    axis.set_title("50 $ or 60 $ for $x$")
    drawn.savefig(io.BytesIO(), format="png")  # mathtext would fail
    assert not axis.title.get_parse_math()

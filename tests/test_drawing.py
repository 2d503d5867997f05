"""A reader's own digits: drawn with the mouse, or in image files, and made like MNIST's."""

import numpy as np
import pytest
import torch
from PIL import Image

import helpers

SEVEN = [[(20, 30), (80, 30), (45, 100)]]


def centre_of_mass(digit):
    ink = digit[0].float()
    places = torch.arange(28) + 0.5
    return (ink.sum(dim=1) @ places / ink.sum()).item(), (ink.sum(dim=0) @ places / ink.sum()).item()


def extent(digit):
    ink = digit[0] > 40
    return int(ink.any(dim=1).sum()), int(ink.any(dim=0).sum())


def test_a_drawing_is_made_as_mnist_was():
    digit = helpers.draw_digit(SEVEN)
    assert digit.shape == (1, 28, 28)
    assert digit.dtype == torch.uint8
    assert digit.max() == 255
    assert digit[0, 0, 0] == 0
    assert 19 <= max(extent(digit)) <= 20
    assert centre_of_mass(digit) == pytest.approx((14, 14), abs=0.6)


@pytest.mark.parametrize(("factor", "shift"), [(0.3, 0), (5, 0), (1, 400), (0.5, -30)])
def test_where_and_how_large_one_draws_makes_no_difference(factor, shift):
    moved = [[(factor * x + shift, factor * y + shift) for x, y in stroke] for stroke in SEVEN]
    difference = helpers.draw_digit(moved).int() - helpers.draw_digit(SEVEN).int()
    assert difference.abs().float().mean() < 3


@pytest.mark.parametrize("strokes", [[], [[]]])
def test_nothing_drawn_is_an_empty_image(strokes):
    assert helpers.draw_digit(strokes).sum() == 0


def test_a_single_point_is_a_dot():
    digit = helpers.draw_digit([[(3, 3)]])
    assert digit.max() == 255
    assert centre_of_mass(digit) == pytest.approx((14, 14), abs=0.6)


def test_dark_ink_on_grey_paper_is_turned_round():
    ink = torch.zeros(1, 112, 112, dtype=torch.uint8)
    ink[0, 20:90, 50:60] = 255
    paper = 200 - (ink.float() * 0.7).to(torch.uint8)
    assert torch.allclose(helpers.centre_digit(paper).float(), helpers.centre_digit(ink).float(), atol=2)
    assert extent(helpers.centre_digit(paper)) == (20, 3)


def test_image_files(tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / name, format="png")
    assert [path.name for path in helpers.image_files(tmp_path)] == ["a.JPG", "b.png"]
    assert helpers.image_files(str(tmp_path / "b.png")) == [tmp_path / "b.png"]
    (tmp_path / "empty").mkdir()
    for missing in ("empty", "nowhere"):
        with pytest.raises(helpers.LabError, match=f"LAB_OWN_IMAGES=.*{missing}"):
            helpers.image_files(tmp_path / missing)


class TestPad:
    """The pad as a reader uses it, its events sent as the browser sends them."""

    @pytest.fixture
    def shown(self, monkeypatch):
        shown = []
        monkeypatch.setattr("IPython.display.display", shown.append)
        monkeypatch.setattr(helpers, "in_notebook", lambda: True)
        monkeypatch.setattr(helpers, "watched", lambda: True)
        return shown

    def test_draws_answers_and_clears(self, shown):
        seen = []

        def classify(strokes):
            seen.append([list(stroke) for stroke in strokes])
            return torch.tensor([0.25, 0.75])

        helpers.show_drawing_pad(classify, ("0", "1"))
        [box] = shown
        (canvas, button), lines = box.children[0].children, box.children[1].children
        send = canvas._handle_frontend_event
        for event, x, y in (("down", 10, 10), ("move", 20, 15), ("up", 20, 15), ("move", 99, 99)):
            send(canvas, {"event": f"mouse_{event}", "x": x, "y": y}, [])
        assert seen[-1] == [[(10, 10), (20, 15)]]  # what comes after the button went up is no stroke
        assert [(bar.value, number.value) for bar, number in (line.children for line in lines)] == [
            (0.25, "25.0%"),
            (0.75, "75.0%"),
        ]
        button.click()
        assert [line.children[1].value for line in lines] == ["", ""]
        send(canvas, {"event": "mouse_down", "x": 1, "y": 1}, [])
        send(canvas, {"event": "mouse_up", "x": 1, "y": 1}, [])
        assert seen[-1] == [[(1, 1)]]

    def test_headless_prints_one_line(self, monkeypatch, capsys):
        monkeypatch.setattr(helpers, "watched", lambda: False)
        helpers.show_drawing_pad(None, ("0",))
        assert len(capsys.readouterr().out.splitlines()) == 1

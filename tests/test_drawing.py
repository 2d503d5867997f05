"""A reader's own digits: drawn with the mouse, or in image files, and made like MNIST's."""

import functools
import types

import numpy as np
import pytest
import torch
from PIL import Image

import helpers
import notebooks

page = functools.cache(functools.partial(notebooks.page, "MNIST.ipynb"))
SEVEN = [[(20, 30), (80, 30), (45, 100)]]


def centre_of_mass(digit):
    ink = digit[0].float()
    places = torch.arange(28) + 0.5
    return (ink.sum(dim=1) @ places / ink.sum()).item(), (ink.sum(dim=0) @ places / ink.sum()).item()


def extent(digit):
    ink = digit[0] > 40
    return int(ink.any(dim=1).sum()), int(ink.any(dim=0).sum())


def test_a_drawing_is_made_as_mnist_was():
    digit = page()["draw_digit"](SEVEN)
    assert digit.shape == (1, 28, 28)
    assert digit.dtype == torch.uint8
    assert digit.max() == 255
    assert digit[0, 0, 0] == 0
    assert 19 <= max(extent(digit)) <= 20
    assert centre_of_mass(digit) == pytest.approx((14, 14), abs=0.6)


@pytest.mark.parametrize(("factor", "shift"), [(0.3, 0), (5, 0), (1, 400), (0.5, -30)])
def test_where_and_how_large_one_draws_makes_no_difference(factor, shift):
    moved = [[(factor * x + shift, factor * y + shift) for x, y in stroke] for stroke in SEVEN]
    difference = page()["draw_digit"](moved).int() - page()["draw_digit"](SEVEN).int()
    assert difference.abs().float().mean() < 3


@pytest.mark.parametrize("strokes", [[], [[]]])
def test_nothing_drawn_is_an_empty_image(strokes):
    assert page()["draw_digit"](strokes).sum() == 0


def test_a_single_point_is_a_dot():
    digit = page()["draw_digit"]([[(3, 3)]])
    assert digit.max() == 255
    assert centre_of_mass(digit) == pytest.approx((14, 14), abs=0.6)


def test_dark_ink_on_grey_paper_is_turned_round():
    ink = torch.zeros(1, 112, 112, dtype=torch.uint8)
    ink[0, 20:90, 50:60] = 255
    paper = 200 - (ink.float() * 0.7).to(torch.uint8)
    assert torch.allclose(page()["centre_digit"](paper).float(), page()["centre_digit"](ink).float(), atol=2)
    assert extent(page()["centre_digit"](paper)) == (20, 3)


class TestOwnImages:
    """The cell that reads the reader's image files."""

    @pytest.fixture
    def show(self, monkeypatch):
        """A function that runs the cell on a path; returns the digits that it made, and their titles."""
        grids = []
        monkeypatch.setattr(helpers, "image_grid", lambda images, titles, **options: grids.append((images, titles)))
        monkeypatch.setattr(helpers, "show", lambda *arguments, **options: None)
        [cell] = [cell.source for cell in notebooks.code_cells("MNIST.ipynb") if "if OWN_IMAGES:" in cell.source]

        def show(path):
            unseen = types.SimpleNamespace(images=torch.zeros(9, 1, 28, 28, dtype=torch.uint8), labels=torch.arange(9))
            namespace = page() | dict(OWN_IMAGES=str(path), classes=tuple("0123456789"), unseen=unseen, provenance=None)
            namespace["read_digit"] = lambda image: torch.eye(10)[7]
            notebooks.execute(cell, namespace)
            return grids.pop()

        return show

    def test_files_of_a_folder_or_a_single_one(self, show, tmp_path):
        ink = np.full((112, 112), 220, np.uint8)  # dark ink on light paper
        ink[20:90, 50:60] = 30
        for name in ("b.png", "a.JPG", "notes.txt"):
            Image.fromarray(ink).save(tmp_path / name, format="png")
        digits, titles = show(tmp_path)
        assert titles == ["a.JPG\n→ 7, 100%", "b.png\n→ 7, 100%"]
        white = torch.from_numpy(ink < 100).view(1, 112, 112) * torch.tensor(255, dtype=torch.uint8)
        for digit in digits:
            assert torch.allclose(digit.float(), page()["centre_digit"](white).float(), atol=2)
        assert show(tmp_path / "b.png")[1] == ["b.png\n→ 7, 100%"]

    def test_without_any_held_out_images_are_shown(self, show, capsys):
        assert len(show("")[0]) == 3
        assert "OWN_IMAGES is empty" in capsys.readouterr().out

    @pytest.mark.parametrize("missing", ["empty", "nowhere", "notes.txt"])
    def test_no_image_file_is_an_error_that_names_the_place(self, show, tmp_path, missing):
        (tmp_path / "empty").mkdir()
        (tmp_path / "notes.txt").touch()
        with pytest.raises(helpers.LabError, match=f"LAB_OWN_IMAGES=.*{missing}"):
            show(tmp_path / missing)


class TestPad:
    """The pad as a reader uses it, its events sent as the browser sends them."""

    @pytest.fixture
    def shown(self, monkeypatch):
        shown = []
        monkeypatch.setattr("IPython.display.display", shown.append)
        monkeypatch.setenv("JPY_SESSION_NAME", "MNIST.ipynb")
        return shown

    def test_draws_answers_and_clears(self, shown):
        seen = []

        def classify(strokes):
            seen.append([list(stroke) for stroke in strokes])
            return torch.tensor([0.25, 0.75])

        page()["show_drawing_pad"](classify, ("0", "1"))
        [box] = shown
        (pad, button), lines = box.children[0].children, box.children[1].children
        send = pad._handle_frontend_event
        for event, x, y in (("down", 10, 10), ("move", 20, 15), ("up", 20, 15), ("move", 99, 99)):
            send(pad, {"event": f"mouse_{event}", "x": x, "y": y}, [])
        assert seen[-1] == [[(10, 10), (20, 15)]]  # what comes after the button went up is no stroke
        assert [(bar.value, number.value) for bar, number in (line.children for line in lines)] == [
            (0.25, "25.0%"),
            (0.75, "75.0%"),
        ]
        button.click()
        assert [line.children[1].value for line in lines] == ["", ""]
        send(pad, {"event": "mouse_down", "x": 1, "y": 1}, [])
        send(pad, {"event": "mouse_up", "x": 1, "y": 1}, [])
        assert seen[-1] == [[(1, 1)]]

    def test_headless_prints_one_line(self, monkeypatch, capsys):
        for name in ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG"):
            monkeypatch.delenv(name, raising=False)
        page()["show_drawing_pad"](None, ("0",))
        assert len(capsys.readouterr().out.splitlines()) == 1

"""What the pages do to their training images, against the same done plainly to one image after the other."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch

import helpers
import notebooks

ALMOST_1 = 1 - 2**-24  # the largest number that torch.rand returns


page = functools.cache(notebooks.page)
mnist, cifar = (functools.partial(page, name) for name in notebooks.NAMES)


@pytest.fixture(params=["MNIST", "MNIST, distorted", "CIFAR"])
def case(request):
    """The shape of the images, and the page."""
    if request.param == "CIFAR":
        return (3, 32, 32), cifar(TRANSLATE=2)
    return (1, 28, 28), mnist(TRANSLATE=2, DISTORT=10.0 if "distorted" in request.param else 0.0)


def drawn(shape, count=300, seed=0):
    """Random images, and the random numbers that a loader would give with them."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=random)
    return images, torch.rand(count, 5, generator=random)


def crops(image, pixels, **border):
    """The crops of one padded image [C, H, W] by the place of their corner."""
    height, width = image.shape[1:]
    padded = np.pad(image.numpy(), ((0, 0), (pixels, pixels), (pixels, pixels)), **border)
    places = [(y, x) for y in range(2 * pixels + 1) for x in range(2 * pixels + 1)]
    return {(y, x): padded[:, y : y + height, x : x + width] for y, x in places}


def found(image, candidates):
    """The key of the one candidate that equals the image."""
    [key] = [key for key, candidate in candidates.items() if np.array_equal(candidate, image.numpy())]
    return key


class TestBoth:
    def test_what_happens_to_an_image_depends_on_its_own_numbers_alone(self, case):
        shape, page = case
        images, chances = drawn(shape)
        together, order = page["augment"](images, chances, 1), torch.randperm(len(images))
        assert torch.allclose(page["augment"](images[order], chances[order], 1), together[order], atol=1e-3)
        for number in (0, 7):
            one = slice(number, number + 1)
            assert torch.allclose(page["augment"](images[one], chances[one], 1), together[one], atol=1e-3)

    def test_the_images_that_come_in_are_left_alone(self, case):
        shape, page = case
        images, chances = drawn(shape)
        before = images.clone()
        assert page["augment"](images, chances, 1).shape == images.shape
        assert torch.equal(images, before)

    def test_white_stays_white_and_black_black(self, case):
        shape, page = case
        _, chances = drawn(shape)
        for value in (0, 255):
            images = torch.full((len(chances), *shape), value, dtype=torch.uint8)
            inside = page["augment"](images, chances, 1)[:, :, 8:-8, 8:-8].double()
            assert torch.allclose(inside, torch.tensor(value, dtype=torch.float64), atol=1e-3)

    def test_the_loader_takes_it(self, case):
        shape, page = case
        images, _ = drawn(shape, 40)
        split = helpers.Split(images, torch.arange(40), ("a",), helpers.Provenance("t", "stand-in", False))
        half = torch.full(shape[:1], 0.5)
        options = dict(mean=half, std=half, shuffle=True, augment=page["augment"], layout=torch.channels_last)
        batches = list(helpers.Loader(split, 20, torch.device("cpu"), **options).epoch(1))
        for images, _ in batches:
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert images.abs().max() <= 1 + 1e-5
            assert images.std() > 0.4


class TestShift:
    def test_mnist_moves_each_image_by_itself_over_black(self):
        images, chances = drawn((1, 28, 28))
        shifted = mnist(TRANSLATE=2, DISTORT=0.0)["augment"](images, chances, 1)
        places = [found(after, crops(before, 2)) for before, after in zip(images, shifted, strict=True)]
        assert len(set(places)) == 25, "all shifts by up to 2 pixels, and no two numbers for both directions"
        assert max(places.count(place) for place in places) < 40

    def test_cifar_moves_each_image_by_itself_over_its_reflection(self):
        images, chances = drawn((3, 32, 32))
        places = set()
        for before, after in zip(images, cifar(TRANSLATE=2)["augment"](images, chances, 1), strict=True):
            sides = {"as it is": before, "mirrored": before.flip(-1)}
            every = {(s, *place): c for s, i in sides.items() for place, c in crops(i, 2, mode="reflect").items()}
            places.add(found(after.to(torch.uint8), every))
        assert len(places) == 50, "all shifts by up to 2 pixels, of either side"

    @pytest.mark.parametrize(("name", "shape"), [("MNIST.ipynb", (1, 28, 28)), ("CIFAR.ipynb", (3, 32, 32))])
    def test_the_smallest_and_the_largest_number_move_as_far(self, name, shape):
        images, border = drawn(shape, 2)[0], dict(mode="reflect") if shape[0] == 3 else {}
        chances = torch.tensor([[0.0] * 5, [ALMOST_1] * 5])
        for pixels in range(5):
            shifted = page(name)["shift"](images, chances, pixels).to(torch.uint8)
            places = [found(shifted[k], crops(images[k], pixels, **border)) for k in (0, 1)]
            assert places == [(0, 0), (2 * pixels, 2 * pixels)]


class TestMirror:
    def sides(self, epoch, chances, images, **options):
        """Whether each image shows its other side."""
        after = cifar()["mirror"](images, chances, epoch, **options)
        kept = torch.tensor([torch.equal(a, b) for a, b in zip(after, images, strict=True)])
        turned = torch.tensor([torch.equal(a, b.flip(-1)) for a, b in zip(after, images, strict=True)])
        assert (kept ^ turned).all()
        return turned

    def test_alternating_each_image_is_mirrored_in_one_of_two_epochs(self):
        images, chances = drawn((3, 32, 32))
        epochs = []
        for epoch in range(1, 6):
            chances[:, :4] = drawn((1, 1, 1), seed=epoch)[1][:, :4]  # the last one stays
            epochs.append(self.sides(epoch, chances, images))
        for before, after in itertools.pairwise(epochs):
            assert (before ^ after).all()
            assert 100 < before.sum() < 200

    def test_without_it_each_epoch_draws_again(self):
        images, chances = drawn((3, 32, 32))
        one = self.sides(1, chances, images, alternate=False)
        chances[:, :4] = drawn((1, 1, 1), seed=1)[1][:, :4]
        two = self.sides(2, chances, images, alternate=False)
        for some in (one, two, one ^ two):
            assert 100 < some.sum() < 200

    def test_the_page_alternates(self):
        images, chances = drawn((3, 32, 32))
        one, two = (cifar(TRANSLATE=0)["augment"](images, chances, epoch) for epoch in (1, 2))
        assert torch.equal(one, two.flip(-1))
        assert not torch.equal(one, two)


class TestDistort:
    def plain(self, image, angle, scale):
        """One image [1, H, W], turned by `angle` (radians) and scaled, pixel by pixel; black where nothing is."""
        height, width = image.shape[1:]
        after = np.zeros((height, width))
        for row in range(height):
            for column in range(width):
                y, x = row - (height - 1) / 2, column - (width - 1) / 2  # from the centre
                from_x = scale * (math.cos(angle) * x - math.sin(angle) * y) + (width - 1) / 2
                from_y = scale * (math.sin(angle) * x + math.cos(angle) * y) + (height - 1) / 2
                left, top = math.floor(from_x), math.floor(from_y)
                for c, r in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
                    if 0 <= r < height and 0 <= c < width:
                        share = (1 - abs(from_x - c)) * (1 - abs(from_y - r))
                        after[row, column] += share * image[0, r, c].item()
        return after

    def test_each_image_by_itself(self):
        images, chances = drawn((1, 28, 28), 6)
        distorted = mnist()["distort"](images, chances, 10.0)
        for image, after, (first, second) in zip(images, distorted, chances[:, 2:4].tolist(), strict=True):
            angle, scale = math.radians(10 * (2 * first - 1)), 1 + 10 * (2 * second - 1) / 100
            assert np.allclose(after[0].numpy(), self.plain(image, angle, scale), atol=0.05)

    def test_the_middle_of_the_numbers_changes_nothing(self):
        images, _ = drawn((1, 28, 28), 20)
        distorted = mnist()["distort"](images, torch.full((20, 5), 0.5), 10.0)
        assert torch.allclose(distorted, images.float(), atol=0.05)

    def test_the_ends_turn_as_far_to_either_side(self):
        images, _ = drawn((1, 28, 28), 2)
        chances = torch.full((2, 5), 0.5)
        chances[:, 2] = torch.tensor([0.0, ALMOST_1])
        distorted = mnist()["distort"](images, chances, 90.0)
        turned = torch.stack([torch.rot90(images[0], -1, (1, 2)), torch.rot90(images[1], 1, (1, 2))])
        assert torch.allclose(distorted, turned.float(), atol=0.05)

    def test_mnist_shifts_first_and_draws_other_numbers_for_it(self):
        images, chances = drawn((1, 28, 28), 50)
        shifted = mnist(TRANSLATE=2, DISTORT=0.0)["augment"](images, chances, 1)
        both = mnist(TRANSLATE=2, DISTORT=10.0)["augment"](images, chances, 1)
        assert torch.allclose(both, mnist()["distort"](shifted, chances, 10.0))
        assert not torch.allclose(both, shifted.float(), atol=10)


def test_a_row_of_the_ablation_cuts_out_a_square():
    images, chances = drawn((3, 32, 32))
    images[:] = 7
    areas, places = set(), set()
    for image in cifar()["cut_out"](images.float(), chances, 8, torch.tensor([200.0, 100.0, 50.0]).view(3, 1, 1)):
        hole = image[0] == 200
        assert torch.equal(image[1] == 100, hole)
        assert torch.equal(image[2] == 50, hole)
        assert (image[:, ~hole] == 7).all()
        rows, columns = hole.any(dim=1).sum().item(), hole.any(dim=0).sum().item()
        assert hole.sum() == rows * columns > 0
        areas.add((rows, columns))
        places.add(tuple(hole.nonzero()[0].tolist()))
    assert max(rows for rows, _ in areas) == max(columns for _, columns in areas) == 8
    assert len(areas) > 5, "holes at the border are cut off"
    assert len(places) > 100

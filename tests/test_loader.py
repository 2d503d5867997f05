import itertools

import pytest
import torch

import helpers
import toy

CPU = torch.device("cpu")


def make(count=103, shape=(3, 8, 10), batch_size=12, **options):
    """A loader of `count` different random images, labelled by their numbers; neither scaled nor shifted."""
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = helpers.Split(images, torch.arange(count), ("a", "b"), helpers.Provenance("test", "stand-in", False))
    options = dict(mean=torch.zeros(shape[0]), std=torch.full(shape[:1], 1 / 255)) | options
    return helpers.Loader(split, batch_size, CPU, **options)


def whole(batches):
    """The images of a pass in the order of their labels, and the labels in the order of the pass."""
    images, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    return images[labels.argsort()], labels


def equal(pass_, other):
    return all(torch.equal(a, b) for a, b in zip(itertools.chain(*pass_), itertools.chain(*other), strict=True))


def change(images, chances, epoch):
    """An augmentation that shows all that it gets."""
    return images.float() + (chances * torch.tensor([1, 2, 4, 8, 16])).sum(dim=1).view(-1, 1, 1, 1) + 100 * epoch


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_image_once_with_its_label(shuffle):
    loader = make(shuffle=shuffle)
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [12] * 8 + [7]
    assert len(loader) == 9
    assert loader.count == 103
    images, labels = whole(batches)
    assert images.dtype == torch.float32
    assert torch.allclose(images, loader.images.float(), atol=1e-3)
    assert (labels.tolist() == list(range(103))) != shuffle


class TestPasses:
    """A pass depends on the seed and its number alone."""

    def test_the_same_number_gives_the_same_batches(self):
        loader = make(shuffle=True, augment=change, seed=3)
        first = list(loader.epoch(4))
        next(loader.epoch(7))  # a pass that somebody left
        torch.manual_seed(5)
        assert equal(loader.epoch(4), first)
        assert equal(make(shuffle=True, augment=change, seed=3).epoch(4), first)
        together = zip(loader.epoch(4), loader.epoch(5), strict=True)
        assert equal([one for one, _ in together], first)

    def test_iterating_is_pass_0(self):
        loader = make(shuffle=True, augment=change)
        assert equal(loader, loader.epoch(0))
        assert equal(loader, loader)

    def test_other_numbers_and_other_seeds_give_other_orders(self):
        orders = [whole(make(shuffle=True, seed=seed).epoch(n))[1].tolist() for seed in (1, 2) for n in range(5)]
        assert len(set(map(tuple, orders))) == 10

    def test_the_random_numbers_of_others_are_left_alone(self):
        before = torch.get_rng_state()
        list(make(shuffle=True, augment=change))
        assert torch.equal(torch.get_rng_state(), before)


class TestAugment:
    def calls(self, loader, *epochs):
        """What `augment` was called with in these epochs: {image: its chances} of each."""
        found, seen = [], []

        def note(images, chances, epoch):
            assert images.dtype == torch.uint8
            assert chances.dtype == torch.float32
            assert chances.shape == (len(images), 5)
            seen.append((chances, epoch))
            return images

        loader.augment = note
        for number in epochs:
            seen.clear()
            _, labels = whole(loader.epoch(number))
            assert {epoch for _, epoch in seen} == {number}
            found.append(torch.cat([chances for chances, _ in seen])[labels.argsort()])
        return found

    def test_four_numbers_are_new_in_each_epoch_and_one_stays_with_the_image(self):
        one, two = self.calls(make(count=1000, batch_size=100, shuffle=True, seed=3), 1, 2)
        assert torch.equal(one[:, 4], two[:, 4])
        assert (one[:, :4] != two[:, :4]).float().mean() > 0.99
        for numbers in (*one.T, *two.T):
            assert numbers.unique().numel() > 990, "each image has its own"
            assert 0 <= numbers.min() < 0.02
            assert 0.98 < numbers.max() < 1
        [other] = self.calls(make(count=1000, batch_size=100, shuffle=True, seed=4), 1)
        assert (one != other).float().mean() > 0.99

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
    def test_what_it_returns_is_normalised(self, dtype):
        loader = make(mean=torch.tensor([0.5, 0.2, 0.1]), std=torch.tensor([0.25, 0.5, 1.0]))
        plain, _ = next(iter(loader))
        loader.augment = lambda images, chances, epoch: images.to(dtype)
        images, _ = next(iter(loader))
        assert images.dtype == torch.float32
        assert torch.allclose(images, plain, atol=1e-6)

    def test_it_may_write_into_its_images(self):
        loader = make(augment=lambda images, chances, epoch: images.zero_())
        before = loader.images.clone()
        assert sum(images.abs().sum() for images, _ in loader) == 0
        assert torch.equal(loader.images, before)


def test_normalised_by_channel():
    mean, std = torch.tensor([0.5, 0.2, 0.1]), torch.tensor([0.25, 0.5, 1.0])
    loader = make(mean=mean, std=std)
    images, _ = next(iter(loader))
    expected = (loader.images[:12].double() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert torch.allclose(images.double(), expected, atol=1e-5)


@pytest.mark.parametrize("augment", [None, change])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layout(layout, augment):
    images, _ = next(iter(make(layout=layout, augment=augment)))
    assert images.is_contiguous(memory_format=layout)


def test_the_images_are_not_copied_on_the_same_device():
    big = helpers.Split(torch.zeros((600, 3, 32, 32), dtype=torch.uint8), torch.zeros(600).long(), ("a",), None)
    loader = helpers.Loader(big, 100, CPU, torch.zeros(3), torch.ones(3), shuffle=True)
    tensors = [value for value in vars(loader).values() if torch.is_tensor(value)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert loader.images.data_ptr() == big.images.data_ptr()
    assert sum(storages.values()) < 1.1 * big.images.nbytes


def test_an_empty_split_has_no_batches():
    assert list(make(count=0)) == []
    assert len(make(count=0)) == 0


@pytest.mark.parametrize(("batch_size", "shuffle"), [(0, False), (-1, True), (104, True)])
def test_an_absurd_batch_size_is_refused_by_name(batch_size, shuffle):
    with pytest.raises(helpers.LabError, match=f"LAB_BATCH_SIZE={batch_size}"):
        make(batch_size=batch_size, shuffle=shuffle)


def test_a_test_set_may_be_smaller_than_a_batch():
    assert [len(labels) for _, labels in make(batch_size=1000)] == [103]


def passes():
    """In a process of its own: what this rank gets of a training pass and of a test pass, and how many all get."""
    world = helpers.join_world(60)
    try:
        make(batch_size=12 * world.size - 1)
        refusal = ""
    except helpers.LabError as error:
        refusal = str(error)
    train, test = make(shuffle=True, augment=change, seed=3), make()
    parts = [[(images.numpy(), labels.numpy()) for images, labels in batches] for batches in (train.epoch(2), test)]
    return *parts, train.count, test.count, refusal


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_each_batch_of_one_process(size, start):
    processes = [start(passes, variables=place) for place in toy.ranks(size)]
    results = [process.result() for process in processes]
    train, test = make(shuffle=True, augment=change, seed=3), make()
    for number, (alone, shuffle) in enumerate(((list(train.epoch(2)), True), (list(test), False))):
        ranks = [result[number] for result in results]
        assert {len(batches) for batches in ranks} == {len(alone)}
        seen = 0
        for step, (images, labels) in enumerate(alone):
            parts = [[torch.from_numpy(array) for array in batches[step]] for batches in ranks]
            assert not shuffle or len({len(part[1]) for part in parts}) == 1, "the mean over ranks needs equal shares"
            of_image = dict(zip(labels.tolist(), images, strict=True))
            got = [(label, image) for part in parts for image, label in zip(part[0], part[1].tolist(), strict=True)]
            assert len({label for label, _ in got}) == len(got), "no image twice"
            assert all(torch.equal(image, of_image[label]) for label, image in got)
            left_out = len(labels) - len(got)
            assert left_out == (len(labels) % size if shuffle and step == len(alone) - 1 else 0)
            seen += len(got)
        assert {result[2 + number] for result in results} == {seen}
        assert seen > 100
    for result in results:
        assert f"LAB_BATCH_SIZE={12 * size - 1}: must be from 1 to" in result[4]


def test_a_channel_that_is_alike_everywhere_stays_finite():
    images, _ = next(iter(make(std=torch.tensor([0.0, 0.25, 0.25]))))
    assert images.isfinite().all()


def test_a_shuffled_loader_is_not_evaluated_against_labels_in_another_order():
    with pytest.raises(helpers.LabError, match="This loader shuffles"):
        helpers.evaluate(torch.nn.Flatten(), make(shuffle=True))


def test_the_largest_seed_that_a_settings_cell_takes():
    assert len(list(make(seed=2**63 - 1, shuffle=True).epoch(200))) == 9

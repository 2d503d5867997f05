import pytest
import torch

import helpers
import notebooks

CPU = torch.device("cpu")


def make(count=103, shape=(3, 8, 8), **options):
    """A loader of `count` images, each constant in its own value, so that an image says which it is."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, *shape).contiguous()
    split = helpers.Split(images, torch.arange(count), ("a", "b"), helpers.Provenance("test", "stand-in", False))
    options = {"batch_size": 10, "device": CPU, "mean": torch.zeros(shape[0]), "std": torch.ones(shape[0])} | options
    return helpers.ResidentLoader(split, **options)


def test_every_image_once_with_its_label():
    loader = make(shuffle=True, flip=True, translate=2)
    batches = list(loader)
    assert len(batches) == len(loader) == 11
    labels = torch.cat([labels for _, labels in batches])
    assert sorted(labels.tolist()) == list(range(103))
    assert labels.tolist() != list(range(103))
    values = torch.cat([images[:, 0, 4, 4] for images, _ in batches]) * 255
    assert torch.equal(values.round().long(), labels)  # constant images: augmentation cannot change them


def test_unshuffled_order():
    assert torch.cat([labels for _, labels in make()]).tolist() == list(range(103))


def test_same_seed_same_batches_and_new_ones_each_epoch():
    first, again, other = (make(shuffle=True, flip=True, translate=2, seed=s) for s in (1, 1, 2))
    epochs = [torch.cat([labels for _, labels in loader]) for loader in (first, first, again, other)]
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], epochs[3])
    again.epoch = 1  # as a resumed run does
    assert torch.equal(torch.cat([labels for _, labels in again]), epochs[1])


def test_normalised():
    mean, std = torch.tensor([0.5, 0.2, 0.1]), torch.tensor([0.25, 0.5, 1.0])
    images, _ = next(iter(make(mean=mean, std=std)))
    expected = (torch.arange(10) / 255)[:, None] - mean
    assert torch.allclose(images[:, :, 0, 0], expected / std, atol=1e-5)
    assert images.dtype == torch.float32


def test_memory_format():
    images, _ = next(iter(make(memory_format=torch.channels_last)))
    assert images.is_contiguous(memory_format=torch.channels_last)


def picture_loader(**options):
    picture = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).repeat(400, 1, 1, 1)
    split = helpers.Split(
        picture, torch.zeros(400, dtype=torch.int64), ("a",), helpers.Provenance("t", "stand-in", False)
    )
    return picture[0].float(), helpers.ResidentLoader(split, 400, CPU, torch.zeros(1), torch.ones(1), **options)


def test_flip_mirrors_about_half_each_on_its_own():
    picture, loader = picture_loader(flip=True)
    images = (next(iter(loader))[0] * 255).round()
    straight = torch.tensor([torch.equal(image, picture) for image in images])
    mirrored = torch.tensor([torch.equal(image, picture.flip(-1)) for image in images])
    assert (straight ^ mirrored).all()
    assert 120 < mirrored.sum() < 280


def test_translate_is_a_crop_of_the_reflected_image():
    picture, loader = picture_loader(translate=1)
    images = (next(iter(loader))[0] * 255).round()
    padded = torch.nn.functional.pad(picture.unsqueeze(0), (1,) * 4, "reflect")[0]
    crops = {tuple(padded[:, y : y + 8, x : x + 8].flatten().tolist()) for y in range(3) for x in range(3)}
    assert {tuple(image.flatten().tolist()) for image in images} == crops


def make_noise(count=103, **options):
    """A loader of `count` different random images, labelled by their number."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 8, 10), dtype=torch.uint8, generator=random)
    split = helpers.Split(images, torch.arange(count), ("a",), helpers.Provenance("test", "stand-in", False))
    options = {"batch_size": 10, "device": CPU, "mean": torch.zeros(3), "std": torch.ones(3)} | options
    return images, helpers.ResidentLoader(split, **options)


def by_label(images, labels):
    order = labels.argsort()
    return images[order], labels[order]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("translate", [0, 1, 2, 3])
def test_each_image_is_its_own_crop_flipped_or_not(translate, memory_format):
    originals, loader = make_noise(shuffle=True, flip=True, translate=translate, memory_format=memory_format)
    padded = torch.nn.functional.pad(originals.float(), (translate,) * 4, "reflect")
    seen = set()
    for images, labels in loader:
        for image, label in zip((images * 255).round(), labels.tolist(), strict=True):
            places = [(y, x) for y in range(2 * translate + 1) for x in range(2 * translate + 1)]
            crops = {(y, x): padded[label, :, y : y + 8, x : x + 10] for y, x in places}
            found = [
                (place, f) for place, c in crops.items() for f in (0, 1) if torch.equal(c.flip(-1) if f else c, image)
            ]
            assert len(found) == 1, label
            seen.add(found[0])
    assert len(seen) > translate * 5, "offsets and flips should differ from image to image"


def test_alternate_shows_the_other_side_every_second_epoch():
    originals, loader = make_noise(flip=True, alternate=True)
    epochs = [by_label(torch.cat(x), torch.cat(y)) for x, y in (zip(*loader, strict=True) for _ in range(3))]
    assert torch.equal(epochs[0][0], epochs[1][0].flip(-1))
    assert torch.equal(epochs[0][0], epochs[2][0])
    mirrored = ((epochs[0][0] * 255).round() != originals).flatten(start_dim=1).any(dim=1)
    assert 25 < mirrored.sum() < 78


def test_cutout_sets_one_square_to_the_mean():
    _, loader = make_noise(shuffle=True, cutout=4, mean=torch.full((3,), 0.5))
    _, whole = make_noise(shuffle=True, mean=torch.full((3,), 0.5))
    areas = set()
    for (images, labels), (originals, same) in zip(loader, whole, strict=True):
        assert torch.equal(labels, same)
        assert torch.equal(torch.where(images == 0, 0, originals), images)
        for hole in (images == 0).all(dim=1):
            rows, columns = hole.any(dim=1).sum().item(), hole.any(dim=0).sum().item()
            assert hole.sum() == rows * columns > 0
            areas.add((rows, columns))
    assert max(rows for rows, _ in areas) == max(columns for _, columns in areas) == 4
    assert len(areas) > 3, "holes at the border are cut off"


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_split_each_global_batch(world_size):
    options = dict(shuffle=True, flip=True, translate=1, cutout=3, seed=3, batch_size=12)
    alone = list(make_noise(**options)[1])
    ranks = [list(make_noise(**options, rank=rank, world_size=world_size)[1]) for rank in range(world_size)]
    for step, (images, labels) in enumerate(alone):
        parts = [ranks[rank][step] for rank in range(world_size)]
        together = by_label(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        assert len({len(part[1]) for part in parts}) == 1, "the mean over ranks needs equal shares"
        if step < len(alone) - 1:
            assert all(map(torch.equal, together, by_label(images, labels)))
        else:  # what the ranks cannot share equally is left out
            assert len(labels) - world_size < len(together[1]) <= len(labels)
            assert set(together[1].tolist()) <= set(labels.tolist())


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_distort_each_image_as_one_process_does(world_size):
    distorted = notebooks.page("MNIST.ipynb", layout=torch.contiguous_format)["distorted"]
    options = dict(shuffle=True, translate=1, seed=3, batch_size=12, count=96)
    plain, alone = make_noise(**options)[1], make_noise(**options)[1]
    ranks = [make_noise(**options, rank=rank, world_size=world_size)[1] for rank in range(world_size)]
    batches = zip(plain, distorted(alone, 10), *(distorted(loader, 10) for loader in ranks), strict=True)
    for before, after, *parts in batches:
        images, labels = by_label(*after)
        assert not torch.allclose(by_label(*before)[0], images, atol=0.1)
        together = by_label(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        assert torch.equal(together[1], labels)
        assert torch.allclose(together[0], images, atol=1e-5)


def test_a_batch_that_ranks_cannot_share_is_refused_by_name():
    with pytest.raises(helpers.LabError, match=r"LAB_BATCH_SIZE=12 .* 5 processes"):
        make_noise(batch_size=12, rank=0, world_size=5)


def test_a_batch_larger_than_the_training_set_is_refused_by_name():
    with pytest.raises(helpers.LabError, match="LAB_BATCH_SIZE=1000"):
        make_noise(batch_size=1000, shuffle=True)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_test_image_is_one_ranks_share(world_size):
    loaders = [make_noise(batch_size=12, rank=rank, world_size=world_size)[1] for rank in range(world_size)]
    places = torch.cat([loader.share() for loader in loaders])
    assert sorted(places.tolist()) == list(range(loaders[0].count))
    for loader in loaders:
        assert sum(len(labels) for _, labels in loader) == len(loader.share())


def test_memory_is_at_most_twice_the_images():
    big = helpers.Split(
        torch.zeros((600, 3, 32, 32), dtype=torch.uint8), torch.zeros(600, dtype=torch.int64), ("a",), None
    )
    loader = helpers.ResidentLoader(big, 100, CPU, torch.zeros(3), torch.ones(3), flip=True, translate=4)
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in vars(loader).values()
        if torch.is_tensor(t)
    }
    assert sum(storages.values()) < 2 * big.images.nbytes


def test_empty_split():
    assert list(make(count=0, translate=2)) == []


def test_absurd_shift_is_refused_by_name():
    with pytest.raises(helpers.LabError, match="LAB_TRANSLATE=8"):
        make(translate=8)


def test_absurd_batch_size_is_refused_by_name():
    with pytest.raises(helpers.LabError, match="LAB_BATCH_SIZE"):
        make(batch_size=0)

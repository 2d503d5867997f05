import pytest
import torch

import helpers

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


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_split_each_global_batch(world_size):
    options = dict(shuffle=True, flip=True, translate=1, seed=3)
    alone = list(make(**options))
    ranks = [list(make(**options, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for step, (images, labels) in enumerate(alone):
        parts = [ranks[rank][step] for rank in range(world_size)]
        assert sorted(torch.cat([part[1] for part in parts]).tolist()) == sorted(labels.tolist())
        assert torch.equal(parts[0][0], images[::world_size])


def test_empty_split():
    assert list(make(count=0, translate=2)) == []


def test_absurd_batch_size_is_refused_by_name():
    with pytest.raises(helpers.LabError, match="LAB_BATCH_SIZE"):
        make(batch_size=0)

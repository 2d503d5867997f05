"""What makes the training fast, and what measures it."""

import functools
import itertools
import json
import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

import helpers
import notebooks

CPU = torch.device("cpu")
cifar = functools.cache(lambda: notebooks.page("CIFAR.ipynb", BATCH_SIZE=100))


def split_of(shape, count=12):
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return helpers.Split(images, torch.arange(count), ("a",), helpers.Provenance("test", "stand-in", False))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_classic_dataset_gives_what_the_loader_gives(shape):
    split, mean, std = split_of(shape), torch.full(shape[:1], 0.4), torch.full(shape[:1], 0.3)
    classic = cifar()["ClassicDataset"](split, mean, std)
    [(images, labels)] = list(torch.utils.data.DataLoader(classic, batch_size=12))
    [(expected, _)] = list(helpers.Loader(split, 12, CPU, mean, std))
    assert torch.allclose(images, expected, atol=1e-5)
    assert torch.equal(labels, split.labels)


def test_classic_dataset_augments():
    data = cifar()["ClassicDataset"](split_of((3, 8, 8)), torch.zeros(3), torch.ones(3), flip=True, translate=2)
    torch.manual_seed(0)
    variants = torch.stack([data[0][0] for _ in range(40)])
    assert variants.shape == (40, 3, 8, 8)
    assert len(variants.unique(dim=0)) > 10


def test_rate_counts_images_after_the_first_batch():
    seen = []
    loader = [(torch.zeros(5, 1), torch.zeros(5)), (torch.zeros(3, 1), torch.zeros(3))]
    rate = cifar()["images_per_second"](loader, CPU, 0.05, lambda images, labels: seen.append(len(labels)))
    assert seen[:4] == [5, 3, 5, 3]
    assert (sum(seen) - 5) / 0.1 < rate <= (sum(seen) - 5) / 0.05


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library's allocator")
def test_reused_memory_is_not_faulted_in_again():
    code = """if True:
        import resource, sys, torch, helpers
        helpers.reuse_memory() if sys.argv[1] == "reuse" else None
        for _ in range(8): torch.zeros(2**24)  # the heap settles
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(16): torch.zeros(2**24)  # 64 MiB each
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    environment = os.environ | {"PYTHONPATH": str(helpers.HERE), "OMP_NUM_THREADS": "1"}
    faults = {}
    for how in ("plain", "reuse"):
        command = [sys.executable, "-c", code, how]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        faults[how] = int(result.stdout)
    if platform.libc_ver()[0] == "glibc":
        assert faults["reuse"] < faults["plain"] / 4


def test_averaged_views_are_the_mean_of_shifted_and_mirrored_images():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5))
    images = torch.randn(4, 3, 8, 8)
    averaged = cifar()["AveragedViews"](model)(images)
    padded = nn.functional.pad(images, (1, 1, 1, 1), mode="reflect")
    crops = [images, images, padded[:, :, 0:8, 0:8], padded[:, :, 2:10, 2:10]]
    expected = sum(model(crop) + model(crop.flip(-1)) for crop in crops) / 8
    assert torch.allclose(averaged, expected, atol=1e-5)


def test_each_row_of_the_ablation_changes_something_and_the_last_is_the_recipe():
    page = cifar()
    rows = page["recipe_rows"]()
    for before, after in itertools.pairwise(rows.values()):
        assert before.keys() == after.keys()
        assert before != after
    last = list(rows.values())[-1]
    assert last["translate"] == page["TRANSLATE"]
    assert last["smoothing"] == page["LABEL_SMOOTHING"]
    assert last["sizes"] == page["RESOLUTIONS"]
    assert all(last[name] for name in ("flip", "alternate", "whitened", "identity", "shortcut", "muon"))


def test_the_last_row_augments_as_the_page_does():
    page, images, chances = cifar(), split_of((3, 32, 32)).images, torch.rand(12, 5)
    row = list(page["recipe_rows"]().values())[-1]
    for epoch in (1, 2):
        assert torch.equal(page["augment_row"](images, chances, epoch, row, 0), page["augment"](images, chances, epoch))


@pytest.mark.parametrize("name", ["plain", "growing images"])
def test_a_row_of_the_ablation_trains(name):
    page = cifar()
    data = helpers.load("CIFAR10", True, (3, 32, 32)).subset(torch.arange(400))
    part, held_out = helpers.hold_out(data, 100, 0)
    arguments = (page["recipe_rows"]()[name], part, held_out, CPU, (8, 8, 8), ("1", "3", "3"), 2, 50, 1)
    results = [page["train_row"](*arguments) for _ in range(2)]
    assert results[0][:2] == results[1][:2], "same seed, same accuracy"
    assert all(0 <= accuracy <= 1 for accuracy in results[0][:2])
    assert results[0][2] > 0


def test_the_stored_ablation_has_the_rows_of_the_page():
    path = helpers.HERE / "runs" / "reference" / "cifar" / "experiments.json"
    stored = json.loads(path.read_text(encoding="utf-8"))["recipe"]
    assert list(stored["variants"]) == list(cifar()["recipe_rows"]())
    assert {len(results) for results in stored["variants"].values()} == {3}
    assert stored["source"] in ("official", "image-folder")

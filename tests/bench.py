"""What the benchmarks `bench_*.py` share: options, tables, images and the networks of the pages."""

import argparse
import os
import sys
import unittest.mock
from pathlib import Path

import torch
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import helpers

LAYOUT = torch.channels_last
LABS = {"MNIST.ipynb": ("MNIST", (1, 28, 28)), "CIFAR.ipynb": ("CIFAR10", (3, 32, 32))}


def parser(doc: str) -> argparse.ArgumentParser:
    """A command line with the options of most benchmarks; `doc` is the script's."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=3.0, help="of each measurement of a rate")
    options.add_argument("--repeats", type=int, default=5, help="rounds of which the median is shown")
    return options


def table(title: str, header: list[str], rows: list[list]) -> None:
    """Print a Markdown table with what it was measured on."""
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(f'{cell:,.4g}' if isinstance(cell, float) else str(cell) for cell in row)} |")
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Python {sys.version.split()[0]}"
    print(f"\n{helpers.device_name(helpers.pick_device())}; {versions}", flush=True)


def stand_in(notebook: str, count: int, train: bool = True) -> helpers.Split:
    """Return `count` images with the shape of the notebook's data, repeated as needed: content changes no rate."""
    with unittest.mock.patch.dict(os.environ, LAB_FAST="1"):
        split = helpers.load(LABS[notebook][0], train, LABS[notebook][1])
    return split.subset(torch.arange(count) % len(split))


def statistics_of(split: helpers.Split) -> dict:
    """Return mean and standard deviation of the channels, as the loader takes them; summed in 64 bits, because the
    order of the sum depends on the number of threads.
    """
    pixels = split.images[:10_000].double() / 255
    return dict(mean=pixels.mean(dim=(0, 2, 3)).float(), std=pixels.std(dim=(0, 2, 3)).float())


def loader(split, batch_size: int, like: helpers.Split | None = None, **options) -> helpers.Loader:
    """Return a loader of `split` on the device, normalised by the statistics of `like`, by default its own."""
    common = dict(device=helpers.pick_device(), layout=LAYOUT) | statistics_of(like or split)
    return helpers.Loader(split, batch_size, **common | options)


def network(page: dict, images: torch.Tensor, steps: int = 10**6, size: int = 32, precision: str = "fp32"):
    """Return a page's network on the device of the images, and what its `train_one_epoch` takes after the batches.

    `precision` may be "auto", which is what the device gets by default.
    """
    precision = helpers.pick_precision(images.device, precision)
    criterion = nn.CrossEntropyLoss(label_smoothing=page.get("LABEL_SMOOTHING", 0.0))
    if "LeNet5" in page:
        model = page["LeNet5"]()
        if images.shape[1] == 3:
            model.c1 = nn.Conv2d(3, 6, kernel_size=5)  # 32 x 32 pixels need no padding
        model = model.to(images.device, memory_format=LAYOUT)
        return model, (criterion, *page["make_optimizer"](model, steps), precision)
    model = page["FastCNN"](page["WIDTHS"], page["REFINE"]).to(images.device, memory_format=LAYOUT)
    page["whiten"](model.whiten, images)
    optimizers, schedulers = page["make_optimizers"](model, steps, page["BATCH_SIZE"])
    return model, (criterion, optimizers, schedulers, size, precision, scaler(images))


def scaler(images: torch.Tensor) -> torch.amp.GradScaler:
    """Return a gradient scaler that does nothing, as fp32 and bf16 need none."""
    return torch.amp.GradScaler(images.device.type, enabled=False)

"""Ours beside the peer, in one run: `python tests/bench.py start|input|mnist [--seconds S] [--seeds N]`.

start: import and data-ready times. input: images/s of the resident loader against the classic one, at CIFAR size.
mnist: seconds of training to 99.0 % test accuracy, LeNet-5 of the page against the well-known two-convolution example.
The machines that this runs on are shared: read the ratios, not the seconds.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import helpers
import notebooks

CPU = torch.device("cpu")


def table(title: str, header: list[str], rows: list[list]) -> None:
    """Print a Markdown table with what it was measured on."""
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(f'{cell:,.4g}' if isinstance(cell, float) else str(cell) for cell in row)} |")
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Python {sys.version.split()[0]}"
    print(f"\n{helpers.device_name(helpers.pick_device())}; {versions}")


# ------------------------------------------------------------------------------------------------------------- start


def seconds_of(code: str) -> float:
    """Run Python code that prints a number of seconds, in a fresh process; return the number."""
    result = subprocess.run([sys.executable, "-c", code], cwd=helpers.HERE, capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1])


def start(arguments) -> None:
    """Median times until the lab can begin, each in fresh processes."""
    clock = "import time; t = time.perf_counter()\n{}\nprint(time.perf_counter() - t)"
    ready = "import torch, torchvision, helpers, time; t = time.perf_counter()\n{}\nprint(time.perf_counter() - t)"
    folder = os.environ.get("LAB_DATASET")
    codes = {
        "import torch, torchvision": clock.format("import torch, torchvision"),
        "import torch, torchvision, helpers": clock.format("import torch, torchvision, helpers"),
        "MNIST ready": ready.format("[helpers.load('MNIST', part, (1, 28, 28)) for part in (True, False)]"),
    }
    if folder:
        codes["image folder ready (cached)"] = ready.format(
            f"[helpers.load({folder!r}, part, (3, 32, 32)) for part in (True, False)]"
        )
    for code in codes.values():
        seconds_of(code)  # fills the file cache, and the kit's own
    rounds = [[seconds_of(code) for code in codes.values()] for _ in range(arguments.repeats)]
    rows = [[name, statistics.median(times)] for name, times in zip(codes, zip(*rounds, strict=True), strict=True)]
    rows.append(["helpers adds", statistics.median(r[1] - r[0] for r in rounds)])
    table(f"Start, median of {arguments.repeats}", ["what", "seconds"], rows)


# ------------------------------------------------------------------------------------------------------------- input


class ClassicDataset(torch.utils.data.Dataset):
    """One image at a time through PIL, as torchvision's datasets do it."""

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images.permute(0, 2, 3, 1).numpy(), labels.tolist(), transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index].squeeze())), self.labels[index]


def classic_transform(mean, std, size, translate):
    """The transforms of countless CIFAR scripts."""
    steps = [torchvision.transforms.RandomCrop(size, padding=translate), torchvision.transforms.RandomHorizontalFlip()]
    steps += [torchvision.transforms.ToTensor(), torchvision.transforms.Normalize(mean.tolist(), std.tolist())]
    return torchvision.transforms.Compose(steps)


def rate(loader, seconds: float) -> float:
    """Images/s over passes of the loader for about `seconds`, after one batch to warm up."""
    next(iter(loader))
    start_time, count = time.perf_counter(), 0
    while True:
        for images, _ in loader:
            count += len(images)
            elapsed = time.perf_counter() - start_time
            if elapsed > seconds:
                return count / elapsed


def input(arguments) -> None:
    """Images/s of crop, flip and normalise at CIFAR size: the resident loader against the classic path."""
    split = helpers.stand_in("CIFAR10", True, (3, 32, 32), 50_000)
    mean = std = torch.full((3,), 0.5)
    transform = classic_transform(mean, std, 32, 4)
    loaders = {
        f"classic, {workers} workers": torch.utils.data.DataLoader(
            ClassicDataset(split.images, split.labels, transform), batch_size=500, shuffle=True, num_workers=workers
        )
        for workers in (0, 2)
    }
    options = dict(batch_size=500, device=helpers.pick_device(), mean=mean, std=std, shuffle=True, flip=True)
    loaders["resident"] = helpers.ResidentLoader(split, **options, translate=4)
    loaders["resident, channels last"] = helpers.ResidentLoader(
        split, **options, translate=4, memory_format=torch.channels_last
    )
    rounds = [[rate(loader, arguments.seconds) for loader in loaders.values()] for _ in range(arguments.repeats)]
    rows = []
    for name, rates in zip(loaders, zip(*rounds, strict=True), strict=True):
        ratio = statistics.median(r / max(others[0], others[1]) for r, others in zip(rates, rounds, strict=True))
        rows.append([name, round(statistics.median(rates)), f"{ratio:.1f} ×"])
    header = ["input pipeline", "images/s", "against the better classic one"]
    table(f"Input at CIFAR size (crop, flip, normalise), median of {arguments.repeats}", header, rows)


# ------------------------------------------------------------------------------------------------------------- mnist


class ClassicNet(nn.Module):
    """The network of the well-known introductory example: two 3 x 3 convolutions, dropout, 1.2 M parameters."""

    def __init__(self):
        super().__init__()
        convolutions = (nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.layers = nn.Sequential(*convolutions, nn.Dropout(0.25), nn.Flatten(), nn.Linear(9216, 128), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(128, 10))

    def forward(self, images):
        return self.head(self.layers(images))


def train_classic(train, test, mean, std, seed, target, epochs):
    """Seconds of training until the test accuracy is `target`, and that accuracy: Adadelta, batch 64, PIL."""
    torch.manual_seed(seed)
    steps = [torchvision.transforms.ToTensor(), torchvision.transforms.Normalize(mean.tolist(), std.tolist())]
    data = ClassicDataset(train.images, train.labels, torchvision.transforms.Compose(steps))
    loader = torch.utils.data.DataLoader(data, batch_size=64, shuffle=True)
    test_loader = helpers.ResidentLoader(test, 1000, CPU, mean, std)
    model, criterion, seconds = ClassicNet(), nn.CrossEntropyLoss(), 0.0
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    for epoch in range(1, epochs + 1):
        begin = time.perf_counter()
        model.train()
        for images, labels in loader:
            optimizer.zero_grad()
            criterion(model(images), labels).backward()
            optimizer.step()
        scheduler.step()
        seconds += time.perf_counter() - begin
        _, accuracy = helpers.evaluate(model, test_loader)
        print(f"  classic, seed {seed}, epoch {epoch}: {accuracy:.2%} after {seconds:.1f} s", flush=True)
        if accuracy >= target:
            break
    return seconds, accuracy


def train_page(train, test, mean, std, seed, epochs):
    """Seconds of training LeNet-5 as the page does, for `epochs` fixed in advance, and its test accuracy."""
    page = notebooks.definitions("MNIST.ipynb") | {"__name__": "page"}
    settings = notebooks.settings("MNIST.ipynb")
    torch.manual_seed(seed)
    options = dict(batch_size=settings["BATCH_SIZE"], device=CPU, mean=mean, std=std, seed=seed)
    loader = helpers.ResidentLoader(train, **options, shuffle=True, translate=settings["TRANSLATE"])
    model = page["LeNet5"]()
    page["LeNet5"].__init__.__globals__.update(settings)  # make_optimizer reads the settings cell's names
    optimizer, scheduler = page["make_optimizer"](model, epochs * len(loader))
    begin = time.perf_counter()
    for _ in range(epochs):
        losses, _, _ = page["train_one_epoch"](model, loader, nn.CrossEntropyLoss(), optimizer, scheduler)
        losses.tolist()
    seconds = time.perf_counter() - begin
    _, accuracy = helpers.evaluate(model, helpers.ResidentLoader(test, **options))
    print(f"  LeNet-5, seed {seed}: {accuracy:.2%} after {seconds:.1f} s", flush=True)
    return seconds, accuracy


def mnist(arguments) -> None:
    """Seconds to 99.0 % on MNIST's test set, in turn: the classic example's recipe and the page's."""
    train, test = (helpers.load("MNIST", part, (1, 28, 28)) for part in (True, False))
    mean, std = torch.tensor([0.1307]), torch.tensor([0.3081])
    rows = {"classic example, 1.2 M parameters": [], "LeNet-5 of MNIST.ipynb, 61,706": []}
    for seed in range(arguments.seeds):
        results = (
            train_classic(train, test, mean, std, seed, 0.99, arguments.epochs),
            train_page(train, test, mean, std, seed, arguments.page_epochs),
        )
        for row, result in zip(rows.values(), results, strict=True):
            row.append(result)
    lines, slowest = [], statistics.mean(seconds for seconds, _ in rows["classic example, 1.2 M parameters"])
    for name, results in rows.items():
        seconds = statistics.mean(s for s, _ in results)
        accuracies = [a for _, a in results]
        reached = f"{sum(a >= 0.99 for a in accuracies)} of {len(results)}"
        everywhere = all(a >= 0.99 for others in rows.values() for _, a in others)
        speed_up = f"{slowest / seconds:.1f} ×" if everywhere else "none: 99.0 % not reached"
        lines.append([name, seconds, f"{statistics.mean(accuracies):.2%}", reached, speed_up])
    header = ["recipe", "training, s", "test accuracy", "reached 99.0 %", "speed-up"]
    table(f"To 99.0 % on {train.provenance}, mean of {arguments.seeds} seeds", header, lines)


def main() -> None:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=("start", "input", "mnist"))
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement of a rate")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of which the median is shown")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=14, help="at most, of the classic recipe")
    parser.add_argument("--page-epochs", type=int, default=4, help="of the page's recipe, fixed in advance")
    arguments = parser.parse_args()
    globals()[arguments.benchmark](arguments)


if __name__ == "__main__":
    main()

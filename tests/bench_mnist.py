"""Seconds of training to 99.0 % on MNIST's test set: `python tests/bench_mnist.py [--seeds N] [--epochs N]`.

LeNet-5 of the page against the well-known example of two convolutions, in turn. LAB_DATA holds the official files.
"""

import statistics
import time

import torch
from torch import nn

import bench
import helpers
import notebooks

CLASSIC = notebooks.definitions("CIFAR.ipynb")  # its ClassicDataset
MOMENTS = dict(mean=torch.tensor([0.1307]), std=torch.tensor([0.3081]))


class ClassicNet(nn.Module):
    """The network of the well-known introductory example: two 3 x 3 convolutions, dropout, 1.2 M parameters."""

    def __init__(self):
        super().__init__()
        convolutions = (nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.layers = nn.Sequential(*convolutions, nn.Dropout(0.25), nn.Flatten(), nn.Linear(9216, 128), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(128, 10))

    def forward(self, images):
        return self.head(self.layers(images))


def train_classic(train, test_loader, seed, target, epochs):
    """Return the seconds of training until the test accuracy is `target`, and that accuracy (Adadelta, PIL)."""
    torch.manual_seed(seed)
    loader = torch.utils.data.DataLoader(CLASSIC["ClassicDataset"](train, **MOMENTS), batch_size=64, shuffle=True)
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


# Chosen on 10,000 held-out training images, three to five seeds each, among 28 settings for two or three passes:
# 98.94 ± 0.03 % after two. Where two passes miss the target, training starts again with more, and all seconds count.
SPRINT = dict(BATCH_SIZE=125, LEARNING_RATE=0.1)
SMOOTHING, TRIES = 0.05, (2, 4, 6)


def train_page(train, test_loader, seed, target):
    """Return the seconds of training LeNet-5 with the page's recipe and the settings above until the test accuracy is
    `target`, and that accuracy.
    """
    page, seconds, criterion = (
        notebooks.page("MNIST.ipynb", **SPRINT),
        0.0,
        nn.CrossEntropyLoss(label_smoothing=SMOOTHING),
    )
    options = dict(device=test_loader.device, **MOMENTS, layout=bench.LAYOUT, shuffle=True, augment=page["augment"])
    for epochs in TRIES:
        torch.manual_seed(seed)
        loader = helpers.Loader(train, page["BATCH_SIZE"], **options, seed=seed)
        model = page["LeNet5"]().to(memory_format=bench.LAYOUT)
        optimizer, scheduler = page["make_optimizer"](model, epochs * len(loader))
        begin = time.perf_counter()
        for epoch in range(1, epochs + 1):
            page["train_one_epoch"](model, loader.epoch(epoch), criterion, optimizer, scheduler)[0].tolist()
        seconds += time.perf_counter() - begin
        _, accuracy = helpers.evaluate(model, test_loader)
        print(f"  LeNet-5, seed {seed}, {epochs} epochs: {accuracy:.2%} after {seconds:.1f} s", flush=True)
        if accuracy >= target:
            break
    return seconds, accuracy


def main() -> None:
    """Train both with each seed, print the table."""
    parser = bench.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=14, help="at most, of the classic example")
    arguments = parser.parse_args()
    helpers.reuse_memory()  # as the page does; the classic example gains by it too
    train, test = (helpers.load("MNIST", part, (1, 28, 28)) for part in (True, False))
    test_loader = helpers.Loader(test, 1_000, torch.device("cpu"), **MOMENTS, layout=bench.LAYOUT)
    rows = {"classic example, 1.2 M parameters": [], "LeNet-5 of MNIST.ipynb, 61,706": []}
    for seed in range(arguments.seeds):
        classic = train_classic(train, test_loader, seed, 0.99, arguments.epochs)
        for results, result in zip(rows.values(), (classic, train_page(train, test_loader, seed, 0.99)), strict=True):
            results.append(result)
    lines, slowest = [], statistics.mean(seconds for seconds, _ in rows["classic example, 1.2 M parameters"])
    everywhere = all(accuracy >= 0.99 for results in rows.values() for _, accuracy in results)
    for name, results in rows.items():
        seconds, accuracies = statistics.mean(s for s, _ in results), [accuracy for _, accuracy in results]
        reached = f"{sum(accuracy >= 0.99 for accuracy in accuracies)} of {len(results)}"
        speed_up = f"{slowest / seconds:.1f} ×" if everywhere else "none: 99.0 % not reached"
        lines.append([name, seconds, f"{statistics.mean(accuracies):.2%}", reached, speed_up])
    header = ["recipe", "training, s", "test accuracy", "reached 99.0 %", "speed-up"]
    bench.table(f"To 99.0 % on {train.provenance}, mean of {arguments.seeds} seeds", header, lines)


if __name__ == "__main__":
    main()

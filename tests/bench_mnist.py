"""Seconds of training to 99.0 % on MNIST's test set: `python tests/bench_mnist.py [--seeds N] [--epochs N] [--long]`.

LeNet-5 of the page against the well-known example of two convolutions, in turn. With `--long` LeNet-5 for thirty
passes, with the page's optimizer and with Muon. LAB_DATA holds the official files.
"""

import statistics
import time

import torch
from torch import nn

import bench
import helpers
import notebooks

CLASSIC = notebooks.definitions("CIFAR.ipynb")  # its ClassicDataset and Muon
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


# Chosen on 10,000 held-out training images, three seeds each, among 24 settings for one or two passes: 98.84 ± 0.04 %
# after one. Where a pass misses the target, training starts again with more, and all seconds count.
SPRINT = dict(BATCH_SIZE=250, TRANSLATE=1, DISTORT=0.0)
MUON_RATE, RATE, RISE, SMOOTHING, TRIES = 0.14, 0.2, 0.2, 0.1, (1, 2, 4)


class Together(list):
    """Several optimizers, or schedulers, that are called as one."""

    def zero_grad(self, set_to_none=True):
        for one in self:
            one.zero_grad(set_to_none)

    def step(self):
        for one in self:
            one.step()


@torch.no_grad()
def initialise(model):
    """He's initial weights (2015), and a tenth of them for the last layer."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    layers[-1].weight.mul_(0.1)
    return model


def optimizers(model, steps, muon_rate=MUON_RATE, rate=RATE, rise=RISE):
    """Muon of CIFAR.ipynb for all weights but the last layer's, which get SGD like the biases; both rise, then fall."""
    *matrices, last = (weight for weight in model.parameters() if weight.ndim > 1)
    others = [last, *(weight for weight in model.parameters() if weight.ndim == 1)]
    sgd = torch.optim.SGD(others, rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    made = Together([CLASSIC["Muon"](matrices, muon_rate), sgd])
    options = dict(total_steps=steps, pct_start=rise, cycle_momentum=False)
    cycles = [torch.optim.lr_scheduler.OneCycleLR(one, one.param_groups[0]["lr"], **options) for one in made]
    return made, Together(cycles)


def train_page(train, test_loader, seed, target):
    """Return the seconds of training the page's LeNet-5 with its loop and the settings above until the test accuracy is
    `target`, and that accuracy.
    """
    page, seconds = notebooks.page("MNIST.ipynb", **SPRINT), 0.0
    criterion = nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
    options = dict(device=test_loader.device, **MOMENTS, layout=bench.LAYOUT, shuffle=True, augment=page["augment"])
    for epochs in TRIES:
        torch.manual_seed(seed)
        loader = helpers.Loader(train, page["BATCH_SIZE"], **options, seed=seed)
        model = initialise(page["LeNet5"]()).to(memory_format=bench.LAYOUT)
        optimizer, scheduler = optimizers(model, epochs * len(loader))
        begin = time.perf_counter()
        for epoch in range(1, epochs + 1):
            page["train_one_epoch"](model, loader.epoch(epoch), criterion, optimizer, scheduler)[0].tolist()
        seconds += time.perf_counter() - begin
        _, accuracy = helpers.evaluate(model, test_loader)
        print(f"  LeNet-5, seed {seed}, {epochs} epochs: {accuracy:.2%} after {seconds:.1f} s", flush=True)
        if accuracy >= target:
            break
    return seconds, accuracy


def train_long(train, test_loader, seed, muon):
    """Return the seconds of thirty passes of the page's `full` settings, and the test accuracy; with Muon the rates are
    the better of two on 10,000 held-out images (99.47 ± 0.07 %, three seeds; the page's optimizer 99.39 ± 0.07 %).
    """
    page, epochs = notebooks.page("MNIST.ipynb", BATCH_SIZE=250, TRANSLATE=2, DISTORT=10.0), 30
    torch.manual_seed(seed)
    options = dict(device=test_loader.device, **MOMENTS, layout=bench.LAYOUT, shuffle=True, augment=page["augment"])
    loader = helpers.Loader(train, page["BATCH_SIZE"], **options, seed=seed)
    model, smoothing = page["LeNet5"](), SMOOTHING if muon else 0
    model = (initialise(model) if muon else model).to(memory_format=bench.LAYOUT)
    steps = epochs * len(loader)
    optimizer, scheduler = optimizers(model, steps, 0.05, 0.1, 0.3) if muon else page["make_optimizer"](model, steps)
    criterion, begin = nn.CrossEntropyLoss(label_smoothing=smoothing), time.perf_counter()
    for epoch in range(1, epochs + 1):
        page["train_one_epoch"](model, loader.epoch(epoch), criterion, optimizer, scheduler)[0].tolist()
    return time.perf_counter() - begin, helpers.evaluate(model, test_loader)[1]


def long(train, test_loader, seeds) -> None:
    """Train both with each seed, print the table."""
    rows = {"the page's optimizer": [], "Muon, label smoothing 0.1, He's weights": []}
    for seed in range(seeds):
        for muon, (name, results) in enumerate(rows.items()):
            results.append(train_long(train, test_loader, seed, bool(muon)))
            print(f"  {name}, seed {seed}: {results[-1][1]:.2%} after {results[-1][0]:.1f} s", flush=True)
    lines = []
    for name, results in rows.items():
        seconds, accuracies = zip(*results, strict=True)
        spread = statistics.stdev(accuracies) if seeds > 1 else 0
        lines.append([name, statistics.mean(seconds), f"{statistics.mean(accuracies):.2%} ± {100 * spread:.2f}"])
    bench.table(
        f"LeNet-5, 30 passes over {train.provenance}, {seeds} seeds", ["optimizer", "s", "test accuracy"], lines
    )


def main() -> None:
    """Train both with each seed, print the table."""
    parser = bench.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=14, help="at most, of the classic example")
    parser.add_argument("--long", action="store_true", help="LeNet-5 for thirty passes instead")
    arguments = parser.parse_args()
    helpers.reuse_memory()  # as the page does; the classic example gains by it too
    train, test = (helpers.load("MNIST", part, (1, 28, 28)) for part in (True, False))
    test_loader = helpers.Loader(test, 1_000, torch.device("cpu"), **MOMENTS, layout=bench.LAYOUT)
    if arguments.long:
        long(train, test_loader, arguments.seeds)
        return
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

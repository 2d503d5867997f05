"""CIFAR.ipynb's full recipe against the published one: `LAB_DATASET=… python tests/bench_cifar.py [--seeds N]`.

By default: test accuracy, FLOPs and seconds of both, trained on all 50,000 images.
--pace: only the milliseconds of their training steps, in turn, and what these add up to; a quiet minute is enough.
--widths: training rate of the page's network and of one twice as wide.
"""

import math
import os
import statistics
import time
import unittest.mock
from copy import deepcopy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import bench
import helpers
import notebooks


def page_recipe(train, seed, epochs):
    """CIFAR.ipynb's full budget. Returns page, model, loader, optimizers, schedulers, the image size of each epoch."""
    with unittest.mock.patch.object(helpers, "budget", lambda smoke, cpu, full: full):
        page = notebooks.page("CIFAR.ipynb")
    epochs, sizes = epochs or page["EPOCHS"], page["RESOLUTIONS"]
    torch.manual_seed(seed)
    loader = bench.loader(train, page["BATCH_SIZE"], seed=seed, shuffle=True, augment=page["augment"])
    model = page["FastCNN"](page["WIDTHS"], page["REFINE"], len(train.classes))
    model = model.to(loader.device, memory_format=bench.LAYOUT)
    page["whiten"](model.whiten, next(iter(bench.loader(train, 5_000)))[0])
    optimizers, schedulers = page["make_optimizers"](model, epochs * len(loader), page["BATCH_SIZE"])
    sizes = sizes[-epochs:]
    return page, model, loader, optimizers, schedulers, [sizes[e * len(sizes) // epochs] for e in range(epochs)]


def published_recipe(train, seed, epochs):
    """The published record (Jordan, cifar10-airbench, the Muon variant), built from the page's parts, SiLU for GELU.

    Widths 64, 256, 256 with no sum, batches of 2,000, full-size images, 8 epochs; the whitening layer has a bias that
    learns in the first three eighths of the steps. Its rates for head and biases are given there for a sum over the
    batch and a head 256 times as large; for a mean they are those below, times the batch.
    """
    rates = dict(MUON_RATE=0.24, HEAD_RATE=1.02e-5, BIAS_RATE=0.053, WEIGHT_DECAY=2e-6, LABEL_SMOOTHING=0.2)
    page, epochs = notebooks.page("CIFAR.ipynb", **rates, BATCH_SIZE=2_000, TRANSLATE=2), epochs or 8
    torch.manual_seed(seed)
    loader = bench.loader(train, 2_000, seed=seed, shuffle=True, augment=page["augment"])
    model = page["FastCNN"]((64, 256, 256), ("3", "3", "3"), len(train.classes), shortcut=False)
    model.whiten = nn.Conv2d(3, 24, kernel_size=2)
    model.whiten.bias.requires_grad_(False)  # it stands apart from the other biases, with a schedule of its own
    model = model.to(loader.device, memory_format=bench.LAYOUT)
    page["whiten"](model.whiten, next(iter(bench.loader(train, 5_000)))[0])
    steps = epochs * len(loader)
    optimizers, schedulers = page["make_optimizers"](model, steps, page["BATCH_SIZE"])
    bias, bias_steps = model.whiten.bias.requires_grad_(True), 3 * steps / 8
    optimizers.append(torch.optim.SGD([bias], 106.0, momentum=0.85, nesterov=True, weight_decay=0.004 / 106))
    fall = torch.optim.lr_scheduler.LambdaLR(optimizers[-1], lambda step: max(0.0, 1 - step / bias_steps))
    return page, model, loader, optimizers, [*schedulers, fall], [32] * epochs


RECIPES = {"published": published_recipe, "page": page_recipe}


def freeze_bias(model, learns: bool) -> None:
    """Let the bias of the whitening layer learn, where the recipe has one, or not."""
    if model.whiten.bias is not None:
        model.whiten.bias.requires_grad_(learns)
        model.whiten.bias.grad = None


def plan_of(model, sizes) -> list[tuple[int, bool]]:
    """The image size of each epoch, and whether the bias of the whitening layer learns in it."""
    learned = 3 * len(sizes) / 8 if model.whiten.bias is not None else 0
    return [(size, epoch < learned) for epoch, size in enumerate(sizes)]


def train_recipe(name, train, seed, epochs, precision):
    """Return (seconds of training, FLOPs, the model, its page) after training as the recipe says."""
    page, model, loader, optimizers, schedulers, sizes = RECIPES[name](train, seed, epochs)
    criterion = nn.CrossEntropyLoss(label_smoothing=page["LABEL_SMOOTHING"])
    scaler, seconds, flops, counts = bench.scaler(loader.images), 0.0, 0, {}
    for epoch, kind in enumerate(plan_of(model, sizes), start=1):
        size, learns = kind
        freeze_bias(model, learns)
        if kind not in counts:  # a step of a copy, so that counting costs the training no time
            copy = deepcopy(model)
            few = page["make_optimizers"](copy, 1, page["BATCH_SIZE"])
            with FlopCounterMode(display=False) as counter:
                page["train_one_epoch"](copy, [next(iter(loader))], criterion, *few, size, precision, scaler)
            helpers.synchronize(loader.device)
            counts[kind] = counter.get_total_flops()
        begin, batches = time.perf_counter(), loader.epoch(epoch)
        losses, _, _ = page["train_one_epoch"](
            model, batches, criterion, optimizers, schedulers, size, precision, scaler
        )
        losses = losses.tolist()
        seconds += time.perf_counter() - begin
        flops += counts[kind] * len(losses)
        print(f"  {name}, seed {seed}, epoch {epoch}: loss {losses[-1]:.3f}, {seconds:.0f} s", flush=True)
    return seconds, flops, model, page


def accuracies(arguments) -> None:
    """Accuracy, FLOPs and seconds of the recipes, on all training images."""
    dataset = os.environ.get("LAB_DATASET", "CIFAR10")
    train, test = (helpers.load(dataset, part, (3, 32, 32)) for part in (True, False))
    rows, test_loader = {name: [] for name in arguments.recipes.split(",")}, bench.loader(test, 1_000, train)
    precision = helpers.pick_precision(test_loader.device, arguments.precision)
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for name, results in rows.items():
            seconds, flops, model, page = train_recipe(name, train, seed, arguments.epochs, precision)
            plain, views = (
                helpers.evaluate(m, test_loader, precision)[1] for m in (model, page["AveragedViews"](model))
            )
            results.append((plain, views, flops / 1e15, seconds))
            print(f"  {name}, seed {seed}: {plain:.2%}, six views {views:.2%}, {seconds:.0f} s", flush=True)
    lines = []
    for name, results in rows.items():
        spread = [statistics.stdev(column) if len(results) > 1 else math.nan for column in zip(*results, strict=True)]
        mean = [statistics.mean(column) for column in zip(*results, strict=True)]
        percent = [f"{100 * m:.2f} ± {100 * s:.2f} %" for m, s in zip(mean[:2], spread[:2], strict=True)]
        lines.append([name, len(results), *percent, mean[2], round(mean[3])])
    header = ["recipe", "seeds", "test accuracy", "six views averaged", "PFLOP", "training, s"]
    bench.table(f"{train.provenance}, {len(train):,} training images, {precision}", header, lines)


def pace(arguments) -> None:
    """Milliseconds for an image in a training step of each recipe, measured in turn, and their sum over 50,000 images
    and all passes.
    """
    split, criterion = bench.stand_in("CIFAR.ipynb", 4_000), nn.CrossEntropyLoss(label_smoothing=0.2)
    precision, plans, runs, measured = helpers.pick_precision(helpers.pick_device(), arguments.precision), {}, {}, {}
    for name in arguments.recipes.split(","):
        page, model, loader, optimizers, schedulers, sizes = RECIPES[name](split, 1, arguments.epochs)
        plans[name], batch = plan_of(model, sizes), next(iter(loader))
        runs[name] = page["train_one_epoch"], model, batch, (criterion, optimizers, schedulers), bench.scaler(batch[0])
        measured |= {(name, kind): [] for kind in plans[name]}
    for _ in range(arguments.repeats + 1):
        for (name, (size, learns)), times in measured.items():
            train_one_epoch, model, batch, options, scaler = runs[name]
            freeze_bias(model, learns)
            begin = time.perf_counter()
            train_one_epoch(model, [batch], *options, size, precision, scaler)[0].tolist()
            times.append((time.perf_counter() - begin) / len(batch[1]))
    rows = []
    for name, plan in plans.items():
        each = {kind: 1e3 * statistics.median(measured[name, kind][1:]) for kind in plan}
        text = ", ".join(f"{ms:.2f} at {size} px{' (bias learns)' * learns}" for (size, learns), ms in each.items())
        rows.append([name, len(plan), text, round(50 * sum(each[kind] for kind in plan))])
    header = ["recipe", "passes", "ms an image", "s, all passes over 50,000 images"]
    bench.table(f"Pace of training steps, measured in turn, median of {arguments.repeats}, {precision}", header, rows)


def widths(arguments) -> None:
    """Training rate and arithmetic of the page's network, once and twice as wide."""
    rows, page = [], notebooks.page("CIFAR.ipynb")
    batch = next(iter(bench.loader(bench.stand_in("CIFAR.ipynb", 500), 500)))
    for channels in ((64, 128, 256), (128, 256, 512)):
        model, run = bench.network(page | {"WIDTHS": channels}, batch[0])
        with FlopCounterMode(display=False) as counter:
            page["train_one_epoch"](model, [batch], *run)
        rates = []
        for _ in range(arguments.repeats):
            begin = time.perf_counter()
            page["train_one_epoch"](model, [batch], *run)[0].tolist()
            rates.append(len(batch[1]) / (time.perf_counter() - begin))
        parameters, rate = sum(p.numel() for p in model.parameters()), statistics.median(rates)
        gigaflops = counter.get_total_flops() / len(batch[1]) / 1e9
        rows.append([channels, f"{parameters:,}", gigaflops, f"{rate:,.0f}", f"{rate * gigaflops:,.0f}"])
    header = ["widths", "parameters", "GFLOP an image", "training images/s", "GFLOP/s"]
    bench.table("Training steps of CIFAR.ipynb's network, 32 × 32, batches of 500, fp32", header, rows)


def main() -> None:
    """Parse the command line, run one of the three."""
    parser = bench.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=1, help="so that several machines share the seeds")
    parser.add_argument("--epochs", type=int, help="of both recipes; default: their own")
    parser.add_argument("--precision", default="auto", help="of both recipes: auto, fp32, bf16")
    parser.add_argument("--recipes", default="published,page", help="which ones")
    parser.add_argument("--pace", action="store_true", help="see above")
    parser.add_argument("--widths", action="store_true", help="see above")
    arguments = parser.parse_args()
    helpers.reuse_memory()
    (pace if arguments.pace else widths if arguments.widths else accuracies)(arguments)


if __name__ == "__main__":
    main()

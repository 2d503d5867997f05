"""Both pages' networks in several processes on this machine: `python tests/bench_ddp.py [--processes 1,2,4]`.

By default: images/s for each number of processes, and the share of the exchange. Or one of
--equality: losses and test accuracy of LeNet-5 on real data for each number of processes;
--statistics: what batch statistics of each process's share cost the CIFAR network in accuracy;
--model: a calculation, not a measurement, of what the exchange takes on several kinds of link.
"""

import contextlib
import functools
import itertools
import math
import os
import statistics
import subprocess
import sys
import time
from copy import deepcopy
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

import bench
import helpers
import notebooks

TURNS = itertools.count()
RANK, EVERYBODY = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))


@functools.cache
def store():
    """Return torchrun's key-value store, through which the processes find each other."""
    return next(dist.rendezvous("env://"))[0]


def in_world(size: int, work):
    """Call `work(rank)` in the first `size` of the processes, as if torchrun had started just these; the others sleep.

    The sizes can so take turns, and a slow minute of the machine hits them all. Returns what `work` did on rank 0, on
    the other ranks nothing of use.
    """
    turn, result = f"turn/{next(TURNS)}", None
    if size > RANK:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
        if size > 1:
            backend, limit = "gloo", timedelta(minutes=5)
            if helpers.pick_device().type == "cuda":
                torch.cuda.set_device(RANK)
                backend = "cpu:gloo,cuda:nccl"
            group = dist.PrefixStore(f"{turn}/group", store())
            dist.init_process_group(backend, store=group, rank=RANK, world_size=size, timeout=limit)
        result = work(RANK)
        if size > 1:
            dist.destroy_process_group()
    if EVERYBODY > 1:
        store().set(f"{turn}/over/{RANK}", "1")
        store().wait([f"{turn}/over/{other}" for other in range(EVERYBODY)], timedelta(hours=1))
    return result


def training_seconds(page, split, rank):
    """Train passes over `split`. Returns (seconds of a pass, seconds without any exchange, seconds of one all-reduce of
    the gradients and nothing else, bytes of the gradients); alone the middle two are nan.
    """
    loader = bench.loader(split, page["BATCH_SIZE"], shuffle=True, augment=page["augment"])
    model, run = bench.network(page, next(iter(loader))[0])
    gradients = sum(p.numel() for p in model.parameters() if p.requires_grad)
    network, seconds, alone = helpers.distribute(model), [], not dist.is_initialized()
    contexts = [contextlib.nullcontext, contextlib.nullcontext]  # the first one warms up
    for context in contexts + ([] if alone else [network.no_sync]):
        helpers.sum_over_ranks(torch.zeros(1, device=loader.device))[0].item()  # all begin together
        begin = time.perf_counter()
        with context():
            losses, _, _ = page["train_one_epoch"](network, loader.epoch(1), *run)
            helpers.sum_over_ranks(losses)[0].tolist()  # as the pages do, once an epoch
        seconds.append(time.perf_counter() - begin)
    if alone:
        return seconds[1], math.nan, math.nan, 4 * gradients
    flat, times = torch.zeros(gradients, device=loader.device), []
    for _ in range(11):
        begin = time.perf_counter()
        dist.all_reduce(flat)
        helpers.synchronize(loader.device)
        times.append(time.perf_counter() - begin)
    return seconds[1], seconds[2], statistics.median(times[1:]), 4 * gradients


def rates(arguments, sizes) -> None:
    """Images/s for each number of processes, which take turns; the exchange's share of a step, and alone."""
    on_gpu, rows, pages = helpers.pick_device().type == "cuda", [], [notebooks.page(name) for name in bench.LABS]
    if not on_gpu:
        pages[1] |= dict(WIDTHS=(16, 32, 64), BATCH_SIZE=200)
    for page in pages:  # that every number of processes can share
        page["BATCH_SIZE"] = math.ceil(page["BATCH_SIZE"] / math.lcm(*sizes)) * math.lcm(*sizes)
    steps = (100, 100) if on_gpu else (30, 3)
    counts = [steps * page["BATCH_SIZE"] for steps, page in zip(steps, pages, strict=True)]
    splits = [bench.stand_in(name, count) for name, count in zip(bench.LABS, counts, strict=True)]

    def both(rank):
        return [training_seconds(page, split, rank) for page, split in zip(pages, splits, strict=True)]

    rounds = [{size: in_world(size, both) for size in sizes} for _ in range(arguments.repeats)]
    if RANK:
        return
    for kind, name in enumerate(("LeNet-5", f"FastCNN, widths {pages[1]['WIDTHS']}")):
        for size in sizes:
            seconds, quiet, exchange, size_of = zip(*(results[size][kind] for results in rounds), strict=True)
            first = [results[sizes[0]][kind][0] for results in rounds]
            ratio = statistics.median(a / b for a, b in zip(first, seconds, strict=True))
            row = [name, pages[kind]["BATCH_SIZE"], size, f"{counts[kind] / statistics.median(seconds):,.0f}"]
            row += [f"{ratio:.2f} ×", f"{size_of[0]:,}", "none", "none"]
            if size > 1:
                share = statistics.median(1 - b / a for a, b in zip(seconds, quiet, strict=True))
                row[-2:] = f"{share:.0%}", f"{1e3 * statistics.median(exchange):.2f}"
            rows.append(row)
    cores = os.cpu_count()
    where = "a GPU each" if on_gpu else f"over gloo on {cores} cores: this shows correctness and overhead, no speed-up"
    title = f"Training in several processes, {where}; median of {arguments.repeats}, fp32"
    header = ["network", "batch", "processes", "images/s", f"against {sizes[0]}", "gradients, bytes a step"]
    bench.table(title, [*header, "exchange, share of a step", "all-reduce alone, ms"], rows)


def equal_training(page, train, test, weights, double, nudge, rank):
    """Train LeNet-5 on `train` once, in the first epoch of the page's schedule. Returns (loss of each global batch,
    number of test images that all ranks read together, right answers, right answers of a model with rank 0's `weights`
    or None, the new weights). `double` computes in 64 bits, `nudge` changes each weight at the start by that share.
    """
    options = dict(seed=1, shuffle=True, augment=page["augment"])
    loader, test_loader = (
        bench.loader(train, page["BATCH_SIZE"], **options),
        bench.loader(test, page["BATCH_SIZE"], train),
    )
    torch.manual_seed(1 + rank)  # the copies must become equal by themselves
    model, run = bench.network(page, torch.zeros(1, *train.images.shape[1:], device=loader.device), 1_500)
    if double:
        model.double().register_forward_pre_hook(lambda module, images: images[0].double())
    with torch.no_grad():
        for weight in model.parameters() if nudge else ():
            weight.mul_(1 + nudge * torch.randn_like(weight))
    losses, _, _ = page["train_one_epoch"](helpers.distribute(model), loader.epoch(1), *run)
    (losses,) = helpers.sum_over_ranks(losses.double() / (dist.get_world_size() if dist.is_initialized() else 1))
    state, right = deepcopy(model.state_dict()), []
    logits = helpers.predict(model, test_loader)
    right.append((logits.argmax(dim=1) == test_loader.labels).sum().item())
    if rank == 0 and weights is not None:
        model.load_state_dict(weights)
    helpers.distribute(model)  # gives all ranks rank 0's weights
    right.append((helpers.predict(model, test_loader).argmax(dim=1) == test_loader.labels).sum().item())
    return losses.tolist(), len(logits), *right, state


def equality(arguments, sizes) -> None:
    """Losses of LeNet-5 and its test accuracy for each number of processes, on MNIST; and, as what rounding
    alone does, those of one process whose weights were changed in the seventh digit.
    """
    batch_size, rows = math.lcm(*sizes) * (240 // math.lcm(*sizes)), []
    page = notebooks.page("MNIST.ipynb", BATCH_SIZE=batch_size)
    train, test = (helpers.load("MNIST", part, (1, 28, 28)) for part in (True, False))
    train = train.subset(torch.arange(min(100, len(train) // batch_size) * batch_size))  # whole batches
    for double in (False, True):
        weights = first = None
        plan = [(sizes[0], 0.0), *([] if double else [(1, 1e-7)]), *((size, 0.0) for size in sizes[1:])]
        for size, nudge in plan:
            result = in_world(size, functools.partial(equal_training, page, train, test, weights, double, nudge))
            if RANK:
                continue
            losses, count, right, same, state = result
            first, weights = first or losses, weights or state
            apart = [abs(a - b) / abs(a) for a, b in zip(first, losses, strict=True)]
            row = [train.provenance.dataset, "fp64" if double else "fp32"]
            row.append(f"{size}, weights nudged" if nudge else size)
            row += [f"{max(apart[:n]):.0e}" for n in (10, 30, len(apart))] + [f"{losses[-1]:.4f}"]
            rows.append([*row, f"{right:,} of {count:,}", f"{same if first is not losses else right:,}"])
    if not RANK:
        title = f"LeNet-5, batches of {batch_size}: losses against those of {sizes[0]} process"
        header = ["data", "", "processes", "largest relative difference, 10 steps", "30", f"{len(losses)}", "last loss"]
        bench.table(title, [*header, "test images right", "right with the first row's weights"], rows)


def shared_training(page, part, held_out, epochs, seed, rank):
    """Train CIFAR.ipynb's network in this world as the page does; return its accuracy on the held-out images."""
    loader = bench.loader(part, page["BATCH_SIZE"], seed=seed, shuffle=True, augment=page["augment"])
    torch.manual_seed(seed)
    model, run = bench.network(page, next(iter(loader))[0], epochs * len(loader))
    network, sizes = helpers.distribute(model), page["RESOLUTIONS"][-epochs:]
    for epoch in range(1, epochs + 1):
        size = sizes[(epoch - 1) * len(sizes) // epochs]
        page["train_one_epoch"](network, loader.epoch(epoch), *run[:3], size, *run[4:])
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        for buffer, total in zip(buffers, helpers.sum_over_ranks(*buffers), strict=True):
            buffer.copy_(total / (dist.get_world_size() if dist.is_initialized() else 1))
    return helpers.evaluate(model, bench.loader(held_out, page["BATCH_SIZE"], part))[1]


def batch_statistics(arguments, sizes) -> None:
    """Accuracy of CIFAR.ipynb's network on held-out images, its batches normalised in one piece or in shares."""
    helpers.reuse_memory()
    page = notebooks.page("CIFAR.ipynb", WIDTHS=(32, 64, 128))
    data = helpers.load(page["DATASET"], True, (3, 32, 32))
    part, held_out = helpers.hold_out(data, min(10_000, len(data) // 5), 0)
    part, results = part.subset(torch.arange(min(20_000, len(part)))), {size: [] for size in sizes}
    for seed in range(1, arguments.seeds + 1):
        for size in sizes:
            work = functools.partial(shared_training, page, part, held_out, arguments.epochs, seed)
            results[size].append(in_world(size, work))
            if not RANK:
                print(f"  seed {seed}, {size} processes: {results[size][-1]:.2%}", flush=True)
    if RANK:
        return
    rows = []
    for size, accuracies in results.items():
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else math.nan
        text = f"{100 * statistics.mean(accuracies):.2f} ± {100 * spread:.2f} %"
        apart = [100 * (b - a) for a, b in zip(results[sizes[0]], accuracies, strict=True)]
        spread = statistics.stdev(apart) if len(apart) > 1 else math.nan
        difference = f"{statistics.mean(apart):+.2f} ± {spread:.2f}" if size > sizes[0] else "none"
        rows.append([size, page["BATCH_SIZE"] // size, text, difference])
    title = f"{len(part):,} training and {len(held_out):,} held-out images of {data.provenance}, {arguments.epochs} "
    title += f"epochs in batches of {page['BATCH_SIZE']}, widths {page['WIDTHS']}, fp32, {arguments.seeds} seeds; one "
    title += "process has the statistics that SyncBatchNorm would exchange"
    header = ["processes", "images that share statistics", "held-out accuracy", "points against the first, per seed"]
    bench.table(title, header, rows)


# What the calculation assumes. Of a link: bytes/s in one direction, as its makers state them, and the seconds that each
# step of a ring takes besides. Of a network: FLOP/s that a GPU reaches in it, and the seconds below which no step
# comes, however few its images, since so many kernels must be started.
LINKS = {
    "PCIe 4.0 x16": (31.5e9, 10e-6),
    "NVLink, A100": (300e9, 5e-6),
    "NVLink, H100": (450e9, 5e-6),
    "100 Gb/s network": (12.5e9, 20e-6),
}
ASSUMED = {"MNIST.ipynb": (1e12, 0.5e-3), "CIFAR.ipynb": (50e12, 2e-3)}


def ring_seconds(count: int, size: int, bandwidth: float, latency: float) -> float:
    """Seconds in which a ring of `count` GPUs sums `size` bytes: 2 (count - 1) steps of size / count bytes each."""
    return 2 * (count - 1) * (size / count / bandwidth + latency)


def calculation(count: int) -> None:
    """What the exchange among `count` GPUs takes on paper, without any overlap with computing."""
    rows = []
    for name in bench.LABS:
        rate, floor = ASSUMED[name]
        for widths in [None] if name == "MNIST.ipynb" else [(64, 128, 256), (64, 160, 320)]:
            page = notebooks.page(name, **({"WIDTHS": widths} if widths else {}))
            images, counts = bench.stand_in(name, 16).images / 255, []
            for some in (images[:8], images):
                model, run = bench.network(page, images)
                with FlopCounterMode(display=False) as counter:
                    page["train_one_epoch"](model, [(some, torch.arange(len(some)) % 10)], *run)
                counts.append(counter.get_total_flops())
            each = (counts[1] - counts[0]) / 8  # for an image
            fixed = counts[0] - 8 * each  # for a step, on every GPU: Muon's
            size, batch = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad), page["BATCH_SIZE"]

            def seconds(batch, link=None, each=each, fixed=fixed, rate=rate, floor=floor, size=size):
                if link is None:  # one GPU
                    return max(floor, (batch * each + fixed) / rate)
                return max(floor, (batch / count * each + fixed) / rate) + ring_seconds(count, size, *LINKS[link])

            row = [f"FastCNN {widths}" if widths else "LeNet-5", f"{size:,}", f"{1e3 * seconds(batch):.2f} ({batch})"]
            row.append(f"{1e3 * fixed / rate:.2f}" if fixed else "none")
            row.append(" · ".join(f"{1e3 * ring_seconds(count, size, *link):.2f}" for link in LINKS.values()))
            row.append(" · ".join(f"{seconds(batch) / seconds(batch, link):.1f}" for link in LINKS))
            enough = [
                next(b for b in itertools.count(count, count) if seconds(b) >= 0.8 * count * seconds(b, link))
                for link in LINKS
            ]
            rows.append([*row, " · ".join(f"{number:,}" for number in enough)])
    header = ["network", "gradients, bytes", "a step on one GPU, ms (batch)", "of it Muon"]
    header += [f"all-reduce of {count}, ms: {' · '.join(LINKS)}"]
    header += [f"{count} GPUs train so many times as fast", "batch for 80 % of linear"]
    title = "Calculated, nothing here was measured; it assumes what stands above `calculation` in tests/bench_ddp.py"
    bench.table(title, header, rows)


def main() -> None:
    """Start the processes with torchrun, and measure in them; the calculation needs none."""
    parser = bench.parser(__doc__)
    parser.add_argument("--processes", help="how many, with commas (1,2,4, or up to the number of GPUs)")
    parser.add_argument("--seeds", type=int, default=3, help="of --statistics")
    parser.add_argument("--epochs", type=int, default=4, help="of --statistics")
    for name in ("equality", "statistics", "model"):
        parser.add_argument(f"--{name}", action="store_true", help="see above")
    arguments, gpus = parser.parse_args(), torch.cuda.device_count()
    default = [n for n in (1, 2, 4, 8) if n <= gpus] if gpus else [1, 2, 3, 4] if arguments.equality else [1, 2, 4]
    sizes = [int(size) for size in arguments.processes.split(",")] if arguments.processes else default
    if arguments.model:
        return calculation(max(sizes) if arguments.processes else 8)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={max(sizes)}"]
        environment = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())}  # in_world divides them
        sys.exit(subprocess.run([*torchrun, *sys.argv], env=environment, check=False).returncode)
    (equality if arguments.equality else batch_statistics if arguments.statistics else rates)(arguments, sizes)
    time.sleep(0.3)  # gloo's threads release the last tensors a moment later


if __name__ == "__main__":
    main()

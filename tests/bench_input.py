"""The input pipelines: `python tests/bench_input.py [--before | --growth | --start] [--seconds S] [--repeats N]`.

By default: images/s of the kit's loader with each page's augmentation against the classic DataLoader, at MNIST and
CIFAR size, and the share of loading and augmentation in a page's training step.
--before: the same with the loader of commit 805afbc beside it, if git has that commit.
--growth: images/s and memory for once, twice and four times the data.
--start: seconds until imports are done and the data is ready, each in new processes (LAB_DATASET adds an image folder).
"""

import os
import statistics
import subprocess
import sys
import time
import types

import torch

import bench
import helpers
import notebooks

CLASSIC = notebooks.definitions("CIFAR.ipynb")  # its ClassicDataset and images_per_second
SIZES = {"MNIST.ipynb": 55_000, "CIFAR.ipynb": 45_000}  # training images of the pages
BEFORE = "805afbc"


def loader_before():
    """Return the class of the loader of commit 805afbc, or None where git does not have it."""
    show = subprocess.run(["git", "-C", helpers.HERE, "show", f"{BEFORE}:helpers.py"], capture_output=True, text=True)
    if show.returncode:
        print(f"git does not have {BEFORE}: without the loader of before.")
        return None
    module = sys.modules["helpers_before"] = types.ModuleType("helpers_before")
    module.__file__ = helpers.__file__
    exec(compile(show.stdout, f"{BEFORE}:helpers.py", "exec"), module.__dict__)
    return module.ResidentLoader


def pipelines(notebook: str, page: dict, before) -> dict:
    """Return the input pipelines to compare, by name: all shift, mirror and normalise as the page does."""
    split, batch_size, flip = bench.stand_in(notebook, SIZES[notebook]), page["BATCH_SIZE"], notebook == "CIFAR.ipynb"
    moments = bench.statistics_of(split)
    classic = CLASSIC["ClassicDataset"](split, **moments, flip=flip, translate=page["TRANSLATE"])
    found = {
        f"classic, {workers} workers": torch.utils.data.DataLoader(classic, batch_size, True, num_workers=workers)
        for workers in (0, 2)
    }
    if before:
        options = dict(flip=True, alternate=True) if flip else {}
        options |= dict(shuffle=True, translate=page["TRANSLATE"], memory_format=bench.LAYOUT)
        found[f"loader of {BEFORE}"] = before(split, batch_size, helpers.pick_device(), **moments, **options)
    return found | {"loader": bench.loader(split, batch_size, shuffle=True, augment=page["augment"])}


def step_seconds(page: dict, images, labels, seconds: float) -> float:
    """Return the seconds that a training step of the page takes for an image, averaged over the image sizes."""
    times = []
    for size in page.get("RESOLUTIONS", (0,)):
        model, run = bench.network(page, images, size=size, precision=page["PRECISION"])
        count, begin = 0, None
        while begin is None or time.perf_counter() - begin < seconds / len(page.get("RESOLUTIONS", (0,))):
            page["train_one_epoch"](model, [(images, labels)], *run)[0].tolist()
            count, begin = (0, time.perf_counter()) if begin is None else (count + 1, begin)  # the first one warms up
        times.append((time.perf_counter() - begin) / count / len(labels))
    return statistics.mean(times)


def rates(arguments) -> None:
    """Images/s of the pipelines, and the share that loading has in training."""
    helpers.reuse_memory()
    before, device, alone, shares = loader_before() if arguments.before else None, helpers.pick_device(), [], []
    for notebook in bench.LABS:
        page = notebooks.page(notebook)
        found = pipelines(notebook, page, before)
        images, labels = next(iter(found["loader"]))
        rounds = [
            {name: CLASSIC["images_per_second"](one, device, arguments.seconds) for name, one in found.items()}
            | {"step": step_seconds(page, images, labels, arguments.seconds)}
            for _ in range(arguments.repeats)
        ]
        for name in found:
            ratio = statistics.median(r[name] / max(r["classic, 0 workers"], r["classic, 2 workers"]) for r in rounds)
            share = statistics.median(1 / (1 + r["step"] * r[name]) for r in rounds)
            alone.append([notebook, name, f"{statistics.median(r[name] for r in rounds):,.0f}", f"{ratio:.1f} ×"])
            shares.append([notebook, name, f"{1e6 / statistics.median(r[name] for r in rounds):,.1f}"])
            shares[-1] += [f"{1e6 * statistics.median(r['step'] for r in rounds):,.1f}", f"{share:.1%}"]
    header = ["page", "input pipeline", "images/s", "against the better classic one"]
    bench.table(f"Input with the page's augmentation, median of {arguments.repeats}", header, alone)
    header = ["page", "input pipeline", "loading an image, µs", "training step for an image, µs", "share of loading"]
    bench.table(
        "Share of loading and augmentation in training; workers run beside it, so theirs is less", header, shares
    )


def growth(arguments) -> None:
    """Images/s and memory of the loader as the data grows."""
    page, rows, device = notebooks.page("CIFAR.ipynb"), [], helpers.pick_device()
    for factor in (1, 2, 4):
        split = bench.stand_in("CIFAR.ipynb", 50_000 * factor)
        loader = bench.loader(split, 500, shuffle=True, augment=page["augment"])
        tensors = [value for value in vars(loader).values() if torch.is_tensor(value)]
        held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
        found = [CLASSIC["images_per_second"](loader, device, arguments.seconds) for _ in range(arguments.repeats)]
        row = [f"{len(split):,}", f"{statistics.median(found):,.0f}", f"{held / 2**20:,.0f} MiB"]
        rows.append([*row, f"{held / split.images.nbytes:.2f} ×"])
    header = ["training images", "images/s", "memory on the device", "against the images alone"]
    bench.table("The loader at CIFAR size", header, rows)


def seconds_of(code: str) -> float:
    """Run Python code that prints a number of seconds, in a new process; return the number."""
    result = subprocess.run([sys.executable, "-c", code], cwd=helpers.HERE, capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1])


def start(arguments) -> None:
    """Median seconds until the lab can begin."""
    clock = "import time; t = time.perf_counter()\n{}\nprint(time.perf_counter() - t)"
    ready = "import torch, torchvision, helpers, time; t = time.perf_counter()\n{}\nprint(time.perf_counter() - t)"
    both = "[helpers.load({!r}, part, {}) for part in (True, False)]"
    codes = {
        "import torch, torchvision": clock.format("import torch, torchvision"),
        "import torch, torchvision, helpers": clock.format("import torch, torchvision, helpers"),
        "MNIST ready": ready.format(both.format("MNIST", (1, 28, 28))),
    }
    if folder := os.environ.get("LAB_DATASET"):
        codes["image folder ready"] = ready.format(both.format(folder, (3, 32, 32)))
    for code in codes.values():
        seconds_of(code)  # fills the file cache, and the kit's own
    rounds = [[seconds_of(code) for code in codes.values()] for _ in range(arguments.repeats)]
    rows = [[name, statistics.median(times)] for name, times in zip(codes, zip(*rounds, strict=True), strict=True)]
    rows.append(["helpers adds", statistics.median(r[1] - r[0] for r in rounds)])
    bench.table(f"Start, median of {arguments.repeats}", ["what", "seconds"], rows)


if __name__ == "__main__":
    parser = bench.parser(__doc__)
    for name in ("before", "growth", "start"):
        parser.add_argument(f"--{name}", action="store_true", help="see above")
    chosen = parser.parse_args()
    (growth if chosen.growth else start if chosen.start else rates)(chosen)

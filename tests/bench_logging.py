"""What TensorBoard, checkpoint and monitor cost, as a share of training: `python tests/bench_logging.py`.

For the default budget of both pages: the seconds of `run.log` and `run.save`, of what is logged once at the end, and
the rate of training with the monitor on and off.
"""

import contextlib
import io
import os
import statistics
import tempfile
import time

import torch

import bench
import helpers
import notebooks

TEST = 10_000  # images


def training(page, batch, run, model, arguments) -> tuple[float, float]:
    """Return the seconds of a training step, and the share by which the monitor slows it."""
    steps, monitor, times = max(3, round(arguments.seconds)), helpers.Monitor(batch[0].device), {True: [], False: []}
    for number in range(2 * arguments.repeats + 2):
        watched = number % 2 == 0
        with monitor if watched else contextlib.nullcontext():
            begin = time.perf_counter()
            page["train_one_epoch"](model, [batch] * steps, *run)[0].tolist()
            times[watched].append((time.perf_counter() - begin) / steps)
    slower = statistics.median(a / b for a, b in zip(times[True][1:], times[False][1:], strict=True)) - 1
    return statistics.median(times[False][1:]), slower


def logging(page, notebook, loader, model, optimizers) -> tuple[float, float, float]:
    """Open a run and log as the pages do. Returns the seconds of log and of save for an epoch, and those of once."""
    namespace, each = {"SEED": 1, "NOTE": ""}, {"log": [], "save": []}
    settings = helpers.Settings(namespace, list(namespace), set())
    with contextlib.redirect_stdout(io.StringIO()):
        lab = notebook.removesuffix(".ipynb").lower()
        run = helpers.Run(lab, settings, loader, model=model, optimizer=optimizers)
        values = dict.fromkeys(("loss/train", "loss/validation", "accuracy/train", "accuracy/validation"), 0.5)
        for _ in run.epochs(page["EPOCHS"]):
            with run.training():
                time.sleep(0.01)
            for name, work in (("log", lambda: run.log(values, torch.ones(len(loader)))), ("save", run.save)):
                begin = time.perf_counter()
                work()
                each[name].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        classes = len(loader.classes)
        labels, probabilities = torch.randint(0, classes, (TEST,)), torch.rand(TEST, classes)
        matrix = torch.bincount(classes * labels + probabilities.argmax(dim=1), minlength=classes**2)
        run.add("test/confusion", helpers.confusion(matrix.view(classes, classes), loader.classes))
        run.event("graph", model, loader.images[:1].float())
        for k in range(classes):
            run.event("pr_curve", f"precision_recall/{k}", labels == k, probabilities[:, k], run.step)
        some = loader.images[: page.get("EMBEDDINGS", 300)].cpu()
        run.event("embedding", torch.rand(len(some), 256), None, some / 255, run.step, tag="test_images")
        run.finish(0.5, 0.5)
        run.close()
    return *(statistics.median(times) for times in each.values()), time.perf_counter() - begin


def main() -> None:
    """Measure both pages, print the table."""
    arguments, rows = bench.parser(__doc__).parse_args(), []
    helpers.reuse_memory()
    for notebook, count in (("MNIST.ipynb", 55_000), ("CIFAR.ipynb", 45_000)):
        page = notebooks.page(notebook)
        loader = bench.loader(bench.stand_in(notebook, count), page["BATCH_SIZE"], shuffle=True)
        batch = next(iter(loader))
        size = 26  # pixels, the mean of the growing images
        model, run = bench.network(page, batch[0], size=size, precision=page["PRECISION"])
        step, slower = training(page, batch, run, model, arguments)
        with tempfile.TemporaryDirectory() as folder:
            os.environ["LAB_RUNS"] = folder
            log, save, once = logging(page, notebook, loader, model, run[1])
        epochs, epoch = page["EPOCHS"], step * len(loader)
        share = ((log + save) * epochs + once) / (epoch * epochs)
        rows.append([notebook, epochs, epoch, log, save, once, f"{share:.1%}", f"{slower:+.1%}"])
    header = ["page, default budget", "epochs", "an epoch's training, s", "run.log, s", "run.save, s", "once a run, s"]
    title = f"Cost of logging and of the monitor, median of {arguments.repeats}"
    bench.table(title, [*header, "logging / training", "monitor slows training by"], rows)


if __name__ == "__main__":
    main()

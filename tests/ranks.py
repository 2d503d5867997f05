"""What tests call in processes of their own: the pages, and what several processes do together.

toy.py starts them, with the variables that torchrun sets where they belong together.
"""

import hashlib
import itertools
import shutil
import time

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import helpers
import notebooks
import toy
from tests import documents


def fingerprint(model) -> str:
    """A hash of all weights."""
    return hashlib.sha256(b"".join(weight.detach().numpy().tobytes() for weight in model.parameters())).hexdigest()


def train_pages() -> dict:
    """Train the networks of both pages for an epoch, as the pages do it, and evaluate them before and after."""
    world = helpers.join_world()
    results = {}
    for name, shape in (("MNIST", (1, 28, 28)), ("CIFAR10", (3, 32, 32))):
        page = notebooks.page("MNIST.ipynb" if name == "MNIST" else "CIFAR.ipynb", BIAS_RATE=0.05)
        half = torch.full((shape[0],), 0.5)
        train_part, test_part = (
            helpers.load(name, train, shape).subset(torch.arange(count)) for train, count in ((True, 400), (False, 101))
        )  # no number of ranks divides 101
        loader = helpers.Loader(train_part, 40, toy.CPU, half, half, shuffle=True, augment=toy.augment, seed=3)
        test_loader = helpers.Loader(test_part, 40, toy.CPU, half, half)
        torch.manual_seed(1)
        if name == "MNIST":
            model = page["LeNet5"]()
            arguments = page["make_optimizer"](model, 50)
        else:
            model = page["FastCNN"](widths=(8, 8, 16))
            page["whiten"](model.whiten, train_part.images[:100] / 255 - 0.5)
            scaler = torch.amp.GradScaler("cpu", enabled=False)
            arguments = *page["make_optimizers"](model, 50, 40), 32, "fp32", scaler
        if world.rank:  # distribute() should make them equal
            with torch.no_grad():
                next(model.parameters()).add_(1)
        network = helpers.distribute(model)
        untrained = helpers.predict(model, test_loader), helpers.evaluate(model, test_loader)
        losses, *sums = page["train_one_epoch"](network, loader.epoch(1), nn.CrossEntropyLoss(), *arguments)
        losses, loss_sum, correct = helpers.sum_over_ranks(losses / world.size, *sums)
        results[name] = dict(losses=losses.tolist(), loss_sum=loss_sum.item(), correct=correct.item())
        results[name] |= dict(logits=untrained[0].numpy(), untrained=untrained[1], weights=fingerprint(model))
    return results


def train_page(name, copy=None):
    """Execute a page's cells up to its loop; return the run's path. In the middle of the second epoch the directory is
    copied to `copy`: what is left of it if the process is killed there.
    """
    steps = itertools.count(1)

    def count(*_):
        run = helpers.Run.current
        if run and len(run.history) == 1 and next(steps) == 5:
            shutil.copytree(run.path, copy)

    hook = register_optimizer_step_post_hook(count) if copy else None
    page = {"__name__": "__main__"}
    for cell in notebooks.code_cells(name):
        notebooks.execute(cell.source, page)
        if "in run.epochs(" in cell.source:
            break
    if hook:
        hook.remove()
    helpers.Run.current.close()
    return page["run"].path


def batches() -> list:
    """The batches of two epochs and of a test, as this process gets them."""
    helpers.join_world()
    parts = (
        toy.loader(toy.digits(), 60, shuffle=True, augment=toy.augment, seed=5),
        toy.loader(toy.digits(count=101), 60),
    )
    passes = [parts[0].epoch(1), parts[0].epoch(2), iter(parts[1])]
    return [[(images.numpy(), labels.numpy()) for images, labels in one] for one in passes]


def statistics() -> tuple:
    """The running statistics at the end of an epoch: what this process computed, and what came out of it."""
    helpers.join_world()
    training, seen = toy.Training(EPOCHS=1), []

    def at(moment):
        if moment in ("step 5 of epoch 1", "epoch 1 is logged"):
            seen.append(
                [
                    buffer.clone().numpy()
                    for buffer in (training.model.norm.running_mean, training.model.norm.running_var)
                ]
            )

    training.train(at)
    return tuple(seen)


def train(**settings) -> tuple:
    """Train as `toy.train` does, with time for the monitor; return the run's path, its history, and the weights."""
    helpers.join_world()
    training = toy.Training(**settings)
    training.train(lambda moment: time.sleep(0.3) if moment == "step 1 of epoch 1" else None)
    training.finish()
    training.run.close()
    documents.write_report(training.run.path)
    return training.run.path, training.run.history, fingerprint(training.model)


def open_at(moment) -> str:
    """Open a run at the Unix time `moment`, without training; return its name."""
    torch.set_num_threads(1)
    settings = dict(NOTE="the same")
    data = toy.loader(toy.digits(count=80), shuffle=True)
    parts = dict(model=(model := toy.Net()), optimizer=torch.optim.SGD(model.parameters(), 0.1))
    time.sleep(max(0, moment - time.time()))
    run = helpers.Run("toy", helpers.Settings(settings, ["NOTE"], {"NOTE"}), data, **parts)
    run.close()
    return run.path.name


def join(seconds) -> str:
    """The error of a process that waits for the others."""
    try:
        helpers.join_world(seconds)
        return "no error"
    except helpers.LabError as error:
        return str(error)


def mistakes() -> list[str]:
    """The errors of this process where all make the same mistakes."""
    helpers.join_world()
    errors = []
    for make in (
        lambda: toy.Training(RESUME="nowhere"),
        lambda: toy.loader(toy.digits(), 41),
        lambda: helpers.load("nowhere", True, (1, 28, 28)),
    ):
        try:
            make()
        except helpers.LabError as error:
            errors.append(str(error))
    return errors


def train_until_one_is_killed(moment=None):
    """Train with the others. At the moment, this process ends as `kill -9` ends it."""
    helpers.join_world()
    toy.train(kill=moment)

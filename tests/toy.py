"""A small training, written as the pages write theirs, for the tests that kill, interrupt, resume or share one.

Processes come from a fork server that has imported the large libraries, so that one more costs a fraction of a second.
"""

import atexit
import contextlib
import functools
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
import tqdm
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import helpers

CPU = torch.device("cpu")
SETTINGS = dict(EPOCHS=3, BATCH_SIZE=40, SEED=1, RATE=0.1, WIDTHS=(4, 8), NOTE="", RESUME="")
FREE = {"NOTE", "RESUME"}


@functools.cache
def digits(train=True, count=240):
    """The first stand-in digits: 240 images and 10 classes."""
    return helpers.load("MNIST", train, (1, 28, 28)).subset(torch.arange(count))


class Net(nn.Module):
    """A small network with running statistics, for [N, 1, 28, 28] images."""

    def __init__(self, width=4, kernel_size=5):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, width, kernel_size, stride=4), nn.BatchNorm2d(width)
        self.output = nn.Linear(width * 36, 10)

    def forward(self, images):
        return self.output(self.norm(self.conv(images)).relu().flatten(start_dim=1))


def augment(images, chances, epoch):
    """Mirror half of the images, others in each epoch."""
    return torch.where(chances[:, 0, None, None, None] < 0.5, images.flip(-1), images)


def loader(split, batch_size=40, **options):
    """A loader of the split on the CPU."""
    return helpers.Loader(split, batch_size, CPU, torch.full((1,), 0.4), torch.full((1,), 0.3), **options)


def nothing(moment):
    """What happens at a moment of the training: nothing."""


class Training:
    """Sections 2 to 8 of a page. `settings` replace SETTINGS; `built` is what section 2 was run with."""

    def __init__(self, data=None, model=None, precision="fp32", built=None, lab="toy", **settings):
        self.page, data = SETTINGS | settings, data or digits()
        self.settings = helpers.Settings(self.page, list(self.page), FREE)
        train_part, validation_part = helpers.hold_out(data, 40, seed=1)
        options = dict(shuffle=True, augment=augment, seed=self.page["SEED"])
        self.train_loader = loader(train_part, self.page["BATCH_SIZE"], **options)
        self.validation_loader, self.test_loader = loader(validation_part), loader(digits(False, 100))
        helpers.set_seed(self.page["SEED"])
        self.model = model or Net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.page["RATE"], momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=self.page["RATE"], total_steps=self.page["EPOCHS"] * len(self.train_loader)
        )
        parts = dict(model=self.model, optimizer=self.optimizer, scheduler=self.scheduler)
        built = {"2 Data": built or dict(BATCH_SIZE=self.train_loader.batch_size)}
        self.run = helpers.Run(
            lab, self.settings, self.train_loader, precision, resume=self.page["RESUME"], built=built, **parts
        )
        self.network = helpers.distribute(self.model)

    def one_epoch(self, epoch, at):
        """Train on each batch once; return the losses, their sum over images, and the number of right answers."""
        self.network.train()
        losses, loss_sum, correct = [], 0, 0
        for number, (images, labels) in enumerate(self.train_loader.epoch(epoch), start=1):
            logits = self.network(images)
            loss = nn.functional.cross_entropy(logits, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            torch.rand(1)  # a page may draw random numbers too
            losses.append(loss.detach())
            loss_sum = loss_sum + loss.detach() * len(labels)
            correct = correct + (logits.argmax(dim=1) == labels).sum()
            at(f"step {number} of epoch {epoch}")
        return torch.stack(losses), loss_sum, correct

    def train(self, at=nothing, log=lambda values, losses: (values, losses)):
        """Run the loop. `at` is called with the name of each moment; `log` may change what is logged."""
        run, size = self.run, int(os.environ.get("WORLD_SIZE", "1"))
        for epoch in run.epochs(self.page["EPOCHS"]):
            with run.training():
                losses, loss_sum, correct = self.one_epoch(epoch, at)
                losses, loss_sum, correct = helpers.sum_over_ranks(losses / size, loss_sum, correct)
            validation_loss, validation_accuracy = helpers.evaluate(self.model, self.validation_loader)
            values = {
                "loss/train": loss_sum / self.train_loader.count,
                "accuracy/train": correct / self.train_loader.count,
                "loss/validation": validation_loss,
                "accuracy/validation": validation_accuracy,
                "learning_rate": self.scheduler.get_last_lr()[0],
            }
            run.log(*log(values, losses))
            at(f"epoch {epoch} is logged")
            run.save()
            at(f"epoch {epoch} is saved")
        return self

    def finish(self, **more):
        """Test what was trained and write the metrics."""
        loss, accuracy = helpers.evaluate(self.run.model, self.test_loader)
        return self.run.finish(accuracy, loss, **more)


def interrupt(chosen):
    """What a person does at a chosen moment of the training."""

    def at(moment):
        if moment == chosen:
            raise KeyboardInterrupt

    return at


def train(kill=None, wait=None, **settings):
    """Train, finish, close; return the run's path. At the moment `kill` the process ends as `kill -9` ends it, at the
    moment `wait` it prints "waiting" and does nothing for a minute.

    Two more moments: "epoch N has no history", its events are written, and "epoch N has no checkpoint", but a history.
    """

    def at(moment):
        if moment == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if moment == wait:
            print("waiting", flush=True)
            time.sleep(60)

    def rename(source, target, replace=os.replace):
        if Path(target).stem in ("history", "checkpoint"):
            at(f"epoch {training.run.history[-1]['epoch']} has no {Path(target).stem}")
        replace(source, target)

    training, os.replace = Training(**settings), rename
    training.train(at).finish()
    training.run.close()
    return training.run.path


def fill(disk, name="ballast"):
    """Fill the disk up; return the file to remove."""
    ballast = Path(disk) / name
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))
    return ballast


def train_on_a_full_disk(disk):
    """Train while the disk fills up, and make room in the end. Return the metrics and the epoch that was saved."""
    training, ballast = Training(), []
    training.train(lambda moment: ballast.append(fill(disk)) if moment == "epoch 1 is saved" else None)
    ballast.append(fill(disk, "more ballast"))
    try:
        training.finish()
    except helpers.LabError as error:
        print(f"LabError: {error}")
    for file in ballast:
        file.unlink()
    metrics = training.finish()
    training.run.close()
    return metrics, helpers.load_checkpoint(training.run.path / "checkpoint.pt")["epoch"]


# --------------------------------------------------------------------------------------------------------- processes

context = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else None)
if hasattr(context, "set_forkserver_preload"):
    large = "torch torch.utils.tensorboard torch.profiler torch.utils.flop_counter torchvision"
    context.set_forkserver_preload([*large.split(), "matplotlib.figure", "nbformat"])


class Process:
    """A process that calls a function of a module; what it prints goes to the file `log`."""

    def __init__(self, log, variables, function, *arguments, **options):
        self.log, (self.answer, answer) = Path(log), context.Pipe(duplex=False)
        self.log.touch()
        call = (answer, str(log), os.environ | variables, function, arguments, options)
        self.process = context.Process(target=answered, args=call)
        self.process.start()
        answer.close()

    @property
    def output(self):
        """All that it printed so far."""
        return self.log.read_text(encoding="utf-8")

    def result(self, seconds=120):
        """Wait for the end; return what the function returned. Raises AssertionError where it did not return."""
        assert self.answer.poll(seconds), f"no answer within {seconds} s\n{self.output}"
        try:
            result = self.answer.recv()
        except EOFError:
            raise AssertionError(f"it ended without an answer\n{self.output}") from None
        finally:
            self.process.join(seconds)
        return result

    def end(self):
        """Wait until it is dead, by what or whom ever; return the exit code, negative for a signal."""
        self.process.join(120)
        return self.process.exitcode


def answered(answer, log, variables, function, arguments, options):
    """What a Process does."""
    os.environ.clear()
    os.environ |= variables
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1, encoding="utf-8") for n in (1, 2))
    tqdm.tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process would leave behind
    try:
        answer.send(function(*arguments, **options))
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
            atexit.unregister(torch.distributed.destroy_process_group)  # Python 3.13 calls it in such a process too


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ranks(size, machines=1):
    """The variables that torchrun sets for each of `size` processes on so many machines."""
    here, place = size // machines, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    place |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(here)}
    return [place | {"RANK": str(rank), "LOCAL_RANK": str(rank % here)} for rank in range(size)]


if __name__ == "__main__":  # under torchrun: rank 1 is killed once
    first = (os.environ["TORCHELASTIC_RESTART_COUNT"], helpers.join_world().rank) == ("0", 1)
    train(kill="step 2 of epoch 3" if first else None, EPOCHS=4, RESUME="latest")

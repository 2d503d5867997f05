"""Train the core of a page, sections 1 to 8, on an accelerator and on the CPU, and measure how far they are apart.

    python tests/accelerator.py MNIST.ipynb

The accelerator is the GPU where there is one, else the device `vulkan` of the package torchvulkan. On Mesa's software
driver that computes on the CPU: it is no GPU and says nothing about speed. But its tensors live in a memory of their
own, its kernels are not the CPU's, and PyTorch treats it like any other accelerator, so that a missing `.cpu()` or
`.to(device)` is an error.

The last line printed is JSON. The exit code is 77 where the device cannot be used; the reason is printed.
"""

import json
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import helpers
from notebooks import code_cells, execute

UNUSABLE = 77
IMAGES = (70, 10)  # training, test; of the first, 30 are held out: four steps an epoch
TINY = dict(FAST="1", OFFLINE="1", EPOCHS="2", BATCH_SIZE="10", VALIDATION="30", PRECISION="fp32")
SMALLER = {"CIFAR.ipynb": dict(RESOLUTIONS="16,20")}


class Core:
    """Sections 1 to 8 of a page on one device.

    Its variables are in `page`, its run in `path`, and that run as it was after the first epoch in `begun`.
    """

    def __init__(self, name: str, device: str):
        self.cells, self.page = [cell.source for cell in code_cells(name)], {"__name__": "__main__"}
        calls = ("helpers.Run(", "in run.epochs(", "run.finish(")
        numbers = (next(n for n, source in enumerate(self.cells) if call in source) for call in calls)
        self.opening, self.loop, self.last = numbers
        os.environ["LAB_DEVICE"] = device
        self.run(0, self.last)
        self.path, self.whole = self.page["run"].path, self.results()
        self.begun = self.path.with_suffix(".begun")

    def run(self, first: int, last: int) -> None:
        """Run the code cells number `first` to `last`."""
        for source in self.cells[first : last + 1]:
            execute(source, self.page)

    def results(self) -> dict:
        """What the page computed: losses of the last epoch's steps, mean losses, logits of the test images."""
        logged = [[v for k, v in entry.items() if k.startswith("loss/")] for entry in self.page["run"].history]
        logits = self.page["test_logits"].cpu()
        return dict(losses=self.page["losses"].cpu(), logged=torch.tensor(logged), logits=logits)

    def reopen(self, path: Path) -> None:
        """Open the run in `path`, as a reader does who sets RESUME and goes on from there."""
        self.page["RESUME"] = str(path)
        self.run(self.opening, self.loop - 1)

    def resume(self, path: Path) -> dict:
        """Go on with the run in `path` to its end; return the results."""
        self.reopen(path)
        self.run(self.loop, self.last)
        return self.results()

    def batches(self) -> list:
        """The batches of two training epochs, on the CPU."""
        loader = self.page["train_loader"]
        return [(images.cpu(), labels.cpu()) for epoch in (1, 2) for images, labels in loader.epoch(epoch)]

    def tensors(self) -> list:
        """Tensors that should be on the device."""
        loader, model = self.page["train_loader"], self.page["run"].model
        return [self.page["test_logits"], loader.images, loader.labels, *model.parameters(), *model.buffers()]


def keep_the_beginning(run: helpers.Run, save=helpers.Run.save) -> None:
    """Save; after the first epoch, also copy the run's directory, as it is when a training is killed there. Random
    numbers are drawn before, as dropout draws them, and after, where a run that is resumed should go on with them.
    """
    torch.rand(3, device=run.loader.device)
    save(run)
    if len(run.history) == 1:
        shutil.copytree(run.path, run.path.with_suffix(".begun"))
        run.drawn = torch.rand(3, device=run.loader.device)


def apart(ones: dict, others: dict) -> dict:
    """The largest difference of each result, as a share of its largest value, and how many predictions differ."""
    shares = {name: ((ones[name] - others[name]).abs().max() / others[name].abs().max()).item() for name in ones}
    return shares | dict(predictions=(ones["logits"].argmax(1) != others["logits"].argmax(1)).sum().item())


def refused(function, *arguments) -> str:
    """What the kit says where it refuses a call."""
    try:
        return f"not refused: {function(*arguments)}"
    except helpers.LabError as error:
        return str(error)


def compare(name: str, kind: str) -> dict:
    """Train whole on both devices, and go on on each with what the other began; return what was seen."""
    helpers.SIZES["smoke"], helpers.Run.save, start = IMAGES, keep_the_beginning, time.perf_counter()
    cpu = Core(name, "cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.set_warn_always(True)  # else only the first operator that falls back is named
        other = Core(name, kind)
        places, drawn, device = (
            {str(tensor.device) for tensor in other.tensors()},
            other.page["run"].drawn,
            other.page["device"],
        )
        begun_on_the_cpu = apart(other.resume(cpu.begun), cpu.whole)
        other.reopen(other.begun)
        drawn_again = torch.rand(3, device=device)
        pairs = list(zip(other.batches(), cpu.batches(), strict=True))
    said = [str(warning.message) for warning in caught if "torchvulkan" in str(warning.message)]
    operators = [re.search(r"aten::\w+|(?<=\]: )[^(]*", text) for text in said]
    return dict(
        automatic=helpers.pick_device("auto").type,
        places=sorted(places),
        images=max((one - two).abs().max().item() for (one, _), (two, _) in pairs),
        labels=all(torch.equal(one, two) for (_, one), (_, two) in pairs),
        whole=apart(other.whole, cpu.whole),
        begun_on_the_cpu=begun_on_the_cpu,
        begun_there=apart(cpu.resume(other.begun), other.whole),
        random_numbers=torch.equal(drawn, drawn_again),
        checkpoint=str(other.path / "checkpoint.pt"),
        precision=refused(helpers.pick_precision, device, "bf16"),
        fell_back=sorted({match[0].strip() for match in operators if match}),
        seconds=round(time.perf_counter() - start, 1),
    )


def main() -> int:
    """Compare the two devices on the page that the command line names."""
    torch.backends.cudnn.allow_tf32 = False  # a GPU's convolutions would keep 10 bits of what they multiply
    try:
        if not torch.accelerator.is_available():
            import torchvulkan

            torchvulkan.get_device_properties()
    except (ImportError, OSError, RuntimeError) as error:  # not installed, for another PyTorch, or no driver
        print(f"{type(error).__name__}: {str(error).splitlines()[0]}")
        return UNUSABLE
    device = helpers.pick_device()
    facts = dict(name=helpers.device_name(device), kind=device.type)
    name = sys.argv[1]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("LAB_RUNS", scratch)
        os.environ |= {f"LAB_{setting}": value for setting, value in (TINY | SMALLER.get(name, {})).items()}
        print("\n" + json.dumps(facts | compare(name, device.type)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

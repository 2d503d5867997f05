"""What test_distributed.py runs under torchrun: train both pages' networks a little, print what came out as JSON."""

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import helpers
import notebooks

CPU = torch.device("cpu")


def fingerprint(model) -> str:
    """A hash of all weights and buffers."""
    return hashlib.sha256(b"".join(v.detach().numpy().tobytes() for v in model.state_dict().values())).hexdigest()


def loaders(world, shape, name, batch_size):
    """A training loader of 400 images in whole batches and one of 101 test images, shared among the ranks."""
    half = torch.full((shape[0],), 0.5)
    options = dict(batch_size=batch_size, device=CPU, mean=half, std=half, seed=3)
    share = dict(rank=world.rank, world_size=world.size)
    train = helpers.stand_in(name, True, shape, 400)
    test = helpers.stand_in(name, False, shape, 101)  # no number of ranks divides it
    return (
        helpers.ResidentLoader(train, **options, **share, shuffle=True, translate=1),
        helpers.ResidentLoader(test, **options, **share),
    )


def train(page, model, arguments, loader, world):
    """One epoch as the pages do it. Returns the losses of the global batches."""
    trained = helpers.distribute(model)
    losses, loss_sum, correct = page["train_one_epoch"](trained, loader, nn.CrossEntropyLoss(), *arguments)
    losses, loss_sum, correct = helpers.sum_over_ranks(losses / world.size, loss_sum, correct)
    helpers.average_over_ranks(model)
    return losses.tolist(), loss_sum.item(), correct.item()


def main() -> None:
    """Train, compare, print."""
    torch.set_num_threads(1)
    world = helpers.join_world()
    results = {"size": world.size}
    for name, shape in (("MNIST", (1, 28, 28)), ("CIFAR10", (3, 32, 32))):
        page = notebooks.page("MNIST.ipynb" if name == "MNIST" else "CIFAR.ipynb", BIAS_RATE=0.05)
        torch.manual_seed(1 if name == "MNIST" else world.rank)  # distribute() must make the second kind equal
        loader, test_loader = loaders(world, shape, name, 40)
        if name == "MNIST":
            model = page["LeNet5"]()
            arguments = page["make_optimizer"](model, 50)
        else:
            model = page["FastCNN"](widths=(8, 8, 16))
            page["whiten"](model.whiten, next(iter(loader))[0])
            loader.epoch = 0
            optimizers = page["make_optimizers"](model, 50, page["BATCH_SIZE"])
            arguments = (*optimizers, 32, "fp32", torch.amp.GradScaler("cpu", enabled=False))
        losses, loss_sum, correct = train(page, model, arguments, loader, world)
        logits = helpers.predict(model, test_loader)
        results[name] = {
            "losses": losses,
            "loss_sum": loss_sum,
            "correct": correct,
            "weights": helpers.from_all_ranks(fingerprint(model)),
            "logits": list(logits.shape),
            "test": helpers.evaluate(model, test_loader),
        }
    print("RESULT " + json.dumps(results))


if __name__ == "__main__":
    main()

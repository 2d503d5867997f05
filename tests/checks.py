"""Checks of the exercises: does what was written do what it should, and if not, what is the likely mistake?

Each check prints one line where all is right. Else it raises `Wrong`, in one sentence, or `Unwritten` for a blank that
is still empty. Values are compared with torch's own functions and with those of known mistakes. Nothing is trained,
no file is read, and the random numbers are as they were before.
"""

import functools
import math
import traceback

import torch
from torch import nn


class Wrong(Exception):
    """What was written does something else than it should."""

    def _render_traceback_(self):  # IPython shows this line and no stack
        return [f"{type(self).__name__}: {self}"]


class Unwritten(Wrong):
    """A blank is still empty."""


def _check(function):
    """Turn errors of what is checked into sentences; restore the random numbers; with strict=False only print."""

    @functools.wraps(function)
    def checked(*arguments, strict=True):
        state = torch.get_rng_state()
        try:
            torch.manual_seed(0)
            print("✓", function(*arguments))
        except Exception as error:
            if isinstance(error, NotImplementedError):
                error = Unwritten(str(error) or "not written yet")
            elif not isinstance(error, Wrong):
                where = traceback.extract_tb(error.__traceback__)[-1]
                line = f" in the line `{where.line}`" if where.line and "checks" not in where.filename else ""
                error = Wrong(f"it stops with {type(error).__name__}{line}: {error}")
            if strict or isinstance(error, Unwritten):
                raise error from None
            print("✗", error)
        finally:
            torch.set_rng_state(state)

    return checked


def _demand(truth, sentence: str) -> None:
    if not truth:
        raise Wrong(sentence)


def _close(one, other, tolerance=1e-4) -> bool:
    one, other = torch.as_tensor(one), torch.as_tensor(other)
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=tolerance, atol=tolerance)


def _compare(value, right, wrong: dict, otherwise: str) -> None:
    """Demand that the value is the right one; else name the mistake {sentence: its value} that gives the same."""
    if not _close(value, right):
        raise Wrong(next((sentence for sentence, other in wrong.items() if _close(value, other)), otherwise))


# ---------------------------------------------------------------------------------------------------------- MNIST.ipynb

SHAPES = [(6, 1, 5, 5), (6,), (16, 6, 5, 5), (16,), (120, 400), (120,), (84, 120), (84,), (10, 84), (10,)]


@_check
def lenet5(network):
    """`network()` is LeNet-5: 61,706 parameters; ReLU, maximum pooling, logits [N, 10] of images [N, 1, 28, 28]."""
    model = network().eval()
    images = torch.randn(3, 1, 28, 28)
    logits = model(images)
    _demand(tuple(logits.shape) == (3, 10), f"three images should give logits [3, 10], not {list(logits.shape)}.")
    weights = {tuple(p.shape): p for p in model.parameters()}
    if (120, 16, 5, 5) in weights:  # C5 as a convolution, as the paper has it
        weights[120, 400] = weights[120, 16, 5, 5].flatten(start_dim=1)
    if (120, 16 * 4 * 4) in weights:
        raise Wrong("C5 gets 4 × 4 places instead of 5 × 5: C1 lacks its padding of 2, which keeps 28 × 28.")
    missing = [shape for shape in SHAPES if shape not in weights]
    count = sum(p.numel() for p in model.parameters())
    _demand(not missing, f"there is no weight of shape {missing and missing[0]}; {count:,} parameters, not 61,706.")
    _demand(count == 61_706, f"LeNet-5 has 61,706 parameters, this one {count:,}: a layer too many?")

    def forward(pool=nn.functional.max_pool2d, activation=torch.relu, last=lambda x: x, first_only=False):
        c1, b1, c3, b3, c5, b5, f6, b6, out, b7 = (weights[shape] for shape in SHAPES)
        x = activation(pool(nn.functional.conv2d(images, c1, b1, padding=2), 2))
        x = activation(pool(nn.functional.conv2d(x, c3, b3), 2)).flatten(start_dim=1)
        hidden = (lambda x: x) if first_only else activation
        return last(hidden(hidden(x @ c5.T + b5) @ f6.T + b6) @ out.T + b7)

    wrong = {
        "the pooling takes the average: LeNet5() should take the maximum.": forward(nn.functional.avg_pool2d),
        "there is a ReLU behind the last layer: logits may be negative.": forward(last=torch.relu),
        "there is a softmax behind the last layer: the criterion has it already.": forward(last=lambda x: x.softmax(1)),
        "no activation behind the linear layers C5 and F6.": forward(first_only=True),
        "no activation anywhere: without one the network is nearly linear.": forward(activation=lambda x: x),
        "the activation is tanh: LeNet5() should use ReLU.": forward(activation=torch.tanh),
    }
    other = "the logits are others than C1, S2, C3, S4, C5, F6 and the output layer give, each with its activation."
    _compare(logits, forward(), wrong, other)
    return "LeNet-5: 61,706 parameters, and the logits are right."


@_check
def cross_entropy(function):
    """`function(logits, labels)` is the mean over the batch of -ln p(label)."""
    logits, labels = 3 * torch.randn(6, 5), torch.tensor([0, 4, 1, 1, 3, 2])
    right, each = nn.functional.cross_entropy(logits, labels), nn.functional.cross_entropy
    loss = function(logits.clone(), labels)
    _demand(
        isinstance(loss, torch.Tensor), f"the loss should be a tensor without dimensions, not {type(loss).__name__}."
    )
    picked = logits[torch.arange(6), labels]
    wrong = {
        "the sum over the batch, where the mean is wanted.": each(logits, labels, reduction="sum"),
        "one loss for each image: take the mean.": each(logits, labels, reduction="none"),
        "the sign is wrong: it is minus the logarithm.": -right,
        "the logarithm is missing: this is minus the mean probability.": -logits.softmax(1)[
            torch.arange(6), labels
        ].mean(),
        "the softmax is missing: these are logits, no logarithms of probabilities.": -picked.mean(),
        "softmax is taken twice: before the logarithm and in it.": each(logits.softmax(1), labels),
        "softmax is taken over the images of the batch: dim=1 is over the classes.": -(
            logits.log_softmax(0)[torch.arange(6), labels].mean()
        ),
        "logarithm to base 2 or 10: take the natural one.": right / math.log(2),
    }
    _compare(loss, right, wrong, f"the loss is {loss.detach().flatten()[:3].tolist()}, it should be {right:.4f}.")
    large = torch.tensor([[1000.0, 0.0], [0.0, -1000.0]])
    value = function(large, torch.tensor([1, 0]))
    message = f"logits of 1,000 give {value.item()}, not 500: subtract the largest logit before exp, or use logsumexp."
    _demand(math.isclose(value.item(), 500, rel_tol=1e-5), message)
    leaf = logits.clone().requires_grad_()
    function(leaf, labels).backward()
    expected = (logits.softmax(1) - nn.functional.one_hot(labels, 5)) / 6
    _demand(
        leaf.grad is not None and _close(leaf.grad, expected), "its gradient is not (p - y) / N: is there a detach?"
    )
    return "cross-entropy: value, large logits and gradient are right."


@_check
def sgd_step(function):
    """`function(parameters, velocities, learning_rate, momentum)` changes both in place: v = μ v + g, p = p - η v."""
    results = []
    for start in (0.0, 0.5):
        p, v = torch.tensor([3.0, -2.0], requires_grad=True), torch.full((2,), start)
        p.grad = torch.tensor([1.0, -4.0])
        function([p], [v], 0.2, 0.9)
        results.append((p.detach().clone(), v.clone()))
        _demand(p.requires_grad and p.is_leaf, "the parameter has become another tensor: change it in place.")
    (p, v), w, g = results[1], torch.tensor([3.0, -2.0]), torch.tensor([1.0, -4.0])
    right_v = 0.9 * torch.full((2,), 0.5) + g
    _demand(
        not _close(p, w), "the parameters did not change: p -= ... changes in place, p = p - ... makes a new tensor."
    )
    wrong = {
        "the velocity did not change in place: the next step will have forgotten it.": torch.full((2,), 0.5),
        "the gradient is multiplied by 1 - momentum: here it is added whole.": 0.9 * 0.5 + 0.1 * g,
        "the velocity contains the learning rate: keep it out, v = momentum * v + gradient.": 0.45 + 0.2 * g,
        "momentum is applied to the gradient too.": 0.9 * (0.5 + g),
        "the velocity is the gradient alone: the old one is lost.": g,
    }
    _compare(v, right_v, wrong, f"the velocity is {v.tolist()}, it should be {right_v.tolist()}.")
    wrong = {
        "the step goes up: subtract, since the gradient points to larger losses.": w + 0.2 * right_v,
        "the step is the gradient's, without momentum: subtract the velocity.": w - 0.2 * g,
        "the step lacks the learning rate.": w - right_v,
        "momentum is applied twice: in the velocity and in the step.": w - 0.2 * 0.9 * right_v,
        "the step uses the velocity of before: update it first.": w - 0.2 * torch.full((2,), 0.5),
        "this is Nesterov's form, which looks a step ahead; here the plain one is wanted.": w
        - 0.2 * (g + 0.9 * right_v),
    }
    _compare(p, w - 0.2 * right_v, wrong, f"the parameters are {p.tolist()}, not {(w - 0.2 * right_v).tolist()}.")
    return "SGD with momentum: parameters and velocities are right after the step."


class _Scheduler:
    """Counts its steps, and notes what the optimizer had done."""

    def __init__(self):
        self.steps = 0

    def step(self):
        self.steps += 1


def _epoch(train, model, criterion, batches, rate=0.5):
    """Train the model with `train`; return losses, sum, right answers, weights and steps of the scheduler."""
    optimizer, scheduler = torch.optim.SGD(model.parameters(), rate), _Scheduler()
    losses, loss_sum, correct = train(model, batches, criterion, optimizer, scheduler)
    return losses, loss_sum, correct, torch.cat([p.detach().flatten() for p in model.parameters()]), scheduler.steps


@_check
def train_one_epoch(function):
    """`function(model, batches, criterion, optimizer, scheduler)` takes one step for each batch, in the right order."""
    batches = [(torch.randn(size, 1, 4, 4), torch.arange(size) % 3) for size in (8, 8, 4)]
    criterion, first = nn.CrossEntropyLoss(), nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3))
    begin = {name: value.clone() for name, value in first.state_dict().items()}

    def model(dropout=0.0):
        made = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(16, 3))
        made.load_state_dict(begin)
        return made

    def reference(zero="before", update=True, softmax=False):
        def train(model, batches, criterion, optimizer, scheduler):
            losses, total, correct = [], 0.0, 0
            for images, labels in batches:
                logits = model(images)
                loss = criterion(logits.softmax(1) if softmax else logits, labels)
                if zero == "before":
                    optimizer.zero_grad()
                loss.backward()
                if zero == "between":
                    optimizer.zero_grad()
                if update:
                    optimizer.step()
                scheduler.step()
                losses.append(loss.detach())
                total, correct = total + loss.detach() * len(labels), correct + (logits.argmax(1) == labels).sum()
            return torch.stack(losses), total, correct

        return _epoch(train, model(), criterion, batches)

    right = reference()
    trained = model()
    trained.eval()
    losses, loss_sum, correct, weights, steps = _epoch(function, trained, criterion, batches)
    wrong = {
        "zero_grad is never called: the gradients of all steps add up.": reference(zero="never")[3],
        "the weights did not change: zero_grad stands between backward and step, or one of these is missing.": (
            reference(zero="between")[3]
        ),
        "softmax stands before the criterion, which takes logits.": reference(softmax=True)[3],
    }
    _compare(weights, right[3], wrong, "the weights after three steps are others: forward, loss, zero, backward, step?")
    _demand(trained.training, "the model should be in training mode: model.train().")
    _demand(steps == len(batches), f"the scheduler took {steps} steps for {len(batches)} batches: one after each step.")
    _demand(_close(losses, right[0]), "the losses should be those of each step, [steps].")
    _demand(not losses.requires_grad, "the losses keep the graph of every step alive: detach them.")
    means = right[0].sum()
    _compare(
        loss_sum, right[1], {"the loss is summed over steps: over images it is loss × len(labels).": means}, "loss_sum?"
    )
    _demand(int(correct) == int(right[2]), f"{int(correct)} right answers, it should be {int(right[2])}.")
    return "a training epoch: weights, losses and sums are right after three steps."


@_check
def evaluate(function):
    """`function(model, batches)` returns (mean loss, accuracy) over all images: evaluation mode, no gradients."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, images):
            self.seen = self.training, torch.is_grad_enabled()
            return images.flatten(start_dim=1)[:, :3] * self.weight

    model = Noisy().train()
    batches = [(2 * torch.randn(size, 1, 2, 2), torch.randint(3, (size,))) for size in (8, 8, 3)]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    logits = images.flatten(start_dim=1)[:, :3]
    right = nn.functional.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()
    result = function(model, batches)
    _demand(isinstance(result, tuple) and len(result) == 2, "return two numbers: mean loss and accuracy.")
    training, gradients = model.seen
    _demand(not training, "the model is in training mode: call model.eval() first.")
    _demand(not gradients, "gradients are recorded: put the loop under torch.no_grad().")
    _demand(model.training, "the model stays in evaluation mode: restore the mode that it had.")
    loss, accuracy = (float(value) for value in result)
    each = [nn.functional.cross_entropy(x.flatten(start_dim=1)[:, :3], y).item() for x, y in batches]
    hits = [(x.flatten(start_dim=1)[:, :3].argmax(1) == y).float().mean().item() for x, y in batches]
    mean = "the mean of the batches' means: the last batch is smaller, so weight each by its images."
    _compare(
        loss, right[0], {mean: sum(each) / 3, "the losses are added, not averaged.": sum(each)}, f"loss {loss:.4f}?"
    )
    wrong = {mean: sum(hits) / 3, "the accuracy is a number of images: divide by all of them.": right[1] * len(labels)}
    wrong |= {"the accuracy is in per cent: from 0 to 1 is wanted.": 100 * right[1]}
    _compare(accuracy, right[1], wrong, f"the accuracy is {accuracy:.4f}, it should be {right[1]:.4f}.")
    return "evaluation: exact with a smaller last batch, mode and gradients as they should be."


@_check
def guesses(numbers):
    """Each guess is a number of per cent."""
    odd = [name for name, value in numbers.items() if not isinstance(value, int | float) or not 0 <= value <= 100]
    _demand(not odd, f"the guess for {odd and odd[0]!r} should be a number from 0 to 100, in per cent.")
    return f"{len(numbers)} guesses are noted."


@_check
def my_network(network, shape):
    """`network(classes)` gives logits [N, classes] of images [N, *shape], and knows nothing yet."""
    for classes in (10, 7):
        model = network(classes=classes)
        images, labels = torch.randn(32, *shape), torch.arange(32) % classes
        logits = model(images)
        got = list(logits.shape)
        _demand(got == [32, classes], f"32 images and {classes} classes should give [32, {classes}], not {got}.")
        loss, chance = nn.functional.cross_entropy(logits, labels).item(), math.log(classes)
        text = f"the first loss is {loss:.2f}; of a network that knows nothing it is ln {classes} = {chance:.2f}."
        _demand(loss < 2 * chance, text + " Are the logits too large?")
        _demand(
            (logits >= 0).any() and (logits < 0).any(), "all logits have one sign: is there an activation at the end?"
        )
    count = sum(parameter.numel() for parameter in model.parameters())
    _demand(count, "the network has no parameters: are its layers attributes of self?")
    return f"a network of your own: {count:,} parameters, shapes and first loss are right."

"""Checks of the exercises: does what was written do what it should, and if not, what is the likely mistake?

Each check prints one line where all is right. Else it raises `Wrong`, in one sentence, or `Unwritten` for a blank that
is still empty. Values are compared with torch's own functions and with those of known mistakes. Nothing is trained,
no file is read, and the random numbers are as they were before.
"""

import functools
import inspect
import math
import traceback

import torch
from torch import nn

import helpers

UNWRITTEN = "not written yet: exercise {}, about {} minutes"  # in every blank of the student edition


class Wrong(Exception):
    """What was written does something else than it should."""

    def __str__(self):
        return helpers.translate(super().__str__())

    def _render_traceback_(self):  # IPython shows this line and no stack
        return [f"{type(self).__name__}: {self}"]


class Unwritten(Wrong):
    """A blank is still empty."""


def _check(function):
    """Turn errors of what is checked into sentences; restore the random numbers; with strict=False only print."""

    @functools.wraps(function)
    def checked(*arguments, strict=True):
        state, gradients = torch.get_rng_state(), torch.is_grad_enabled()
        try:
            torch.manual_seed(0)
            print("✓", helpers.translate(function(*arguments)))
        except Exception as error:
            if isinstance(error, NotImplementedError) and "not written yet" in (str(error) or "not written yet"):
                error = Unwritten(str(error) or "not written yet")
            elif not isinstance(error, Wrong):
                stack = traceback.extract_tb(error.__traceback__)  # the last line that is neither ours nor a library's
                ours = {__file__, helpers.__file__}  # torch is in dist-packages on Colab
                own = [frame for frame in stack if frame.filename not in ours and "-packages" not in frame.filename]
                kind, line = type(error).__name__, own[-1].line if own else ""
                where = f"it stops with {kind} in the line `{line}`: {error}"
                if not own and "NoneType" in str(error):
                    where = line = "it returns nothing: is the return missing, or does it stand in the wrong place?"
                elif not own and "does not require grad" in str(error):
                    where = line = "no gradient flows through it: is there a detach, .item(), .data or no_grad?"
                error = Wrong(where if line else f"it stops with {kind}: {error}")
            if strict or isinstance(error, Unwritten):
                raise error from None
            print("✗", error)
        finally:
            torch.set_rng_state(state)
            torch.set_grad_enabled(gradients)

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


def _flat(value):
    """What lists, tuples and dicts hold, however deep."""
    if not isinstance(value, dict | list | tuple):
        return [value]
    return [one for part in (value.values() if isinstance(value, dict) else value) for one in _flat(part)]


def _demand_no_hidden_layers(model) -> None:
    """Layers in a plain list or dict have no parameters for PyTorch, unless they are attributes, too."""
    known = {id(parameter) for parameter in model.parameters()}
    for name, value in [pair for module in model.modules() for pair in vars(module).items()]:
        layers = [] if name.startswith("_") else [part for part in _flat(value) if isinstance(part, nn.Module)]
        hidden = any(id(parameter) not in known for layer in layers for parameter in layer.parameters())
        _demand(not hidden, f"self.{name} hides its layers from PyTorch: make it nn.Sequential or nn.ModuleList.")


# ---------------------------------------------------------------------------------------------------------- MNIST.ipynb

SHAPES = [(6, 1, 5, 5), (6,), (16, 6, 5, 5), (16,), (120, 400), (120,), (84, 120), (84,), (10, 84), (10,)]


@_check
def lenet5(network):
    """`network()` is LeNet-5: 61,706 parameters; ReLU, maximum pooling, logits [N, 10] of images [N, 1, 28, 28]."""
    model = network().eval()
    _demand_no_hidden_layers(model)
    images = torch.randn(3, 1, 28, 28)
    logits = model(images)
    _demand(tuple(logits.shape) == (3, 10), f"three images should give logits [3, 10], not {list(logits.shape)}.")
    with torch.no_grad():  # a network that starts at 0 would hide mistakes, and the effect of the arguments
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * (2 / p[0].numel()) ** 0.5 if p.dim() > 1 else 0.1 * torch.randn(p.shape))
    logits = model(images)
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
        "there is a log_softmax behind the last layer: the criterion has it already.": forward(
            last=lambda x: x.log_softmax(1)
        ),
        "there is a sigmoid behind the last layer: logits may be any numbers.": forward(last=torch.sigmoid),
        "no activation behind the linear layers C5 and F6.": forward(first_only=True),
        "no activation anywhere: without one the network is nearly linear.": forward(activation=lambda x: x),
        "the activation is tanh: LeNet5() should use ReLU.": forward(activation=torch.tanh),
    }
    other = "the logits are others than C1, S2, C3, S4, C5, F6 and the output layer give, each with its activation."
    _compare(logits, forward(), wrong, other)
    taken = inspect.signature(network).parameters
    if "classes" in taken:
        got = list(network(classes=7).eval()(images).shape)
        _demand(got == [3, 7], f"with classes=7 three images should give logits [3, 7], not {got}.")
    if {"activation", "pool"} <= taken.keys():  # as on the page; a version with no such arguments is right, too
        for name, kind in (("activation", nn.Tanh), ("pool", nn.AvgPool2d)):
            changed = network(**{name: kind}).eval()
            changed.load_state_dict(model.state_dict())
            _demand(
                not _close(changed(images), logits),
                f"the argument `{name}` has no effect: section 10 changes the network by it.",
            )
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
    _demand(
        loss.dim() == 0 or loss.numel() > 1,
        f"the loss should be a tensor without dimensions, not of shape {list(loss.shape)}.",
    )
    picked, log_p = logits[torch.arange(6), labels], logits.log_softmax(1)
    wrong = {
        "it is divided by the number of images and of classes: sum over the classes, mean over the images.": right / 5,
        "logits[:, labels] takes all labels of each row: logits[torch.arange(len(labels)), labels] takes its own.": (
            logits.logsumexp(1) - logits[:, labels]
        ).mean(),
        "the largest logit is subtracted in one part only: in both, or add it again.": right - logits.amax(1).mean(),
        "all classes count alike: only the label's probability should.": -log_p.mean(),
        "the largest logit of a column is subtracted: take each row's, dim=1.": (
            (logits - logits.amax(0)).logsumexp(1) - (logits - logits.amax(0))[torch.arange(6), labels]
        ).mean(),
        "logarithm to base 10: take the natural one.": right / math.log(10),
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
        "logarithm to base 2: take the natural one.": right / math.log(2),
    }
    _compare(loss, right, wrong, f"the loss is {loss.detach().flatten()[:3].tolist()}, it should be {right:.4f}.")
    large = torch.tensor([[1000.0, 0.0, 0.0], [0.0, -1000.0, -1000.0]])  # no image of the last class
    value = function(large, torch.tensor([1, 0]))
    message = f"logits of 1,000 give {value.item()}, not 500: subtract each row's largest logit, stay in logarithms."
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
        more = torch.ones(3, 1, requires_grad=True), torch.full((3, 1), 2.0)
        more[0].grad = torch.full((3, 1), 3.0)
        function([p, more[0]], [v, more[1]], 0.2, 0.9)
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
        "momentum is applied to the gradient, not to the old velocity.": 0.5 + 0.9 * g,
        "momentum is missing: the old velocity is added whole.": 0.5 + g,
        "the gradient does not reach the velocity: a name that ends with _ changes the tensor itself.": (
            0.9 * torch.full((2,), 0.5)
        ),
        "the velocity is multiplied by the learning rate in the end: learning_rate * v leaves it alone.": 0.2 * right_v,
        "the velocity has the other sign: v = momentum * v + gradient, and the step subtracts it.": 0.45 - g,
        "the velocity has the learning rate and the other sign: v = momentum * v + gradient.": 0.45 - 0.2 * g,
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
    _demand(
        _close(more[0].detach(), torch.full((3, 1), 1 - 0.2 * 4.8)) and _close(more[1], torch.full((3, 1), 4.8)),
        "the second parameter is wrong: does the loop go over all, each with its own velocity? A return ends it.",
    )
    return "SGD with momentum: parameters and velocities are right after the step."


class _Scheduler:
    """Counts its steps; each halves the rate, so that one before the optimizer's shows in the weights."""

    def __init__(self, optimizer):
        self.steps, self.group = 0, optimizer.param_groups[0]

    def step(self):
        self.steps += 1
        self.group["lr"] /= 2


def _epoch(train, model, criterion, batches, *precision):
    """Train the model with `train`; return losses, sum, right answers, weights and steps of the scheduler."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = _Scheduler(optimizer)
    losses, loss_sum, correct = train(model, batches, criterion, optimizer, scheduler, *precision)
    return losses, loss_sum, correct, torch.cat([p.detach().flatten() for p in model.parameters()]), scheduler.steps


@_check
def train_one_epoch(function):
    """`function(model, batches, criterion, optimizer, scheduler)` takes one step for each batch, in the right order."""
    batches = [(torch.randn(size, 1, 4, 4), torch.arange(size) % 3) for size in (8, 8, 4)]
    criterion = nn.CrossEntropyLoss(label_smoothing=0.2)  # not torch's default, nor the student's own
    first = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3))
    begin = {name: value.clone() for name, value in first.state_dict().items()}

    def model(dropout=0.0):
        made = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(16, 3))
        made.load_state_dict(begin)
        return made

    def reference(order="zbsr", softmax=False, plain=False, scale=None):  # zero_grad, backward, step, the next rate
        def train(model, batches, criterion, optimizer, scheduler):
            losses, total, correct = [], 0.0, 0
            for images, labels in batches:
                logits = model(images)
                loss = criterion(logits.softmax(1) if softmax else logits, labels)
                loss = nn.functional.cross_entropy(logits, labels) if plain else loss
                loss = loss * len(labels) ** scale if scale else loss
                for act in order:
                    {"z": optimizer.zero_grad, "b": loss.backward, "s": optimizer.step, "r": scheduler.step}[act]()
                losses.append(loss.detach())
                total, correct = total + loss.detach() * len(labels), correct + (logits.argmax(1) == labels).sum()
            return torch.stack(losses), total, correct

        return _epoch(train, model(), criterion, batches)

    right = reference()
    trained = model()
    trained.eval()
    losses, loss_sum, correct, weights, steps = _epoch(function, trained, criterion, batches)
    wrong = {
        "zero_grad is never called: the gradients of all steps add up.": reference("bsr")[3],
        "the weights did not change: is there a step, and a gradient left for it? Order: zero_grad, backward, step.": (
            reference("bzsr")[3]
        ),
        "softmax stands before the criterion, which takes logits.": reference(softmax=True)[3],
        "step stands before backward: each step follows the gradient of the batch before.": reference("szbr")[3],
        "the loss is not the criterion's: criterion(logits, labels).": reference(plain=True)[3],
        "the optimizer steps twice for each batch.": reference("zbssr")[3],
        "the loss is divided by the number of images: the criterion's is a mean already.": reference(scale=-1)[3],
        "the loss is multiplied by the number of images before backward: only the sum below is.": reference(scale=1)[3],
        "the scheduler steps before the optimizer, which then has the next step's rate.": reference("zbrs")[3],
    }
    text = f"the scheduler took {steps} steps for {len(batches)} batches: one after each step."
    _demand(steps == len(batches), text)
    _compare(weights, right[3], wrong, "the weights after three steps are others: forward, loss, zero, backward, step?")
    _demand(trained.training, "the model should be in training mode: model.train().")
    _demand(torch.is_tensor(losses), "the losses should be one tensor, [steps]: torch.stack makes it of a list.")
    _demand(_close(losses, right[0]), "the losses should be those of each step, [steps].")
    _demand(not losses.requires_grad, "the losses keep the graph of every step alive: detach them.")
    means = right[0].sum()
    _compare(
        loss_sum, right[1], {"the loss is summed over steps: over images it is loss × len(labels).": means}, "loss_sum?"
    )
    _demand(int(correct) == int(right[2]), f"{int(correct)} right answers, it should be {int(right[2])}.")
    watched = _Watchful()
    _epoch(function, watched, criterion, batches, "bf16")
    _demand(watched.seen[2], "forward does not run under helpers.autocast(images.device, precision).")
    return "a training epoch: weights, losses and sums are right after three steps."


class _Watchful(nn.Module):
    """Notes in which mode it was called, whether with gradients, whether under autocast."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images):
        self.seen = self.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        return images.flatten(start_dim=1)[:, :3] * self.weight


@_check
def evaluate(function):
    """`function(model, batches)` returns (mean loss, accuracy) over all images: evaluation mode, no gradients."""
    model = _Watchful().train()
    batches = [(2 * torch.randn(size, 1, 2, 2), torch.randint(3, (size,))) for size in (8, 8, 3)]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    logits = images.flatten(start_dim=1)[:, :3]
    right = nn.functional.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()
    result = function(model, batches)
    stopped = not torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    _demand(not stopped, "gradients stay switched off afterwards: with torch.no_grad(): switches them on again.")
    _demand(isinstance(result, tuple | list) and len(result) == 2, "return two numbers: mean loss and accuracy.")
    plain = all(isinstance(value, int | float) for value in result)
    _demand(plain, "return plain numbers: .item() makes one of a tensor.")
    training, gradients, _ = model.seen
    _demand(not training, "the model is in training mode: call model.eval() first.")
    _demand(not gradients, "gradients are recorded: put the loop under torch.no_grad().")
    _demand(model.training, "the model stays in evaluation mode: restore the mode that it had.")
    function(model.eval(), batches)
    _demand(not model.training, "a model in evaluation mode comes back in training mode: restore the mode that it had.")
    loss, accuracy = result
    each = [nn.functional.cross_entropy(x.flatten(start_dim=1)[:, :3], y).item() for x, y in batches]
    hits = [(x.flatten(start_dim=1)[:, :3].argmax(1) == y).float().mean().item() for x, y in batches]
    mean = "the mean of the batches' means: the last batch is smaller, so weight each by its images."
    wrong = {
        mean: sum(each) / 3,
        "the losses are added, not averaged.": sum(each),
        "the loss is the sum over all images: divide by their number.": right[0] * len(labels),
        "means of batches are added and divided by the images: weight each by len(labels), or reduction='sum'.": (
            sum(each) / len(labels)
        ),
        "the sum over images is divided by the number of batches.": right[0] * len(labels) / 3,
        "loss and accuracy are exchanged: the loss comes first.": right[1],
        "the loss of the first batch alone: does the return stand in the loop?": each[0],
        "the loss of the last batch alone: add them up.": each[-1],
        "softmax stands before the cross-entropy, which takes logits.": nn.functional.cross_entropy(
            logits.softmax(1), labels
        ).item(),
    }
    _compare(loss, right[0], wrong, f"the loss is {loss:.4f}, it should be {right[0]:.4f}.")
    wrong = {mean: sum(hits) / 3, "the accuracy is a number of images: divide by all of them.": right[1] * len(labels)}
    wrong |= {"right answers are divided by the number of batches.": right[1] * len(labels) / 3}
    wrong |= {"the accuracy is in per cent: from 0 to 1 is wanted.": 100 * right[1]}
    _compare(accuracy, right[1], wrong, f"the accuracy is {accuracy:.4f}, it should be {right[1]:.4f}.")
    return "evaluation: exact with a smaller last batch, mode and gradients as they should be."


@_check
def guesses(numbers):
    """Each of the three mistakes has a guess, a number of per cent."""
    _demand(
        isinstance(numbers, dict),
        f"GUESSES should be a dict with a number for each name, not {type(numbers).__name__}.",
    )
    missing = [name for name in ("no zero_grad", "rate × 10", "not normalised") if name not in numbers]
    _demand(not missing, f"GUESSES lacks the key {missing and missing[0]!r}.")
    odd = [name for name, value in numbers.items() if not isinstance(value, int | float) or not 0 <= value <= 100]
    _demand(not odd, f"the guess for {odd and odd[0]!r} should be a number from 0 to 100, in per cent.")
    return f"{len(numbers)} guesses are noted."


@_check
def my_network(network, shape):
    """`network(classes)` gives logits [N, classes] of images [N, *shape], and knows nothing yet."""
    for classes in (7, 10):
        model = network(classes=classes)
        _demand_no_hidden_layers(model)
        images, labels = torch.randn(32, *shape), torch.arange(32) % classes
        logits = model(images)
        got = list(logits.shape)
        _demand(got == [32, classes], f"32 images and {classes} classes should give [32, {classes}], not {got}.")
        loss, chance = nn.functional.cross_entropy(logits, labels).item(), math.log(classes)
        text = f"the first loss is {loss:.2f}, not about ln {classes} = {chance:.2f}: are the logits too large?"
        _demand(loss < 2 * chance, text)
        _demand(
            ((logits >= 0).any() and (logits < 0).any()) or not logits.any(),  # a last layer may start at 0
            "all logits have one sign: is there a ReLU or a softmax at the end? Nothing should stand there.",
        )
        _demand(
            logits.requires_grad or not [*model.parameters()],
            "no gradient flows to the weights: is there a detach or no_grad?",
        )
        model.eval()
        text = "two calls in evaluation mode differ: is a layer made in forward, or F.dropout always on?"
        _demand(_close(model(images).detach(), model(images).detach()), text)
    count = sum(parameter.numel() for parameter in model.parameters())
    _demand(count, "the network has no parameters: are its layers attributes of self?")
    return f"a network of your own: {count:,} parameters, shapes and first loss are right."


# ---------------------------------------------------------------------------------------------------------- CIFAR.ipynb


def _chosen(flip, images):
    return torch.where(flip[:, None, None, None], images.flip(-1), images).float()


@_check
def mirror(function):
    """`function(images, chances, epoch, alternate)` mirrors the images that the chances choose, [B, C, H, W]."""
    images, chances = torch.randint(256, (12, 3, 6, 8), dtype=torch.uint8), torch.rand(12, 5)
    last, third = chances[:, 4] < 0.5, chances[:, 2] < 0.5
    for epoch, alternate, flip in ((2, True, last), (3, True, ~last), (2, False, third), (3, False, third)):
        options = {} if alternate else dict(alternate=False)
        given = images.clone()
        seen = function(given, chances.clone(), epoch, **options)
        _demand(_close(given, images), "the images given were changed themselves: build new ones, or clone first.")
        wrong = {
            "no image is mirrored: the last dimension of the images is the width.": images.float(),
            "all images are mirrored, or none: choose for each image.": images.flip(-1).float(),
            "the images are upside down: mirror the last dimension, the width.": torch.where(
                flip[:, None, None, None], images.flip(-2), images
            ).float(),
            "the colours are exchanged: mirror the last dimension, the width.": torch.where(
                flip[:, None, None, None], images.flip(1), images
            ).float(),
            "the images are turned by half: mirror the last dimension alone.": torch.where(
                flip[:, None, None, None], images.flip(2, 3), images
            ).float(),
            f"epoch {epoch} mirrors the images that it should leave, and leaves the others: 0.5, and even or odd?": (
                _chosen(~flip, images)
            ),
            "with alternate=False the third chance decides, chances[:, 2], in every epoch.": _chosen(
                last if epoch == 2 else ~last, images
            ),
            "with alternate the last chance decides, chances[:, 4], which stays with the image.": _chosen(
                third, images
            ),
        }
        if epoch == 3 and alternate:
            none = "odd epochs mirror nothing: they should mirror the images that even ones leave."
            wrong = {none: images.float()} | wrong
            odd = "odd epochs mirror the same images as even ones: they should mirror the others."
            wrong = {odd: _chosen(last, images)} | wrong
        _demand(torch.is_tensor(seen), "return the images, [B, C, H, W].")
        got, want = list(seen.shape), list(images.shape)
        _demand(got == want, f"all images should come back, [B, C, H, W]: {want}, not {got}.")
        _compare(seen.float(), _chosen(flip, images), wrong, "others are mirrored than the chances choose.")
    return "mirror: the right images, alternating or not."


@_check
def shift(function):
    """`function(images, chances, pixels)` moves each image by its own chances, the border reflected."""
    images, chances, pixels = torch.randint(256, (9, 3, 7, 8), dtype=torch.uint8), torch.rand(9, 5), 2
    chances[0, :2] = torch.tensor([0.0, 0.999])  # both ends of the range

    def moved(mode="reflect", down=lambda d, r: d, right=lambda d, r: r, most=2 * pixels + 1):
        begin = (chances[:, :2] * most).long()
        padded = nn.functional.pad(images.float(), (pixels,) * 4, mode=mode)
        return torch.stack(
            [
                image[:, down(d, r) : down(d, r) + 7, right(d, r) : right(d, r) + 8]
                for image, (d, r) in zip(padded, begin.tolist(), strict=True)
            ]
        )

    first = (chances[0, :2] * (2 * pixels + 1)).long().tolist()
    given = images.clone()
    seen = function(given, chances.clone(), pixels)
    _demand(torch.is_tensor(seen), "return the images, [B, C, H, W].")
    _demand(_close(given, images), "the images given were changed themselves: build new ones, or clone first.")
    got = list(seen.shape)
    _demand(got == [9, 3, 7, 8], f"the images should keep their size: [9, 3, 7, 8], not {got}.")
    wrong = {
        "one shift for the whole batch: each image has chances of its own.": moved(
            down=lambda d, r: first[0], right=lambda d, r: first[1]
        ),
        "the border is black: pad by reflection.": moved("constant"),
        "the border is repeated: pad by reflection, mode='reflect'.": moved("replicate"),
        "what leaves on one side comes back on the other: pad by reflection.": moved("circular"),
        "rows and columns are exchanged: the first chance gives the window's row, the second its column.": moved(
            down=lambda d, r: r, right=lambda d, r: d
        ),
        "the shift goes the other way: the window begins at the row that the chance gives.": moved(
            down=lambda d, r: 4 - d, right=lambda d, r: 4 - r
        ),
        "the largest shift is never drawn: there are 2 * pixels + 1 places for a window.": moved(most=2 * pixels),
        "the images are only moved up and left: there are 2 * pixels + 1 places for a window.": moved(most=pixels + 1),
        "nothing is moved.": images.float(),
        "row and column come from the same chance: the second gives the column.": moved(right=lambda d, r: d),
        "all windows begin at 0: multiply first, then .long() drops what is behind the point.": moved(
            down=lambda d, r: 0, right=lambda d, r: 0
        ),
        "what leaves on one side comes back on the other: pad by reflection, and cut a window.": moved(
            "circular", down=lambda d, r: 4 - d, right=lambda d, r: 4 - r
        ),
    }
    _compare(seen.float(), moved(), wrong, "the images are moved otherwise than the chances say.")
    return "shift: every image by its own chances, the border reflected."


@_check
def batch_norm(layer):
    """`layer(channels, momentum, epsilon)` does what nn.BatchNorm2d does, with a bias and no scale."""
    one, right = layer(3, momentum=0.3, epsilon=0.01), nn.BatchNorm2d(3, momentum=0.3, eps=0.01)
    bias = torch.tensor([0.5, -1.0, 2.0])
    right.bias.data.copy_(bias)
    one.bias.data.copy_(bias)
    x = 2 * torch.randn(4, 3, 2, 5) + torch.tensor([1.0, -2.0, 0.5]).view(-1, 1, 1)
    leaf, other = (x.clone().requires_grad_() for _ in range(2))
    one.train()
    try:
        y = one(leaf)
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        if "must match" not in text and "broadcast" not in text:
            raise
        hint = (
            f"{text}: mean and variance are over dim=(0, 2, 3); [C] numbers need the shape [C, 1, 1]: view(-1, 1, 1)."
        )
        raise Wrong(hint) from None
    _demand(y is not None, "it returns nothing: is the return missing, or does it stand in the wrong place?")
    expected = right(other)
    mean, var = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), correction=0)
    m, v, b = (t.view(-1, 1, 1) for t in (mean, var, bias))
    wrong = {
        "the bias is missing.": expected - b,
        "the running averages normalise the training batch: take the batch's own mean and variance.": x / 1.01**0.5 + b,
        "the mean is not subtracted.": x / (v + 0.01).sqrt() + b,
        "it is divided by the variance, not by its root.": (x - m) / (v + 0.01) + b,
        "the running averages, already updated, normalise the training batch: take the batch's own.": (
            (x - 0.3 * m) / (0.7 + 0.3 * v * 40 / 39 + 0.01).sqrt() + b
        ),
        "the variance has 1/(n - 1), and epsilon is outside of the root: √(variance + ε), correction=0.": (
            (x - m) / ((v * 40 / 39).sqrt() + 0.01) + b
        ),
        "the variance has 1/(n - 1), and epsilon is missing: √(variance + ε), correction=0.": (
            (x - m) / (v * 40 / 39).sqrt() + b
        ),
        "epsilon is missing, or another number than self.epsilon.": (x - m) / v.sqrt() + b,
        "epsilon is outside of the root: √(variance + ε).": (x - m) / (v.sqrt() + 0.01) + b,
        "the training batch is divided by the variance with 1/(n - 1): here it is the one with 1/n.": (
            (x - m) / (v * 40 / 39 + 0.01).sqrt() + b
        ),
        "the statistics are over the images alone, one for each place: take those over N, H and W.": (
            (x - x.mean(0)) / (x.var(0, correction=0) + 0.01).sqrt() + b
        ),
        "the statistics are those of single images: take those over N, H and W.": (
            (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), correction=0, keepdim=True) + 0.01).sqrt() + b
        ),
        "one mean and variance for all channels: each channel has its own.": (
            (x - x.mean()) / (x.var(correction=0) + 0.01).sqrt() + b
        ),
    }
    _compare(
        y.detach(),
        expected.detach(),
        {k: w.detach() for k, w in wrong.items()},
        "the output in training is not (x - mean) / √(variance + ε) + bias.",
    )
    weights = torch.randn(y.shape)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    text = "the gradient treats mean or variance as constants: detach only what goes into the running averages."
    _demand(leaf.grad is not None and _close(leaf.grad, other.grad, 1e-3), text)
    for name, batch, start in (("running_mean", mean, 0.0), ("running_var", var * 40 / 39, 1.0)):
        value, target = getattr(one, name), getattr(right, name)
        _demand(
            not value.requires_grad,
            f"{name} remembers how it was computed, and so every batch: use mean.detach() for it.",
        )
        wrong = {
            f"{name} did not change: update it in place, in training.": torch.full((3,), start),
            f"{name} is the batch's: only a share, the momentum, is new.": batch,
            f"{name} takes a tenth of the batch's whatever the momentum is: use self.momentum.": 0.9 * start
            + 0.1 * batch,
            f"{name} keeps a share of `momentum` of the old value: that is the share of the new one.": (
                0.3 * start + 0.7 * batch
            ),
            "running_var takes the biased variance, 1/n: the average takes the one with 1/(n - 1).": (
                0.7 * start + 0.3 * var
            ),
        }
        got, want = ([round(number, 4) for number in t.tolist()] for t in (value, target))
        _compare(value, target, wrong, f"{name} is {got}, it should be {want}.")
    one.eval()
    right.eval()
    before, z = one.running_mean.clone(), x[:1] + 3
    m, v = z.mean((0, 2, 3)).view(-1, 1, 1), z.var((0, 2, 3), correction=0).view(-1, 1, 1)
    batch = "in evaluation the batch's statistics are used: take the running averages, see self.training."
    _compare(
        one(z).detach(),
        right(z).detach(),
        {batch: (z - m) / (v + 0.01).sqrt() + b},
        "the output in evaluation is not that of the running averages.",
    )
    _demand(_close(one.running_mean, before), "the running averages move in evaluation: only in training.")
    return "batch normalisation: training, running averages, gradient and evaluation."


@_check
def block(layer):
    """`layer(in, out, kernels, shortcut)`: convolution, pooling, norm, SiLU, then refinements with a sum around."""
    one, x = layer(4, 6, "31"), torch.randn(5, 4, 8, 8)
    for refine in one.refine:  # no identity: each refinement must count
        nn.init.normal_(refine[0].weight, std=0.3)
    f, norm = nn.functional, functools.partial(nn.functional.batch_norm, running_mean=None, running_var=None)

    def forward(
        shortcut=True, order="pna", pool=f.max_pool2d, active=f.silu, chain=True, each=False, after=False, most=9
    ):
        acts = {"p": lambda x: pool(x, 2), "n": lambda x: norm(x, training=True, bias=one.norm.bias), "a": active}
        x1 = y = functools.reduce(lambda x, act: acts[act](x), order, one.conv(x))
        for layers in list(one.refine)[:most]:
            y = y + layers(y) if each else layers(y if chain else x1)
        y = x1 + y if shortcut and not each else y
        return active(y) if after else y

    with torch.no_grad():
        right, wrong = forward(), {}
        for sentence, options in {
            "x is not added: with the shortcut it is x + y.": dict(shortcut=False),
            "the pooling takes the average.": dict(pool=f.avg_pool2d),
            "the activation is ReLU: take SiLU.": dict(active=f.relu),
            "the activation is missing behind the first normalisation.": dict(active=lambda x: x),
            "the first normalisation, self.norm, is missing.": dict(order="pa"),
            "each refinement gets x: it should get what the one before made.": dict(chain=False),
            "x is added after every refinement: once, around all of them.": dict(each=True),
            "an activation behind the sum: return the sum as it is.": dict(after=True),
            "the normalisation stands before the pooling: pool first.": dict(order="npa"),
            "the pooling stands behind the activation: pool first.": dict(order="nap"),
            "the activation stands before the normalisation: norm, then SiLU.": dict(order="pan"),
            "only the first refinement is used: does the return stand in the loop?": dict(most=1),
        }.items():
            wrong[sentence] = forward(**options)
        y = one(x)
        got = list(y.shape)
        _demand(got == [5, 6, 4, 4], f"images of 8 × 8 should become [5, 6, 4, 4], not {got}: is the pooling there?")
        wrong["the sum is 2 x: y is never refined, or x is replaced by it."] = 2 * forward(False)
        _compare(y, right, wrong, "the output is another one: conv, pooling, norm, SiLU, refinements, sum?")
    try:
        one(x.clone().requires_grad_()).sum().backward()
    except (RuntimeError, Wrong) as error:  # Wrong: from the grader's process
        if "inplace operation" not in str(error):
            raise
        raise Wrong("x is changed in place, but backward needs it as it was: x + y makes a new tensor.") from None
    with torch.no_grad():
        one.shortcut = False
        _demand(_close(one(x), forward(shortcut=False)), "without self.shortcut the result of the refinements alone.")
    return "a block: its halves, its refinements and the sum."


@_check
def schedule(function):
    """`function(step, steps)` falls in a straight line from 1 to 0, and not below."""
    seen = torch.tensor([float(function(step, 8)) for step in range(9)])
    line = torch.linspace(1, 0, 9)
    wrong = {
        "it rises: 1 at step 0, 0 at the end.": line.flip(0),
        "it does not fall.": torch.ones(9),
        "it reaches 0 a step early: divide by steps.": (1 - torch.arange(9) / 7).clamp(min=0),
        "it reaches 0 a step early and falls below: divide by steps.": 1 - torch.arange(9) / 7,
        "it begins a step ahead: 1 at step 0.": (1 - torch.arange(1, 10) / 8).clamp(min=0),
        "it does not reach 0 at the end: divide by steps.": 1 - torch.arange(9) / 9,
        "it drops at once: is the division one of whole numbers?": (line == 1).float(),
        "it drops only at the end: is the division one of whole numbers?": (line > 0).float(),
        "it is 0 from the start: max takes the larger one, min the smaller.": torch.zeros(9),
        "it falls along a parabola: a straight line is wanted.": line**2,
        "it falls along a cosine: a straight line is wanted.": (1 + torch.cos(math.pi * (1 - line))) / 2,
    }
    _compare(seen, line, wrong, f"the factors of eight steps are {seen.tolist()}, not {line.tolist()}.")
    beyond = float(function(9, 8))
    _demand(beyond >= 0, f"step 9 of 8 gives {beyond:.3f}: never below 0.")
    _demand(beyond == 0, f"step 9 of 8 gives {beyond:.3f}: it stays at 0.")
    return "the schedule: from 1 to 0, and not below."


@_check
def data_parallel(function):
    """`function(model, criterion, parts)` returns the gradients of the whole batch from those of its parts."""
    model, criterion = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), nn.CrossEntropyLoss()
    model[0].bias.requires_grad_(False)
    weights = [p for p in model.parameters() if p.requires_grad]
    parts = [(torch.randn(size, 4), torch.randint(3, (size,))) for size in (6, 2, 4)]
    each = [torch.autograd.grad(criterion(model(x), y), weights) for x, y in parts]
    sizes = torch.tensor([6.0, 2.0, 4.0])

    def mix(shares):
        return torch.cat(
            [sum(s * g for s, g in zip(shares, gs, strict=True)).flatten() for gs in zip(*each, strict=True)]
        )

    right = mix(sizes / 12)
    before = [p.detach().clone() for p in model.parameters()]
    gradients = list(function(model, criterion, parts))
    text = "return a list of tensors, one gradient for each trainable weight."
    _demand(all(torch.is_tensor(g) for g in gradients), text)
    gradients = [g.detach().clone() for g in gradients]  # a second call may change .grad
    again = list(function(model, criterion, parts))
    moved = any(not _close(p.detach(), old) for p, old in zip(model.parameters(), before, strict=True))
    _demand(not moved, "the weights have changed: only the gradients are wanted, no step.")
    got = [list(g.shape) for g in gradients]
    want = [list(p.shape) for p in weights]
    _demand(got == want, f"the gradients should have the shapes {want}, one for each trainable weight, not {got}.")
    wrong = {
        "the gradients are added, not averaged.": mix(torch.ones(3)),
        "the gradients are all 0: g = g + ... makes a new tensor, g += ... changes the one in the list.": mix(
            0 * sizes
        ),
        "the parts are weighted, and then averaged once more: divide by the number of all images alone.": mix(
            sizes / 36
        ),
        "these are sums over images, divided by the number of parts: divide by the number of all images.": mix(
            sizes / 3
        ),
        "the parts' means are divided by the number of all images: multiply each by its own number first.": mix(
            torch.ones(3) / 12
        ),
        "the last part's share alone: add the parts up.": mix(sizes / 12 * torch.tensor([0.0, 0.0, 1.0])),
        "the first part's share alone: does the return stand in the loop?": mix(
            sizes / 12 * torch.tensor([1.0, 0.0, 0.0])
        ),
        "the mean of the parts' means: weight each part by its number of images.": mix(torch.ones(3) / 3),
        "these are sums over images: divide by the number of all images.": mix(sizes),
        "the gradients of the last part alone: are they kept before the next backward overwrites them? clone.": mix(
            torch.tensor([0.0, 0.0, 1.0])
        ),
        "the gradients of the first part alone.": mix(torch.tensor([1.0, 0.0, 0.0])),
        "the gradients of earlier parts are counted again: zero_grad before each backward.": mix(
            torch.tensor([12.0, 6.0, 4.0]) / 12
        ),
    }
    flat, second = (torch.cat([g.detach().flatten() for g in gs]) for gs in (gradients, again))
    _compare(flat, right, wrong, "the gradients differ from those of the whole batch.")
    text = "a second call gives something else: what does the first one leave in .grad?"
    _demand(_close(second, right), text)
    return "data parallel: three parts give the gradients of the whole batch."

"""Every known mistake gets its own sentence, every correct version passes, and nothing is left changed."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import helpers
import notebooks
from tests import checks

mnist, cifar = (notebooks.definitions(name) for name in notebooks.NAMES)
SOURCES = [(name, cell.source) for name in notebooks.NAMES for cell in notebooks.code_cells(name)]


def net(*layers):
    """A class whose instances are these layers in their order, for ten classes."""

    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(*(make() for make in layers))

    return Net


def lenet(pool=lambda: nn.MaxPool2d(2), active=nn.ReLU, hidden=None, last=(), padding=2):
    """LeNet-5 as one nn.Sequential, or something near it."""
    inputs, hidden = (400 if padding else 256), hidden or active
    return net(
        *(lambda: nn.Conv2d(1, 6, 5, padding=padding), pool, active, lambda: nn.Conv2d(6, 16, 5), pool, active),
        *(nn.Flatten, lambda: nn.Linear(inputs, 120), hidden, lambda: nn.Linear(120, 84), hidden),
        *(lambda: nn.Linear(84, 10), *last),
    )


class Functional(nn.Module):
    """LeNet-5 with other names, in another order, C5 as a convolution, and activation before pooling."""

    def __init__(self, classes=10):
        super().__init__()
        self.a, self.b = nn.Linear(84, classes), nn.Linear(120, 84)
        self.z, self.y, self.x = nn.Conv2d(16, 120, 5), nn.Conv2d(6, 16, 5), nn.Conv2d(1, 6, 5, padding=2)

    def forward(self, images):
        x = F.max_pool2d(F.relu(self.x(images)), 2)
        x = F.max_pool2d(F.relu(self.y(x)), 2)
        x = F.relu(self.z(x)).flatten(1)
        return self.a(F.relu(self.b(x)))


class Deaf(Functional):
    """LeNet-5 whose arguments change nothing."""

    def __init__(self, activation=nn.ReLU, pool=nn.MaxPool2d, classes=10):
        super().__init__(classes)


class Late(Functional):
    """LeNet-5 that makes what its arguments name only when it is called, activation before pooling."""

    pooled = True

    def __init__(self, activation=nn.ReLU, pool=nn.MaxPool2d, classes=10):
        super().__init__(classes)
        self.active, self.pool = activation, pool if self.pooled else nn.MaxPool2d

    def forward(self, images):
        active, pool = self.active(), self.pool(2)
        x = pool(active(self.y(pool(active(self.x(images))))))
        return self.a(active(self.b(active(self.z(x)).flatten(1))))


class HalfDeaf(Late):
    """One of the two arguments changes nothing."""

    pooled = False


def lse(logits, labels):
    return (logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]).mean()


def naive(logits, labels):
    return -(logits.exp() / logits.exp().sum(1, keepdim=True))[torch.arange(len(labels)), labels].log().mean()


def step(update):
    """An sgd_step whose inner line is `update(p, v, g, η, μ)`."""

    def sgd_step(parameters, velocities, learning_rate, momentum):
        with torch.no_grad():
            for p, v in zip(parameters, velocities, strict=True):
                update(p, v, p.grad, learning_rate, momentum)

    return sgd_step


def both(new_v, new_p):
    def update(p, v, g, eta, mu):
        old = v.clone()
        v.copy_(new_v(old, g, eta, mu))
        p.copy_(new_p(p, v, old, g, eta, mu))

    return step(update)


plain = lambda v, g, eta, mu: mu * v + g  # noqa: E731
down = lambda p, v, old, g, eta, mu: p - eta * v  # noqa: E731


def epoch(order="zbs", softmax=False, train=True, schedule=1, detach=True, weigh=True, count=True, cast=True):
    """A train_one_epoch: z for zero_grad, b for backward, s for step, r for the next rate, else at the end."""

    def train_one_epoch(model, loader, criterion, optimizer, scheduler, precision="fp32"):
        if train:
            model.train()
        losses, total, correct = [], 0, 0
        for images, labels in loader:
            with helpers.autocast(images.device, precision if cast else "fp32"):
                logits = model(images)
                loss = criterion(logits.softmax(1) if softmax else logits, labels)
            for act in order:
                {"z": optimizer.zero_grad, "b": loss.backward, "s": optimizer.step, "r": scheduler.step}[act]()
            for _ in range(schedule):
                scheduler.step()
            losses.append(loss.detach() if detach else loss)
            total = total + loss.detach() * (len(labels) if weigh else 1)
            correct = correct + (logits.argmax(1) == labels).sum() * count
        return torch.stack(losses), total, correct

    return train_one_epoch


def evaluation(mode=True, grad=False, restore=True, exact=True, percent=1, total=False, add=False, plain=True):
    """An evaluate with one thing wrong."""

    def evaluate(model, batches):
        was = model.training
        if mode:
            model.eval()
        losses, hits, sizes = [], [], []
        with torch.set_grad_enabled(grad):
            for images, labels in batches:
                logits = model(images)
                losses.append(F.cross_entropy(logits, labels).item())
                hits.append((logits.argmax(1) == labels).float().mean().item())
                sizes.append(len(labels) if exact else 1)
        if restore:
            model.train(was if restore is True else restore == "train")
        mean = lambda values: sum(v * n for v, n in zip(values, sizes, strict=True)) / sum(sizes)  # noqa: E731
        loss, accuracy = sum(losses) if add else mean(losses), mean(hits) * percent
        return loss if plain else torch.tensor(loss), accuracy * (sum(sizes) if total else 1)

    return evaluate


def mirrored(dim=-1, every=False, last=4, third=2, swap=False, alternating=True):
    """A mirror with one thing wrong."""

    def mirror(images, chances, epoch, alternate=True):
        flip = chances[:, last if alternate else third] < 0.5
        if alternate and alternating:
            flip = flip ^ (epoch % 2 == 1)
        flip = torch.full_like(flip, True) if every else flip ^ swap
        return torch.stack([image.flip(dim) if f else image for image, f in zip(images, flip, strict=True)])

    return mirror


def in_place(images, chances, epoch, alternate=True):
    """A mirror that changes the images that it is given."""
    images[:] = mirrored()(images, chances, epoch, alternate)
    return images


def shifted(mode="reflect", one=False, swap=False, back=False, most=None):
    """A shift with one thing wrong, image by image."""

    def shift(images, chances, pixels):
        height, width = images.shape[2:]
        padded = F.pad(images.float(), (pixels,) * 4, mode=mode)
        places = (chances[:, :2] * (most(pixels) if most else 2 * pixels + 1)).long()
        places = places[:1].expand_as(places) if one else 2 * pixels - places if back else places
        windows = []
        for image, (y, x) in zip(padded, (places.flip(1) if swap else places).tolist(), strict=True):
            windows.append(image[:, y : y + height, x : x + width])
        return torch.stack(windows)

    return shift


def norm(change=lambda self, m, v: (m, v), output=None, axes=(0, 2, 3), running=None, always=False, how=None):
    """A BatchNorm with one thing wrong."""

    class Norm(nn.Module):
        def __init__(self, channels, momentum=0.1, epsilon=1e-5):
            super().__init__()
            self.momentum, self.epsilon = momentum, epsilon
            self.bias = nn.Parameter(torch.zeros(channels))
            self.register_buffer("running_mean", torch.zeros(channels))
            self.register_buffer("running_var", torch.ones(channels))

        def forward(self, x):
            m, v = self.running_mean.view(-1, 1, 1), self.running_var.view(-1, 1, 1)
            if self.training or always:
                m, v = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
            if self.training:
                (running or standard)(self, x)
                m, v = change(self, m, v)
            return (output or normal)(x, m, v, self.epsilon, self.bias.view(-1, 1, 1))

    return Norm


def normal(x, m, v, epsilon, bias):
    return (x - m) / (v + epsilon).sqrt() + bias


def standard(self, x, mean=True, correction=1, share=None, detach=True):
    x, share = x.detach() if detach else x, self.momentum if share is None else share(self.momentum)
    new = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=correction)
    self.running_mean = (1 - share) * self.running_mean + share * new[0] if mean else self.running_mean
    self.running_var = (1 - share) * self.running_var + share * new[1]


class Drifting(norm()):
    """Its running averages move in evaluation too."""

    def forward(self, x):
        y = super().forward(x)
        if not self.training:
            standard(self, x)
        return y


def block(forward):
    """The page's Block with another forward(self, x)."""
    return type("Other", (cifar["Block"],), {"forward": forward})


def stages(pool=F.max_pool2d, normed=True, active=F.silu, last=lambda x, y: x + y, chain=True):
    def forward(self, x):
        x = self.conv(x)
        x = pool(x, 2)
        x = active(self.norm(x) if normed else x)
        y = x
        for layers in self.refine:
            y = layers(y if chain else x)
        return last(x, y) if self.shortcut else y

    return forward


def every_sum(self, x):
    x = F.silu(self.norm(F.max_pool2d(self.conv(x), 2)))
    for layers in self.refine:
        x = x + layers(x)
    return x


def parts_of(mix, backward=False, zero=True):
    """A data_parallel_gradients that puts the parts together with mix(sizes)."""

    def gradients(model, criterion, parts):
        weights = [p for p in model.parameters() if p.requires_grad]
        shares = mix(torch.tensor([float(len(labels)) for _, labels in parts]))
        total = [torch.zeros_like(p) for p in weights]
        for (images, labels), share in zip(parts, shares.tolist(), strict=True):
            loss = criterion(model(images), labels)
            if backward:
                model.zero_grad() if zero else None
                loss.backward()
                each = [p.grad for p in weights]
            else:
                each = torch.autograd.grad(loss, weights)
            for t, g in zip(total, each, strict=True):
                t.add_(g, alpha=share)
        return total

    return gradients


def edited(name, old, new):
    """The check of the page's definition `name`, and this definition with `old` replaced by `new` where it stands."""
    call = re.compile(rf"\nchecks\.(\w+)\({name}\b")
    [(page, source)] = [(page, source) for page, source in SOURCES if call.search(source)]
    check, source = call.search(source)[1], source.split("\nchecks.")[0]
    assert old in source
    namespace = dict(mnist if page == "MNIST.ipynb" else cifar)
    notebooks.execute(source.replace(old, new), namespace)
    return getattr(checks, check), namespace[name]


GUESSES = {"no zero_grad": 10, "rate × 10": 99.5, "not normalised": 0}
fair = lambda sizes: sizes / sizes.sum()  # noqa: E731
RIGHT = [
    *[(checks.mirror, f) for f in (cifar["mirror"], mirrored())],
    *[(checks.shift, f) for f in (cifar["shift"], shifted())],
    *[(checks.batch_norm, layer) for layer in (cifar["BatchNorm"], norm())],
    *[(checks.block, layer) for layer in (cifar["Block"], block(stages()))],
    *[
        (checks.schedule, f)
        for f in (cifar["schedule"], lambda step, steps: torch.tensor(max(steps - step, 0)) / steps)
    ],
    *[(checks.data_parallel, f) for f in (cifar["data_parallel_gradients"], parts_of(fair), parts_of(fair, True))],
    *[(checks.lenet5, net) for net in (mnist["LeNet5"], lenet(), Functional, Late)],
    *[(checks.cross_entropy, f) for f in (mnist["cross_entropy"], lse, F.cross_entropy)],
    *[(checks.sgd_step, f) for f in (mnist["sgd_step"], both(plain, down))],
    *[(checks.train_one_epoch, f) for f in (mnist["train_one_epoch"], epoch(), epoch("bsz"))],
    *[(checks.evaluate, f) for f in (mnist["evaluate"], evaluation())],
    (checks.guesses, GUESSES),
    (checks.guesses, GUESSES | {"my own": 12}),
    edited("LeNet5", "self.activation = ", "nn.init.zeros_(self.output.weight)\n        self.activation = "),
    edited("cross_entropy", "(logits.logsumexp", "(logits.double().logsumexp"),
    edited("sgd_step", "v.mul_(momentum).add_(p.grad)", "v[:] = momentum * v + p.grad"),
    edited("evaluate", "return loss_sum / count, correct / count", "return [loss_sum / count, correct / count]"),
    edited("Block", "return x + y if self.shortcut", "return torch.add(x, y) if self.shortcut"),
    edited("data_parallel_gradients", "whole += part", "whole.add_(part)"),
]
WRONG = [
    (checks.block, block(lambda self, x: self.refine(x)), "it stops with NotImplementedError in the line"),
    (checks.lenet5, lenet(pool=lambda: nn.AvgPool2d(2)), "pooling takes the average"),
    (checks.lenet5, lenet(last=(nn.ReLU,)), "ReLU behind the last layer"),
    (checks.lenet5, lenet(last=(lambda: nn.Softmax(1),)), "softmax behind the last layer"),
    (checks.lenet5, lenet(hidden=nn.Identity), "no activation behind the linear layers"),
    (checks.lenet5, lenet(active=nn.Identity), "no activation anywhere"),
    (checks.lenet5, lenet(active=nn.Tanh), "the activation is tanh"),
    (checks.lenet5, Deaf, "the argument `activation` has no effect"),
    (checks.lenet5, HalfDeaf, "the argument `pool` has no effect"),
    (checks.lenet5, lenet(padding=0), "lacks its padding of 2"),
    (checks.lenet5, lenet(pool=nn.Identity), "it stops with RuntimeError"),
    (checks.lenet5, net(nn.Flatten, lambda: nn.Linear(784, 10)), "there is no weight of shape (6, 1, 5, 5)"),
    (checks.lenet5, lenet(last=(lambda: nn.Linear(10, 10),)), "a layer too many"),
    (checks.cross_entropy, lambda z, y: F.cross_entropy(z, y, reduction="sum"), "the sum over the batch"),
    (checks.cross_entropy, lambda z, y: F.cross_entropy(z, y, reduction="none"), "one loss for each image"),
    (checks.cross_entropy, lambda z, y: -lse(z, y), "the sign is wrong"),
    (checks.cross_entropy, lambda z, y: F.nll_loss(z.softmax(1), y), "the logarithm is missing"),
    (checks.cross_entropy, lambda z, y: F.nll_loss(z, y), "the softmax is missing"),
    (checks.cross_entropy, lambda z, y: lse(z.softmax(1), y), "softmax is taken twice"),
    (checks.cross_entropy, lambda z, y: F.nll_loss(z.log_softmax(0), y), "over the images of the batch"),
    (checks.cross_entropy, lambda z, y: lse(z, y) / math.log(2), "logarithm to base 2"),
    (checks.cross_entropy, naive, "subtract each row's largest logit"),
    (checks.cross_entropy, lambda z, y: lse(z, y).detach(), "is there a detach, .item()"),
    (checks.cross_entropy, lambda z, y: lse(z, y).item(), "a tensor without dimensions"),
    (checks.sgd_step, step(lambda p, v, g, eta, mu: v.copy_(mu * v + g)), "the parameters did not change"),
    (checks.sgd_step, step(lambda p, v, g, eta, mu: p.sub_(eta * (mu * v + g))), "velocity did not change in place"),
    (checks.sgd_step, both(lambda v, g, eta, mu: mu * v + (1 - mu) * g, down), "multiplied by 1 - momentum"),
    (checks.sgd_step, both(lambda v, g, eta, mu: mu * v + eta * g, down), "contains the learning rate"),
    (checks.sgd_step, both(lambda v, g, eta, mu: mu * (v + g), down), "momentum is applied to the gradient"),
    (checks.sgd_step, both(lambda v, g, eta, mu: g, down), "the velocity is the gradient alone"),
    (checks.sgd_step, both(plain, lambda p, v, old, g, eta, mu: p + eta * v), "the step goes up"),
    (checks.sgd_step, both(plain, lambda p, v, old, g, eta, mu: p - eta * g), "without momentum"),
    (checks.sgd_step, both(plain, lambda p, v, old, g, eta, mu: p - v), "lacks the learning rate"),
    (checks.sgd_step, both(plain, lambda p, v, old, g, eta, mu: p - eta * mu * v), "applied twice"),
    (checks.sgd_step, both(plain, lambda p, v, old, g, eta, mu: p - eta * old), "the velocity of before"),
    (checks.sgd_step, both(plain, lambda p, v, old, g, eta, mu: p - eta * (g + mu * v)), "Nesterov"),
    (checks.train_one_epoch, epoch("bs"), "zero_grad is never called"),
    (checks.train_one_epoch, epoch("bzs"), "a gradient left for it"),
    (checks.train_one_epoch, epoch("zsb"), "the weights did not change"),
    (checks.train_one_epoch, epoch("szb"), "step stands before backward"),
    (checks.train_one_epoch, epoch("zb"), "is there a step"),
    (checks.train_one_epoch, epoch(softmax=True), "softmax stands before the criterion"),
    (checks.train_one_epoch, epoch("zbrs", schedule=0), "the scheduler steps before the optimizer"),
    (checks.train_one_epoch, epoch(cast=False), "under helpers.autocast"),
    (checks.train_one_epoch, epoch(train=False), "should be in training mode"),
    (checks.train_one_epoch, epoch(schedule=0), "the scheduler took 0 steps"),
    (checks.train_one_epoch, epoch(schedule=2), "the scheduler took 6 steps"),
    (checks.train_one_epoch, epoch(detach=False), "detach them"),
    (checks.train_one_epoch, epoch(weigh=False), "summed over steps"),
    (checks.train_one_epoch, epoch(count=0), "0 right answers"),
    (checks.evaluate, evaluation(mode=False), "call model.eval()"),
    (checks.evaluate, evaluation(grad=True), "torch.no_grad()"),
    (checks.evaluate, evaluation(restore="train"), "comes back in training mode"),
    (checks.evaluate, evaluation(restore=False), "restore the mode"),
    (checks.evaluate, evaluation(exact=False), "mean of the batches' means"),
    (checks.evaluate, evaluation(add=True), "the losses are added"),
    (checks.evaluate, evaluation(total=True), "the accuracy is a number of images"),
    (checks.evaluate, evaluation(percent=100), "in per cent"),
    (checks.evaluate, evaluation(plain=False), "return plain numbers"),
    (checks.mirror, lambda images, *_, **__: images, "no image is mirrored"),
    (checks.mirror, mirrored(every=True), "all images are mirrored, or none"),
    (checks.mirror, mirrored(dim=-2), "upside down"),
    (checks.mirror, mirrored(swap=True), "mirrors the images that it should leave"),
    (checks.mirror, in_place, "the images given were changed themselves"),
    (checks.mirror, mirrored(alternating=False), "odd epochs mirror the same images as even ones"),
    (checks.mirror, mirrored(last=2), "with alternate the last chance decides"),
    (
        checks.mirror,
        lambda images, chances, epoch, alternate=True: mirrored()(images, chances, epoch),
        "the third chance",
    ),
    (checks.shift, shifted(one=True), "one shift for the whole batch"),
    (checks.shift, shifted("constant"), "the border is black"),
    (checks.shift, shifted("replicate"), "the border is repeated"),
    (checks.shift, shifted("circular"), "comes back on the other"),
    (checks.shift, shifted(swap=True), "rows and columns are exchanged"),
    (checks.shift, shifted(back=True), "the shift goes the other way"),
    (checks.shift, shifted(most=lambda p: 2 * p), "the largest shift is never drawn"),
    (checks.shift, shifted(most=lambda p: p + 1), "only moved up and left"),
    (checks.shift, lambda images, *_: images, "nothing is moved"),
    (checks.shift, lambda images, *_: F.pad(images, (2,) * 4), "keep their size"),
    (checks.batch_norm, norm(output=lambda x, m, v, e, b: normal(x, m, v, e, 0)), "the bias is missing"),
    (
        checks.batch_norm,
        norm(change=lambda self, m, v: (0, torch.ones(1))),
        "the running averages normalise the training batch",
    ),
    (checks.batch_norm, norm(output=lambda x, m, v, e, b: normal(x, 0, v, e, b)), "the mean is not subtracted"),
    (checks.batch_norm, norm(output=lambda x, m, v, e, b: (x - m) / (v + e) + b), "by the variance, not by its root"),
    (checks.batch_norm, norm(output=lambda x, m, v, e, b: (x - m) / v.sqrt() + b), "epsilon is missing"),
    (
        checks.batch_norm,
        norm(output=lambda x, m, v, e, b: (x - m) / (v.sqrt() + e) + b),
        "epsilon is outside of the root:",
    ),
    (checks.batch_norm, norm(change=lambda self, m, v: (m, v * 40 / 39)), "divided by the variance with 1/(n - 1)"),
    (checks.batch_norm, norm(output=lambda x, m, v, e, b: x - m.flatten()), "need the shape [C, 1, 1]"),
    (checks.batch_norm, norm(running=lambda self, x: standard(self, x, share=lambda m: 0.1)), "use self.momentum"),
    (checks.batch_norm, norm(axes=(0,)), "over the images alone"),
    (checks.batch_norm, norm(axes=(2, 3)), "those of single images"),
    (checks.batch_norm, norm(axes=(0, 1, 2, 3)), "one mean and variance for all channels"),
    (checks.batch_norm, norm(change=lambda self, m, v: (m.detach(), v.detach())), "mean or variance as constants"),
    (checks.batch_norm, norm(running=lambda self, x: standard(self, x, detach=False)), "remembers how it was computed"),
    (checks.batch_norm, norm(running=lambda self, x: None), "running_mean did not change"),
    (checks.batch_norm, norm(running=lambda self, x: standard(self, x, mean=False)), "running_mean did not change:"),
    (
        checks.batch_norm,
        norm(running=lambda self, x: standard(self, x, share=lambda m: 1)),
        "running_mean is the batch's",
    ),
    (
        checks.batch_norm,
        norm(running=lambda self, x: standard(self, x, share=lambda m: 1 - m)),
        "keeps a share of `momentum`",
    ),
    (checks.batch_norm, norm(running=lambda self, x: standard(self, x, correction=0)), "running_var takes the biased"),
    (checks.batch_norm, norm(always=True), "in evaluation the batch's statistics are used"),
    (checks.batch_norm, Drifting, "the running averages move in evaluation"),
    (checks.block, block(stages(last=lambda x, y: y)), "x is not added"),
    (checks.block, block(stages(pool=F.avg_pool2d)), "the pooling takes the average"),
    (checks.block, block(stages(pool=lambda x, _: x)), "is the pooling there?"),
    (checks.block, block(stages(active=F.relu)), "the activation is ReLU"),
    (checks.block, block(stages(active=lambda x: x)), "missing behind the first normalisation"),
    (checks.block, block(stages(normed=False)), "self.norm, is missing"),
    (checks.block, block(stages(chain=False)), "each refinement gets x"),
    (checks.block, block(every_sum), "x is added after every refinement"),
    (checks.block, block(stages(last=lambda x, y: F.silu(x + y))), "an activation behind the sum"),
    (checks.block, block(stages(last=lambda x, y: 2 * y)), "the sum is 2 x"),
    (checks.block, block(lambda self, x: stages()(type("", (), vars(self))(), x)), "it stops with"),
    (checks.schedule, lambda step, steps: 1 - step / steps, "never below 0"),
    (checks.schedule, lambda step, steps: min(1.0, step / steps), "it rises"),
    (checks.schedule, lambda step, steps: 1.0, "it does not fall"),
    (checks.schedule, lambda step, steps: max(0.0, 1 - step / (steps - 1)), "it reaches 0 a step early"),
    (checks.schedule, lambda step, steps: max(0, (steps - step) // steps), "it drops at once"),
    (checks.schedule, lambda step, steps: (1 + math.cos(math.pi * step / steps)) / 2, "along a cosine"),
    (checks.schedule, lambda step, steps: abs(1 - step / steps), "it stays at 0"),
    (checks.data_parallel, parts_of(torch.ones_like), "added, not averaged"),
    (checks.data_parallel, parts_of(lambda sizes: torch.ones(3) / 3), "weight each part"),
    (checks.data_parallel, parts_of(lambda sizes: sizes), "these are sums over images"),
    (checks.data_parallel, parts_of(lambda sizes: torch.tensor([0.0, 0.0, 1.0])), "of the last part alone"),
    (checks.data_parallel, parts_of(lambda sizes: torch.tensor([1.0, 0.0, 0.0])), "of the first part alone"),
    (checks.data_parallel, parts_of(fair, True, zero=False), "counted again"),
    (checks.data_parallel, lambda model, criterion, parts: [], "should have the shapes"),
    (checks.guesses, GUESSES | {"rate × 10": "many"}, "the guess for 'rate × 10'"),
    (checks.guesses, GUESSES | {"no zero_grad": 1010}, "the guess for 'no zero_grad'"),
    (checks.guesses, {"no zero_grad": 10}, "lacks the key 'rate × 10'"),
]

ENTROPY, STEP = "(logits.logsumexp(dim=1) - logits[places, labels]).mean()", "v.mul_(momentum).add_(p.grad)"
LOSS, RESULT = "loss = criterion(logits, labels)", "return loss_sum / count, correct / count"
FLIPPED, SUM = "images.flip(-1)", "return x + y if self.shortcut else y"
NORMED, BATCH_VARIANCE = "(x - mean) / (variance + self.epsilon).sqrt()", "x.var(dim=(0, 2, 3), correction=0)"
FALL, SHARE = "max(0.0, 1 - step / steps)", "* len(labels) / count"
EDITED = [  # the page's own solution, a line of it, what a student wrote there, words of the sentence
    ("LeNet5", "return self.output(x)", "self.output(x)", "it returns nothing"),
    ("LeNet5", "self.output(x)", "self.output(x).log_softmax(1)", "log_softmax behind the last layer"),
    ("LeNet5", "self.output(x)", "self.output(x).sigmoid()", "sigmoid behind the last layer"),
    ("LeNet5", "nn.Linear(84, classes)", "nn.Linear(84, 10)", "with classes=7"),
    ("LeNet5", "= activation()", "= activation(); self.all = [[nn.Linear(2, 2)]]", "self.all hides its layers"),
    ("cross_entropy", ENTROPY, "F.cross_entropy(logits, labels).view(1)", "not of shape [1]"),
    ("cross_entropy", ENTROPY, "-(F.one_hot(labels, 5) * logits.log_softmax(1)).mean()", "of images and of classes"),
    (
        "cross_entropy",
        ENTROPY,
        "-(F.one_hot(labels) * logits.log_softmax(1)).sum(1).mean()",
        "RuntimeError in the line",
    ),
    ("cross_entropy", "logits[places, labels]", "logits[:, labels]", "takes all labels of each row"),
    ("cross_entropy", "logits.logsumexp", "(logits - logits.amax(1, True)).logsumexp", "in one part only"),
    ("cross_entropy", ENTROPY, "-logits.log_softmax(1).mean()", "all classes count alike"),
    (
        "cross_entropy",
        "logits.logsumexp(dim=1)",
        "(logits - logits.amax(0)).logsumexp(1) + logits.amax(0)[labels]",
        "the largest logit of a column",
    ),
    ("cross_entropy", ENTROPY, f"{ENTROPY} / math.log(10)", "base 10"),
    ("cross_entropy", ENTROPY, "F.cross_entropy(logits.data, labels)", "no gradient flows through it"),
    (
        "sgd_step",
        "p.sub_(learning_rate * v)",
        "p.sub_(learning_rate * v)\n        return",
        "the second parameter is wrong",
    ),
    ("sgd_step", STEP, f"v = velocities[0]\n        {STEP}", "it stops with RuntimeError in the line"),
    ("sgd_step", STEP, "v.add_(p.grad, alpha=momentum)", "not to the old velocity"),
    ("sgd_step", STEP, "v.add_(p.grad)", "momentum is missing"),
    ("sgd_step", STEP, "v.mul_(momentum).add(p.grad)", "does not reach the velocity"),
    ("sgd_step", "learning_rate * v", "v.mul_(learning_rate)", "multiplied by the learning rate in the end"),
    ("sgd_step", STEP, "v.mul_(momentum).sub_(p.grad)", "the velocity has the other sign"),
    ("sgd_step", STEP, "v.mul_(momentum).sub_(learning_rate * p.grad)", "the learning rate and the other sign"),
    ("train_one_epoch", LOSS, "loss = F.cross_entropy(logits, labels)", "not the criterion's"),
    ("train_one_epoch", LOSS, f"{LOSS} / len(labels)", "divided by the number of images"),
    ("train_one_epoch", LOSS, f"{LOSS} * len(labels)", "multiplied by the number of images"),
    ("train_one_epoch", "optimizer.step()", "optimizer.step(); optimizer.step()", "steps twice"),
    ("train_one_epoch", "return torch.stack(losses)", "return losses", "torch.stack makes it"),
    ("train_one_epoch", "(images.device, ", "(images.device.type, ", "in the line `with helpers.autocast"),
    ("evaluate", "with torch.no_grad():", "torch.set_grad_enabled(False)\n    if True:", "gradients stay switched off"),
    ("evaluate", RESULT, "return loss_sum, correct / count", "the sum over all images"),
    ("evaluate", ', reduction="sum"', "", "added and divided by the images"),
    ("evaluate", RESULT, "return loss_sum / len(batches), correct / count", "sum over images is divided by the number"),
    ("evaluate", RESULT, "return loss_sum / count, correct / len(batches)", "right answers are divided by"),
    ("evaluate", RESULT, "return correct / count, loss_sum / count", "exchanged"),
    (
        "evaluate",
        "count += len(labels)",
        "model.train(training); return loss_sum / len(labels), 0",
        "of the first batch alone",
    ),
    ("evaluate", RESULT, "return F.cross_entropy(logits, labels).item(), 0.0", "of the last batch alone"),
    ("evaluate", "model(images)", "model(images).softmax(1)", "softmax stands before the cross-entropy"),
    ("mirror", FLIPPED, "images.flip(1)", "the colours are exchanged"),
    ("mirror", FLIPPED, "images.flip(2, 3)", "turned by half"),
    ("mirror", "return torch.where", "return images[flip].flip(-1), torch.where", "return the images, [B, C, H, W]"),
    (
        "mirror",
        "return torch.where(flip[:, None, None, None], images.flip(-1), images)",
        "return images[flip]",
        "all images",
    ),
    ("mirror", "^ (epoch % 2 == 1)", "& (epoch % 2 == 0)", "odd epochs mirror nothing"),
    ("shift", "return windows", "windows", "return the images"),
    ("shift", "down, right]", "down, down]", "row and column come from the same chance"),
    ("shift", ".long().T", ".T", "it stops with IndexError in the line"),
    ("shift", "(chances[:, :2] * (2 * pixels + 1)).long()", "(chances[:, :2].long() * 5)", "all windows begin at 0"),
    ("BatchNorm", "mean(dim=(0, 2, 3))", "mean(dim=(1, 2, 3))", "mean and variance are over dim=(0, 2, 3)"),
    ("BatchNorm", "variance + self.epsilon", "variance + 1e-5", "another number than self.epsilon"),
    ("BatchNorm", "return (x", "(x", "it returns nothing"),
    (
        "BatchNorm",
        NORMED,
        "(x - mean) / (x.std(dim=(0, 2, 3)).view(-1, 1, 1) + self.epsilon)",
        "outside of the root: √",
    ),
    ("BatchNorm", NORMED, "(x - mean) / x.std(dim=(0, 2, 3)).view(-1, 1, 1)", "and epsilon is missing"),
    (
        "BatchNorm",
        "mean, variance, bias = (",
        "mean, variance = self.running_mean, self.running_var\n        mean, variance, bias = (",
        "already updated",
    ),
    ("BatchNorm", "mean = x.mean", "x -= 1\n            mean = x.mean", "RuntimeError in the line `x -= 1`"),
    (
        "Block",
        SUM,
        "if self.shortcut:\n            x += y\n        return x if self.shortcut else y",
        "changed in place",
    ),
    (
        "Block",
        "x = F.max_pool2d(x, 2)\n        x = self.norm(x)",
        "x = F.max_pool2d(self.norm(x), 2)",
        "before the pooling",
    ),
    (
        "Block",
        "x = F.max_pool2d(x, 2)\n        x = self.norm(x)\n        x = F.silu(x)",
        "x = F.max_pool2d(F.silu(self.norm(x)), 2)",
        "stands behind the activation",
    ),
    ("Block", "x = self.norm(x)\n        x = F.silu(x)", "x = self.norm(F.silu(x))", "stands before the normalisation"),
    ("Block", "y = layers(y)", "return x + layers(y)", "only the first refinement is used"),
    ("schedule", FALL, "1 - step / (steps - 1)", "a step early and falls below"),
    ("schedule", FALL, "max(0.0, 1 - (step + 1) / steps)", "it begins a step ahead"),
    ("schedule", FALL, "1 - step / (steps + 1)", "it does not reach 0 at the end"),
    ("schedule", FALL, "1 - step // steps", "it drops only at the end"),
    ("schedule", FALL, "min(0.0, 1 - step / steps)", "it is 0 from the start"),
    ("schedule", FALL, f"{FALL} ** 2", "along a parabola"),
    ("schedule", "return ", "", "it returns nothing"),
    ("data_parallel_gradients", "whole += part", "whole = whole + part", "the gradients are all 0"),
    ("data_parallel_gradients", SHARE, f"{SHARE} / len(parts)", "averaged once more"),
    ("data_parallel_gradients", SHARE, "* len(labels) / len(parts)", "divided by the number of parts"),
    ("data_parallel_gradients", SHARE, "/ count", "multiply each by its own number first"),
    ("data_parallel_gradients", "whole += part", "whole[:] = part", "the last part's share alone"),
    (
        "data_parallel_gradients",
        "            whole += part",
        "            whole += part\n        return gradients",
        "the first part's",
    ),
    (
        "data_parallel_gradients",
        "return gradients",
        "[p.data.add_(1) for p in weights]; return gradients",
        "have changed",
    ),
    ("data_parallel_gradients", "return gradients", "return [g.tolist() for g in gradients]", "a list of tensors"),
    ("data_parallel_gradients", "return gradients", "", "it returns nothing"),
]


WRONG += [(*edited(name, old, new), words) for name, old, new, words in EDITED]


@pytest.mark.parametrize(("check", "thing"), RIGHT)
def test_a_correct_version_passes_and_the_random_numbers_stay(check, thing, capsys):
    state = torch.get_rng_state()
    check(thing)
    assert capsys.readouterr().out.startswith("✓ ")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("check", "thing", "words"), WRONG)
def test_a_known_mistake_gets_its_sentence(check, thing, words, capsys):
    with pytest.raises(checks.Wrong) as caught:
        check(thing)
    assert words in str(caught.value)
    [line] = caught.value._render_traceback_()
    assert line == f"Wrong: {caught.value}"
    check(thing, strict=False)
    assert capsys.readouterr().out == f"✗ {caught.value}\n"
    assert torch.is_grad_enabled()


def test_the_sentences_differ():
    sentences = [(check.__name__, words) for check, _, words in WRONG if "it stops" not in words]
    assert len(set(sentences)) == len(sentences)


FUNCTIONS = [checks.cross_entropy, checks.sgd_step, checks.train_one_epoch, checks.evaluate]


@pytest.mark.parametrize("check", [*FUNCTIONS, checks.mirror, checks.shift, checks.schedule, checks.data_parallel])
def test_an_empty_blank_says_not_written_yet(check):
    def blank(*arguments, **options):
        raise NotImplementedError("not written yet: exercise 3, about 10 minutes")

    with pytest.raises(checks.Unwritten, match=r"^not written yet: exercise 3, about 10 minutes$"):
        check(blank, strict=False)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_a_network_of_ones_own(shape, capsys):
    def linear(scale=1.0, end=nn.Identity, outputs=None):
        class Net(nn.Module):
            def __init__(self, classes=10):
                super().__init__()
                self.layer, self.end = nn.Linear(math.prod(shape), outputs or classes), end()

            def forward(self, images):
                return self.end(scale * self.layer(images.flatten(start_dim=1)))

        return Net

    class Hiding(linear()):
        def __init__(self, classes=10):
            super().__init__(classes)
            self.more = {"all": [[nn.Linear(3, 3)]]}

    class Listed(linear()):
        def __init__(self, classes=10):
            super().__init__(classes)
            self.parts, self.activations = [self.layer], [nn.ReLU()]  # known to PyTorch, and without parameters
            nn.init.zeros_(self.layer.weight)
            nn.init.zeros_(self.layer.bias)

    class Forward(linear()):
        def forward(self, images):
            return nn.Linear(10, len(self.layer.bias))(super().forward(images)[:, [0] * 10])

    class Dropping(linear()):
        def forward(self, images):
            return F.dropout(super().forward(images))

    class Constant(linear()):
        @torch.no_grad()
        def forward(self, images):
            return super().forward(images)

    for right in (linear(), Listed):
        checks.my_network(right, shape)
        assert f"✓ a network of your own: {10 * (math.prod(shape) + 1):,} parameters" in capsys.readouterr().out
    for wrong, words in [
        (linear(50), "are the logits too large"),
        (linear(end=nn.ReLU), "one sign"),
        (linear(outputs=10), "[32, 7]"),
        (Hiding, "self.more hides its layers"),
        (Forward, "is a layer made in forward"),
        (Dropping, "F.dropout always on"),
        (Constant, "no gradient flows to the weights"),
    ]:
        with pytest.raises(checks.Wrong) as caught:
            checks.my_network(wrong, shape)
        assert words in str(caught.value)

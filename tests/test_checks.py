"""Every known mistake gets its own sentence, every correct version passes, and nothing is left changed."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import notebooks
from tests import checks

mnist = notebooks.definitions("MNIST.ipynb")


def net(*layers):
    """A class whose instances are these layers in their order."""

    class Net(nn.Sequential):
        def __init__(self, classes=10):
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


def epoch(order="zbs", softmax=False, train=True, schedule=1, detach=True, weigh=True, count=True):
    """A train_one_epoch: z for zero_grad, b for backward, s for step."""

    def train_one_epoch(model, loader, criterion, optimizer, scheduler, precision="fp32"):
        if train:
            model.train()
        losses, total, correct = [], 0, 0
        for images, labels in loader:
            logits = model(images)
            loss = criterion(logits.softmax(1) if softmax else logits, labels)
            for act in order:
                {"z": optimizer.zero_grad, "b": loss.backward, "s": optimizer.step}[act]()
            for _ in range(schedule):
                scheduler.step()
            losses.append(loss.detach() if detach else loss)
            total = total + loss.detach() * (len(labels) if weigh else 1)
            correct = correct + (logits.argmax(1) == labels).sum() * count
        return torch.stack(losses), total, correct

    return train_one_epoch


def evaluation(mode=True, grad=False, restore=True, exact=True, percent=1, total=False, add=False):
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
            model.train(was)
        mean = lambda values: sum(v * n for v, n in zip(values, sizes, strict=True)) / sum(sizes)  # noqa: E731
        loss, accuracy = sum(losses) if add else mean(losses), mean(hits) * percent
        return loss, accuracy * (sum(sizes) if total else 1)

    return evaluate


RIGHT = [
    *[(checks.lenet5, net) for net in (mnist["LeNet5"], lenet(), Functional)],
    *[(checks.cross_entropy, f) for f in (mnist["cross_entropy"], lse, F.cross_entropy)],
    *[(checks.sgd_step, f) for f in (mnist["sgd_step"], both(plain, down))],
    *[(checks.train_one_epoch, f) for f in (mnist["train_one_epoch"], epoch(), epoch("bsz"))],
    *[(checks.evaluate, f) for f in (mnist["evaluate"], evaluation())],
    (checks.guesses, {"a": 10, "b": 99.5}),
]
WRONG = [
    (checks.lenet5, lenet(pool=lambda: nn.AvgPool2d(2)), "pooling takes the average"),
    (checks.lenet5, lenet(last=(nn.ReLU,)), "ReLU behind the last layer"),
    (checks.lenet5, lenet(last=(lambda: nn.Softmax(1),)), "softmax behind the last layer"),
    (checks.lenet5, lenet(hidden=nn.Identity), "no activation behind the linear layers"),
    (checks.lenet5, lenet(active=nn.Identity), "no activation anywhere"),
    (checks.lenet5, lenet(active=nn.Tanh), "the activation is tanh"),
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
    (checks.cross_entropy, naive, "subtract the largest logit"),
    (checks.cross_entropy, lambda z, y: lse(z, y).detach(), "it stops with RuntimeError"),
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
    (checks.train_one_epoch, epoch("bzs"), "zero_grad stands between backward and step"),
    (checks.train_one_epoch, epoch("zb"), "or one of these is missing"),
    (checks.train_one_epoch, epoch(softmax=True), "softmax stands before the criterion"),
    (checks.train_one_epoch, epoch(train=False), "should be in training mode"),
    (checks.train_one_epoch, epoch(schedule=0), "the scheduler took 0 steps"),
    (checks.train_one_epoch, epoch(schedule=2), "the scheduler took 6 steps"),
    (checks.train_one_epoch, epoch(detach=False), "detach them"),
    (checks.train_one_epoch, epoch(weigh=False), "summed over steps"),
    (checks.train_one_epoch, epoch(count=0), "0 right answers"),
    (checks.evaluate, evaluation(mode=False), "call model.eval()"),
    (checks.evaluate, evaluation(grad=True), "torch.no_grad()"),
    (checks.evaluate, evaluation(restore=False), "restore the mode"),
    (checks.evaluate, evaluation(exact=False), "mean of the batches' means"),
    (checks.evaluate, evaluation(add=True), "the losses are added"),
    (checks.evaluate, evaluation(total=True), "the accuracy is a number of images"),
    (checks.evaluate, evaluation(percent=100), "in per cent"),
    (checks.guesses, {"a": 10, "b": "many"}, "the guess for 'b'"),
    (checks.guesses, {"a": 1010}, "the guess for 'a'"),
]


@pytest.mark.parametrize(("check", "thing"), RIGHT)
def test_a_correct_version_passes_and_the_random_numbers_stay(check, thing, capsys):
    state = torch.get_rng_state()
    check(thing)
    assert capsys.readouterr().out.startswith("✓ ")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("check", "thing", "words"), WRONG)
def test_a_known_mistake_gets_its_sentence(check, thing, words, capsys):
    with pytest.raises(checks.Wrong) as caught:
        check(thing)
    assert words in str(caught.value)
    [line] = caught.value._render_traceback_()
    assert line == f"Wrong: {caught.value}"
    check(thing, strict=False)
    assert capsys.readouterr().out == f"✗ {caught.value}\n"


def test_the_sentences_differ():
    sentences = [(check.__name__, words) for check, _, words in WRONG if "it stops" not in words]
    assert len(set(sentences)) == len(sentences)


@pytest.mark.parametrize("check", [checks.cross_entropy, checks.sgd_step, checks.train_one_epoch, checks.evaluate])
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

    checks.my_network(linear(), shape)
    assert "✓ a network of your own" in capsys.readouterr().out
    for wrong, words in [
        (linear(50), "logits too large"),
        (linear(end=nn.ReLU), "one sign"),
        (linear(outputs=10), "[32, 7]"),
    ]:
        with pytest.raises(checks.Wrong) as caught:
            checks.my_network(wrong, shape)
        assert words in str(caught.value)

"""What a run writes for TensorBoard, and the server that shows it in a notebook."""

import os
import re
import signal
import sys
import time
import urllib.request

import jupyter_client
import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import helpers
import toy


def events(training):
    """All events of the run, which is closed."""
    training.run.close()
    sizes = dict.fromkeys(("scalars", "histograms", "images", "tensors"), 0)
    return EventAccumulator(str(training.run.path), size_guidance=sizes).Reload()


class TestEvents:
    def test_scalars_have_one_axis_the_training_steps_done(self, runs):
        training = toy.Training().train()
        metrics, history = training.finish(), training.run.history
        found = events(training)
        for tag in ("loss/train", "accuracy/train", "loss/validation", "learning_rate", "images_per_second"):
            points = [(p.step, p.value) for p in found.Scalars(tag)]
            assert points == [(entry["step"], pytest.approx(entry[tag])) for entry in history], tag
        for tag, name in (("accuracy/test", "test_accuracy"), ("loss/test", "test_loss")):
            assert [(p.step, p.value) for p in found.Scalars(tag)] == [(15, pytest.approx(metrics[name]))]

    def test_the_loss_of_every_tenth_step(self, runs):
        training, losses = toy.Training(BATCH_SIZE=8, EPOCHS=2), []
        training.train(log=lambda values, new: (losses.extend(new.tolist()), (values, new))[1])  # 25 steps in an epoch
        points = [(p.step, p.value) for p in events(training).Scalars("loss/step")]
        assert points == [(step, pytest.approx(losses[step - 1])) for step in (1, 11, 21, 26, 36, 46)]

    def test_figures_tables_and_whatever_the_page_adds(self, runs):
        training = toy.Training(EPOCHS=1).train()
        drawn, _ = helpers.figure(size=(2, 1))
        training.run.add("curves/all", drawn)
        training.run.add("tables/loaders", [["loader", "images/s"], ["classic", 1000]])
        training.run.event("images", "samples", toy.digits().images[:4], training.run.step)
        training.run.event("pr_curve", "curve/0", toy.digits().labels[:40] == 0, torch.rand(40), training.run.step)
        found = events(training)
        [image] = found.Images("curves/all")
        assert (image.step, image.width, image.height) == (5, 200, 100)
        assert [image.step for image in found.Images("samples")] == [5]
        assert {"tables/loaders/text_summary", "curve/0", "settings/text_summary"} <= set(found.Tags()["tensors"])

    def test_the_page_may_add_what_no_writer_takes_without_an_error_of_the_disk(self, runs):
        training = toy.Training()
        with pytest.raises(AttributeError):
            training.run.event("scalars_of_the_moon", 1)


# -------------------------------------------------------------------------------------------------------------- server


class Kernel:
    """A Jupyter kernel of this Python, as a front end starts it."""

    def __init__(self, **variables):
        self.manager = jupyter_client.KernelManager()
        self.manager.kernel_spec.argv[0] = sys.executable
        self.manager.start_kernel(env=os.environ | variables)
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)
        self(f"import os, sys; sys.path.insert(0, {str(helpers.HERE)!r}); import helpers")

    def __call__(self, code):
        """Execute the code; return what was printed and shown."""
        outputs = []
        reply = self.client.execute_interactive(code, timeout=60, output_hook=outputs.append)
        contents = [message["content"] for message in outputs if message["msg_type"] != "status"]
        text = "".join(content.get("text") or content.get("data", {}).get("text/html", "") for content in contents)
        assert reply["content"]["status"] == "ok", "\n".join(reply["content"]["traceback"])
        return text

    def end(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    hidden = {"JUPYTERHUB_SERVICE_PREFIX": "", "VSCODE_PROXY_URI": "", "TENSORBOARD_PROXY_URL": ""}
    runs = tmp_path_factory.mktemp("tensorboard")
    running = Kernel(JPY_SESSION_NAME="MNIST.ipynb", LAB_RUNS=str(runs), **hidden)
    yield running
    running.end()


def answers(port):
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).status == 200
    except OSError:
        return False


def test_it_is_shown_in_a_notebook_answers_and_listens_on_this_machine_only(kernel):
    shown = kernel("helpers.show_tensorboard(); print('pid', os.getpid())")
    port = int(re.search(r"TensorBoard: http://localhost:(\d+)/\n", shown)[1])
    assert f"ssh -L {port}:localhost:{port} " in shown
    assert re.search(rf'<iframe[^>]*src="http://localhost:{port}/', shown)
    assert answers(port)
    process = psutil.Process(int(re.search(r"pid (\d+)", shown)[1]))
    listening = [c.laddr for c in process.net_connections("inet") if c.status == "LISTEN" and c.laddr.port == port]
    assert [address.ip for address in listening] == ["127.0.0.1"]
    assert f"TensorBoard: http://localhost:{port}/\n" in kernel("helpers.show_tensorboard()"), "the same server again"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"JUPYTERHUB_SERVICE_PREFIX": "/user/li/"}, "/user/li/proxy/PORT/"),
        ({"TENSORBOARD_PROXY_URL": "https://host/proxy/%PORT%"}, "https://host/proxy/PORT/"),
        ({"TENSORBOARD_PROXY_URL": "/node/gpu1/%PORT%", "JUPYTERHUB_SERVICE_PREFIX": "/x/"}, "/node/gpu1/PORT/"),
    ],
)
def test_its_address_behind_proxies_ends_with_a_slash(variables, expected, kernel):
    code = f"import unittest.mock\nwith unittest.mock.patch.dict(os.environ, {variables}): helpers.show_tensorboard()"
    shown = kernel(code)
    port = re.search(r"ssh -L (\d+):", shown)[1]
    address = expected.replace("PORT", port)
    assert f"TensorBoard: {address}\n" in shown
    assert re.search(rf'<iframe[^>]*src="{re.escape(address)}', shown)


def test_one_that_does_not_start_is_a_line(kernel):
    code = """from unittest.mock import patch
with patch.dict(os.environ, LAB_RUNS="/elsewhere"), patch.dict(sys.modules, tensorboard=None):
    helpers.show_tensorboard()"""
    shown = kernel(code)
    assert shown.startswith("TensorBoard does not start, the page goes on without it: ModuleNotFoundError: ")
    assert shown.count("\n") == 1


def test_without_a_reader_nothing_starts(kernel, capsys):
    helpers.show_tensorboard()
    assert "tensorboard --logdir" in capsys.readouterr().out
    code = "import unittest.mock\nwith unittest.mock.patch.dict(os.environ): del os.environ['JPY_SESSION_NAME']; "
    assert kernel(code + "helpers.show_tensorboard()").startswith("not interactive: TensorBoard is not started.")


def alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # dead, where nobody collects orphans
    except psutil.NoSuchProcess:
        return False


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a POSIX signal")
def test_it_ends_when_the_kernel_is_killed(kernel):
    """The last test of this kernel."""
    shown = kernel("helpers.show_tensorboard(); print('pid', os.getpid())")
    port, process = int(re.search(r"ssh -L (\d+):", shown)[1]), psutil.Process(int(re.search(r"pid (\d+)", shown)[1]))
    started = process.children(recursive=True)
    assert answers(port)
    os.kill(process.pid, signal.SIGKILL)
    end = time.monotonic() + 20
    while time.monotonic() < end and (answers(port) or any(map(alive, started))):
        time.sleep(0.1)
    assert not answers(port)
    assert not any(map(alive, started))

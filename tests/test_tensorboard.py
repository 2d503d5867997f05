"""What is logged, and the server that shows it."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from types import SimpleNamespace

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import nn

import helpers


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.rest = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        self.head = nn.Linear(4 * 9, 5)

    def forward(self, images):
        return self.head(self.rest(self.norm(self.conv(images))))


@pytest.fixture
def trained():
    torch.manual_seed(0)
    model = Small()
    model(torch.randn(8, 3, 8, 8)).square().sum().backward()
    return model


def logged(folder, log):
    folder.mkdir(exist_ok=True)
    writer = helpers.event_writer(folder)
    log(writer)
    writer.close()
    return EventAccumulator(str(folder), size_guidance={"histograms": 0}).Reload()


def test_histograms_count_every_weight_and_gradient(trained, tmp_path):
    events = logged(tmp_path, lambda writer: helpers.log_histograms(writer, trained, 3))
    names = [name for name, _ in trained.named_parameters()]
    assert set(events.Tags()["histograms"]) == {f"{k}/{name}" for name in names for k in ("weights", "gradients")}
    for name, parameter in trained.named_parameters():
        [event] = events.Histograms(f"weights/{name}")
        value = event.histogram_value
        assert event.step == 3
        assert (value.num, sum(value.bucket)) == (parameter.numel(), parameter.numel())
        assert (value.min, value.max) == pytest.approx((parameter.min().item(), parameter.max().item()))
        assert value.sum == pytest.approx(parameter.sum().item(), abs=1e-4)


def test_histograms_of_constant_and_of_infinite_weights(trained, tmp_path):
    nn.init.constant_(trained.conv.bias, 0.5)
    trained.conv.weight.data.fill_(torch.inf)
    events = logged(tmp_path, lambda writer: helpers.log_histograms(writer, trained, 1))
    assert events.Histograms("weights/conv.bias")[0].histogram_value.num == 4
    assert "weights/conv.weight" not in events.Tags()["histograms"]


def test_pictures_and_state_is_left_alone(trained, tmp_path):
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    images = torch.randn(2, 3, 8, 8)
    events = logged(tmp_path, lambda writer: helpers.log_pictures(writer, trained, images, 2))
    assert {"filters/first_layer", "feature_maps/01_conv", "feature_maps/04_rest.1"} <= set(events.Tags()["images"])
    assert trained.training
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())


def test_graph_is_logged_or_one_line_says_why(trained, tmp_path, capsys):
    class Odd(nn.Module):
        def forward(self, images):
            raise RuntimeError("cannot be traced")

    events = logged(tmp_path / "a", lambda writer: helpers.log_graph(writer, trained, torch.zeros(1, 3, 8, 8)))
    assert events.Tags()["graph"]
    assert capsys.readouterr() == ("", "")
    logged(tmp_path / "b", lambda writer: helpers.log_graph(writer, Odd(), torch.zeros(1, 3, 8, 8)))
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert "cannot be traced" in out
    assert err == ""


def test_settings_are_comparable_without_a_stray_run(tmp_path):
    settings = {"EPOCHS": 3, "RATE": 0.1, "WIDTHS": (1, 2), "NAME": "x", "FLAG": True}
    events = logged(tmp_path, lambda writer: helpers.log_comparable(writer, settings, {"test/accuracy": 0.5}))
    assert len(list(tmp_path.iterdir())) == 1
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert values["EPOCHS"].number_value == 3
    assert values["WIDTHS"].string_value == "(1, 2)"


def test_penultimate_features(trained):
    split = helpers.stand_in("CIFAR10", True, (3, 32, 32), 10)
    split = helpers.Split(split.images[:, :, :8, :8], split.labels, split.classes, split.provenance)
    half = torch.full((3,), 0.5)
    loader = helpers.ResidentLoader(split, 4, torch.device("cpu"), half, half)
    features = helpers.penultimate(trained, loader)
    assert features.shape == (10, 36)
    trained.eval()
    assert torch.allclose(trained.head(features), helpers.predict(trained, loader), atol=1e-6)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "http://localhost:6006/"),
        ({"JUPYTERHUB_SERVICE_PREFIX": "/user/li/"}, "/user/li/proxy/6006/"),
        ({"VSCODE_PROXY_URI": "https://host/proxy/{{port}}"}, "https://host/proxy/6006/"),
        ({"TENSORBOARD_PROXY_URL": "/node/gpu1/%PORT%", "JUPYTERHUB_SERVICE_PREFIX": "/x/"}, "/node/gpu1/6006/"),
    ],
)
def test_address_behind_proxies_ends_with_a_slash(variables, expected, monkeypatch):
    for name in ("JUPYTERHUB_SERVICE_PREFIX", "VSCODE_PROXY_URI", "TENSORBOARD_PROXY_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert helpers.tensorboard_url(6006) == expected


def test_headless_starts_nothing(capsys):
    helpers.show_tensorboard()
    assert "tensorboard --logdir" in capsys.readouterr().out
    assert helpers._server is None


def answers(port):
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).status == 200
    except OSError:
        return False


def test_server_is_replaced_listens_here_only_and_is_stopped(tmp_path, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(helpers, "in_notebook", lambda: True)
    monkeypatch.setattr(helpers, "watched", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda frame: shown.append(frame.src))
    helpers.show_tensorboard(tmp_path)
    first = helpers._server
    try:
        helpers.show_tensorboard(tmp_path)
        assert first.poll() is not None
        out = capsys.readouterr().out
        assert "ssh -L" in out
        assert shown[-1] in out
        port = int(shown[-1].split(":")[-1].strip("/"))
        assert answers(port)
        listening = [c for c in connections(helpers._server.pid) if c.status == "LISTEN"]
        assert {c.laddr.ip for c in listening if c.laddr.port == port} == {"127.0.0.1"}
    finally:
        helpers.stop_tensorboard()
    assert not answers(port)


def connections(pid):
    process = psutil.Process(pid)
    return (process.net_connections if hasattr(process, "net_connections") else process.connections)("inet")


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # dead, where nobody collects orphans
    except psutil.NoSuchProcess:
        return False


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a POSIX signal")
def test_server_ends_when_the_kernel_is_killed(tmp_path):
    code = (
        f"import sys, time; sys.path.insert(0, {str(helpers.HERE)!r}); import helpers, pathlib\n"
        f"print(helpers._start_tensorboard(pathlib.Path({str(tmp_path)!r})), helpers._server.pid, flush=True)\n"
        "time.sleep(60)"
    )
    kernel = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    port, pid = map(int, kernel.stdout.readline().split())
    assert answers(port)
    kernel.send_signal(signal.SIGKILL)
    kernel.wait()
    end = time.monotonic() + 20
    while time.monotonic() < end and (answers(port) or alive(pid)):
        time.sleep(0.2)
    assert not answers(port)
    assert not alive(pid)


def test_a_server_that_does_not_start_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(helpers, "SERVER", "raise SystemExit('no module named tensorboard')")
    with pytest.raises(helpers.LabError, match="no module named tensorboard"):
        helpers._start_tensorboard(tmp_path)
    assert helpers._server is None


def test_colab_gets_its_own_frame(tmp_path, monkeypatch):
    served = []
    output = SimpleNamespace(serve_kernel_port_as_iframe=lambda port, height: served.append(port))
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(output=output))
    monkeypatch.setattr(helpers, "in_notebook", lambda: True)
    monkeypatch.setattr(helpers, "watched", lambda: True)
    monkeypatch.setattr(helpers, "_start_tensorboard", lambda logdir: 6123)
    helpers.show_tensorboard(tmp_path)
    assert served == [6123]


def test_a_figure_that_the_page_shows_is_drawn_once(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(helpers, "picture", lambda canvas, draw=helpers.picture: drawn.append(canvas) or draw(canvas))
    canvas, axis = helpers.figure(size=(2, 1))
    axis.plot([0, 1], color="red")
    writer = helpers.EventWriter(tmp_path)
    writer.add_figure("figure", canvas, 3)  # on a terminal nothing was shown
    canvas.picture = helpers.picture(canvas)
    writer.add_figure("figure", canvas, 4)
    writer.close()
    assert len(drawn) == 2
    accumulator = EventAccumulator(str(tmp_path)).Reload()
    logged = accumulator.Images("figure")
    assert [(image.step, image.width, image.height) for image in logged] == [(3, 200, 100), (4, 200, 100)]

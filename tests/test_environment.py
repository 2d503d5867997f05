"""Device, precision and the environment check, against what machines answer that nobody has here."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch

import helpers


@pytest.fixture
def machine(monkeypatch):
    """A function that sets what this machine has: a CUDA build of torch or none, and an NVIDIA driver or none."""

    def install(build, driver):
        monkeypatch.setattr("torch.version.cuda", build)
        monkeypatch.setattr("shutil.which", lambda name: driver and f"/usr/bin/{name}")
        monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: None)  # if there is one

    return install


@pytest.mark.parametrize(
    ("build", "driver", "problem"),
    [
        (None, True, "it is a CPU build"),
        ("13.0", True, "the driver is too old"),
        ("13.0", False, ""),
        (None, False, ""),
    ],
)
def test_an_idle_gpu_comes_with_the_command_that_puts_it_to_use(build, driver, problem, machine, capsys):
    machine(build, driver)
    helpers.check_environment()  # the training can go on
    said = capsys.readouterr().out.partition("SLOWER THAN IT COULD BE")[2]
    assert problem in said
    assert bool(said) == bool(problem)
    assert not said or "pip install --force-reinstall torch torchvision" in said.splitlines()[-1]


def test_the_card_that_the_user_does_not_want_is_no_problem(machine, monkeypatch, capsys):
    machine(None, True)
    monkeypatch.setenv("LAB_DEVICE", "cpu")
    helpers.check_environment()
    assert "SLOWER" not in capsys.readouterr().out


@pytest.mark.parametrize(("build", "wheels"), [("13.0", "whl/cu130"), ("12.6", "whl/cu126"), (None, "whl/cpu")])
def test_a_torchvision_that_does_not_import_comes_with_the_wheels_that_fit(build, wheels, machine, monkeypatch):
    machine(build, False)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(helpers.LabError, match=r"torchvision does not fit torch[^$]*pip install") as caught:
        helpers.check_environment()
    assert str(caught.value).endswith(wheels)


@pytest.mark.parametrize(("quota", "threads"), [("100000 100000", 1), ("max 100000", 2), ("50000 100000", 1), ("", 2)])
def test_a_container_gets_as_many_threads_as_its_quota(quota, threads, monkeypatch, tmp_path):
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(helpers, "CPU_QUOTA", tmp_path / "cpu.max")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        helpers.check_environment()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii"])
def test_what_a_terminal_cannot_encode_stops_nothing(encoding):
    program = "import helpers\nhelpers.check_environment()\nprint('✓ 网络')"
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=helpers.HERE, env=environment, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.decode(encoding).endswith("? ??\n")


def test_check_prints_this_machine(capsys):
    helpers.check_environment()
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert helpers.device_name(helpers.pick_device()) in printed


@pytest.mark.parametrize(
    ("capability", "precision"),
    [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16"), ((12, 0), "bf16"), ((6, 1), "fp32")],
)
def test_precision_by_capability(monkeypatch, capability, precision):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert helpers.pick_precision(torch.device("cuda", 0)) == precision


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ({"amx_bf16": True, "avx2": True}, "bf16"),
        ({"avx512_bf16": True}, "bf16"),
        ({"avx2": True}, "fp32"),
        ({}, "fp32"),
    ],
)
def test_precision_of_a_processor(monkeypatch, capabilities, precision):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities, raising=False)
    assert helpers.pick_precision(torch.device("cpu")) == precision


def test_named_precision_and_device():
    assert helpers.pick_precision(torch.device("cpu"), "bf16") == "bf16"
    assert helpers.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(helpers.LabError, match="LAB_PRECISION"):
        helpers.pick_precision(torch.device("cpu"), "int8")
    with pytest.raises(helpers.LabError, match="LAB_DEVICE"):
        helpers.pick_device("gpu")


def test_autocast():
    cpu, layer = torch.device("cpu"), torch.nn.Linear(2, 2)
    with helpers.autocast(cpu, "bf16"):
        assert layer(torch.ones(1, 2)).dtype == torch.bfloat16
    assert isinstance(helpers.autocast(cpu, "fp32"), contextlib.nullcontext)


def test_the_device_is_the_accelerator_if_there_is_one(monkeypatch):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: None)
    assert helpers.pick_device() == torch.device("cpu")
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: torch.device("meta"))
    assert helpers.pick_device() == torch.device("meta")

"""Device, precision and the environment check, against recorded facts of machines that nobody has here."""

import contextlib
import sys

import pytest
import torch

import helpers

CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]  # torch.cuda.get_arch_list(), cu130
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]  # the same, cu126
HEALTHY = {
    "python": "3.11.7",
    "torch": "2.14.1+cu130",
    "torchvision": "0.29.1+cu130",
    "cuda_build": "13.0",
    "driver": "580.65.06",
    "driver_gpus": ["NVIDIA A100-SXM4-40GB"],
    "device": "NVIDIA A100-SXM4-40GB",
    "device_type": "cuda",
    "capability": (8, 0),
    "arch_list": CU130,
    "memory_gib": 39.4,
}
NO_CUDA = {"device_type": "cpu", "capability": None, "arch_list": []}


@pytest.mark.parametrize(
    ("change", "problem", "fix", "fatal"),
    [
        ({"capability": (7, 0), "device": "Tesla V100"}, "no kernels for Tesla V100", "cu126", True),
        ({"capability": (9, 0), "arch_list": ["sm_80", "sm_100"]}, "no kernels", "cu126", True),
        ({"capability": (10, 0), "arch_list": CU126, "cuda_build": "12.6"}, "no kernels", "cu130", True),
        ({"torchvision": "does not import: operator torchvision::nms does not exist"}, "nms", "cu130", True),
        ({"torchvision": "not installed"}, "not installed", "cu130", True),
        ({**NO_CUDA, "torch": "2.14.1+cpu", "cuda_build": None}, "CPU build", "cu126", False),
        ({**NO_CUDA, "driver": "535.183.01"}, "too old", "cu126", False),
        ({**NO_CUDA, "driver": "470.256.02"}, "too old", "update the NVIDIA driver", False),
        (NO_CUDA, "CUDA_VISIBLE_DEVICES", "unset", False),
    ],
)
def test_each_problem_comes_with_the_command_that_fixes_it(change, problem, fix, fatal, capsys):
    if fatal:
        with pytest.raises(helpers.LabError) as caught:
            helpers.check_environment(HEALTHY | change)
        said = str(caught.value)
    else:
        helpers.check_environment(HEALTHY | change)  # the training can go on
        said = capsys.readouterr().out.partition("SLOWER THAN IT COULD BE\n")[2]
    [found, command] = said.strip().splitlines()
    assert problem in found
    assert fix in command.partition("To fix it:")[2]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"capability": (7, 5), "device": "Tesla T4"},
        {"capability": (7, 5), "device": "NVIDIA GeForce RTX 2080 Ti"},
        {"capability": (8, 9), "device": "NVIDIA GeForce RTX 4090"},  # sm_86 kernels run on it
        {"capability": (9, 0), "device": "NVIDIA H100 MIG 1g.10gb"},
        {"capability": (12, 1), "device": "NVIDIA GB10"},
        {"capability": (13, 0), "device": "a later card"},  # compiled for it at run time
        {"capability": (7, 0), "device": "Tesla V100", "arch_list": CU126, "cuda_build": "12.6"},
        {**NO_CUDA, "driver": None, "driver_gpus": [], "torch": "2.14.1+cpu", "cuda_build": None},
        {
            "device": "AMD Instinct MI250X",
            "cuda_build": None,
            "driver": None,
            "driver_gpus": [],
            "arch_list": ["gfx90a"],
        },
    ],
)
def test_nothing_is_wrong(change, capsys):
    helpers.check_environment(HEALTHY | change)
    printed = capsys.readouterr().out
    assert (HEALTHY | change)["device"] in printed
    assert len(printed.splitlines()) == 5
    assert "SLOWER" not in printed


def test_the_card_that_the_user_does_not_want_is_no_problem(monkeypatch, capsys):
    monkeypatch.setenv("LAB_DEVICE", "cpu")
    helpers.check_environment(HEALTHY | NO_CUDA)
    assert "SLOWER" not in capsys.readouterr().out


def test_a_torchvision_that_does_not_import_is_told_by_this_machine_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(helpers.LabError, match=r"torchvision.* does not import[^$]*pip install --force-reinstall"):
        helpers.check_environment()


def test_check_prints_this_machine(capsys):
    helpers.check_environment()
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert helpers.device_name(helpers.pick_device()) in printed
    assert "GiB" in printed


@pytest.mark.parametrize(
    ("capability", "precision"),
    [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16"), ((12, 0), "bf16"), ((6, 1), "fp32")],
)
def test_precision_by_capability(monkeypatch, capability, precision):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert helpers.pick_precision(torch.device("cuda", 0)) == precision


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [({"amx_bf16": True, "avx2": True}, "bf16"), ({"avx512_bf16": True, "amx_bf16": False}, "fp32"), ({}, "fp32")],
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


def test_the_device_is_the_best_one_there_is(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: None)
    assert helpers.pick_device() == torch.device("cpu")
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: torch.device("mps"))
    assert helpers.pick_device() == torch.device("mps")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    assert helpers.pick_device() == torch.device("cuda", 1)

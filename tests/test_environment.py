"""Device, precision and the environment check, against recorded facts of machines that nobody has here."""

import contextlib

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
    ("change", "problem", "mend", "fatal"),
    [
        ({"capability": (7, 0), "device": "Tesla V100"}, "no kernels for Tesla V100", "cu126", True),
        ({"torchvision": "does not import: operator torchvision::nms does not exist"}, "nms", "cu130", True),
        ({"torchvision": "not installed"}, "not installed", "cu130", True),
        ({**NO_CUDA, "torch": "2.14.1+cpu", "cuda_build": None}, "CPU build", "cu126", False),
        ({**NO_CUDA, "driver": "535.183.01"}, "too old", "cu126", False),
        ({**NO_CUDA, "driver": "470.256.02"}, "too old", "update the NVIDIA driver", False),
        (NO_CUDA, "CUDA_VISIBLE_DEVICES", "unset", False),
    ],
)
def test_each_problem_comes_with_the_line_that_mends_it(change, problem, mend, fatal):
    [(found, command, stops)] = helpers.diagnose(HEALTHY | change)
    assert problem in found
    assert mend in command
    assert stops == fatal


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"capability": (7, 5), "device": "Tesla T4"},
        {"capability": (7, 5), "device": "NVIDIA GeForce RTX 2080 Ti"},
        {"capability": (8, 9), "device": "NVIDIA GeForce RTX 4090"},  # sm_86 kernels run on it
        {"capability": (9, 0), "device": "NVIDIA H100 MIG 1g.10gb"},
        {"capability": (12, 1), "device": "NVIDIA GB10"},
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
def test_nothing_is_wrong(change):
    assert helpers.diagnose(HEALTHY | change) == []


def test_check_prints_this_machine(capsys):
    helpers.check_environment()
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "GiB" in printed


def test_check_stops_with_the_mending_line(monkeypatch):
    monkeypatch.setattr(helpers, "environment", lambda: HEALTHY | {"capability": (7, 0)})
    with pytest.raises(helpers.LabError, match="pip install"):
        helpers.check_environment()


def test_check_goes_on_where_training_can(monkeypatch, capsys):
    monkeypatch.setattr(helpers, "environment", lambda: HEALTHY | NO_CUDA)
    helpers.check_environment()
    assert "unset CUDA_VISIBLE_DEVICES" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("capability", "precision"),
    [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16"), ((12, 0), "bf16"), ((6, 1), "fp32")],
)
def test_precision_by_capability(monkeypatch, capability, precision):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert helpers.pick_precision(torch.device("cuda", 0)) == precision


@pytest.mark.parametrize(("faster", "expected"), [("bf16", "bf16"), ("fp32", "fp32")])
def test_cpu_precision_is_measured(monkeypatch, faster, expected):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(helpers, "_block_seconds", lambda precision: 1.0 if precision == faster else 2.0)
    assert helpers.pick_precision(torch.device("cpu")) == expected


def test_cpu_without_bf16_hardware_is_not_measured(monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True}, raising=False)
    monkeypatch.setattr(helpers, "_block_seconds", None)
    assert helpers.pick_precision(torch.device("cpu")) == "fp32"


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

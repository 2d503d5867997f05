"""A synthetic class for the grader: `python -m tests.submissions FOLDER [--all]` writes what students might hand in.

Nothing is stored. Solved pages are the repository's own; correct variants and mutants are the expressions of the lists
RIGHT and WRONG in test_checks.py, put into notebooks with the functions that they call.
"""

import ast
import io
import json
import stat
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from tests import notebooks, release
from tests.grade import EXERCISES

HERE = Path(__file__).resolve().parent
WRITTEN = HERE.parent / "written-by-a-student"  # no attack should succeed in making it
LABS = {"MNIST": "MNIST.ipynb", "CIFAR": "CIFAR.ipynb"}
NAMES = {check: (name, target) for name, (_, tasks) in EXERCISES.items() for check, target in tasks}


@dataclass
class Expected:
    """What grading a student should give: exercises that fail, with words of their messages; words of the remarks."""

    wrong: dict = field(default_factory=dict)
    remarks: tuple = ()
    labs: tuple = ("MNIST", "CIFAR")
    only: tuple = ()  # the exercises that are there; all, where there are none


def variants() -> tuple[dict, dict, str]:
    """RIGHT {check: [expression]} and WRONG {check: [(expression, words)]} of test_checks.py, and its functions."""
    tree = ast.parse((HERE / "test_checks.py").read_text(encoding="utf-8"))
    right, wrong, functions = {}, {}, []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("test_"):
            functions.append(node)
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        if node.targets[0].id in ("plain", "down", "fair"):
            functions.append(node)
        if node.targets[0].id == "RIGHT":
            for one in node.value.elts:
                if isinstance(one, ast.Starred):
                    check = one.value.elt.elts[0].attr
                    right.setdefault(check, []).extend(map(ast.unparse, one.value.generators[0].iter.elts))
        if node.targets[0].id == "WRONG":
            for one in node.value.elts:
                check, thing, words = one.elts
                wrong.setdefault(check.attr, []).append((ast.unparse(thing), words.value))
    imports = "import math\n\nimport torch\nimport torch.nn.functional as F\nfrom torch import nn\n\n\n"
    return right, wrong, imports + "\n\n\n".join(map(ast.unparse, functions))


def page(lab: str, *only: str) -> list[dict]:
    """The cells of the solved page, without outputs; or its first code cell and those of some exercises."""
    cells = []
    for cell in notebooks.read(LABS[lab]).cells:
        tasks = [check for name in only for check, _ in EXERCISES[name][1]]
        if only and cell.id != "env-check" and not any(f"checks.{check}(" in cell.source for check in tasks):
            continue
        cells.append({"cell_type": cell.cell_type, "id": cell.id, "metadata": {}, "source": cell.source})
        if cell.cell_type == "code":
            cells[-1] |= {"outputs": [], "execution_count": None}
    return cells


def code(source: str) -> dict:
    return {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None, "source": source}


def file(cells: list[dict], **more) -> bytes:
    """A notebook's bytes."""
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells} | more).encode()


def with_variants(lab: str, chosen: dict, functions: str) -> bytes:
    """The solved page, with `NAME = expression` behind it for each check in {check: expression}."""
    cells = page(lab)
    given = {"mnist['LeNet5']": "LeNet5"}
    for check, expression in chosen.items():
        target = NAMES[check][1].split()[0]
        for name in ("mirror", "shift", "BatchNorm", "schedule", "data_parallel_gradients", "Block"):
            given[f"cifar['{name}']"] = f"page_{name}"
        for name in ("LeNet5", "cross_entropy", "sgd_step", "train_one_epoch", "evaluate"):
            given[f"mnist['{name}']"] = f"page_{name}"
        # The functions have names that the page has too: `block`, `epoch`; the page's own get others.
        solution = next(c["source"] for c in cells if f"checks.{check}(" in c["source"])
        text = functions + f"\n\n\nmade = {expression}\n"
        for name, other in given.items():
            text = text.replace(name, other)
        if f"page_{target}" in text:
            cells.append(code(_renamed(solution, target, f"page_{target}")))
        cells.append(code(_prefixed(text, f"{check}_").replace(f"{check}_made = ", f"{target} = ")))
    return file(cells)


def _renamed(source: str, old: str, new: str) -> str:
    """The definition of `old` in the source, as `new`."""
    for node in ast.parse(source).body:
        if getattr(node, "name", None) == old:
            node.name = new
            return ast.unparse(node)
    raise KeyError(old)


def _prefixed(source: str, prefix: str) -> str:
    """The source with a prefix before each name that its top level defines, so that it hides none of the page's."""
    tree = ast.parse(source)
    own = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    own |= {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in own and not _local(tree, node):
            node.id = prefix + node.id
    for node in tree.body:
        if getattr(node, "name", None) in own:
            node.name = prefix + node.name
    return ast.unparse(tree)


def _local(tree, name) -> bool:
    """Whether a name stands in a function that has it as an argument or variable."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.Lambda):
            inside = list(ast.walk(function))
            if any(one is name for one in inside):
                if any(isinstance(one, ast.arg) and one.arg == name.id for one in inside):
                    return True
                if any(isinstance(o, ast.Name) and o.id == name.id and isinstance(o.ctx, ast.Store) for o in inside):
                    return True
                if any(isinstance(o, ast.FunctionDef) and o.name == name.id and o is not function for o in inside):
                    return True
    return False


def replaced(lab: str, definitions: str) -> bytes:
    """Solved exercises of the page with other definitions behind them."""
    return file([*page(lab, *FEW[lab]), code(definitions)])


FEW = {"MNIST": ("MNIST 2", "MNIST 5"), "CIFAR": ("CIFAR 4", "CIFAR 5")}  # where more would only take time
ATTACKS = {  # {student: (definitions, exercise, words of its message)}
    "attack_loop": ("def schedule(step, steps):\n    while True:\n        pass", "CIFAR 4", "does a loop end?"),
    "attack_exit": ("def schedule(step, steps):\n    raise SystemExit(0)", "CIFAR 4", "calls exit"),
    "attack_os_exit": ("def schedule(step, steps):\n    torch.os._exit(0)", "CIFAR 4", "ended its own process"),
    "attack_import_os": (
        "def schedule(step, steps):\n    import os\n    os._exit(0)",
        "CIFAR 4",
        "os may not be imported",
    ),
    "attack_forks": (
        "def schedule(step, steps):\n    while True:\n        torch.os.fork()",
        "CIFAR 4",
        "no exercise needs: os.fork",
    ),
    "attack_prints": (
        'def schedule(step, steps):\n    for _ in range(200):\n        print("✓" * 1_000_000)\n    return 1.0',
        "CIFAR 4",
        "it does not fall",
    ),
    "attack_memory": (
        "def cross_entropy(logits, labels):\n    return torch.ones(10_000_000_000).sum()",
        "MNIST 2",
        "more memory",
    ),
    "attack_torch": (
        "torch.allclose = lambda *a, **k: True\n\n\ndef cross_entropy(logits, labels):\n"
        "    torch.allclose = lambda *a, **k: True\n    return torch.tensor(0.0)",
        "MNIST 2",
        "it should be",
    ),
    "attack_checks": (
        'checks.cross_entropy = print\n\n\ndef cross_entropy(logits, labels):\n    print("✓ cross-entropy is right")\n'
        '    import torch\n    torch.sys.modules["tests.checks"]._demand = print\n    return logits.mean()',
        "MNIST 2",
        "it should be",
    ),
    "attack_pipe": (
        "def schedule(step, steps):\n    for fd in range(3, 40):\n        try:\n"
        "            torch.os.write(fd, b'\\x02' + bytes(7) + b'{}')\n        except OSError:\n"
        "            pass\n    torch.os._exit(0)",
        "CIFAR 4",
        "cannot be read",
    ),
    "attack_reads": (
        f"def schedule(step, steps):\n    return open({str(HERE.parent / 'CIFAR.ipynb')!r}).read()",
        "CIFAR 4",
        "reads what is not its own",
    ),
    "attack_imports": (
        "def schedule(step, steps):\n    return torch.sys.modules['tests.notebooks'].definitions('CIFAR.ipynb')",
        "CIFAR 4",
        "KeyError",
    ),
    "attack_writes": (
        f'def schedule(step, steps):\n    open("{WRITTEN}", "w").write("x")\n    return 0.0',
        "CIFAR 4",
        "writes outside of its folder",
    ),
    "attack_native_write": (
        f'def schedule(step, steps):\n    torch._C.PyTorchFileWriter("{WRITTEN}", False, False).write_end_of_file()',
        "CIFAR 4",
        "it stops with",
    ),
    "attack_network": (
        "def schedule(step, steps):\n    from torch.distributed import TCPStore\n"
        '    return TCPStore("1.1.1.1", 53, is_master=False)',
        "CIFAR 4",
        "it ",
    ),
    "attack_kill": ("def schedule(step, steps):\n    torch.os.kill(torch.os.getppid(), 9)", "CIFAR 4", "os.kill"),
    "attack_huge_answer": ("def schedule(step, steps):\n    return torch.zeros(100_000_000)", "CIFAR 4", "too large"),
    "attack_recursion": ("def schedule(step, steps):\n    return schedule(step, steps)", "CIFAR 4", "RecursionError"),
}


def zipped(members: dict) -> bytes:
    """A zip of {name: bytes}."""
    with zipfile.ZipFile(memory := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return memory.getvalue()


def hand_in(mnist: bytes | None = None, cifar: bytes | None = None) -> bytes:
    """A zip as the page's own command packs it, with a run of MNIST."""
    files = {"MNIST.ipynb": mnist or file(page("MNIST")), "CIFAR.ipynb": cifar or file(page("CIFAR"))}
    for name in ("metrics.json", "config.json"):
        files[f"runs/mnist/one/{name}"] = (HERE.parent / "runs/reference/mnist" / name).read_bytes()
    return zipped(files)


def damages(folder: Path, expected: dict) -> None:
    """Hand-ins that arrive damaged, renamed, or in another form."""
    few, other = page("MNIST", *FEW["MNIST"]), page("CIFAR", *FEW["CIFAR"])
    mnist, cifar = file(few), file(other)

    def put(name, content, student=None, **what):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        expected[student or name.partition(".")[0]] = Expected(**what)

    every = dict.fromkeys(EXERCISES, "handed in")
    both = dict(only=FEW["MNIST"] + FEW["CIFAR"])
    mnist_only = dict(labs=("MNIST",), only=FEW["MNIST"])
    put("mueller_12345_MNIST.ipynb", mnist, "mueller", **both)
    put("mueller_12346_CIFAR.ipynb", cifar, "mueller", **both)
    put("mueller_22345_MNIST.ipynb", mnist, "mueller-2", **mnist_only)
    put("renamed.zip", zipped({"Lab final (2).ipynb": cifar, "notes.ipynb": mnist}), **both)
    put("handed_in.zip", hand_in(mnist, cifar), **both)
    put("folder/mine/My MNIST.ipynb", mnist, "folder", **mnist_only)
    put("deleted.ipynb", file([c for c in few if "checks.evaluate(" not in c["source"]]),
        wrong={"MNIST 5": "not defined"}, **mnist_only)  # fmt: skip
    put("reordered.ipynb", file(few[::-1]), **mnist_only)
    old = code("def evaluate(model, batches):\n    return 0.0, 0.0")
    put("copied.ipynb", file([old, *few, *few]), **mnist_only)
    three = {"nbformat": 3, "nbformat_minor": 0, "metadata": {}, "worksheets": [{"cells": [
        {"cell_type": "code", "language": "python", "input": c["source"].splitlines(keepends=True), "outputs": []}
        for c in few if c["cell_type"] == "code"]}]}  # fmt: skip
    put("three.ipynb", json.dumps(three).encode(), **mnist_only)
    colab = [c | {"metadata": {"id": "x", "colab": {"base_uri": "https://colab"}}} for c in few]
    put("colab.ipynb", b"\xef\xbb\xbf" + file(colab, metadata={"accelerator": "GPU"}), **mnist_only)
    lost = [{"cell_type": c["cell_type"], "source": c["source"].splitlines(True)} for c in few]
    put("metadata.ipynb", json.dumps({"cells": lost}).encode(), **mnist_only)
    magic = [c | {"source": "%matplotlib inline\n!pip install timm\n" + c["source"]} if "checks.sgd" in c["source"] else
             c | {"source": "%%time\n" + c["source"]} if "checks.evaluate" in c["source"] else c
             for c in few]  # fmt: skip
    put("magics.ipynb", file(magic), **mnist_only)
    put("syntax.ipynb", file([code("def broken(:\n    pass"), *few]), remarks=("cell 1 is left out",),
        **mnist_only)  # fmt: skip
    put("invalid.ipynb", mnist[: len(mnist) // 2], wrong=every, remarks=("cannot be read",), labs=())
    put("empty.ipynb", b"", wrong=every, remarks=("cannot be read",), labs=())
    put("nothing.zip", zipped({}), wrong=every, remarks=("no notebook",), labs=())
    deep = b"[" * 100_000 + b"]" * 100_000
    put("deep.ipynb", b'{"cells": ' + deep + b"}", wrong=every, remarks=("cannot be read",), labs=())
    put("bomb.zip", zipped({"MNIST.ipynb": mnist, "CIFAR.ipynb": b" " * 200_000_000}), remarks=("larger than",),
        **mnist_only)  # fmt: skip
    put("paths.zip", zipped({"../../escaped.ipynb": mnist, "/absolute.ipynb": cifar}), **both)
    link = zipfile.ZipInfo("CIFAR.ipynb")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    put("link.zip", zipped({"MNIST.ipynb": mnist, link: str(HERE.parent / "CIFAR.ipynb")}), **mnist_only)
    put("=cmd.ipynb", mnist, "=cmd", **mnist_only)
    for name in LABS.values():  # as it went out
        blank = release.student_notebook(notebooks.read(name))
        put(
            f"untouched_777_{name}",
            json.dumps(blank).encode(),
            "untouched",
            wrong=dict.fromkeys(EXERCISES, "not written"),
        )
    ready = (
        "from torchvision.models import resnet18\n\n\nclass MyLeNet(nn.Module):\n    def __init__(self, classes=10):\n"
    )
    ready += "        super().__init__()\n        self.net = resnet18(weights='DEFAULT')\n"
    put(
        "ready.ipynb",
        replaced("MNIST", ready),
        wrong={"MNIST 7": "resnet18"},
        labs=("MNIST",),
        only=(*FEW["MNIST"], "MNIST 7"),
    )


def write(folder: Path, *, every: bool = False) -> dict[str, Expected]:
    """Write the class; return {student: what is expected}. Without `every`, only some of the mutants."""
    folder.mkdir(parents=True, exist_ok=True)
    expected = {}
    right, wrong, functions = variants()

    def student(name, chosen, lists):
        files = {}
        for lab in LABS:
            mine = {check: value for check, value in chosen.items() if NAMES[check][0].startswith(lab)}
            files[f"{lab}.ipynb"] = with_variants(lab, mine, functions)
        (folder / f"{name}.zip").write_bytes(zipped(files))
        expected[name] = Expected(wrong=lists)

    for number in range(3 if every else 1):  # correct in different styles
        chosen = {c: e[min(number, len(e) - 1)] for c, e in right.items() if "F." not in e[min(number, len(e) - 1)]}
        student(f"right{'abc'[number]}", chosen, {})
    most = max(map(len, wrong.values()))
    for number in range(most) if every else (most - 1,):
        chosen = {c: e[min(number, len(e) - 1)] for c, e in wrong.items() if NAMES[c][1] != "GUESSES"}
        lists = {NAMES[check][0]: words for check, (_, words) in chosen.items()}
        lists["CIFAR 1"] = chosen["mirror"][1]  # the first of its two checks
        letters = "abcdefghijklmnopqrstuvwxyz"
        student(f"wrong{letters[number]}", {c: e for c, (e, _) in chosen.items()}, lists)
        if every:  # shift stands behind mirror
            expression, words = chosen["shift"]
            student(f"shift{letters[number]}", {"shift": expression}, {"CIFAR 1": words})
    damages(folder, expected)
    slow = () if every else ("attack_loop", "attack_network")  # each takes the time that it may
    attacks = {name: attack for name, attack in ATTACKS.items() if name not in slow}
    for name, (definitions, exercise, words) in attacks.items():
        lab = exercise.split()[0]
        place = folder / f"{name}.zip"
        place.write_bytes(zipped({"lab.ipynb": replaced(lab, definitions)}))
        expected[name] = Expected(wrong={exercise: words}, labs=(lab,), only=FEW[lab])
    return expected


if __name__ == "__main__":
    print(*write(Path(sys.argv[1]), every="--all" in sys.argv), sep="\n")

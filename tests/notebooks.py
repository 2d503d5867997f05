"""Read the notebooks as data, and run the definitions on their pages without running the pages."""

import ast
import contextlib
import io
import itertools
import linecache
import math
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("MNIST.ipynb", "CIFAR.ipynb")
numbers = itertools.count(1)


def read(name: str):
    """The notebook `name` as nbformat reads it."""
    return nbformat.read(ROOT / name, as_version=4)


def code_cells(name: str) -> list:
    """The notebook's code cells."""
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def definitions(name: str) -> dict:
    """Execute the imports, functions and classes of a notebook, and nothing else; return them by name."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    nodes = [node for cell in code_cells(name) for node in ast.parse(cell.source).body if isinstance(node, kinds)]
    namespace = {"math": math, "__name__": name}
    exec(compile(ast.Module(nodes, type_ignores=[]), name, "exec"), namespace)
    return namespace


def execute(source: str, namespace: dict) -> None:
    """Execute a cell as IPython does, so that its source can be found by the name of its file."""
    file = f"<cell {next(numbers)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), namespace)


def settings(name: str) -> dict:
    """Execute the settings cells of a notebook; return its settings, with the environment's overrides."""
    namespace = definitions(name)
    with contextlib.redirect_stdout(io.StringIO()):
        for cell in code_cells(name):
            if "helpers.settings(globals()" in cell.source:
                execute(cell.source, namespace)
    return {setting: namespace[setting] for setting in namespace["SETTINGS"]}


def page(name: str, **replaced) -> dict:
    """The definitions of a notebook with its settings, some of them replaced; its functions read these."""
    namespace = definitions(name)
    namespace.update(settings(name) | replaced)
    return namespace


def experiment_cells(name: str) -> dict[str, str]:
    """The sources of the cells that call the page's `experiment`, by the experiments' names."""
    call = re.compile(r"^experiment\(\"(.+?)\"", re.MULTILINE)
    return {found: cell.source for cell in code_cells(name) for found in call.findall(cell.source)}

"""Read the notebooks as data, and run the definitions on their pages without running the pages."""

import ast
import contextlib
import io
import math
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("MNIST.ipynb", "CIFAR.ipynb")


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


def settings(name: str) -> dict:
    """Execute the settings cell of a notebook; return its settings, the environment's overrides included."""
    [cell] = [cell for cell in code_cells(name) if "override_settings(globals())" in cell.source]
    namespace = definitions(name)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(cell.source, namespace)
    return namespace["SETTINGS"]


def page(name: str, **replaced) -> dict:
    """The definitions of a notebook with its settings, some of them replaced; its functions read these."""
    namespace = definitions(name)
    namespace.update(settings(name) | replaced)
    return namespace


def experiment_cells(name: str) -> dict[str, str]:
    """The sources of the cells that call the page's `experiment`, by the experiment's name."""
    found = {cell.source: re.search(r"= experiment\(\"(.+?)\"", cell.source) for cell in code_cells(name)}
    return {match[1]: source for source, match in found.items() if match}

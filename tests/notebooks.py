"""Read the notebooks as data, and run the definitions on their pages without running the pages."""

import ast
import contextlib
import io
import itertools
import linecache
import math
import re
import symtable
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


def top_level(source: str) -> tuple[set[str], set[str]]:
    """Of a cell: the names that it assigns at top level, and those that it reads before it has assigned them."""
    table, assigned, read = symtable.symtable(source, "cell", "exec"), set(), set()
    inner = {}  # {function or class: the globals that its body reads}
    for child in table.get_children():
        stack, names = [child], set()
        while stack:
            scope = stack.pop()
            stack += scope.get_children()
            names |= {s.get_name() for s in scope.get_symbols() if s.is_global() and s.is_referenced()}
        inner.setdefault(child.get_name(), set()).update(names)
    for statement in ast.parse(source).body:
        inside = [n for n in ast.walk(statement) if isinstance(n, ast.comprehension)]  # their names end with them
        hidden = {n.id for part in inside for n in ast.walk(part.target) if isinstance(n, ast.Name)}
        loads = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        stores = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        loads, stores = loads - hidden, stores - hidden
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            loads, stores = inner.get(statement.name, set()), {statement.name}
        read |= loads - stores - assigned
        assigned |= stores
    return assigned, read

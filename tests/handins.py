"""What was handed in: whose it is, which notebook, what it defines, and what it says of its training.

Everything here is read as data from strangers: nothing is unpacked to the disk, no code is run, and what is damaged is
left out and named in `remarks`.
"""

import ast
import contextlib
import dis
import itertools
import json
import math
import re
import stat
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from IPython.core.inputtransformer2 import TransformerManager

from tests import documents, sandbox

SMOKE = {"EPOCHS": 2, "VALIDATION": 200}  # settings that tell a smoke run
LARGEST, MEMBERS = 30 << 20, 2_000  # bytes of a file that is read; files of a hand-in that are looked at
LONGEST = 100_000  # characters of a cell
SIGNS = {  # names that tell the notebook
    "MNIST": set("LeNet5 cross_entropy sgd_step evaluate MyLeNet GUESSES distort centre_digit make_optimizer".split()),
    "CIFAR": set("mirror BatchNorm Block schedule data_parallel_gradients MyNet FastCNN Muon whiten".split()),
}

# ------------------------------------------------------------------------------------------------ what was handed in


@dataclass
class Cell:
    code: bool
    source: str
    text: str  # of its outputs


def contents(path: Path, remarks: list[str]) -> list[tuple[str, bytes]]:
    """The notebooks and runs' JSON in a file, folder or zip, [(name, bytes)]; nothing is unpacked to the disk."""
    found, room = [], 4 * LARGEST

    def wanted(name):
        parts = name.replace("\\", "/").split("/")
        hidden = any(part.startswith(("._", ".ipynb_checkpoints", "__MACOSX")) for part in parts)
        return not hidden and (name.endswith(".ipynb") or parts[-1] in ("metrics.json", "config.json"))

    def take(name, stream):
        nonlocal room
        content = stream.read(min(LARGEST, max(0, room)) + 1)
        if len(content) > min(LARGEST, room):
            remarks.append(f"{name} is larger than {LARGEST >> 20} MB, or all is: left out")
            return
        room -= len(content)
        found.append((name, content))

    def unzip(name, stream):
        try:
            with zipfile.ZipFile(stream) as archive:
                members = [m for m in archive.infolist()[:MEMBERS] if wanted(m.filename)]
                for member in sorted(members, key=lambda m: m.date_time):
                    if stat.S_ISLNK(member.external_attr >> 16):
                        remarks.append(f"{member.filename} is a link: left out")
                        continue
                    with archive.open(member) as opened:
                        take(member.filename, opened)
        except Exception as error:  # whatever a damaged or crafted archive makes the reader raise
            remarks.append(f"{name} cannot be read: {type(error).__name__}: {error}")

    inside = itertools.islice(path.rglob("*"), MEMBERS) if path.is_dir() else [path]
    files = [one for one in inside if one.is_file() and not one.is_symlink()]
    for one in sorted(files, key=lambda file: file.stat().st_mtime):
        name = one.relative_to(path).as_posix() if path.is_dir() else one.name
        with one.open("rb") as stream:
            if name.lower().endswith(".zip"):
                unzip(name, stream)
            elif wanted(name):
                take(name, stream)
    return found


def cells_of(content: bytes) -> list[Cell]:
    """The cells of a notebook of format 3 or 4. Raises ValueError, RecursionError or AttributeError for none."""
    notebook = json.loads(content.decode("utf-8-sig", errors="replace"))
    sheets = notebook.get("worksheets") or [notebook]
    joined = lambda value: "".join(map(str, value)) if isinstance(value, list) else str(value or "")  # noqa: E731
    cells = []
    for cell in (cell for sheet in sheets for cell in sheet["cells"] if isinstance(cell, dict)):
        outputs = [one for one in cell.get("outputs") or [] if isinstance(one, dict)]
        text = "\n".join(joined(one.get("text")) for one in outputs)
        cells.append(Cell(cell.get("cell_type") == "code", joined(cell.get("source", cell.get("input"))), text))
    return cells


def lab_of(cells: list[Cell]) -> str | None:
    """Which notebook it is, by what it defines."""
    text = "\n".join(cell.source for cell in cells if cell.code)
    names = set(re.findall(r"^ *(?:class|def) +(\w+)|^(\w+) *=", text, re.MULTILINE))
    names = {name for pair in names for name in pair}
    lab = max(SIGNS, key=lambda lab: len(SIGNS[lab] & names))
    return lab if SIGNS[lab] & names else None


def read(paths: list[Path]) -> tuple[dict[str, list[Cell]], list[tuple[str, dict]], list[str], list[str]]:
    """Notebooks by lab, JSON of runs, names of the notebooks, remarks."""
    labs, runs, names, remarks = {}, [], [], []
    for path in paths:
        try:
            held = contents(path, remarks)
        except OSError as error:
            remarks.append(f"{path.name} cannot be read: {error.strerror}")
            continue
        for name, content in held:
            try:
                if not name.endswith(".ipynb"):
                    value = json.loads(content)
                    runs += [(name, value)] if isinstance(value, dict) else []
                    continue
                cells = cells_of(content)
            except (ValueError, RecursionError, AttributeError, KeyError, TypeError, MemoryError) as error:
                remarks.append(f"{name} cannot be read: {type(error).__name__}")
                continue
            if (lab := lab_of(cells)) is None:
                remarks.append(f"{name} is none of the lab's notebooks: left out")
            else:
                if lab in labs:
                    remarks.append(f"several notebooks of {lab}: the last, {name}, is graded")
                labs[lab] = cells
                names.append(name if name == path.name else f"{path.name}: {name}")
    if not names:
        remarks.append("no notebook of the lab was found")
    return labs, runs, names, remarks


def student_of(path: Path) -> str:
    """The student's name in a file's: what stands before the number that a learning platform adds, or before a lab's
    name.
    """
    stem = path.stem if path.suffix.lower() in (".ipynb", ".zip") else path.name
    if found := re.match(r"(.+?)_+\d{3,}(?:_|$)", stem):
        return found[1]
    words = [w for w in re.split(r"[_\s]+", stem) if not re.fullmatch(r"(?i)(mnist|cifar(10+)?|lab|\(\d+\))", w)]
    return "_".join(words) or stem


@dataclass
class Submission:
    student: str
    paths: list[Path]
    labs: set = field(default_factory=set)
    page: str = ""  # the name of the feedback file, without suffix


def group(folder: Path) -> list[Submission]:
    """One submission for each student. Files of the same name belong together unless both hold the same notebook."""
    groups, taken = {}, set()
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.startswith(".") or path.is_symlink() or not (path.is_dir() or path.is_file()):
            continue
        if path.is_file() and path.suffix.lower() not in (".ipynb", ".zip"):
            continue
        name, labs = student_of(path), set(read([path])[0])
        same = groups.setdefault(name, [])
        if not same or same[-1].labs & labs:
            same.append(Submission(name if not same else f"{name}-{len(same) + 1}", []))
        same[-1].paths.append(path)
        same[-1].labs |= labs
    everyone = [one for same in groups.values() for one in same]
    for one in everyone:
        page = base = re.sub(r"[^\w-]+", "_", one.student)[:60].strip("_") or "student"
        while page.casefold() in taken:
            page = f"{base}-{len(taken)}"
        taken.add(page.casefold())
        one.page = page
    return everyone


# ------------------------------------------------------------------------------------------ definitions and their needs


@dataclass
class Statement:
    file: str
    line: int
    source: str
    names: set
    needs: set
    refused: str = ""  # a module that may not be imported


def plain(source: str) -> str:
    """A cell as Python: magics and shell lines become calls, which no definition needs."""
    source = re.sub(r"\A\s*%%(time|capture)\b.*\n", "", source)
    magic = re.search(r"^[ \t]*[%!?]|[?][ \t]*$|=[ \t]*[%!]", source, re.MULTILINE)
    return TransformerManager().transform_cell(source) if magic else source


def names_in(code) -> set:
    """The global names that a code object and those inside it read."""
    loads = {i.argval for i in dis.get_instructions(code) if re.search("LOAD_.*(GLOBAL|NAME)", i.opname)}
    return loads.union(*(names_in(one) for one in code.co_consts if hasattr(one, "co_code")))


def bound(node) -> set:
    """The names that a statement of a cell's top level binds or changes."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name.partition(".")[0]) for alias in node.names}
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)}
    if isinstance(node, ast.If | ast.Try | ast.With):
        return set().union(*(bound(one) for one in ast.iter_child_nodes(node)))
    return set()


def statements(sources: list[str], label: str, remarks: list[str]) -> list[Statement]:
    """The statements that define something; cells that cannot be parsed are left out and named."""
    found = []
    for number, source in enumerate(sources, start=1):
        try:
            if len(source) > LONGEST:
                raise ValueError(f"it has more than {LONGEST:,} characters")
            source = plain(source)
            lines, file = source.splitlines(keepends=True), f"<cell {number} of {label}>"
            for node in ast.parse(source).body:
                if names := bound(node):
                    first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])
                    needs = names_in(compile(ast.Module([node], []), file, "exec"))
                    text = "".join(lines[first - 1 : node.end_lineno])
                    shares = node.col_offset or b";" in lines[node.end_lineno - 1].encode()[node.end_col_offset :]
                    one = Statement(file, first, ast.unparse(node) if shares else text, names, needs)
                    if isinstance(node, ast.Import | ast.ImportFrom):
                        modules = [getattr(node, "module", None) or alias.name for alias in node.names]
                        refused = [m for m in modules if m.partition(".")[0] not in sandbox.ALLOWED]
                        one.refused = refused[0] if refused else ""
                    found.append(one)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            where = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
            remarks.append(
                f"cell {number} is left out{where}: {getattr(error, 'msg', None) or str(error) or type(error).__name__}"
            )
    return found


def needed(name: str, known: list[Statement]) -> tuple[list[tuple], list[str]]:
    """What must run to define `name`, in the order of the document, and the imports that were left out."""
    chosen, open_names = set(), [(name, len(known))]
    while open_names:
        one, before = open_names.pop()
        places = [i for i, statement in enumerate(known[:before]) if one in statement.names]
        # The last definition counts; what only changes it, as `Net.forward = forward`, runs too.
        whole = [i for i in places if f"{one}." not in known[i].source.partition("=")[0]][-1:]
        for i in [*whole, *(i for i in places if whole and i > whole[0])]:
            if i not in chosen:
                chosen.add(i)
                own = known[i].names
                wanted = known[i].needs - {"device", "classes"}  # sandbox.GIVEN has them, without data and machine
                open_names += [(need, i if need in own else len(known)) for need in wanted]
    kept = [known[i] for i in sorted(chosen)]
    refused = [one.refused for one in kept if one.refused]
    return [(one.file, one.line, one.source) for one in kept if not one.refused], refused


def suspicious(sources: list[str]) -> tuple[list[str], list[str]]:
    """Ready-made or pretrained networks that a notebook uses, and parts of libraries that it replaces."""
    ready, replaced = set(), set()
    for source in sources:
        with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
            for node in ast.walk(ast.parse(plain(source[:LONGEST]))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    words = ast.unparse(node)
                    if words.split(".")[0] in ("torch", "nn", "F", "checks"):
                        replaced.add(words)
            ready.update(documents.ready_made(plain(source[:LONGEST])))
    return sorted(ready), sorted(replaced)


def number(value, low=0.0, high=math.inf) -> float | None:
    """A finite number in a range, or None for anything else that JSON can hold."""
    plain_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain_number and low <= value <= high else None


def facts(lab: str, cells: list[Cell], runs: list[tuple[str, dict]], mine: list[Statement], wanted: float) -> dict:
    """What the hand-in says of its training, `wanted` per cent in the test. All of it is data of the student's."""
    text = "\n".join(cell.text for cell in cells)
    metrics = [pair for pair in runs if pair[0].endswith("metrics.json") and pair[1].get("lab") == lab.lower()]
    name, run = max(metrics, key=lambda pair: str(pair[1].get("finished")), default=("", {}))
    config = dict(runs).get(name.removesuffix("metrics.json") + "config.json", {})
    settings = config.get("settings") if isinstance(config.get("settings"), dict) else {}
    accuracy, marks = number(run.get("test_accuracy"), 0, 1), []
    origin = "metrics.json, as handed in" if accuracy is not None else ""
    lines = re.findall(r"^(.{0,200}): test accuracy (\d+\.\d+)%, loss ", text, re.MULTILINE)
    if lines:
        data, shown = lines[-1]
        if accuracy is None:
            accuracy, origin = number(float(shown) / 100, 0, 1), "output of the notebook, as handed in"
        elif abs(100 * accuracy - float(shown)) > 0.006:
            marks.append(f"the notebook shows {shown} %")
        marks += ["stand-in"] * data.startswith("STAND-IN")
    stand_in = run.get("source") == "stand-in" or "stand-in" in marks
    smoke = bool(run.get("smoke")) or all(settings.get(key) == value for key, value in SMOKE.items())
    smoke |= all(f"'{key}': {value}," in text for key, value in SMOKE.items())
    marks = [mark for mark in marks if mark != "stand-in"] + ["stand-in"] * stand_in + ["smoke"] * smoke
    if accuracy is not None and not stand_in:
        marks.append(f"{'reaches' if 100 * accuracy >= wanted else 'below'} {wanted:g} %")
    busy = run.get("gpu_utilization")
    mean = number(busy.get("mean"), 0, 100) if isinstance(busy, dict) else None
    found = re.findall(r"(?:GPU|CPU) utilisation.{0,60}: mean \d+ %", text)
    device = run.get("device") or (re.findall(r"^training on (.+) in \w+$", text, re.MULTILINE) or [""])[-1]
    seconds = number(run.get("train_seconds"))
    if seconds is None and (shown := re.findall(r"trained for (\d+\.\d+) s", text)):
        seconds = float(shown[-1])
    seed = settings.get("SEED", run.get("seed", config.get("seed")))
    if seed is None:
        seed = next((one.source for one in mine[::-1] if one.names == {"SEED"}), "").partition("#")[0].split("=")[-1]
    return {
        "accuracy": "" if accuracy is None else round(100 * accuracy, 2),
        "source": "; ".join([origin, *marks]).strip("; ") or "none found",
        "device": str(device)[:100],
        "utilisation": f"GPU mean {mean:.0f} %" if mean is not None else (found or [""])[-1],
        "seed": str(seed).strip()[:20],
        "elapsed": "" if seconds is None else round(seconds, 1),
        "reached": accuracy is not None and not stand_in and not smoke and 100 * accuracy >= wanted,
    }


def below_the_heading(cells: list[Cell]) -> str:
    """What stands below the heading "In my own words"."""
    parts = (documents.WORDS.split(cell.source, maxsplit=1) for cell in cells if not cell.code)
    return next((below[0] for _, *below in parts if below), "")


def own_words(cells: list[Cell], template: str) -> str:
    """The student's text there, without the page's own lines."""
    text = below_the_heading(cells)
    for line in template.splitlines():
        text = text.replace(line.rstrip(" …"), "", 1) if line.strip() else text
    return "\n".join(line.strip(" …") for line in text.splitlines() if re.search(r"\w", line))

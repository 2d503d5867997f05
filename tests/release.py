"""Write the student edition: the notebooks with blanks instead of solutions, and what they need.

    python -m tests.release OUT [--hints] [--solutions] [--reference] [--nbgrader]

What stands between `### BEGIN SOLUTION` and `### END SOLUTION` becomes a blank that says "not written yet", with the
exercise's number and minutes from the task box above it. Outputs are removed, and what is folded as hint or as reading
of results too, unless asked for: whoever is to predict first must not find the answer below.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
TASK = re.compile(r"\*\*Exercise (\d+) 练习: .+?\*\* \(about (\d+) minutes\)")
SOLUTION = re.compile(r"^( *)### BEGIN SOLUTION\n.*?^ *### END SOLUTION\n?", re.MULTILINE | re.DOTALL)
HINT = re.compile(r"\n*<details><summary>[^<]*(?:提示|解读)[^<]*</summary>.*?</details>", re.DOTALL)
POINTS = 10  # of an exercise, for nbgrader
README = """# CNN training lab: student edition

Install once: `python -m pip install -r requirements.txt`. Then `jupyter lab MNIST.ipynb`, and write what is missing,
from top to bottom: each exercise has a task, a blank and a check that says what is right. `LAB_FAST=1` before the
command tries all cells in under a minute. The last cell writes `report.html`, the page to hand in.

安装一次:`python -m pip install -r requirements.txt`;然后 `jupyter lab MNIST.ipynb`,自上而下完成练习。
"""


def blanks(source: str, task: tuple[str, str] | None) -> str:
    """Return a cell's source with its solutions replaced. Raises ValueError where no task box tells the exercise."""

    def blank(match):
        if task is None:
            raise ValueError(f"no task box above the solution: {source[:60]!r}")
        text = f"not written yet: exercise {task[0]}, about {task[1]} minutes"
        lines = ("# write your code here 在此处编写代码", f'raise NotImplementedError("{text}")')
        return "".join(f"{match[1]}{line}\n" for line in lines)

    return SOLUTION.sub(blank, source).rstrip("\n")


def student_notebook(notebook, hints: bool = False):
    """Return a copy of the notebook with blanks, without outputs, and without hints unless `hints`."""
    made, task = nbformat.from_dict(notebook), None
    for cell in made.cells:
        if cell.cell_type == "markdown":
            found = TASK.findall(cell.source)
            task = found[-1] if found else task
            cell.source = cell.source if hints else HINT.sub("", cell.source)
        else:
            cell.source, cell.outputs, cell.execution_count = blanks(cell.source, task), [], None
    return made


def for_nbgrader(notebook) -> None:
    """Add nbgrader's metadata: a cell with a blank is a solution, and a locked cell behind it repeats its checks. The
    points of an exercise are shared by its cells.
    """
    cells, task, tests = [], "0", {}
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type == "markdown":
            task = ([task] + [number for number, _ in TASK.findall(cell.source)])[-1]
        elif "NotImplementedError" in cell.source or "### BEGIN SOLUTION" in cell.source:
            common = dict(schema_version=3, task=False)
            cell.metadata["nbgrader"] = common | dict(grade=False, grade_id=cell.id, locked=False, solution=True)
            calls = "\n".join(line for line in cell.source.splitlines() if line.startswith("checks."))
            test = nbformat.v4.new_code_cell(calls, id=f"{cell.id[:50]}-check")
            test.metadata["nbgrader"] = common | dict(grade=True, grade_id=test.id, locked=True, solution=False)
            tests.setdefault(task, []).append(test)
            cells.append(test)
    for share in tests.values():
        for test in share:
            test.metadata["nbgrader"]["points"] = POINTS / len(share)
    notebook.cells = cells


def release(out: Path, *, hints=False, solutions=False, reference=False, nbgrader=False) -> None:
    """Write the edition into `out`, a folder that is new or empty. Raises FileExistsError where it is not."""
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty: name a new folder")
    (out / "tests").mkdir(parents=True, exist_ok=True)
    for name in ("MNIST.ipynb", "CIFAR.ipynb"):
        notebook = nbformat.read(ROOT / name, as_version=4)
        made = notebook if solutions else student_notebook(notebook, hints)
        if nbgrader:
            for_nbgrader(made)
        nbformat.write(made, out / name)
    for name in ("helpers.py", "requirements.txt", "tests/__init__.py", "tests/checks.py"):
        shutil.copyfile(ROOT / name, out / name)
    (out / "README.md").write_text(README, encoding="utf-8")
    if reference:
        shutil.copytree(ROOT / "runs" / "reference", out / "runs" / "reference")


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(prog="python -m tests.release", description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--hints", action="store_true", help="keep the folded hints and readings")
    parser.add_argument("--solutions", action="store_true", help="keep the solutions and outputs")
    parser.add_argument("--reference", action="store_true", help="add the finished runs to compare with")
    parser.add_argument("--nbgrader", action="store_true", help="add nbgrader's metadata, and cells with the checks")
    chosen = vars(parser.parse_args(arguments))
    try:
        release(chosen.pop("out"), **chosen)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

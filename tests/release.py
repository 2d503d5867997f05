"""Write the student edition: the notebooks with blanks instead of solutions, and what they need.

    python -m tests.release OUT [--lang zh] [--hints] [--solutions] [--reference] [--nbgrader]

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

from tests import checks, translate

ROOT = Path(__file__).resolve().parent.parent
TASK = re.compile(r"\*\*Exercise (\d+) 练习: .+?\*\* \(about (\d+) minutes\)")
SOLUTION = re.compile(r"^( *)### BEGIN SOLUTION\n.*?^ *### END SOLUTION\n?", re.MULTILINE | re.DOTALL)
TAKE = re.compile(r" ?(?:Take the hint after [\w ]+ minutes\.|[^。？\n]*分钟[^。？\n]*提示。)")
HINT = re.compile(r"\n*<details><summary>[^<]*(?:提示|解读)[^<]*</summary>.*?</details>", re.DOTALL)
POINTS = 10  # of an exercise, for nbgrader
README = {
    "en": """# CNN training lab: student edition

Install once: `python -m pip install -r requirements.txt`. Then `jupyter lab MNIST.ipynb`, and write what is missing,
from top to bottom: each exercise has a task, a blank and a check that says what is right. `CIFAR.ipynb` follows.
`LAB_FAST=1` before the command tries all cells in under a minute. Section 11 writes the report; when both notebooks
are done, `python -m helpers handin` packs what is to be handed in, and says what is missing.
""",
    "zh": """# CNN 训练实验:学生版

先安装一次:`python -m pip install -r requirements.txt`。然后运行 `jupyter lab MNIST.ipynb`,自上而下补全缺少的代码:
每个练习都有任务说明、一处空白和一个检查,检查会告诉你哪里对、哪里错。接着做 `CIFAR.ipynb`。
在命令前加上 `LAB_FAST=1`,一分钟之内就能把所有单元格试跑一遍。第 11 节生成实验报告;两个笔记本都完成后,
用 `python -m helpers handin` 打包要提交的内容,它还会指出缺了什么。消息默认是中文,`LAB_LANG=en` 换成英文。
""",
}


def blanks(source: str, task: tuple[str, str] | None) -> str:
    """Return a cell's source with its solutions replaced. Raises ValueError where no task box tells the exercise."""

    def blank(match):
        if task is None:
            raise ValueError(f"no task box above the solution: {source[:60]!r}")
        text = checks.UNWRITTEN.format(*task)
        kind = "NotImplementedError" if match[1] else "checks.Unwritten"  # on the page itself: one line, no stack
        lines = (
            "# write your code here in place of the next line 在此处编写代码，替换下一行",
            f'raise {kind}("{text}")',
        )
        return "".join(f"{match[1]}{line}\n" for line in lines)

    return SOLUTION.sub(blank, source).rstrip("\n")


def student_notebook(notebook, hints: bool = False, chinese: dict[str, str] | None = None):
    """Return a copy of the notebook with blanks, without outputs, and without hints unless `hints`. The prose of the
    cells that `chinese` names, {id: text}, is replaced.
    """
    made, task = nbformat.from_dict(notebook), None
    for cell in made.cells:
        if cell.cell_type == "markdown":
            found = TASK.findall(cell.source)
            task = found[-1] if found else task
            text = (chinese or {}).get(cell.id, cell.source)
            cell.source = text if hints else TAKE.sub("", HINT.sub("", text))
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
        elif any(mark in cell.source for mark in ("not written yet: ", "### BEGIN SOLUTION")):
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


def prose(page: str, lang: str) -> dict[str, str]:
    """{cell id: text} of a page's prose in `lang`. Raises ValueError where the translation is not complete."""
    if lang == "en":
        return {}
    chinese = translate.entries((translate.ZH / f"{page}.md").read_text(encoding="utf-8"))
    english = translate.prose((ROOT / f"{page}.ipynb").read_text(encoding="utf-8"))
    if wrong := translate.faults(english, chinese):
        raise ValueError(
            f"{page}: {len(wrong)} cells are not as they should be; `python -m tests.translate` lists them"
        )
    return {name: text for name, (_, text) in chinese.items()}


def release(out: Path, *, hints=False, solutions=False, reference=False, nbgrader=False, lang="en") -> None:
    """Write the edition into `out`, a folder that is new or empty. Raises FileExistsError where it is not."""
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty: name a new folder")
    (out / "tests").mkdir(parents=True, exist_ok=True)
    for name in ("MNIST.ipynb", "CIFAR.ipynb"):
        notebook, chinese = nbformat.read(ROOT / name, as_version=4), prose(name[:5], lang)
        made = notebook if solutions else student_notebook(notebook, hints, chinese)
        for cell in made.cells if solutions else []:
            cell.source = chinese.get(cell.id, cell.source)
        if nbgrader:
            for_nbgrader(made)
        nbformat.write(made, out / name)
    for name in ("helpers.py", "requirements.txt", "tests/__init__.py", "tests/checks.py", "tests/documents.py"):
        shutil.copyfile(ROOT / name, out / name)
    if lang != "en":
        source = (out / "helpers.py").read_text(encoding="utf-8")
        (out / "helpers.py").write_text(source.replace('LANGUAGE = "en"', f'LANGUAGE = "{lang}"', 1), encoding="utf-8")
        (out / "tests" / lang).mkdir()
        shutil.copyfile(translate.ZH / "messages.md", out / "tests" / lang / "messages.md")
    (out / "README.md").write_text(README[lang], encoding="utf-8")
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
    parser.add_argument("--lang", choices=sorted(README), default="en", help="of prose, messages and figures")
    chosen = vars(parser.parse_args(arguments))
    try:
        release(chosen.pop("out"), **chosen)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

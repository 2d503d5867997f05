"""Grade a class: run the checks of the exercises on what was handed in, and write a table, a page, and feedback.

    python -m tests.grade SUBMISSIONS --output OUT [--rerun smoke]

SUBMISSIONS holds zips, folders or notebooks under any names. Definitions are collected by name from the syntax tree of
each notebook; each check calls them in a process of its own, see sandbox.py. What was trained is not trained again:
numbers of a run are reported as they were handed in.
"""

import argparse
import ast
import collections
import contextlib
import gc
import io
import os
import pickle
import secrets
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import nbformat
import torch

from tests import checks, gradebook, handins, release, sandbox

ROOT = Path(__file__).resolve().parent.parent
EXERCISES = {  # name: (points, what is checked); points count if all checks of the exercise pass
    "MNIST 1": (10, [("lenet5", "LeNet5")]),
    "MNIST 2": (10, [("cross_entropy", "cross_entropy")]),
    "MNIST 3": (10, [("sgd_step", "sgd_step")]),
    "MNIST 4": (10, [("train_one_epoch", "train_one_epoch")]),
    "MNIST 5": (10, [("evaluate", "evaluate")]),
    "MNIST 6": (5, [("guesses", "GUESSES")]),  # any three guesses
    "MNIST 7": (10, [("my_network", "MyLeNet")]),  # shapes and first loss; a person reads what is said of it
    "CIFAR 1": (10, [("mirror", "mirror"), ("shift", "shift")]),
    "CIFAR 2": (10, [("batch_norm", "BatchNorm")]),
    "CIFAR 3": (10, [("block", "Block")]),
    "CIFAR 4": (5, [("schedule", "schedule")]),
    "CIFAR 5": (10, [("data_parallel", "data_parallel_gradients")]),
    "CIFAR 6": (10, [("my_network", "MyNet")]),
}
ACCURACY = {"MNIST": (98.0, 0), "CIFAR": (80.0, 0)}  # per cent wanted in the test, and points for it: 0, only said
GUESSED = {"MNIST": ("GUESS_POOLING", "GUESS_RATE"), "CIFAR": ("GUESS_DIFFERENCE",)}  # changed from the page's?
SHAPES = {"MNIST": (1, 28, 28), "CIFAR": (3, 32, 32)}


def run_check(check: str, target: str, lab: str, page: list, mine: list, hidden: list[Path]) -> tuple[bool, str]:
    """Run one check in a process of its own; return whether it passed, and its sentence. `mine` are the statements of
    the hand-in, `page` those that the page gives.
    """
    if not any(target in one.names for one in mine):
        return False, f"not written yet, or deleted: {target} is not defined in the notebook."
    kept, refused = handins.needed(target, page + mine)
    notes = [f"{name} may not be imported in an exercise" for name in refused]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            with sandbox.Student(kept, hidden) as student:
                notes += student.notes["notes"]
                if check == "guesses":
                    value = sandbox.decode(student, student.ask("value", target))
                    checks._demand(isinstance(value, dict) and len(value) >= 3, "three guesses are wanted, in a dict.")
                    checks.guesses(value)
                else:
                    shape = [SHAPES[lab]] if check == "my_network" else []
                    getattr(checks, check)(sandbox.Remote(student, target), *shape)
        except (checks.Wrong, NotImplementedError) as error:
            return False, " ".join([str(error), *(f"(Before: {note}.)" for note in notes[:2])])[:700]
        except Exception as error:
            return False, f"the check could not go on: {type(error).__name__}: {error}"[:700]
    return True, said.getvalue().strip().removeprefix("✓ ")


def given(lab: str) -> tuple[list[handins.Statement], str]:
    """What the page itself gives, without solutions, and its lines for one's own words. From the student edition, so
    that no solution is in memory when students' processes start.
    """
    page = release.student_notebook(nbformat.read(ROOT / f"{lab}.ipynb", as_version=4))
    known = handins.statements([cell.source for cell in page.cells if cell.cell_type == "code"], "the page", [])
    words = handins.below_the_heading([handins.Cell(False, cell.source, "") for cell in page.cells])
    return [one for one in known if "not written yet: " not in one.source], words


def grade(one: handins.Submission, pages: dict, hidden: list[Path], rerun: bool) -> dict:
    """All that is known of a hand-in, by the names of the table's columns."""
    labs, runs, files, remarks = handins.read(one.paths)
    points, said, passed, row, words = {}, {}, {}, {}, {}
    for lab, (page, template) in pages.items():
        cells = labs.get(lab, [])
        sources, own = [cell.source for cell in cells if cell.code], []
        mine = handins.statements(sources, lab, own)
        for name, (worth, tasks) in EXERCISES.items():
            if name.startswith(lab):
                results = [run_check(check, target, lab, page, mine, hidden) for check, target in tasks if lab in labs]
                passed[name] = bool(results) and all(right for right, _ in results)
                points[name] = worth if passed[name] else 0
                wrong = [text for right, text in results if not right]
                said[name] = " ".join(wrong or [text for _, text in results]) or f"no notebook of {lab} was handed in"
        fact = handins.facts(lab, cells, runs, mine, ACCURACY[lab][0])
        reached = fact.pop("reached")
        if ACCURACY[lab][1]:
            points[f"{lab} test"] = ACCURACY[lab][1] if reached else 0
        ready, replaced = handins.suspicious(sources)
        own += [f"it replaces {', '.join(replaced)}"] * bool(replaced)
        words[lab] = handins.own_words(cells, template)
        fact["own words"] = f"{len(words[lab].split())} words, read by a person" if words[lab] else ""
        same = [n for n in GUESSED[lab] if cells and assigned(n, mine) in (None, assigned(n, page))]
        fact["guesses"] = f"{', '.join(same)} as on the page" if same else "changed" if cells else ""
        fact["ready-made"] = ", ".join(ready)
        if rerun:
            fact["smoke run"] = smoke(cells, hidden) if cells else ""
        row |= {f"{lab} {key}": value for key, value in fact.items()}
        note = assigned("NOTE", mine) if lab == "MNIST" and not passed["MNIST 1"] else None
        own += [f"NOTE says {note}: a network changed on purpose fails exercise 1"] if note not in (None, "''") else []
        remarks += [f"{lab}: {text}" for text in own]
    row |= {"remarks": "; ".join(remarks), "files": ", ".join(files)}
    return {"student": one.student, "page": one.page, "points": points, "said": said, "row": row, "words": words}


def assigned(name: str, known: list[handins.Statement]) -> str | None:
    """The source of the value that `name` gets last, or None."""
    for one in known[::-1]:
        if name in one.names:
            for node in ast.parse(one.source).body:
                for target in getattr(node, "targets", []):
                    if ast.unparse(target) == name:
                        return ast.unparse(node.value)
                    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                        pairs = zip(map(ast.unparse, target.elts), map(ast.unparse, node.value.elts), strict=False)
                        return dict(pairs).get(name)
    return None


def smoke(cells: list, hidden: list[Path], seconds: int = 300) -> str:
    """Run the whole notebook in the smoke mode, confined, with the kit's own helpers and checks; return how it went."""
    token, home = secrets.token_hex(16), tempfile.mkdtemp(prefix="lab-")
    Path(home).chmod(0o777)
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c.source) for c in cells if c.code])
    made.cells.append(nbformat.v4.new_code_cell(f'print("{token}")'))  # printed only where no cell stopped before
    files = {name: (ROOT / name).read_bytes() for name in ("helpers.py", "tests/__init__.py", "tests/checks.py")}
    files["lab.ipynb"] = nbformat.writes(made).encode()
    output, theirs = os.pipe()
    child, start, said, code = os.fork(), time.monotonic(), b"", None
    if not child:
        with contextlib.suppress(BaseException):
            sandbox.enter(
                home, hidden, memory=8 << 30, file=200 << 20, seconds=2 * seconds, processes=256, room=1 << 30
            )
            for name, content in files.items():
                Path(name).parent.mkdir(exist_ok=True)
                Path(name).write_bytes(content)
            for number in (1, 2):
                os.dup2(theirs, number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.closerange(3, 4096)
            os.environ.update(LAB_FAST="1", LAB_DATA=f"{home}/data", LAB_RUNS=f"{home}/runs", IPYTHONDIR=home)
            os.execv(sys.executable, [sys.executable, "-m", "IPython", "--colors=NoColor", "lab.ipynb"])
        os._exit(1)
    os.close(theirs)
    while (left := start + seconds - time.monotonic()) > 0 and select.select([output], [], [], left)[0]:
        if not (part := os.read(output, 1 << 16)):
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            break
        said = (said + part)[-200_000:]
    if code is None:
        with contextlib.suppress(OSError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    os.close(output)
    shutil.rmtree(home, ignore_errors=True)
    if code == 0 and token.encode() in said:
        return f"ran to its end in {time.monotonic() - start:.0f} s"
    lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
    return f"stopped after {seconds} s" if code is None else f"stopped: {lines[-1][:300] if lines else f'code {code}'}"


def apart(tasks: list, workers: int, seconds: float):
    """Call each function in a forked process, some at a time; yield (index, result), or (index, None) where it died."""
    waiting, running = collections.deque(enumerate(tasks)), {}
    while waiting or running:
        while waiting and len(running) < workers:
            index, function = waiting.popleft()
            end, theirs = os.pipe()
            child = os.fork()
            if not child:
                try:
                    with os.fdopen(theirs, "wb") as stream:
                        pickle.dump(function(), stream)
                except Exception:
                    traceback.print_exc()
                finally:
                    os._exit(0)
            os.close(theirs)
            running[end] = index, child, time.monotonic() + seconds, []
        for end in select.select(list(running), [], [], 1)[0]:
            index, child, _, parts = running[end]
            parts.append(os.read(end, 1 << 20))
            if not parts[-1]:
                del running[end]
                os.close(end)
                os.waitpid(child, 0)
                try:
                    yield index, pickle.loads(b"".join(parts))
                except (EOFError, pickle.UnpicklingError):
                    yield index, None
        for _, child, deadline, _ in running.values():
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)  # its pipe ends, and the loop above sees it


def solutions() -> list[Path]:
    """What no student's code may see of this repository."""
    return [ROOT / name for name in (".git", "tests", "runs")] + [*ROOT.glob("*.ipynb")]


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, grade, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.grade", description=__doc__.partition("\n")[0])
    parser.add_argument("submissions", type=Path, help="a folder of zips, folders or notebooks")
    parser.add_argument("--output", type=Path, required=True, help="a folder for grades.csv, grades.html, feedback/")
    parser.add_argument("--rerun", choices=["smoke"], help="also run each whole notebook in the smoke mode")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="hand-ins at a time")
    chosen = parser.parse_args(arguments)
    if not chosen.submissions.is_dir():
        print(f"{chosen.submissions} is no folder", file=sys.stderr)
        return 1
    start = time.monotonic()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a forked process cannot use a card
    torch.set_num_threads(1)
    gc.freeze()  # or each forked process would copy what the collector touches
    folder, out = chosen.submissions.resolve(), chosen.output.resolve()
    (out / "feedback").mkdir(parents=True, exist_ok=True)
    hidden = [*solutions(), folder, out]
    # Reading is done in processes that end: no page with solutions, and no hand-in, is in the memory of the next.
    reading = [lambda: {lab: given(lab) for lab in SHAPES}, lambda: handins.group(folder)]
    pages, everyone = (result for _, result in sorted(apart(reading, 1, 600)))
    if pages is None or not everyone:
        print("the pages cannot be read" if pages is None else f"{folder}: no hand-in found", file=sys.stderr)
        return 1
    tasks = [lambda one=one: grade(one, pages, hidden, bool(chosen.rerun)) for one in everyone]
    results = [None] * len(tasks)
    for index, result in apart(tasks, chosen.workers, 1200 if chosen.rerun else 600):
        one = everyone[index]
        nothing = dict.fromkeys(EXERCISES, 0) | {f"{lab} test": 0 for lab in SHAPES if ACCURACY[lab][1]}
        failed = dict.fromkeys(EXERCISES, "the hand-in could not be graded: look at it by hand")
        row = {"remarks": "could not be graded", "files": ", ".join(path.name for path in one.paths)}
        failed = {"student": one.student, "page": one.page, "points": nothing, "said": failed, "row": row, "words": {}}
        results[index] = result or failed
        print(
            f"{one.student:<24} {sum(results[index]['points'].values()):>5g}  {results[index]['row']['remarks'][:90]}"
        )
    most = sum(points for points, _ in EXERCISES.values()) + sum(points for _, points in ACCURACY.values())
    isolation = sandbox.isolation(hidden)
    notes = f"{len(results)} students, {time.monotonic() - start:.0f} s. {isolation}"
    worth = {name: points for name, (points, _) in EXERCISES.items()}
    gradebook.write_table(results, worth, most, out / "grades.csv")
    gradebook.write_pages(results, worth, most, out, notes)
    print(f"{notes}\n{out / 'grades.csv'}\n{out / 'grades.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

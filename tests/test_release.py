"""The student edition: blanks that say so, nothing of a solution, and with the solutions put back the same page."""

import ast
import os
import re
import subprocess
import sys

import nbformat
import pytest

import notebooks
from tests import release

SOLVED = re.compile(r"### BEGIN SOLUTION\n(.*?)### END SOLUTION", re.DOTALL)


@pytest.fixture(scope="module")
def edition(tmp_path_factory):
    """A folder with the edition as students get it."""
    out = tmp_path_factory.mktemp("edition") / "out"
    assert release.main([str(out)]) == 0
    return out


def solutions(name):
    """The sources between the markers of a notebook."""
    return [text for cell in notebooks.code_cells(name) for text in SOLVED.findall(cell.source)]


def shape(source):
    """Its syntax trees' statements with all names the same."""

    class Anonymous(ast.NodeTransformer):
        def visit_Name(self, node):
            return ast.Name("x", node.ctx)

        def visit_arg(self, node):
            return ast.arg("x", None)

    tree = Anonymous().visit(ast.parse(source))
    return {ast.dump(node) for node in ast.walk(tree) if isinstance(node, ast.stmt)}


def test_it_holds_what_the_contract_lists(edition):
    files = {path.relative_to(edition).as_posix() for path in edition.rglob("*") if path.is_file()}
    assert files == {
        *("MNIST.ipynb", "CIFAR.ipynb", "helpers.py", "requirements.txt", "README.md"),
        *("tests/__init__.py", "tests/checks.py", "tests/documents.py"),
    }


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_no_output_no_hint_and_no_marker_goes_out(name, edition):
    notebook = nbformat.read(edition / name, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert "Hint 提示" not in cell.source
        assert "解读" not in cell.source, "what was measured stands where one should predict first"
        assert "### BEGIN SOLUTION" not in cell.source
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)
            ast.parse(cell.source)


@pytest.mark.parametrize(("name", "exercises"), [("MNIST.ipynb", "1234567"), ("CIFAR.ipynb", "123456")])
def test_every_exercise_has_its_blanks(name, exercises, edition):
    text = "\n".join(cell.source for cell in nbformat.read(edition / name, as_version=4).cells)
    blanks = re.findall(
        r'(?:NotImplementedError|^raise checks.Unwritten)\("not written yet: exercise (\d), about \d+ minutes"\)',
        text,
        re.MULTILINE,
    )
    assert sorted(set(blanks)) == list(exercises)
    assert len(blanks) == len(solutions(name))


def test_no_long_statement_of_a_solution_goes_out_under_any_names(edition):
    there = shape((edition / "tests" / "checks.py").read_text(encoding="utf-8"))
    there |= shape((edition / "helpers.py").read_text(encoding="utf-8"))
    for name in notebooks.NAMES:
        for cell in nbformat.read(edition / name, as_version=4).cells:
            there |= shape(cell.source) if cell.cell_type == "code" else set()
    short = 200  # such as `x = x + x` or `optimizer.step()`, which prove nothing
    for solution in [*solutions("MNIST.ipynb"), *solutions("CIFAR.ipynb")]:
        body = "def f():\n" + "\n".join("    " + line for line in solution.splitlines())
        found = {statement for statement in shape(body) if len(statement) > short} & there
        assert not found, solution


def test_with_the_solutions_put_back_the_page_is_the_same(edition):
    for name in notebooks.NAMES:
        blank = re.compile(
            r"^ *# write your code here .*\n *raise (?:NotImplementedError|checks.Unwritten)\(.*\)$", re.MULTILINE
        )
        for cell, original in zip(
            nbformat.read(edition / name, as_version=4).cells, notebooks.read(name).cells, strict=True
        ):
            if cell.cell_type == "code":
                parts = iter(re.findall(r"^ *### BEGIN SOLUTION\n.*?### END SOLUTION", original.source, re.M | re.S))
                assert blank.sub(lambda _, parts=parts: next(parts), cell.source) == original.source


def test_the_untouched_edition_stops_at_the_first_blank_with_its_sentence(edition, tmp_path):
    command = [sys.executable, "-m", "IPython", "--colors=NoColor", "MNIST.ipynb"]
    variables = os.environ | {"LAB_FAST": "1", "LAB_RUNS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=edition, env=variables, capture_output=True, text=True)
    said = result.stdout + result.stderr
    assert "not written yet: exercise 1, about 20 minutes" in said
    assert "exercise 2" not in said


@pytest.mark.parametrize("options", [[], ["--solutions"]])
def test_nbgrader_reads_the_edition(options, tmp_path):
    assert release.main([str(tmp_path / "out"), "--nbgrader", *options]) == 0
    for name, exercises in (("MNIST.ipynb", 7), ("CIFAR.ipynb", 6)):
        notebook = nbformat.read(tmp_path / "out" / name, as_version=4)
        nbformat.validate(notebook)
        marks = [(cell, cell.metadata["nbgrader"]) for cell in notebook.cells if "nbgrader" in cell.metadata]
        assert sum(mark.get("points", 0) for _, mark in marks) == pytest.approx(release.POINTS * exercises)
        for (solution, mine), (test, its) in zip(marks[::2], marks[1::2], strict=True):
            assert (mine["solution"], its["grade"], its["locked"]) == (True, True, True)
            assert test.source.startswith("checks.")
            assert set(test.source.splitlines()) <= set(solution.source.splitlines())
        validator = pytest.importorskip("nbgrader.nbgraderformat", reason="nbgrader is not installed")
        validator.MetadataValidator().validate_nb(notebook)


def test_a_folder_with_files_is_refused(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("kept")
    assert release.main([str(tmp_path)]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_solution_without_a_task_box_is_an_error():
    with pytest.raises(ValueError, match="no task box"):
        release.blanks("### BEGIN SOLUTION\nx = 1\n### END SOLUTION\n", None)

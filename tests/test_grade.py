"""The grader: every variant, mutant, damage and attack of a generated class gets what it should, and costs no more."""

import csv
import html.parser
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import notebooks

pytest.importorskip("resource", reason="grading needs fork, which this system lacks")
from tests import grade, handins, sandbox, submissions

LONG = os.environ.get("FAULTS_LONG") == "1"


def run(folder, out, *more):
    """Grade a folder as an instructor does; return what was printed."""
    command = [sys.executable, "-m", "tests.grade", str(folder), "--output", str(out), "--workers", "2", *more]
    result = subprocess.run(command, cwd=notebooks.ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def rows(out):
    """The lines of grades.csv by student."""
    with (out / "grades.csv").open(encoding="utf-8", newline="") as stream:
        return {row["student"].removeprefix("'"): row for row in csv.DictReader(stream)}


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """A class, what is expected of it, and its grades."""
    folder = tmp_path_factory.mktemp("grade")
    expected = submissions.write(folder / "class", every=LONG)
    said = run(folder / "class", folder / "out")
    return folder, expected, rows(folder / "out"), said


def test_everyone_gets_what_the_hand_in_deserves(graded):
    _, expected, got, _ = graded
    assert set(got) == set(expected)
    odd = []
    for student, wanted in expected.items():
        row, sum_of_points = got[student], 0
        for name, (points, _) in grade.EXERCISES.items():
            words = wanted.wrong.get(name) or ("" if name.split()[0] in wanted.labs else "no notebook")
            words = words or ("not defined" if wanted.only and name not in wanted.only else "")
            said, have = row[f"{name} message"], float(row[name])
            if have != (0 if words else points) or words not in said:
                odd.append(f"{student}, {name}: {have} points, {said!r}; expected {words or 'solved'!r}")
            sum_of_points += have
        odd += [
            f"{student}: {row['remarks']!r} lacks {text!r}" for text in wanted.remarks if text not in row["remarks"]
        ]
        assert (float(row["total"]), float(row["max"])) == (sum_of_points, 120)
    assert not odd, "\n".join(odd)


def test_the_table_is_the_contract(graded):
    folder, expected, got, said = graded
    header = (folder / "out" / "grades.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
    assert header[: len(grade.EXERCISES) + 3] == ["student", *grade.EXERCISES, "total", "max"]
    assert "without network and with read-only files" in said or "use a container" in said
    assert "mueller_12345_MNIST.ipynb, mueller_12346_CIFAR.ipynb" in got["mueller"]["files"]
    assert got["handed_in"]["MNIST source"] == "metrics.json, as handed in; reaches 98 %"
    metrics = json.loads((notebooks.ROOT / "runs" / "reference" / "mnist" / "metrics.json").read_text(encoding="utf-8"))
    assert got["handed_in"]["MNIST accuracy"] == f"{metrics['test_accuracy']:.2%}".rstrip("%")
    assert got["handed_in"]["MNIST elapsed"] == str(round(metrics["train_seconds"], 1))
    assert "torchvision.models.resnet18" in got["ready"]["MNIST ready-made"]
    assert got["renamed"]["MNIST ready-made"] == ""
    assert "torch.allclose" in got["attack_torch"]["remarks"]
    cells = [cell for row in csv.reader((folder / "out" / "grades.csv").open(encoding="utf-8")) for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
    assert len(expected) == len(list((folder / "out" / "feedback").glob("*.html")))
    assert not submissions.WRITTEN.exists()


def test_the_pages_are_whole_and_link_to_each_other(graded):
    folder, expected, _, _ = graded

    class Reader(html.parser.HTMLParser):
        def __init__(self):
            super().__init__()
            self.links, self.bars = [], 0

        def handle_starttag(self, tag, attributes):
            attributes = dict(attributes)
            self.links += [attributes["href"]] if tag == "a" else []
            self.bars += attributes.get("class") == "bar"

    reader = Reader()
    reader.feed((folder / "out" / "grades.html").read_text(encoding="utf-8"))
    assert len(reader.links) == len(set(reader.links)) == len(expected)
    assert all((folder / "out" / link).is_file() for link in reader.links)
    assert reader.bars == len(grade.EXERCISES)


@pytest.mark.parametrize("lab", grade.SHAPES)
def test_the_table_of_points_names_the_checks_of_the_pages(lab):
    number, found = "0", {}
    for cell in notebooks.read(f"{lab}.ipynb").cells:
        if cell.cell_type == "markdown":
            number = [number, *re.findall(r"\*\*Exercise (\d+)", cell.source)][-1]
        for check, target in re.findall(r"^checks\.(\w+)\((\w+)", cell.source, re.MULTILINE):
            found.setdefault(f"{lab} {number}", []).append((check, target))
    assert found == {name: tasks for name, (_, tasks) in grade.EXERCISES.items() if name.startswith(lab)}


def test_the_signs_of_a_smoke_run_are_those_of_the_pages(monkeypatch):
    monkeypatch.setenv("LAB_FAST", "1")
    for name in notebooks.NAMES:
        assert handins.SMOKE.items() <= notebooks.settings(name).items()


def facts(text="", **metrics):
    cell = handins.Cell(True, "", text)
    runs = [("runs/mnist/a/metrics.json", {"lab": "mnist"} | metrics)] if metrics else []
    return handins.facts("MNIST", [cell], runs, [], 98.0)


def test_numbers_of_a_run_are_read_as_data_of_strangers():
    for odd in (float("nan"), float("inf"), -1, 1.01, True, "0.99", None, [], {}):
        assert facts(test_accuracy=odd)["accuracy"] == ""
    odd = facts(test_accuracy=0.99, device=["<b>"] * 1000, gpu_utilization="all", seed={}, train_seconds="long")
    assert (odd["accuracy"], odd["utilisation"], odd["elapsed"]) == (99.0, "", "")
    assert len(odd["device"]) <= 100
    line = "MNIST (official, checksums matched): test accuracy 97.50%, loss 0.0200; trained for 16.1 s"
    shown = facts(f"training on My CPU in fp32\n{line}\n")
    assert (shown["accuracy"], shown["elapsed"], shown["device"]) == (97.5, 16.1, "My CPU")
    assert shown["source"] == "output of the notebook, as handed in; below 98 %"
    assert "the notebook shows 97.50 %" in facts(line, test_accuracy=0.999)["source"]
    drawn = facts("STAND-IN, not MNIST: test accuracy 99.50%, loss 0.02; trained for 1.1 s")
    assert drawn["source"].endswith("stand-in")
    assert not drawn["reached"]
    assert "smoke" in facts("{'EPOCHS': 2, 'VALIDATION': 200, 'SEED': 1}\n" + line)["source"]


def test_own_words_and_guesses_are_told_from_the_page_s():
    page, template = grade.given("MNIST")
    template = f"### In my own words 我的结论\n\n{template}"
    answered = template.replace("how sure am I? …", "how sure am I? Maximum, by 1.7 points.\n\n肯定")
    assert handins.own_words([handins.Cell(False, template, "")], template) == ""
    assert handins.own_words([handins.Cell(False, answered, "")], template) == "Maximum, by 1.7 points.\n肯定"
    assert grade.assigned("GUESS_RATE", page) == "0.1"
    assert not [one for one in page if "logsumexp(dim=1) - logits" in one.source], "a solution is given away"


@pytest.mark.parametrize(
    ("name", "student"),
    [
        ("mueller_12345_MNIST.ipynb", "mueller"),
        ("anna_schmidt_12345_99_x.zip", "anna_schmidt"),
        ("anna_schmidt_MNIST.ipynb", "anna_schmidt"),
        ("MNIST_anna.ipynb", "anna"),
        ("s123456_CIFAR.ipynb", "s123456"),
        ("王小明_MNIST.ipynb", "王小明"),
        ("MNIST.ipynb", "MNIST"),
    ],
)
def test_the_name_of_a_student_is_found_in_that_of_a_file(name, student):
    assert handins.student_of(Path(name)) == student


@pytest.mark.parametrize("source", ["cross_entropy = F.cross_entropy", "cross_entropy = nn.CrossEntropyLoss()"])
def test_only_what_a_definition_needs_is_run(source):
    sources = [
        "import torch.nn.functional as F\nfrom torch import nn",
        "raise SystemExit",
        "x = open('/nowhere')",
        source,
    ]
    known = handins.statements(sources, "MNIST", [])
    kept, _ = handins.needed("cross_entropy", known)
    assert [text.strip() for _, _, text in kept][-1] == source
    assert len(kept) == 2
    assert grade.run_check("cross_entropy", "cross_entropy", "MNIST", [], known, []) == (
        True,
        "cross-entropy: value, large logits and gradient are right.",
    )


def test_statements_that_share_a_line_are_told_apart():
    source = 'x = 1; text = """\n;"""; y = x  # ; no more\nfor _ in range(3): y += 1\ndef f(): return x + y'
    known = handins.statements([source], "MNIST", [])
    assert [one.source.strip() for one in known] == ["x = 1", "text = '\\n;'", "y = x", "def f(): return x + y"]
    assert [text.strip() for _, _, text in handins.needed("f", known)[0]] == ["x = 1", "y = x", "def f(): return x + y"]


def attack(name, hidden):
    """What the check says of an attack."""
    definitions, exercise, words = submissions.ATTACKS[name]
    (check, target), *_ = grade.EXERCISES[exercise][1]
    known = handins.statements(["import torch", definitions], "the attack", [])
    return words, *grade.run_check(check, target, exercise.split()[0], [], known, hidden)


HOOKED = "attack_forks attack_reads attack_imports attack_writes attack_kill attack_os_exit attack_pipe".split()


@pytest.mark.parametrize("name", HOOKED)
def test_where_the_system_refuses_namespaces_the_simple_attacks_fail_too(name, monkeypatch):
    def refuse(*_):
        raise OSError

    monkeypatch.setattr(sandbox, "_isolate", refuse)
    words, passed, said = attack(name, grade.solutions())
    assert not passed
    assert words in said
    assert not submissions.WRITTEN.exists()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can become another user")
def test_a_user_without_rights_gets_the_same():
    def as_nobody():
        os.setgid(65534)
        os.setuid(65534)
        sandbox._system("prctl", 4, 1, 0, 0, 0)  # else /proc/self belongs to root until a program is started
        with sandbox.Student([], []) as student:
            apart = student.notes["apart"]
        return apart, [attack(name, grade.solutions()) for name in ("attack_native_write", "attack_os_exit")]

    [(_, (apart, results))] = grade.apart([as_nobody], 1, 60)
    for words, passed, said in results if apart else ():
        assert not passed
        assert words in said


def test_a_process_that_never_answers_is_stopped():
    start = time.monotonic()
    statements = [("<cell 1>", 1, "def f():\n    while True:\n        pass\n")]
    with pytest.raises(sandbox.Stopped, match="does a loop end"), sandbox.Student(statements, [], seconds=1) as student:
        sandbox.Remote(student, "f")()
    assert time.monotonic() - start < 10


@pytest.mark.skipif(not LONG, reason="a minute for each page")
def test_the_smoke_run_says_whether_the_page_ran_to_its_end(tmp_path):
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "right.ipynb").write_bytes(submissions.file(submissions.page("MNIST")))
    early = submissions.code("import os\nos._exit(0)")
    (tmp_path / "class" / "early.ipynb").write_bytes(submissions.file([early, *submissions.page("MNIST")]))
    run(tmp_path / "class", tmp_path / "out", "--rerun", "smoke")
    got = rows(tmp_path / "out")
    assert got["right"]["MNIST smoke run"].startswith("ran to its end in")
    assert got["early"]["MNIST smoke run"].startswith("stopped")


@pytest.mark.skipif(not LONG, reason="two minutes")
def test_forty_students_take_two_minutes_at_most(tmp_path):
    (tmp_path / "class").mkdir()
    for number in range(40):
        (tmp_path / "class" / f"student{number}.zip").write_bytes(submissions.hand_in())
    start = time.monotonic()
    run(tmp_path / "class", tmp_path / "out")
    assert time.monotonic() - start < 120
    assert {row["total"] for row in rows(tmp_path / "out").values()} == {"120"}

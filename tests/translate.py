"""Keep the Chinese edition complete: what is missing, stale or lost in `tests/zh/`, and the skeleton of new entries.

    python -m tests.translate [--add]

`tests/zh/<notebook>.md` has an entry for each prose cell, below a line `<!-- cell-id digest -->` with the digest of the
English text that it translates. `tests/zh/messages.md` has one table, an English template and its Chinese; `=` says
that it stays. The command shows how a cell has changed since it was translated (from git's history) and exits with 1
where anything is to do; `--add` writes an empty entry for each new cell and message.
"""

import argparse
import ast
import collections
import difflib
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ZH = ROOT / "tests" / "zh"
PAGES = ("MNIST", "CIFAR")
SOURCES = ("helpers.py", "tests/checks.py", "tests/documents.py")
ENTRY = re.compile(r"^<!-- ([\w-]+) ([0-9a-f]{8}) -->\n", re.MULTILINE)
KEPT = {  # what a translation has as often as its source
    "code": re.compile(r"`([^`\n]+)`|<code>(.+?)</code>"),
    "formula": re.compile(r"\$([^$\n]+)\$"),
    "link": re.compile(r"\]\(([^)\s]+)\)|<a id=\"([^\"]+)\""),
    "number": re.compile(r"(?<![\w.])\d+(?:[.,]\d+)*"),
}
LABELS = {"xlabel", "ylabel", "title", "label", "supxlabel"}  # of figures, as keywords
DRAWN = {"set_title", "supxlabel", "text", "annotate", "set_ylabel", "set_xlabel"}  # and as methods

SHORT = (  # what figures and prints say in fewer words than `messages` looks for
    *("accuracy (%)", "loss (nats)", "epoch", "train", "validation", "utilisation (%)", "process CPU", "GPU"),
    *("as it is", "mirrored", "signal, forward", "gradient, backward", "trained for {} s; smoke run"),
    *("STAND-IN DATA, NOT {}", "STAND-IN, not {}", "resuming {}", "new run {}"),
    *("Augmentation: `{}`.", "Optimizer: {}."),
)


# ------------------------------------------------------------------------------------------------------------ prose


def digest(text: str) -> str:
    """The first 8 hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def prose(notebook: str) -> dict[str, str]:
    """{id: source} of the prose cells of a notebook, given as its JSON."""
    cells = json.loads(notebook)["cells"]
    return {cell["id"]: "".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"}


def entries(text: str) -> dict[str, tuple[str, str]]:
    """{id: (digest of the English, Chinese)} of a file of translations."""
    _, *parts = ENTRY.split(text)
    triples = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    return {name: (mark, chinese.strip("\n")) for name, mark, chinese in triples}


def kept(text: str) -> dict[str, collections.Counter]:
    """How often each piece of code, formula, link and number stands in a text."""
    counts = {}
    for kind, pattern in KEPT.items():
        found = pattern.findall(text)
        counts[kind] = collections.Counter("".join(piece) for piece in found)
        text = pattern.sub(" ", text) if kind != "link" else re.sub(r"\]\([^)\s]+\)", " ", text)
    return counts


def lost(english: str, chinese: str) -> list[str]:
    """What stands in one text and not, or not as often, in the other."""
    odd, there = [], kept(chinese)
    for kind, counts in kept(english).items():
        odd += [f"{kind} {name!r} is missing" for name in (counts - there[kind]).elements()]
        odd += [f"{kind} {name!r} is added" for name in (there[kind] - counts).elements()]
    return odd


def faults(english: dict[str, str], chinese: dict[str, tuple[str, str]]) -> dict[str, str]:
    """{id: what is wrong with its translation}, for cells and for entries without a cell."""
    wrong = dict.fromkeys(chinese.keys() - english.keys(), "there is no such cell any more")
    for name, text in english.items():
        mark, translation = chinese.get(name, ("", ""))
        if not translation:
            wrong[name] = "not translated"
        elif mark != digest(text):
            wrong[name] = "stale: the English text has changed"
        elif odd := lost(text, translation):
            wrong[name] = "; ".join(odd)
    return wrong


def changes(page: str, name: str, mark: str) -> str:
    """How a cell differs from the text with the digest `mark`, found in git's history; nothing if it is not there."""
    git = ["git", "-C", str(ROOT)]
    log = subprocess.run(
        [*git, "log", "--format=%h", "-n", "200", "--", f"{page}.ipynb"], capture_output=True, text=True
    )
    now = prose((ROOT / f"{page}.ipynb").read_text(encoding="utf-8")).get(name, "")
    for commit in log.stdout.split():
        then = subprocess.run([*git, "show", f"{commit}:{page}.ipynb"], capture_output=True, text=True)
        before = prose(then.stdout).get(name, "") if then.returncode == 0 else ""
        if digest(before) == mark:
            sentences = (re.split(r"(?<=[.:?!]) |\n", text) for text in (before, now))
            lines = difflib.unified_diff(*sentences, lineterm="", n=0)
            return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))
    return ""


# --------------------------------------------------------------------------------------------------------- messages


def _template(node: ast.AST) -> str | None:
    """The text of a string, with `{}` for what an f-string fills in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def _inner(node: ast.AST) -> set[int]:
    """The strings in a tree that are no messages: docstrings, parts of f-strings, help of the command line."""
    skipped = set()
    for each in ast.walk(node):
        if isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant):
            skipped.add(id(each.value))
        elif isinstance(each, ast.JoinedStr):
            skipped |= {id(part) for part in each.values}
        elif isinstance(each, ast.keyword) and each.arg in ("help", "description", "prog"):
            skipped |= {id(part) for part in ast.walk(each.value)}
    return skipped


def _says(line: str) -> bool:
    """Whether a line of a template is a sentence or a label, and no code, path, address or list of names."""
    words = re.findall(r"(?<![\w/.-])[A-Za-z][a-z']*(?![\w/-])", line)
    sentence = len(words) >= 3 or (len(words) == 2 and line.rstrip().endswith((".", ":", "?")))
    return sentence and not re.search(
        r"://|%[YmdHMSf]|\{\{|^\^|[{]\w+[:}]|\{\{|\}\}|^[a-z0-9_ -]+$(?<![a-z] [a-z]{9})", line
    )


def messages() -> list[str]:
    """The templates that are to be translated: lines of three words and more of the kit, and labels of the figures."""
    found = []
    for file in SOURCES:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        skipped = _inner(tree)
        texts = [_template(node) for node in ast.walk(tree) if id(node) not in skipped]
        found += [line for text in texts if text for line in text.split("\n") if _says(line)]
    for page in PAGES:
        cells = json.loads((ROOT / f"{page}.ipynb").read_text(encoding="utf-8"))["cells"]
        for cell in cells:
            tree = ast.parse("".join(cell["source"]) if cell["cell_type"] == "code" else "")
            for node in ast.walk(tree):
                if isinstance(node, ast.Call):
                    drawn = [word.value for word in node.keywords if word.arg in LABELS]
                    name = getattr(node.func, "attr", "")
                    drawn += node.args if name in DRAWN else []
                    texts = [text for text in map(_template, drawn) if text]
                    found += [line for text in texts for line in text.split("\n") if re.search("[a-z]{3}", line)]
    return list(dict.fromkeys([*SHORT, *(line.strip() for line in found)]))


def table(text: str) -> dict[str, str]:
    """{English: Chinese} of the table of messages."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ") and " | " in line]
    return {english: chinese for english, chinese in rows if set(english) != {"-"}}


def message_faults(wanted: list[str], rows: dict[str, str]) -> dict[str, str]:
    """{template: what is wrong with its translation}, for templates and for rows without one."""
    wrong = {text: "no message says so any more" for text in rows if text not in wanted and text != "English"}
    for text in wanted:
        chinese = rows.get(text, "")
        if not chinese or chinese == "?":
            wrong[text] = "not translated"
        elif chinese != "=":
            holes = [len(re.findall(r"\{\d*\}", one)) for one in (text, chinese)]
            used = {*re.findall(r"\{(\d+)\}", chinese)} or {str(n) for n in range(holes[1])}
            if holes[0] != len(used):
                wrong[text] = f"{holes[0]} places to fill, {len(used)} in the translation"
    return wrong


# ----------------------------------------------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> int:
    """Say what is to do, or add what is missing; return 1 where something is to do."""
    parser = argparse.ArgumentParser(prog="python -m tests.translate", description=__doc__.partition("\n")[0])
    parser.add_argument("--add", action="store_true", help="write an empty entry for each new cell and message")
    add, total = parser.parse_args(arguments).add, 0
    for page in PAGES:
        file = ZH / f"{page}.md"
        english = prose((ROOT / f"{page}.ipynb").read_text(encoding="utf-8"))
        chinese = entries(file.read_text(encoding="utf-8"))
        wrong = faults(english, chinese)
        total += len(wrong)
        for name, why in wrong.items():
            print(f"{page}.md, {name}: {why}")
            if why.startswith("stale"):
                print(changes(page, name, chinese[name][0]) or f"now:\n{english[name]}")
        if add:
            texts = {name: chinese.get(name, (digest(text), "")) for name, text in english.items()}
            parts = [f"<!-- {name} {mark} -->\n{text}\n" for name, (mark, text) in texts.items()]
            file.write_text("\n".join(parts), encoding="utf-8")
    file, wanted = ZH / "messages.md", messages()
    rows = table(file.read_text(encoding="utf-8"))
    wrong = message_faults(wanted, rows)
    for text, why in wrong.items():
        print(f"messages.md, {text!r}: {why}")
    if add:
        lines = [f"| {text} | {rows.get(text, '?')} |" for text in wanted]
        file.write_text("\n".join(["| English | 中文 |", "| --- | --- |", *lines, ""]), encoding="utf-8")
    return int(total + len(wrong) > 0)


if __name__ == "__main__":
    sys.exit(main())

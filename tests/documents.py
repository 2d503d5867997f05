"""What is made of finished runs: report, comparison, list, hand-in; and `python -m helpers`, which asks for them.

Reads files alone: those of a run's folder, and the notebooks beside `helpers.py`. Goes out with the student edition.
"""

import argparse
import ast
import base64
import contextlib
import functools
import html
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from datetime import date
from pathlib import Path

BROWSERS = "chromium chromium-browser google-chrome google-chrome-stable chrome msedge".split()
DATASETS = "MNIST FashionMNIST CIFAR10 CIFAR100".split()
LABS = {"mnist": "LeNet-5", "cifar": "A network of our own"}
# what a run's files must hold for pages and lists
NEEDED = {
    "metrics": (
        *("lab", "dataset", "source", "device", "precision", "epochs"),
        *("parameters", "test_accuracy", "test_loss", "train_seconds"),
    ),
    "config": ("settings", "versions", "images", "batch_size", "model", "mean", "std", "optimizer", "scheduler"),
    "history": ("epoch", "seconds", "samples"),
}
WORDS = re.compile(r"^#+ .*(?:In my own words|我的结论).*\n*", re.MULTILINE)
READY_MADE = ("torchvision.models", "torch.hub", "timm", "transformers", "segmentation_models_pytorch", "keras")
PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif;
  color: #1a1a1a; background: #fff; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; }} img {{ max-width: 100%; }} h2 {{ border-top: 1px solid; padding-top: 1rem; }}
td, th {{ padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }}
blockquote {{ background: #D55E00; color: #fff; padding: .1rem 1rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; line-height: 1.35; }}
@media print {{ body {{ font-size: 11pt; margin: 0; max-width: none; }} img, tr, blockquote {{ break-inside: avoid; }}
  img {{ max-height: 20cm; }} h1, h2, h3, h4 {{ break-after: avoid; }} pre {{ font-size: 6.5pt; line-height: 1.25; }} }}
</style><body>{body}</body></html>"""


# ------------------------------------------------------------------------------------------------------- notebooks


def read_notebook(path: Path) -> list[dict]:
    """The cells of a notebook, {type, source, count, failed}; none where the file is no notebook."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return [
            dict(
                type=cell["cell_type"],
                source="".join(cell["source"]),
                count=cell.get("execution_count"),
                failed=any(output.get("output_type") == "error" for output in cell.get("outputs", [])),
            )
            for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        ]
    return []


def code(cells: list[dict]) -> str:
    """The code cells as one program, a comment `# %%` before each."""
    return "".join(f"# %%\n{cell['source']}\n\n" for cell in cells if cell["type"] == "code")


def find_notebook(lab: str, folder: Path) -> Path | None:
    """The notebook saved last that opens runs of `lab`, whatever it is called."""
    pages = [page for page in folder.glob("*.ipynb") if f'Run("{lab}"' in code(read_notebook(page))]
    return max(pages, key=lambda page: page.stat().st_mtime, default=None)


def own_words(cells: list[dict]) -> tuple[str, str]:
    """The text of the cell "In my own words", and what is missing there, a sentence or nothing."""
    parts = (WORDS.split(cell["source"], maxsplit=1) for cell in cells if cell["type"] == "markdown")
    text = next((below[0].strip() for _, *below in parts if below), "")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    blank = [line for line in lines if line.endswith("…") or line.startswith(("Replace each …", "请把每个"))]
    asked = sum(line.endswith("…") for line in lines)
    if len(blank) == len(lines):
        return text, 'Nothing is written in the cell "In my own words" of the notebook as it was saved.'
    return text, f"{asked} of the questions have no answer yet." if asked else ""


def ready_made(program: str) -> list[str]:
    """What a program imports or calls of networks that others made or trained."""
    found = []
    with contextlib.suppress(SyntaxError):
        for node in ast.walk(ast.parse(program)):
            if isinstance(node, ast.ImportFrom):
                found += [f"{node.module}.{name.name}" for name in node.names]
            elif isinstance(node, ast.Import):
                found += [name.name for name in node.names]
            elif isinstance(node, ast.Attribute):
                found.append(ast.unparse(node))
            elif isinstance(node, ast.keyword) and node.arg in ("weights", "pretrained"):
                given = not (isinstance(node.value, ast.Constant) and node.value.value in (None, False))
                found += [f"timm.{node.arg}="] * given
    return sorted({name for name in found if f"{name}.".startswith(tuple(f"{made}." for made in READY_MADE))})


# ------------------------------------------------------------------------------------------------------------ pages


def _fence(text: str, language: str = "") -> str:
    """A block of text as it is, whatever fences it has itself."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _picture(content: bytes, alt: str) -> str:
    return f"![{alt}](data:image/png;base64,{base64.b64encode(content).decode()})"


def _write_page(path: Path, title: str, parts: list[str]) -> Path:
    """Write a page of Markdown parts beside `path`, then rename it. HTML inside them is escaped."""
    import mistune

    import helpers

    parts = [part if part.startswith(("```", "|", "![")) else helpers.translate(part) for part in parts]
    body = mistune.create_markdown(escape=True, plugins=["table"])("\n\n".join([f"# {title}", *parts]))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(PAGE.format(title=html.escape(title), body=body), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_pdf(page: Path) -> Path | None:
    """Print a page to PDF beside it, with a Chromium or Chrome of this machine; None where there is none."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        return None
    target = page.with_suffix(".pdf")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [browser, "--headless", "--disable-gpu", f"--user-data-dir={profile}", "--no-pdf-header-footer"]
        command += ["--no-sandbox"] * (getattr(os, "geteuid", lambda: 1)() == 0)  # root may not have one
        command += [f"--print-to-pdf={target.resolve()}", page.resolve().as_uri()]
        target.unlink(missing_ok=True)  # an older one would look like what this call made
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    if not target.is_file():
        raise OSError(f"{browser} wrote no {target}: open {page} in a browser and print it to PDF")
    return target


# ------------------------------------------------------------------------------------------------------------- runs


def read_run(path: Path) -> dict:
    """A run's `metrics`, `config` and `history`. Raises OSError or ValueError where a file is not there or damaged."""
    found = {}
    for name, keys in NEEDED.items():
        try:
            found[name] = json.loads((path / f"{name}.json").read_text("utf-8"))
            entries = found[name] if name == "history" else [found[name]]
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                raise ValueError(f"{'a list of dicts' if name == 'history' else 'a dict'} is wanted")
            if missing := [key for key in keys for entry in entries if entry.get(key) is None]:
                raise ValueError(f"it lacks {missing[0]}")
        except FileNotFoundError:
            raise FileNotFoundError(f"{path / name}.json is not there: name the folder of a finished run") from None
        except ValueError as error:
            raise ValueError(f"{path / name}.json is damaged: {error}") from None
    return found


def finished_runs(folder: Path, lab: str = "*") -> list[Path]:
    """The folders of finished runs below `folder`, those of `lab`, oldest first; the kit's own reference before all."""
    found = [file.parent for file in folder.glob(f"{lab}/*/metrics.json")]
    return sorted(found, key=lambda run: (run.parent.name != "reference", run.name))


def _text(key: str, value) -> str:
    """A value for people."""
    text = f"{value:.2%}" if key.endswith("accuracy") and isinstance(value, float) else value
    text = f"{text:,.4g}" if isinstance(text, float) else text
    if isinstance(text, dict):
        return ", ".join(f"{name} {part}" for name, part in text.items())
    return text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)


def _validation(history: list[dict]) -> float | None:
    return history[-1].get("accuracy/validation") if history else None


def facts(path: Path) -> dict[str, str]:
    """What pages say of a run, {name: text}: validation first, test last, then versions and settings."""
    run = read_run(path)
    metrics, config = dict(run["metrics"]), run["config"]
    last = {key: metrics.pop(key) for key in ("six_views_accuracy", "test_accuracy", "test_loss") if key in metrics}
    metrics.pop("test_interval", None)  # stands beside the accuracy
    found = {
        "run": path.resolve().name,
        "note": config.get("note", ""),
        "validation_accuracy": _validation(run["history"]),
    }
    found |= metrics | last | {"versions": config["versions"]} | config["settings"]
    return {key if key.isupper() else key.replace("_", " "): _text(key, value) for key, value in found.items()}


def _warnings(metrics: dict) -> list[str]:
    """What must be said before any number of a run."""
    found = [f"STAND-IN DATA, NOT {metrics['dataset']}: images that the kit drew itself 替代图像"]
    found = found * (metrics["source"] == "stand-in")
    found += ["SMOKE RUN: a try of the cells with few images, no result 冒烟测试"] * bool(metrics.get("smoke"))
    found += [f"UNFINISHED: {metrics.get('unfinished')} 训练未完成"] * ("unfinished" in metrics)
    return [f"> {line}" for line in found]


def _describe(name: str, group: dict) -> str:
    """A group of an optimizer's weights in words: its class, its rate and what else is not 0."""
    rate = group.get("max_lr", group.get("initial_lr", group["lr"]))  # schedules set the first two
    others = [f"{key} {group[key]:.3g}" for key in ("momentum", "weight_decay") if group.get(key)]
    return f"{name} ({', '.join([f'lr {rate:.3g}', *others])})"


def curves(*histories: list[dict], names: tuple[str, ...] = ()):
    """Return a figure over the seconds of training: of one history accuracy and loss of both parts, and utilisation; of
    several, with `names`, accuracy and loss on the validation images.
    """
    import helpers

    drawn, axes = helpers.figure(2 + (not names), 1, size=(9, 5.5 if names else 7), sharex=True)
    lines = [(history, "validation", name) for history, name in zip(histories, names, strict=False)]
    lines = lines or [(histories[0], part, part) for part in ("train", "validation")]
    for axis, quantity, unit, scale in zip(axes, ("accuracy", "loss"), ("%", "nats"), (100, 1), strict=False):
        for number, (history, part, label) in enumerate(lines):
            values = [scale * entry.get(f"{quantity}/{part}", math.nan) for entry in history]
            marker = "os^Dv<"[(number % 2 + number // 6 * 2) % 6]  # another one where the colours begin again
            style = dict(color=helpers.COLORS[number % 6], marker=marker, markersize=4, label=label)
            axis.plot([entry["seconds"] for entry in history], values, **style)
        axis.set_ylabel(f"{quantity} ({unit})")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    axes[-1].set_xlabel("time spent training (s)")
    if not names:
        samples = [sample for entry in histories[0] for sample in entry["samples"]]
        kind = "gpu" if any("gpu/utilization_percent" in sample for sample in samples) else "cpu"
        busy = [sample.get(f"{kind}/utilization_percent", math.nan) for sample in samples]
        axes[2].plot([sample["seconds"] for sample in samples], busy, color=helpers.COLORS[2], linewidth=1)
        axes[2].set(ylim=(0, 105), ylabel=f"{'GPU' if kind == 'gpu' else 'process CPU'}\nutilisation (%)")
        some = histories[0][:: math.ceil(len(histories[0]) / 12) or 1]
        top = axes[0].secondary_xaxis("top", xlabel="epoch")
        top.set_xticks([entry["seconds"] for entry in some], [entry["epoch"] for entry in some])
    return drawn


def process(run: dict) -> str:
    """How the network of a run was trained, in one paragraph."""
    import helpers

    metrics, config, held_out = run["metrics"], run["config"], run["config"]["settings"].get("VALIDATION", 0)
    mean, std = (", ".join(f"{value:.4f}" for value in config[key]) for key in ("mean", "std"))
    name = config["model"].partition("(")[0]
    sentences = [
        f"`{name}` has {metrics['parameters']:,} parameters.",
        f"It saw {config['images']:,} training images of {metrics['dataset']} ({metrics['source']}), "
        f"and was validated on {held_out:,} others.",
        f"Preprocessing: mean {mean} and standard deviation {std} of the training images become 0 and 1.",
        f"Augmentation: `{config['augmentation']}`." if config.get("augmentation") else "There is no augmentation.",
        f"Optimizer: {'; '.join(_describe(*group) for group in config['optimizer'])}.",
        f"Schedule of the learning rate: {', '.join(config['scheduler']) or '–'}.",
        f"Trained for {metrics['epochs']} epochs in batches of {config['batch_size']}, in {metrics['precision']} on "
        f"{metrics['device']}, in {metrics['train_seconds']:.1f} s.",
    ]
    return " ".join(map(helpers.translate, sentences))


def _run_parts(path: Path) -> list[str]:
    """The report's parts on one run."""
    import helpers

    run = read_run(path)
    metrics, history = run["metrics"], run["history"]
    home, results = path / "results", {}  # without what a file manager, Jupyter or a killed process left there
    for file in home.rglob("*.*"):
        name = file.relative_to(home).as_posix()
        if file.suffix in (".png", ".md") and file.is_file() and not re.search(r"(^|/)\.", name):
            results[name] = file

    def result(name: str) -> str:
        file = results[name]
        title, _, kind = name.rpartition(".")
        content = _picture(file.read_bytes(), title) if kind == "png" else file.read_text("utf-8")
        return f"### {title.replace('_', ' ')}\n\n{content}"

    parts = [f"## {LABS.get(metrics['lab'], metrics['lab'])} on {metrics['dataset']}", *_warnings(metrics)]
    parts += ["### Process 实验过程", process(run)]
    parts += [_picture(results.pop("structure.png").read_bytes(), "structure")] if "structure.png" in results else []
    parts += [
        "### Curves 训练曲线",
        _picture(helpers.png(curves(history)), "accuracy, loss and utilisation over time"),
    ]
    busy = "Utilisation is the share of time in which the device was busy at all; how well it was used is in images/s."
    reason = metrics.get("gpu_utilization_reason")
    on_gpu = any("gpu/utilization_percent" in sample for entry in history for sample in entry["samples"])
    stopped = reason if on_gpu else None  # a series that ends midway has no mean
    parts += [
        "### Utilisation 利用率",
        f"GPU: {reason}. " * bool(reason) + f"{helpers.utilization(history, stopped)[0]}. {busy}",
    ]
    printed = path / "nvidia-smi.txt"
    if printed.is_file():
        parts += [f"`nvidia-smi` in the middle of the training:\n\n{_fence(printed.read_text('utf-8'))}"]
    test = f"{metrics['test_accuracy']:.2%}"
    if interval := metrics.get("test_interval"):
        test += " (95 % interval {:.2%} to {:.2%})".format(*interval)
    if views := metrics.get("six_views_accuracy"):
        test += f"; with six views of an image {views:.2%}"
    parts += ["### Test 测试", f"Test accuracy **{test}**, loss {metrics['test_loss']:.4f}; {metrics['source']} data."]
    order = sorted(results, key=lambda name: (not name.startswith("test/"), results[name].stat().st_mtime))
    parts += [result(name) for name in order]
    pairs = itertools.zip_longest(*[iter(facts(path).items())] * 2, fillvalue=("", ""))
    rows = [[*left, *right] for left, right in pairs]
    return [*parts, "### All numbers and settings 全部数据与设置", helpers.table([["", "", "", ""], *rows])]


def write_report(*runs: str | Path, words: Path | None = None, output: Path | None = None) -> Path:
    """Write one page on finished runs, of one notebook or both, from files alone; return its path.

    It is `report.html` in the folder of a single run, of several in the one that holds all runs, or `output`. Your own
    words come first: those of `words`, a Markdown file, or of each run's notebook, which is the one saved last that
    opens runs of its lab. The code of these notebooks is the appendix.
    """
    import helpers

    runs = {Path(run): read_run(Path(run)) for run in runs}
    labs = list(dict.fromkeys(run["metrics"]["lab"] for run in runs.values()))
    pages = {lab: find_notebook(lab, helpers.HERE) for lab in labs}
    authors = [author for run in runs.values() if (author := run["config"]["settings"].get("AUTHOR"))]
    author = authors[0] if authors else "(AUTHOR is empty: name and number 姓名、学号)"
    parts = [f"**{author}** · {date.today()} · {', '.join(f'`{path.resolve().name}`' for path in runs)}"]
    parts += dict.fromkeys(itertools.chain(*(_warnings(run["metrics"]) for run in runs.values())))
    parts += ["## In my own words 我的结论"]
    if words:
        parts += [words.read_text(encoding="utf-8-sig") or "(The file of words is empty.)"]
    for path, run in runs.items() if not words else ():
        lab, page = run["metrics"]["lab"], pages[run["metrics"]["lab"]]
        text, missing = own_words(read_notebook(page)) if page else ("", "There is no notebook of this run here.")
        if page and page.stat().st_mtime < (path / "metrics.json").stat().st_mtime:
            missing += "\nThe notebook was not saved since the test: save it, and write the report again."
        parts += [f"### {LABS.get(lab, lab)}"] * (len(labs) > 1) + [
            text,
            f"*({helpers.translate(missing.strip())})*" * bool(missing),
        ]
    for path in runs:
        parts += _run_parts(path)
    for page in filter(None, pages.values()):
        parts += [f"## Code of {page.name} 代码", _fence(code(read_notebook(page)), "python")]
    home = next(iter(runs)) if len(runs) == 1 else helpers.folder("RUNS")
    title = " and ".join(LABS.get(lab, lab) for lab in labs)
    title += " (UNFINISHED 训练未完成)" * any("unfinished" in run["metrics"] for run in runs.values())
    return _write_page(output or home / "report.html", title, parts)


def write_comparison(runs: list[Path], output: Path) -> Path:
    """Write a page that compares runs: their metrics, the settings and lines of the model that differ, their curves."""
    import helpers

    read, found = [read_run(run) for run in runs], [facts(run) for run in runs]
    rows = [[name, *(fact.get(name, "") for fact in found)] for name in dict.fromkeys(itertools.chain(*found))]
    rows = [row for row in rows if not row[0].isupper() or len(set(row[1:])) > 1]
    rows.sort(key=lambda row: (row[0].isupper(), row[0].startswith(("test", "six"))))  # the test after all else
    parts = [*dict.fromkeys(line for run in read for line in _warnings(run["metrics"])), helpers.table(rows)]
    lines = [run["config"]["model"].splitlines() for run in read]
    differ = [row for row in itertools.zip_longest(*lines, fillvalue="") if len(set(row)) > 1]
    if differ:
        rows = [[f"`{line.strip()}`" if line else "" for line in row] for row in differ]
        parts += [
            "## Lines of the model that differ 网络结构的不同",
            helpers.table([[fact["run"] for fact in found], *rows]),
        ]
    histories, names = [run["history"] for run in read], tuple(fact["run"] for fact in found)
    parts += [_picture(helpers.png(curves(*histories, names=names)), "validation curves of the runs")]
    parts += ["One run each is no mean: a difference counts only beside the spread over seeds."]
    return _write_page(output, f"{len(runs)} runs compared 实验对比", parts)


def list_runs(folder: Path) -> str:
    """A table of the finished runs below `folder`, for the terminal."""
    rows = [["run", "note", "data", "validation", "test", "seconds", ""]]
    for path in finished_runs(folder):
        with contextlib.suppress(OSError, ValueError, KeyError):
            run = read_run(path)
            metrics, share = run["metrics"], _validation(run["history"])
            marks = ["smoke run"] * bool(metrics.get("smoke")) + ["unfinished"] * ("unfinished" in metrics)
            name, note = path.relative_to(folder).as_posix(), str(run["config"].get("note", ""))
            data = metrics["dataset"] + " (stand-in)" * (metrics["source"] == "stand-in")
            row = [name, note, data, "–" if share is None else f"{share:.2%}", f"{metrics['test_accuracy']:.2%}"]
            rows.append([*row, f"{metrics['train_seconds']:.1f}", ", ".join(marks)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


# ---------------------------------------------------------------------------------------------------------- hand-in


def _check_page(page: Path | None) -> list[tuple[bool, str]]:
    if page is None:
        return [(False, "there is no notebook that opens runs of this lab.")]
    cells = read_notebook(page)
    counts = [cell["count"] for cell in cells if cell["type"] == "code" and cell["source"].strip()]
    whole = counts == list(range(1, len(counts) + 1)) and not any(cell["failed"] for cell in cells)
    blanks, made, missing = code(cells).count('("not written'), ready_made(code(cells)), own_words(cells)[1]
    return [
        (not blanks, f"code of {page.name}: {blanks} blanks are not written." if blanks else f"code of {page.name}."),
        (whole, "executed from top to bottom." if whole else "not executed from top to bottom: restart and run all."),
        (not made, f"uses ready-made networks: {', '.join(made)}." if made else "no ready-made network."),
        (not missing, missing or "own words are written."),
    ]


def _check_run(path: Path | None) -> list[tuple[bool, str]]:
    if path is None:
        return [(False, "there is no finished training.")]
    run = read_run(path)
    metrics, gpu = run["metrics"], run["metrics"].get("gpu_utilization")
    smoke, real = bool(metrics.get("smoke")), metrics["source"] != "stand-in"
    trained = f"trained for {metrics['epochs']} epochs on {metrics['device']}."
    trained = f"the training was {metrics.get('unfinished')}." if "unfinished" in metrics else trained
    busy = f"GPU utilisation {gpu['mean']:.0f} % on average." if gpu else ""
    curves = bool(run["history"]) and any(path.glob("events.out.tfevents.*"))
    return [
        ("unfinished" not in metrics, trained),
        (not smoke, f"{path.name} is a smoke run, no result." if smoke else f"the run that counts is {path.name}."),
        (real, f"on {metrics['dataset']}." if real else f"on a stand-in, not on {metrics['dataset']}."),
        (bool(gpu), busy or f"no GPU utilisation: {metrics.get('gpu_utilization_reason')}."),
        (curves, "curves are there." if curves else "history or TensorBoard's events are missing."),
        (True, f"test accuracy {metrics['test_accuracy']:.2%}."),
    ]


def checklist(pages: dict[str, Path | None], runs: dict[str, Path | None]) -> list[str]:
    """A line for each thing that the handout asks for, ✓ or ✗, of {lab: notebook} and {lab: run}."""
    import helpers

    found = [(lab, *line) for lab in pages for line in (*_check_page(pages[lab]), *_check_run(runs[lab]))]
    return [f"{'✓' if good else '✗'} {lab.upper()}: {helpers.translate(sentence)}" for lab, good, sentence in found]


def hand_in(name: str = "", output: Path | None = None) -> tuple[Path, str]:
    """Write one zip of notebooks, their code, the runs that count and the report; return its path and the checklist.

    The run that counts is the newest finished one of each lab, a smoke run or one on a stand-in only if there is no
    other. No file of yours is changed.
    """
    import helpers

    home, kept = helpers.folder("RUNS"), ("metrics.json", "config.json", "history.json", "nvidia-smi.txt", "events*")
    pages, runs = {lab: find_notebook(lab, helpers.HERE) for lab in LABS}, {}
    for lab in LABS:
        read = []
        for path in finished_runs(home, lab):
            with contextlib.suppress(OSError, ValueError):  # a damaged run hides no other
                read.append((path, read_run(path)["metrics"]))
        read.sort(key=lambda pair: (not pair[1].get("smoke"), pair[1]["source"] != "stand-in", pair[0].name))
        runs[lab] = read[-1][0] if read else None
    lines = checklist(pages, runs)
    counting = [run for run in runs.values() if run]
    authors = [str(read_run(run)["config"]["settings"].get("AUTHOR", "")) for run in counting]
    name = re.sub(r"[^\w.-]+", "-", name or next(filter(None, authors), "")).strip("-.") or "hand-in"
    output = output or home / f"{name}-{date.today()}.zip"
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.part")
    zipped = functools.partial(zipfile.ZipFile, mode="w", compression=zipfile.ZIP_DEFLATED, strict_timestamps=False)
    try:
        with zipped(temporary) as archive, tempfile.TemporaryDirectory() as folder:
            for page in filter(None, pages.values()):
                archive.write(page, page.name)
                archive.writestr(f"code/{page.stem}.py", code(read_notebook(page)))
            for run in counting:
                for file in sorted(itertools.chain(*map(run.glob, kept))):
                    archive.write(file, f"runs/{run.parent.name}/{run.name}/{file.name}")
            if counting:
                archive.write(write_report(*counting, output=Path(folder) / "report.html"), "report.html")
            archive.writestr("checklist.txt", "\n".join(lines) + "\n")
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return output, "\n".join(lines)


# ----------------------------------------------------------------------------------------------------- command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m helpers", description="Fetch data, and work on finished runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser
    report = add("report", help="write the report of one run, or of both notebooks' runs together")
    report.add_argument("run", type=Path, nargs="+", help="the folder of a finished run, such as runs/mnist/2026…")
    report.add_argument("--words", type=Path, help="a Markdown file with your own words, instead of the notebook's")
    report.add_argument("--output", type=Path, help="the page; by default report.html in the run's folder or in runs/")
    report.add_argument(
        "--pdf", action="store_true", help="print it to PDF too, with the Chromium or Chrome found here"
    )
    compare = add("compare", help="write a page that compares runs")
    compare.add_argument("runs", type=Path, nargs="*", help="folders of finished runs")
    compare.add_argument("--last", type=int, default=0, metavar="N", help="the last N runs, of any notebook")
    compare.add_argument("--output", type=Path, help="the page; by default runs/compare.html")
    add("runs", help="list the finished runs")
    handin = add("handin", help="pack what is to be handed in, and say what is missing")
    handin.add_argument("--name", default="", help="name and number, for the file's name; by default AUTHOR")
    handin.add_argument("--output", type=Path, help="the zip; by default <name>-<date>.zip in the folder of the runs")
    for name, text in (("prefetch", "bring datasets into LAB_DATA"), ("verify", "check what is in LAB_DATA")):
        add(name, help=text).add_argument(
            "names", nargs="*", metavar="NAME", help=f"all by default: {', '.join(DATASETS)}"
        )
    return parser


def bring(names: list[str], verify: bool) -> int:
    """Bring datasets into LAB_DATA or, to `verify`, only check what is there; return 1 if any failed, else 0."""
    import helpers

    if unknown := set(names) - set(helpers.MIRRORS):
        raise helpers.LabError(
            f"No dataset called {', '.join(sorted(unknown))}. There are: {', '.join(helpers.MIRRORS)}."
        )
    os.environ |= {"LAB_OFFLINE": "1"} if verify else {}
    failed = 0
    for name in names or helpers.MIRRORS:
        try:
            helpers.say(f"{name}: {helpers.load_official(name, True)}; test: {helpers.load_official(name, False)}")
        except helpers.LabError as error:
            missing = verify and isinstance(error, helpers.DataUnavailable)
            failed |= not missing or name in names
            helpers.say(
                f"{name}: not there, or not all of it" if missing else f"{name}: FAILED\n{error}", file=sys.stderr
            )
    return int(failed)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and do what it asks; return 0, or 1 after an error."""
    chosen = _parser().parse_args(arguments)
    import helpers  # takes seconds, which --help should not

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal in GBK has no ✓
    try:
        if chosen.command in ("prefetch", "verify"):
            return bring(chosen.names, chosen.command == "verify")
        if chosen.command == "runs":
            print(list_runs(helpers.folder("RUNS")))
        elif chosen.command == "handin":
            path, lines = hand_in(chosen.name, chosen.output)
            print(f"{lines}\n{path}")
        elif chosen.command == "compare":
            runs = chosen.runs
            if chosen.last > 1 and not runs:
                runs = finished_runs(helpers.folder("RUNS"))[-chosen.last :]
            if len(runs) < 2:
                raise helpers.LabError("Name two or more runs, or --last 2; `python -m helpers runs` lists them.")
            print(write_comparison(runs, chosen.output or helpers.folder("RUNS") / "compare.html"))
        else:
            page = write_report(*chosen.run, words=chosen.words, output=chosen.output)
            printed = write_pdf(page) if chosen.pdf else page
            print(
                page,
                *[printed or "No Chromium or Chrome is found: open the page in a browser and print it to PDF."]
                * chosen.pdf,
                sep="\n",
            )
        return 0
    except (helpers.LabError, OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1

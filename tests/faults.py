"""Every fault of the tests, in the long form, and a table of what came out: `python tests/faults.py [--kills N]`.

It runs the tests that inject faults (they have the fixture `fault`) several times, the misbehaving server with the
kit's own timeouts and with as many killed trainings as asked for, and prints one row a fault: how often it was tried,
how often all that the test demands held, the seconds from the fault to the verdict, and what the user is told. A fault
that cannot be injected here is listed with the reason. Exit code 1 when one was not survived.
"""

import argparse
import os
import re
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


class Collector:
    """A pytest plugin: repeats the tests that have the fixture `fault`, drops the others, keeps what they record."""

    def __init__(self, repeats: int):
        self.repeats, self.rows, self.skipped, self.broken = repeats, {}, {}, []

    @pytest.hookimpl(trylast=True)
    def pytest_generate_tests(self, metafunc):
        if "fault" in metafunc.fixturenames and metafunc.definition.get_closest_marker("once") is None:
            metafunc.fixturenames.append("repeat")
            metafunc.parametrize("repeat", range(self.repeats), indirect=True)

    @pytest.fixture
    def repeat(self, request):
        return request.param

    def pytest_collection_modifyitems(self, config, items):
        items[:] = [item for item in items if "fault" in item.fixturenames]

    def pytest_runtest_logreport(self, report):
        if report.skipped:
            self.skipped[report.location[2].partition("[")[0]] = str(report.longrepr[2]).removeprefix("Skipped: ")
        entries = [value for name, value in report.user_properties if name == "fault"]
        if report.failed and not entries:
            self.broken.append(report.nodeid)
        if report.when == "call":
            for entry in entries:
                seconds = report.duration if entry["seconds"] is None else entry["seconds"]  # of a whole test
                self.rows.setdefault(entry["name"], []).append(entry | dict(seconds=seconds, survived=report.passed))


def shortened(text: str, length: int) -> str:
    """The text on one line that fits into a table, without the folders that only this machine has."""
    text = re.sub(r" for url: \S+|\(?HTTPS?Connection\w*\(.*?\): ?", "", " ".join(text.split()))
    text = re.sub(r"(?<![\w:/…])/\S*/(?=[^/\s]+)", "…/", text).replace("|", "\\|")
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def table(collected: Collector, length: int = 110) -> str:
    """The rows as Markdown."""
    lines = [
        "| fault | tried | survived | seconds to a verdict, median (max) | what the user sees |",
        "|---|---|---|---|---|",
    ]
    for name, entries in collected.rows.items():
        seconds = [entry["seconds"] for entry in entries]
        median, most = (
            f"{value:.1f}" if value >= 0.05 else "< 0.1" for value in (statistics.median(seconds), max(seconds))
        )
        survived = sum(entry["survived"] for entry in entries)
        lines.append(
            f"| {name} | {len(entries)} | {survived} | {median} ({most}) | {shortened(entries[-1]['seen'], length)} |"
        )
    every = [entry["survived"] for entries in collected.rows.values() for entry in entries]
    return "\n".join([*lines, "", f"{len(collected.rows)} faults, {len(every)} times tried, {sum(every)} survived."])


def main() -> int:
    """Run them, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="killed and resumed trainings of MNIST.ipynb")
    parser.add_argument("--repeats", type=int, default=3, help="of every other fault")
    parser.add_argument("--only", default="", help="a pytest -k expression")
    parser.add_argument("--output", type=Path, help="a file for the table")
    chosen = parser.parse_args()
    os.environ |= {"FAULTS_LONG": "1", "RUNS_TO_KILL": str(chosen.kills)}
    os.chdir(ROOT)
    collected = Collector(chosen.repeats)
    options = ["-o", "addopts=-p tests.smoke", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider"]
    code = pytest.main([*options, "-k", chosen.only, "tests"], plugins=[collected])

    import helpers

    text = table(collected)
    print(f"\n{text}\n\n{helpers.device_name(helpers.pick_device('cpu'))}; torch {helpers.torch.__version__}")
    for name, reason in collected.skipped.items():
        print(f"not tried: {name}: {reason}")
    for name in collected.broken:
        print(f"failed before its fault: {name}")
    if chosen.output:
        chosen.output.write_text(text + "\n", encoding="utf-8")
    return int(code != 0)


if __name__ == "__main__":
    sys.exit(main())

"""Fixtures of the tests that inject faults. `python tests/faults.py` runs the same tests in their long form."""

import contextlib
import os
import subprocess
import tempfile
import time
from pathlib import Path

import pytest


def pytest_configure(config):
    config.addinivalue_line("markers", "once: not to be repeated in the long form, for it takes long or repeats itself")


@pytest.fixture
def fault(record_property):
    """`with fault("its name") as seen:` times the block, from the fault to the verdict; `seen(text)` keeps what the
    user is told. faults.py makes a row of its table of it, also when the block fails.
    """

    @contextlib.contextmanager
    def clock(name):
        entry = {"name": name, "seconds": None, "seen": ""}
        record_property("fault", entry)
        start = time.monotonic()
        try:
            yield lambda text: entry.update(seen=str(text))
        finally:
            entry["seconds"] = time.monotonic() - start

    return clock


@pytest.fixture
def small_disk(tmp_path_factory):
    """A function that mounts a file system of so many kilobytes and returns its folder."""
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("only root can mount a disk that is really full")
    mounted = []

    def mount(kilobytes):
        place = tmp_path_factory.mktemp("disk")
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "small", str(place)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"cannot mount here: {getattr(error, 'stderr', error)}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def common_folder():
    """A folder that every user may enter; those that pytest makes are its own user's."""
    with tempfile.TemporaryDirectory(prefix="lab-common-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)

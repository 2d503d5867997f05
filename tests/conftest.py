"""The fixtures of several files. `python tests/faults.py` runs the tests that inject faults in their long form."""

import collections
import contextlib
import hashlib
import io
import os
import pickle
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

import helpers
import toy
from server import serving


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


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """An empty folder for runs. The last run that the test opened is closed at its end."""
    monkeypatch.setenv("LAB_RUNS", str(tmp_path / "runs"))
    yield tmp_path / "runs"
    if helpers.Run.current:
        helpers.Run.current.close()


@pytest.fixture
def start(runs):
    """`start(function, *arguments, variables={}, **options)` calls a function of a module in a process of its own,
    with the same folder for runs, and returns the toy.Process. It is dead when the test ends.
    """
    started = []

    def begin(function, *arguments, variables=None, **options):
        runs.mkdir(exist_ok=True)
        log = runs.with_name(f"process-{len(started)}.log")
        started.append(toy.Process(log, variables or {}, function, *arguments, **options))
        return started[-1]

    yield begin
    for one in started:
        one.process.kill()
        one.process.join()


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty data folder, with the smoke mode off and the network forbidden."""
    monkeypatch.setenv("LAB_FAST", "0")
    monkeypatch.setenv("LAB_OFFLINE", "1")
    monkeypatch.setenv("LAB_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


Cifar = collections.namedtuple("Cifar", "name table archive")


@pytest.fixture
def cifar(request, data, monkeypatch):
    """A small CIFAR-10, or the dataset that the test is parametrised with: its name, its torchvision class, patched to
    the checksums of the small one, and the archive's bytes. Nothing is on disk.
    """
    import torchvision

    name, random, files = getattr(request, "param", "CIFAR10"), np.random.default_rng(0), {}
    table, fine = getattr(torchvision.datasets, name), name == "CIFAR100"
    count = 200 if fine else 16
    for batch_name, _ in [*table.train_list, *table.test_list]:
        labels = [i % (100 if fine else 10) for i in range(count)]
        batch = {"data": random.integers(0, 256, (count, 3072), dtype=np.uint8)}
        batch |= {"fine_labels": labels, "coarse_labels": [k % 20 for k in labels]} if fine else {"labels": labels}
        files[batch_name] = pickle.dumps(batch)
    names = {table.meta["key"]: [f"class {k}" for k in range(100 if fine else 10)]}
    files[table.meta["filename"]] = pickle.dumps(names | {"coarse_label_names": list("abcdefghijklmnopqrst")})
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for file, content in files.items():
            member = tarfile.TarInfo(f"{table.base_folder}/{file}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    sums = {file: hashlib.md5(content).hexdigest() for file, content in files.items()}
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(table, attribute, [[file, sums[file]] for file, _ in getattr(table, attribute)])
    monkeypatch.setattr(table, "meta", table.meta | {"md5": sums[table.meta["filename"]]})
    monkeypatch.setattr(table, "tgz_md5", hashlib.md5(packed.getvalue()).hexdigest())
    return Cifar(name, table, packed.getvalue())


@pytest.fixture
def server(cifar, monkeypatch):
    """A misbehaving server of the small CIFAR archive, the only one that the kit may ask; its timeouts are short unless
    the long form is run."""
    monkeypatch.setenv("LAB_OFFLINE", "0")
    monkeypatch.setitem(helpers.MIRRORS, cifar.name, "")
    if not os.environ.get("FAULTS_LONG"):
        monkeypatch.setattr(helpers, "CONNECT_SECONDS", 1)
        monkeypatch.setattr(helpers, "SLOW_SECONDS", 1)
        monkeypatch.setattr(helpers, "SLOW_RATE", 20_000_000)  # curl takes the mean of five seconds
        monkeypatch.setattr(helpers, "LARGEST", 3_000_000)
    with serving(cifar.archive) as running:
        yield running

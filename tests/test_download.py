"""The download from a server that misbehaves in every way a network does, and into folders that refuse.

In the long form (`python tests/faults.py`) the server is given the time that a user would have to wait.
"""

import contextlib
import hashlib
import io
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import filelock
import pytest

import helpers
from rights import in_child, needs_fork
from server import serving
from tests import documents

LONG = bool(os.environ.get("FAULTS_LONG"))
SLOWEST = 30 if LONG else 5  # seconds for one source
NAME, UNPACKED = "cifar-10-python.tar.gz", "cifar-10-batches-py"


def mirrors(monkeypatch, *addresses):
    monkeypatch.setenv("LAB_MIRRORS", " ".join(addresses))


def bring() -> str:
    """Run `python -m helpers prefetch CIFAR10`; return what it says when it fails, "" when the data is there."""
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()) as printed:
        failed = documents.main(["prefetch", "CIFAR10"])
    assert failed == ("CIFAR10: 80 images (3, 32, 32), 10 classes: CIFAR10 (official" not in printed.getvalue())
    return said.getvalue() if failed else ""


def left(home):
    """What is in the folder beside locks."""
    return sorted(path.name for path in home.iterdir() if not path.name.endswith(".lock"))


def reason_of(address, text):
    [line] = [line for line in text.splitlines() if line.startswith(f"  {address}/{NAME}: ")]
    return line.partition(f"{NAME}: ")[2]


FAULTS = {  # folder of the address: what it is called, what the reason must name
    "403": ("HTTP 403", "403"),
    "404": ("HTTP 404", "404"),
    "429": ("HTTP 429, too many requests", "429"),
    "503": ("HTTP 503", "503"),
    "loop": ("redirects without end", "redirects"),
    "to-a-file": ("redirect to a file of this machine", "file"),
    "to-ftp": ("redirect to another protocol", "ftp"),
    "html": ("login page with status 200", "another checksum (a login page?)"),
    "altered": ("right length, one byte altered", "checksum"),
    "bomb": ("gzip bomb as content encoding", "checksum"),
    "endless": ("body without end", "xceeded"),
    "slow-headers": ("headers byte by byte", "too slow"),
    "silent": ("silence after the headers", "too slow"),
    "stalled": ("silence in the middle", "too slow"),
    "trickle": ("10 bytes a second", "too slow"),
    "cut": ("body cut short", "missing"),
    "cut-unsized": ("body cut short, length not given", "checksum"),
}
QUICK = [kind for kind in FAULTS if kind not in ("slow-headers", "silent", "stalled", "trickle")]


@pytest.fixture
def dead_ends():
    """Addresses where nobody listens and that nobody knows."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        yield {"refused": f"http://127.0.0.1:{nobody.getsockname()[1]}", "unknown": "http://no-such-host.invalid"}


def check_alone(name, reason, address, home, fault, monkeypatch):
    """Let the address be the only one: an error in time, with its reason, and nothing under the file's name."""
    mirrors(monkeypatch, address)
    with fault(f"download: {name}") as seen:
        start = time.monotonic()
        text = bring()
        assert time.monotonic() - start < SLOWEST
        seen(reason_of(address, text))
        assert reason in reason_of(address, text)
        assert set(left(home)) <= {f".{NAME}.part"}


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_is_named_in_time_and_the_next_try_brings_the_file(kind, server, data, fault, monkeypatch):
    check_alone(*FAULTS[kind], f"{server.url}/{kind}", data, fault, monkeypatch)
    mirrors(monkeypatch, f"{server.url}/good")
    assert not bring()
    assert (data / NAME).read_bytes() == server.body
    assert left(data) == [UNPACKED, NAME]


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [("refused", "connection refused", "onnect"), ("unknown", "name that no DNS server knows", "resol")],
)
def test_dead_ends_are_named_too(kind, name, reason, dead_ends, server, data, fault, monkeypatch):
    check_alone(name, reason, dead_ends[kind], data, fault, monkeypatch)


@pytest.mark.once
def test_a_good_mirror_behind_all_the_bad_ones_is_found(server, data, dead_ends, fault, monkeypatch):
    bad = [f"{server.url}/{kind}" for kind in (FAULTS if LONG else QUICK)] + list(dead_ends.values())
    mirrors(monkeypatch, *bad, f"{server.url}/good")
    with fault("download: all of these, then a good mirror") as seen:
        assert not bring()
        seen("the data")
    assert left(data) == [UNPACKED, NAME]
    asked = list(dict.fromkeys(kind for kind, _ in server.asked))
    assert asked == [*(FAULTS if LONG else QUICK), "good"]
    assert not bring()
    assert list(dict.fromkeys(kind for kind, _ in server.asked)) == asked, "nothing is downloaded twice"


def test_when_nothing_serves_the_error_lists_each_address_its_reason_and_the_manual_step(
    server, data, cifar, dead_ends, monkeypatch
):
    addresses = [*(f"{server.url}/{kind}" for kind in ("404", "html", "altered", "loop")), *dead_ends.values()]
    mirrors(monkeypatch, *addresses)
    text = bring()
    for address in addresses:
        assert reason_of(address, text)
    assert f"By hand: put {NAME} (md5 {cifar.table.tgz_md5}) into {data}" in text
    assert set(left(data)) <= {f".{NAME}.part"}


def test_the_mirrors_of_the_user_come_before_the_kits(server, monkeypatch):
    mirrors(monkeypatch, f"{server.url}/404/,{server.url}/403")
    monkeypatch.setitem(helpers.MIRRORS, "CIFAR10", f"{server.url}/503 {server.url}/good {server.url}/500")
    assert not bring()
    assert [kind for kind, _ in server.asked] == ["404", "403", "503", "good"]


def test_offline_nobody_is_asked(server, data, cifar, monkeypatch):
    mirrors(monkeypatch, f"{server.url}/good")
    monkeypatch.setenv("LAB_OFFLINE", "1")
    text = bring()
    assert "LAB_OFFLINE=1" in text
    assert cifar.table.tgz_md5 in text
    assert server.asked == []


def test_a_redirect_is_followed(server, data, monkeypatch):
    mirrors(monkeypatch, f"{server.url}/moved")
    assert not bring()
    assert [kind for kind, _ in server.asked] == ["moved", "good"]


class TestPart:
    """What an earlier try left behind."""

    @pytest.fixture
    def part(self, data):
        return data / f".{NAME}.part"

    def test_a_download_that_broke_off_goes_on_where_it_ended(self, server, data, fault, monkeypatch):
        mirrors(monkeypatch, f"{server.url}/cut", f"{server.url}/range")
        with fault("download: broken off, then resumed") as seen:
            assert not bring()
            seen("the data; only the rest was asked for")
        assert server.asked == [("cut", None), ("range", f"bytes={len(server.body) // 2}-")]
        assert left(data) == [UNPACKED, NAME]

    @pytest.mark.parametrize("kind", ["range", "good"])  # one that can begin in the middle, and one that cannot
    def test_the_next_start_goes_on_too(self, kind, server, part, monkeypatch):
        part.write_bytes(server.body[:1000])
        mirrors(monkeypatch, f"{server.url}/{kind}")
        assert not bring()
        assert server.asked[0] == (kind, "bytes=1000-")

    @pytest.mark.parametrize("extra", [b"", b"and more"])  # killed before it was renamed; not the same file
    def test_a_part_that_has_all_or_more_is_used_or_replaced(self, extra, server, part, monkeypatch):
        part.write_bytes(server.body + extra)
        mirrors(monkeypatch, f"{server.url}/range")
        assert not bring()
        assert server.asked[0] == ("range", f"bytes={len(server.body + extra)}-")

    def test_a_part_of_another_file_is_thrown_away(self, server, part, monkeypatch):
        part.write_bytes(b"?" * 1000)
        mirrors(monkeypatch, f"{server.url}/range", f"{server.url}/range")
        assert not bring()
        assert [asked for _, asked in server.asked] == ["bytes=1000-", None]

    def test_who_waits_for_the_lock_without_success_leaves_the_others_part_alone(self, server, part, monkeypatch):
        mirrors(monkeypatch, f"{server.url}/good")
        part.write_bytes(server.body[:1000])  # what another process has so far
        lock = filelock.FileLock
        monkeypatch.setattr(filelock, "FileLock", lambda path, timeout: lock(path, timeout=0.2))
        with lock(part.with_suffix(".lock")), ThreadPoolExecutor(1) as pool:
            assert "lock" in pool.submit(bring).result()
        assert part.read_bytes() == server.body[:1000]
        assert server.asked == []


def test_a_slow_mirror_is_given_up_unless_it_is_the_last(server, monkeypatch):
    monkeypatch.setattr(helpers, "SLOW_RATE", 300_000)  # bytes a second; a third of it comes, on a busy machine less
    monkeypatch.setattr(helpers, "SLOW_SECONDS", 2)
    mirrors(monkeypatch, f"{server.url}/slow", f"{server.url}/slow/again")
    assert not bring()
    assert len(server.asked) > 1, "the first one was given up"


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl to make a certificate that nobody trusts")
def test_a_certificate_that_nobody_signed_is_refused(server, data, tmp_path, fault, monkeypatch):
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=127.0.0.1 -keyout key -out cert"
    make += " -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(make.split(), cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    with serving(server.body, context) as secure:
        address = f"{secure.url}/good"
        check_alone("certificate that nobody signed", "certificate", address, data, fault, monkeypatch)
        assert secure.asked == []
        monkeypatch.setattr("certifi.where", lambda: str(tmp_path / "cert"))
        assert not bring(), "and it was the certificate alone"


@needs_fork
class TestProcesses:
    @pytest.fixture
    def start(self):
        """A function that starts a process which brings the data, and exits with 1 where it cannot."""
        context, processes = multiprocessing.get_context("fork"), []

        def child():
            sys.exit(bool(bring()))

        def start():
            processes.append(context.Process(target=child))
            processes[-1].start()
            return processes[-1]

        yield start
        for process in processes:
            process.kill()
            process.join()

    def test_eight_on_an_empty_folder_download_once(self, start, server, data, fault, monkeypatch):
        mirrors(monkeypatch, f"{server.url}/good")
        with fault("eight processes, empty folder") as seen:
            processes = [start() for _ in range(8)]
            for process in processes:
                process.join(30)
            assert [process.exitcode for process in processes] == [0] * 8
            seen(f"the data in all; downloads: {len(server.asked)}")
        assert len(server.asked) == 1
        assert left(data) == [UNPACKED, NAME]

    def test_when_the_holder_of_the_lock_is_killed_the_others_take_over(self, start, server, data, fault, monkeypatch):
        mirrors(monkeypatch, f"{server.url}/stalled")
        monkeypatch.setattr(helpers, "SLOW_SECONDS", 60)
        holder = start()
        while not server.asked:
            time.sleep(0.02)
        mirrors(monkeypatch, f"{server.url}/good")
        others = [start() for _ in range(3)]
        time.sleep(0.3)
        assert all(other.is_alive() for other in others), "they wait for the lock"
        with fault("holder of the lock killed, three wait") as seen:
            os.kill(holder.pid, signal.SIGKILL)
            for other in others:
                other.join(20)
            assert [other.exitcode for other in others] == [0] * 3
            seen("the data in all three")
        assert left(data) == [UNPACKED, NAME]

    def test_a_limit_on_file_size_is_a_clear_error_without_remains(self, server, data, fault, monkeypatch):
        mirrors(monkeypatch, f"{server.url}/good", f"{server.url}/range")

        def limited():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # the kernel refuses to write more
            return bring()

        with fault("limit on the size of files") as seen:
            seen(check_no_room(in_child(limited), data, "Failure writing", server))


def check_no_room(text, home, match, server):
    """The reason that is given, after which nothing is left in `home`."""
    [line] = [line for line in text.splitlines() if line.startswith(f"  {home}: ")]
    assert match in line
    assert [(home / name).stat().st_size for name in left(home)] in ([], [0])  # the part, emptied
    assert len(server.asked) == 1, "another mirror would not help"
    return line.partition(f"{home}: ")[2]


class TestFullDisk:
    def test_no_room_for_the_archive_is_a_clear_error_without_remains(self, server, small_disk, fault, monkeypatch):
        disk = small_disk(100)
        monkeypatch.setenv("LAB_DATA", str(disk))
        mirrors(monkeypatch, f"{server.url}/good", f"{server.url}/range")
        with fault("disk full while downloading") as seen:
            seen(check_no_room(bring(), disk, "Failure writing", server))

    def test_no_room_to_unpack_leaves_whole_files_and_says_so(self, server, small_disk, cifar, fault, monkeypatch):
        disk = small_disk(450)  # the archive has 300 kB, and so have the files in it
        monkeypatch.setenv("LAB_DATA", str(disk))
        mirrors(monkeypatch, f"{server.url}/good")
        with fault("disk full while unpacking") as seen:
            text = bring()
            assert "No space left on device. Set LAB_DATA" in text
            seen(text.splitlines()[1])
        inside = {name: len(content) for name, content in members(cifar.archive).items()}
        there = {path.name: path.stat().st_size for path in (disk / UNPACKED).iterdir()}
        assert there.items() < inside.items()


def members(archive: bytes) -> dict[str, bytes]:
    """The files in an archive by their last names."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {member.name.rpartition("/")[2]: tar.extractfile(member).read() for member in tar if member.isfile()}


def test_members_that_point_elsewhere_are_never_written_there(cifar, data, tmp_path, monkeypatch):
    with tarfile.open(fileobj=(packed := io.BytesIO()), mode="w:gz") as tar:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        tar.addfile(link)
        evil = dict.fromkeys(("../../outside", "link/through", f"{tmp_path}/absolute"), b"abc")
        for name, content in (members(cifar.archive) | evil).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(cifar.table, "tgz_md5", hashlib.md5(packed.getvalue()).hexdigest())
    (data / NAME).write_bytes(packed.getvalue())
    assert not bring()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert left(data) == [UNPACKED, NAME]
    assert all(path.is_file() and not path.is_symlink() for path in (data / UNPACKED).iterdir())


def test_verify_and_prefetch_name_what_is_wrong(data, capsys):
    raw = data / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in helpers.MNIST_MD5:
        (raw / name).write_bytes(b"damaged")
    assert documents.main(["verify", "MNIST", "CIFAR10"]) == 1
    said = capsys.readouterr().err
    assert "MNIST: FAILED" in said
    assert str(raw / "train-images-idx3-ubyte") in said
    assert "CIFAR10: not there" in said
    assert documents.main(["prefetch", "CIFAR100"]) == 1
    assert "cifar-100-python.tar.gz" in capsys.readouterr().err
    assert documents.main(["prefetch", "CIFAR11"]) == 1
    assert "No dataset called CIFAR11" in capsys.readouterr().err


def test_verify_asks_nobody_and_is_content_with_what_is_there(server, cifar, data, monkeypatch, capsys):
    mirrors(monkeypatch, f"{server.url}/good")
    for name in set(helpers.MIRRORS) - {"CIFAR10"}:
        monkeypatch.delitem(helpers.MIRRORS, name)
    assert documents.main(["verify"]) == 0, "nothing is there, and nothing was named"
    assert documents.main(["verify", "CIFAR10"]) == 1
    (data / NAME).write_bytes(cifar.archive)
    assert documents.main(["verify"]) == documents.main(["verify", "CIFAR10"]) == 0
    assert "checksums matched" in capsys.readouterr().out
    assert server.asked == []

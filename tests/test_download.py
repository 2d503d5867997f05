"""The download against a local server that misbehaves in every way a network does, and against files that refuse.

In the long form (`python tests/faults.py`) the server is given the time that a user would have to wait.
"""

import gzip
import hashlib
import http.server
import io
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import filelock
import pytest

import helpers
from rights import in_child, needs_fork

LONG = bool(os.environ.get("FAULTS_LONG"))
GOOD = random.Random(0).randbytes(300_000)
MD5 = hashlib.md5(GOOD).hexdigest()
NAME = "archive.tar.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    """What happens is the first folder of the address."""

    def do_GET(self):
        kind = self.path.split("/")[1]
        self.server.asked.append((kind, self.headers.get("Range")))
        if kind.isdigit():
            return self.send_error(int(kind))
        if kind == "slow-headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Padding: ")
            return self.trickle(b"?" * 10_000)
        if kind == "loop":
            self.send_response(302)
            self.send_header("Location", self.path)
            return self.end_headers()
        body, begin, status = GOOD, 0, 200
        if kind == "range" and self.headers.get("Range"):
            begin, status = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")), 206
        if kind == "html":
            body = b"<html>please accept the terms</html>"
        if kind == "altered":
            body = GOOD[:-1] + b"?"
        if kind == "bomb":
            body = gzip.compress(bytes(50_000_000))
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if kind == "html" else "application/octet-stream")
        if kind == "bomb":
            self.send_header("Content-Encoding", "gzip")
        if kind not in ("endless", "cut-unsized"):
            self.send_header("Content-Length", str(len(body) - begin))
        self.end_headers()
        half = len(body) // 2
        if kind == "silent":
            time.sleep(120)
        elif kind in ("stalled", "cut", "cut-unsized"):
            self.wfile.write(body[:half])
            self.wfile.flush()
            time.sleep(120 if kind == "stalled" else 0)
        elif kind == "trickle":
            self.trickle(body)
        elif kind == "slow":
            for start in range(0, len(body), len(body) // 15):
                self.wfile.write(body[start : start + len(body) // 15])
                time.sleep(0.1)
        elif kind == "endless":
            while True:
                self.wfile.write(body)
        else:
            self.wfile.write(body[begin:])

    def trickle(self, body):
        for byte in body:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            time.sleep(0.1)

    def log_message(self, *arguments):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *arguments):
        pass  # a client that goes away is what is tested


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("LAB_OFFLINE", "0")
    monkeypatch.setitem(helpers.MIRRORS, "CIFAR10", ())
    if not LONG:
        monkeypatch.setattr(helpers, "TIMEOUTS", (0.3, 0.7))
        monkeypatch.setattr(helpers, "SLOW_SECONDS", 1)
        monkeypatch.setattr(helpers, "LARGEST", 3_000_000)
    with Server(("127.0.0.1", 0), Handler) as running:
        running.asked = []
        running.url = f"http://127.0.0.1:{running.server_port}"
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        yield running
        running.shutdown()


def mirrors(monkeypatch, *addresses):
    monkeypatch.setenv("LAB_MIRRORS", " ".join(addresses))


def download(home):
    return helpers.download("CIFAR10", NAME, MD5, home)


def left(home):
    """What is in the folder beside locks."""
    return sorted(path.name for path in home.iterdir() if not path.name.endswith(".lock")) if home.exists() else []


FAULTS = {  # folder of the address: what it is called, what the reason must name
    "403": ("HTTP 403", "403"),
    "404": ("HTTP 404", "404"),
    "429": ("HTTP 429, too many requests", "429"),
    "503": ("HTTP 503", "503"),
    "loop": ("redirects without end", "redirects"),
    "html": ("login page with status 200", "a web page instead"),
    "altered": ("right length, one byte altered", "hash"),
    "bomb": ("gzip bomb as content encoding", "hash"),
    "endless": ("body without end", "larger than any"),
    "slow-headers": ("headers byte by byte", "no answer within"),
    "silent": ("silence after the headers", "timed out"),
    "stalled": ("silence in the middle", "timed out"),
    "trickle": ("10 bytes a second", "kB/s"),
    "cut": ("body cut short", "IncompleteRead"),
    "cut-unsized": ("body cut short, length not given", "hash"),
}
SLOWEST = 30 if LONG else 5  # seconds for one source


@pytest.fixture
def dead_ends():
    """Addresses where nobody listens and that nobody knows."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        yield {
            "refused": f"http://127.0.0.1:{nobody.getsockname()[1]}",
            "unknown": "http://no-such-host.invalid",
        }


def check_alone(name, reason, address, home, fault, monkeypatch):
    """Let the address be the only one: an error in time, with its reason, and nothing under the file's name."""
    mirrors(monkeypatch, address)
    with fault(f"download: {name}") as seen:
        start = time.monotonic()
        with pytest.raises(helpers.DataUnavailable) as caught:
            download(home)
        assert time.monotonic() - start < SLOWEST
        [line] = [line for line in str(caught.value).splitlines() if f"{address}/{NAME}: " in line]
        seen(line.partition(f"{NAME}: ")[2])
        assert reason in line
        assert NAME not in left(home)


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_is_named_in_time_and_the_next_try_brings_the_right_file(kind, server, tmp_path, fault, monkeypatch):
    check_alone(*FAULTS[kind], f"{server.url}/{kind}", tmp_path, fault, monkeypatch)
    mirrors(monkeypatch, f"{server.url}/good")
    assert download(tmp_path).read_bytes() == GOOD
    assert left(tmp_path) == [NAME]


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [("refused", "connection refused", "refused"), ("unknown", "name that no DNS server knows", "resol")],
)
def test_dead_ends_are_named_too(kind, name, reason, dead_ends, server, tmp_path, fault, monkeypatch):
    check_alone(name, reason, dead_ends[kind], tmp_path, fault, monkeypatch)


QUICK = [kind for kind in FAULTS if kind not in ("slow-headers", "silent", "stalled", "trickle")]


@pytest.mark.once
def test_a_good_mirror_behind_all_the_bad_ones_is_found(server, tmp_path, dead_ends, fault, monkeypatch):
    bad = [f"{server.url}/{kind}" for kind in (FAULTS if LONG else QUICK)] + list(dead_ends.values())
    mirrors(monkeypatch, *bad, f"{server.url}/good")
    with fault("download: all of these, then a good mirror") as seen:
        assert download(tmp_path).read_bytes() == GOOD
        seen("the data")
    assert left(tmp_path) == [NAME]


def test_when_nothing_serves_the_error_lists_every_source_its_reason_and_the_manual_step(
    server, tmp_path, dead_ends, monkeypatch
):
    addresses = [*(f"{server.url}/{kind}" for kind in ("404", "html", "altered", "loop")), *dead_ends.values()]
    mirrors(monkeypatch, *addresses)
    with pytest.raises(helpers.DataUnavailable) as caught:
        download(tmp_path)
    text = str(caught.value)
    for address in addresses:
        assert f"{address}/{NAME}: " in text
    assert all(part in text for part in ("By hand", NAME, MD5, str(tmp_path)))
    assert NAME not in left(tmp_path)


def test_a_download_that_broke_off_goes_on_where_it_ended(server, tmp_path, fault, monkeypatch):
    mirrors(monkeypatch, f"{server.url}/cut", f"{server.url}/range")
    with fault("download: broken off, then resumed") as seen:
        assert download(tmp_path).read_bytes() == GOOD
        seen("the data; only the rest was asked for")
    assert server.asked == [("cut", None), ("range", f"bytes={len(GOOD) // 2}-")]


def test_the_last_mirror_may_be_slow(server, tmp_path, monkeypatch):
    monkeypatch.setattr(helpers, "SLOW_RATE", 1_000_000)  # bytes a second; 200,000 are what comes
    monkeypatch.setattr(helpers, "SLOW_SECONDS", 0.5)
    mirrors(monkeypatch, f"{server.url}/slow", f"{server.url}/slow")
    assert download(tmp_path).read_bytes() == GOOD
    assert len(server.asked) == 2, "the first one was given up for it"


def test_who_waits_in_vain_for_the_lock_leaves_the_others_file_alone(server, tmp_path, monkeypatch):
    mirrors(monkeypatch, f"{server.url}/good")
    (tmp_path / f".{NAME}.part").write_bytes(GOOD[:1000])  # what another process has so far
    lock = filelock.FileLock
    monkeypatch.setattr(filelock, "FileLock", lambda path, timeout: lock(path, timeout=0.2))
    with lock(tmp_path / f".{NAME}.lock"), pytest.raises(helpers.DataUnavailable, match="lock"):
        in_thread(lambda: download(tmp_path))
    assert (tmp_path / f".{NAME}.part").read_bytes() == GOOD[:1000]


def in_thread(call):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_a_part_that_does_not_fit_is_thrown_away(server, tmp_path, monkeypatch):
    (tmp_path / f".{NAME}.part").write_bytes(b"?" * 1000)
    mirrors(monkeypatch, f"{server.url}/range", f"{server.url}/range")
    assert download(tmp_path).read_bytes() == GOOD
    assert [asked for _, asked in server.asked] == ["bytes=1000-", None]


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl to make a certificate that nobody trusts")
def test_a_certificate_that_nobody_signed_is_refused(server, tmp_path, fault, monkeypatch):
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=127.0.0.1 -keyout key -out cert"
    subprocess.run(make.split(), cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    with Server(("127.0.0.1", 0), Handler) as secure:
        secure.asked = []
        secure.socket = context.wrap_socket(secure.socket, server_side=True)
        threading.Thread(target=secure.serve_forever, args=(0.05,), daemon=True).start()
        address = f"https://127.0.0.1:{secure.server_port}/good"
        check_alone("certificate that nobody signed", "certificate", address, tmp_path / "data", fault, monkeypatch)
        secure.shutdown()
    assert secure.asked == []


@needs_fork
class TestProcesses:
    def test_eight_on_an_empty_folder_download_once(self, server, tmp_path, fault, monkeypatch):
        mirrors(monkeypatch, f"{server.url}/good")
        fork = multiprocessing.get_context("fork")
        processes = [fork.Process(target=download, args=(tmp_path / "data",)) for _ in range(8)]
        with fault("eight processes, empty folder") as seen:
            for process in processes:
                process.start()
            for process in processes:
                process.join(30)
            assert [process.exitcode for process in processes] == [0] * 8
            seen(f"the data in all; downloads: {len(server.asked)}")
        assert len(server.asked) == 1
        assert (tmp_path / "data" / NAME).read_bytes() == GOOD

    def test_when_the_holder_of_the_lock_is_killed_the_others_take_over(self, server, tmp_path, fault, monkeypatch):
        mirrors(monkeypatch, f"{server.url}/stalled", f"{server.url}/good")
        monkeypatch.setattr(helpers, "TIMEOUTS", (5, 30))
        fork = multiprocessing.get_context("fork")
        holder = fork.Process(target=download, args=(tmp_path,))
        holder.start()
        while not server.asked:
            time.sleep(0.02)
        mirrors(monkeypatch, f"{server.url}/good")
        others = [fork.Process(target=download, args=(tmp_path,)) for _ in range(3)]
        for other in others:
            other.start()
        time.sleep(0.3)
        assert all(other.is_alive() for other in others), "they wait for the lock"
        with fault("holder of the lock killed, three wait") as seen:
            os.kill(holder.pid, signal.SIGKILL)
            for other in others:
                other.join(20)
            assert [other.exitcode for other in others] == [0] * 3
            seen("the data in all three")
        assert (tmp_path / NAME).read_bytes() == GOOD

    def test_a_limit_on_file_size_is_a_clear_error_without_remains(self, server, tmp_path, fault, monkeypatch):
        mirrors(monkeypatch, f"{server.url}/good", f"{server.url}/range")

        def refused():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # the kernel refuses to write more
            download(tmp_path)

        with fault("limit on the size of files") as seen:
            seen(refused_for_room(lambda: in_child(refused), tmp_path, "too large", server))


def refused_for_room(call, home, match, server):
    """The reason that `call` gives for its refusal, after which nothing is left in `home`."""
    with pytest.raises(helpers.DataUnavailable, match=match) as caught:
        call()
    assert left(home) == []
    assert len(server.asked) == 1, "another mirror would not help"
    [line] = [line for line in str(caught.value).splitlines() if line.startswith(f"  {home}: ")]
    return line.partition(f"{home}: ")[2]


def test_a_full_disk_is_a_clear_error_without_remains(server, small_disk, fault, monkeypatch):
    disk = small_disk(100)
    mirrors(monkeypatch, f"{server.url}/good", f"{server.url}/range")
    with fault("disk full while downloading") as seen:
        seen(refused_for_room(lambda: download(disk), disk, "No space left", server))


def test_on_a_terminal_it_says_how_far_it_is(server, tmp_path, monkeypatch, capsys):
    mirrors(monkeypatch, f"{server.url}/good")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    download(tmp_path)
    assert f"{NAME}: 0.0 of 0 MB" in capsys.readouterr().err


def test_members_that_point_elsewhere_are_never_written(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in ("folder/data", "../outside", "/absolute"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("folder/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    path = tmp_path / "folder" / "a.tar.gz"
    path.parent.mkdir()
    path.write_bytes(buffer.getvalue())
    assert set(helpers._unpack(path)) == {"data", "outside", "absolute"}  # in memory, by their last names
    assert [p.name for p in tmp_path.rglob("*")] == ["folder", "a.tar.gz"]


def test_verify_and_prefetch_from_the_command_line(tmp_path):
    environment = os.environ | {"LAB_DATA": str(tmp_path), "LAB_OFFLINE": "1"}
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in helpers.MNIST_MD5:
        (raw / name).write_bytes(b"damaged")
    command = [sys.executable, "-m", "helpers"]
    kinds = dict(cwd=helpers.HERE, env=environment, capture_output=True, text=True, check=False)
    result = subprocess.run([*command, "verify", "MNIST", "CIFAR10"], **kinds)
    assert result.returncode == 1
    assert "MNIST: DAMAGED" in result.stderr
    assert "train-images-idx3-ubyte" in result.stderr
    assert "CIFAR10: not there" in result.stdout
    result = subprocess.run([*command, "prefetch", "CIFAR100"], **kinds)
    assert result.returncode == 1
    assert "cifar-100-python.tar.gz" in result.stderr
    result = subprocess.run([*command, "prefetch", "CIFAR11"], **kinds)
    assert "No dataset called CIFAR11" in result.stderr

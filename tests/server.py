"""A web server on this machine that misbehaves in every way a network does."""

import contextlib
import gzip
import http.server
import threading
import time

import helpers


class Handler(http.server.BaseHTTPRequestHandler):
    """What happens is the first folder of the address; "range" serves the file as it should be, ranges included."""

    def do_GET(self):
        kind = self.path.split("/")[1]
        self.server.asked.append((kind, self.headers.get("Range")))
        body, begin, status = self.server.body, 0, 200
        if kind.isdigit():
            return self.send_error(int(kind))
        if kind == "slow-headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Padding: ")
            return self.trickle(b"?" * 10_000)
        places = {"loop": self.path, "moved": self.path.replace("moved", "good")}
        places |= {"to-a-file": "file:///etc/passwd", "to-ftp": "ftp://127.0.0.1:9/file"}
        if kind in places:
            self.send_response(302)
            self.send_header("Location", places[kind])
            return self.end_headers()
        if kind == "range" and self.headers.get("Range"):
            begin, status = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")), 206
            if begin >= len(body):
                return self.send_error(416)
        if kind == "html":
            body = b"<html>please accept the terms</html>"
        if kind == "altered":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if kind == "bomb":
            body = gzip.compress(bytes(50_000_000))
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if kind == "html" else "application/octet-stream")
        if kind == "bomb":
            self.send_header("Content-Encoding", "gzip")
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        if kind not in ("endless", "cut-unsized"):
            self.send_header("Content-Length", str(len(body) - begin))
        self.end_headers()
        if kind == "silent":
            self.server.ending.wait(120)
        elif kind in ("stalled", "cut", "cut-unsized"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.server.ending.wait(120 if kind == "stalled" else 0)
        elif kind == "trickle":
            self.trickle(body)
        elif kind == "slow":  # 3 s in all
            for start in range(0, len(body), len(body) // 15):
                self.wfile.write(body[start : start + len(body) // 15])
                time.sleep(0.2)
        elif kind == "endless":
            for _ in range(2 * helpers.LARGEST // len(body)):  # nearly: a kit without a limit must not fill the disk
                self.wfile.write(body)
        else:
            self.wfile.write(body[begin:])

    def trickle(self, body):
        """Send ten bytes a second."""
        for byte in body:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            if self.server.ending.wait(0.1):
                return

    def log_message(self, *arguments):
        pass


class Server(http.server.ThreadingHTTPServer):
    """Serves `body`; `asked` has the kind and the range of each request, in order."""

    daemon_threads = True

    def handle_error(self, *arguments):
        pass  # a client that goes away is what is tested


@contextlib.contextmanager
def serving(body: bytes, context=None):
    """A running server at `server.url`; with `context`, an ssl.SSLContext, at an https address."""
    with Server(("127.0.0.1", 0), Handler) as server:
        server.body, server.asked, server.ending = body, [], threading.Event()
        server.url = f"http{'s' * bool(context)}://127.0.0.1:{server.server_port}"
        if context:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.ending.set()
            server.shutdown()

"""A web server that misbehaves in the way that the path names. Run it with `python zoo_server.py FOLDER [CERTIFICATE KEY]`.

It prints its port, then a line for each request: method, path and Range header.

    /plain/FILE       ranges are served
    /no-range/FILE    ranges are ignored
    /cut-N/FILE       the connection is closed after N bytes of each answer
    /once-N/FILE      as /cut-N/, for the first request only
    /slow/FILE        16 KiB at a time, with pauses
    /short/FILE       Content-Length is half of what comes
    /long/FILE        Content-Length is twice of what comes
    /drip/FILE        one byte at a time, with pauses
    /head/FILE        the headers one byte at a time, with pauses
    /continue/FILE    "100 Continue" for ever
    /endless/FILE     headers for ever
    /digits/FILE      lengths of 5,000 digits
    /html/FILE        a page, as a captive portal answers
    /wrong-range/FILE a range is answered from another offset
    /bomb/FILE        endless zeros, chunked, without a length
    /gzip/FILE        a gzip of 64 MiB of zeros, as Content-Encoding
    /busy/FILE        503 for the first request only
    /redirect?to=X    to X
    /circle           to itself
    /flood            to itself, with a page that never ends
    /reason           404, with a reason that a terminal obeys
    /status-N         that status
"""

import gzip
import http.server
import io
import ssl
import sys
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

FOLDER = Path(sys.argv[1]) if __name__ == "__main__" else Path()  # pytest imports this file to look for doctests
PAGE = b"<!DOCTYPE html><html><body>Please sign in to use this network.</body></html>\n"
# What is sent at the beginning, what is repeated, and the pause in seconds
UNENDING = {
    "head": (b"HTTP/1.1 200 OK\r\nX-Long: ", b"a", 0.02),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0),
    "endless": (b"HTTP/1.1 200 OK\r\n", b"X-Many: many\r\n", 0),
}
asked = {}


def bomb():
    """64 MiB of zeros in 64 KiB."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file:
        for _ in range(64):
            file.write(bytes(2**20))
    return packed.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        print("GET", self.path, self.headers.get("Range", "-"), flush=True)
        self.close_connection = True
        parts = urlsplit(self.path)
        mode, _, name = parts.path.strip("/").partition("/")
        mode, _, number = mode.partition("-") if mode.startswith(("cut", "once", "status")) else (mode, "", "")
        asked[self.path] = asked.get(self.path, 0) + 1
        first = asked[self.path] == 1
        if mode == "redirect":
            self.answer(302, Location=parse_qs(parts.query)["to"][0])
        elif mode == "circle":
            self.answer(302, Location="/circle?again" if first else "/circle")
        elif mode == "flood":
            self.answer_without_end(b"HTTP/1.1 302 Found\r\nLocation: /flood?\r\n\r\n", bytes(2**20), 0)
        elif mode == "reason":
            self.send_response(404, "\x1b[2J\x07gone")
            self.end_headers()
        elif mode == "status":
            self.answer(int(number))
        elif mode == "busy" and first:
            self.answer(503)
        elif mode == "html":
            self.answer(200, Content_Length=str(len(PAGE)), Content_Type="text/html")
            self.wfile.write(PAGE)
        elif mode in UNENDING:
            self.answer_without_end(*UNENDING[mode])
        elif not (FOLDER / name).is_file():
            self.answer(404)
        else:
            self.send(mode, int(number or 0), first, (FOLDER / name).read_bytes())

    def answer(self, status, **headers):
        self.send_response(status)
        for key, value in {"Content_Length": "0", **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()

    def send(self, mode, number, first, content):
        if mode == "bomb":
            self.answer_chunked()
            return
        if mode == "gzip":
            packed = bomb()
            self.answer(200, Content_Length=str(len(packed)), Content_Encoding="gzip")
            self.wfile.write(packed)
            return
        start = 0
        asked_from = self.headers.get("Range", "").removeprefix("bytes=").removesuffix("-")
        if asked_from and mode != "no-range":
            start = int(asked_from)
            if start >= len(content):
                self.answer(416)
                return
        rest = content[start:]
        length = {"short": len(rest) // 2, "long": len(rest) * 2}.get(mode, len(rest))
        if mode == "digits":
            many = "9" * 5000
            self.answer(206 if start else 200, Content_Length=many, Content_Range=f"bytes {start}-9/{many}")
        elif start and mode == "wrong-range":
            self.answer(206, Content_Length=str(length), Content_Range=f"bytes 0-{len(content) - 1}/{len(content)}")
        elif start:
            whole = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.answer(206, Content_Length=str(length), Content_Range=whole)
        else:
            self.answer(200, Content_Length=str(length))
        if mode == "cut" or (mode == "once" and first):
            rest = rest[:number]
        if mode in ("slow", "drip"):
            step = 2**14 if mode == "slow" else 1
            for at in range(0, len(rest), step):
                self.wfile.write(rest[at : at + step])
                time.sleep(0.02)
        else:
            self.wfile.write(rest)

    def answer_without_end(self, beginning, repeated, pause):
        self.wfile.write(beginning)
        while True:  # until the other side hangs up
            self.wfile.write(repeated)
            time.sleep(pause)

    def answer_chunked(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while True:  # until the other side hangs up
            self.wfile.write(b"100000\r\n" + bytes(2**20) + b"\r\n")

    def log_message(self, *arguments):
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        pass  # clients that hang up are what is tested


if __name__ == "__main__":
    server = Server(("127.0.0.1", 0), Handler)
    if len(sys.argv) > 2:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*sys.argv[2:])
        server.socket = context.wrap_socket(server.socket, server_side=True)
    print(server.server_port, flush=True)
    server.serve_forever()

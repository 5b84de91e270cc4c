"""One download from a real server that takes its time, and addresses inside of a private network."""

import contextlib
import io
import shutil
import socket
import socketserver
import subprocess
import threading

import pytest
from zoo_fixtures import ServerProcess

from smartfrz.errors import DownloadError, UnreachableError
from smartfrz.zoo import embedded_folder, settings, transport, urls

BASE = embedded_folder() / "smartfrz-base.onnx"
CONTENT = BASE.read_bytes()
METADATA = "http://169.254.169.254/latest/x.onnx"  # where cloud machines give out credentials

PRIVATE = [
    "10.1.2.3",
    "192.168.0.1",
    "172.16.0.1",
    "169.254.169.254",
    "100.64.0.1",
    "127.0.0.2",
    "0.0.0.0",
    "224.0.0.1",
]
PRIVATE += ["::1", "fe80::1", "fe80::1%eth0", "fd00::1", "::", "ff02::1"]
PRIVATE += ["::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::a00:1", "2002:a00:1::"]
PUBLIC = ["8.8.8.8", "185.199.108.153", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    shutil.copy(BASE, folder / "x.onnx")
    process = ServerProcess(tmp_path_factory.mktemp("log") / "log", "zoo_server.py", folder)
    yield process
    process.stop()


@pytest.fixture(autouse=True)
def _apart(monkeypatch):
    for name in ("SMARTFRZ_OFFLINE", "SMARTFRZ_ALLOW_PRIVATE", "SMARTFRZ_ALLOW_HTTP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(transport, "PAUSE", 0.01)


def fetched(url, **options):
    buffer = io.BytesIO()
    transport.download(url, buffer, **{"limit": 10**7, **options})
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["head", "continue", "endless", "drip"])
def test_an_answer_that_never_ends_is_given_up(mode, server):
    """Each byte comes in time, and the answer never does."""
    with pytest.raises(UnreachableError, match=rf"/{mode}/x\.onnx .*Tried"):
        fetched(f"{server.url}/{mode}/x.onnx", deadline=1, attempts=1)


@pytest.mark.parametrize("start", [b"", CONTENT[:1000]])
def test_a_length_of_many_digits_is_none(start, server):
    buffer = io.BytesIO(start)
    transport.download(f"{server.url}/digits/x.onnx", buffer, limit=10**7, attempts=1)
    assert buffer.getvalue() == CONTENT


@pytest.mark.parametrize("mode", ["head", "drip"])
def test_a_server_below_the_lowest_rate_is_given_up(mode, server, monkeypatch):
    monkeypatch.setattr(transport, "SLOW_FOR", 0.3)
    with pytest.raises(UnreachableError, match=r"only \d+ bytes a second arrive; expected at least 1024"):
        fetched(f"{server.url}/{mode}/x.onnx", attempts=1)


def test_a_server_above_the_lowest_rate_is_waited_for(server, monkeypatch):
    monkeypatch.setattr(transport, "SLOW_FOR", 0.1)
    assert fetched(f"{server.url}/slow/x.onnx") == CONTENT


def test_a_name_that_is_looked_up_for_ever_is_given_up(monkeypatch):
    """The resolver of the system knows no time limit: it is slowed down here."""
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: released.wait(60))
    with pytest.raises(UnreachableError, match=r"cannot be reached \((no end after|it did not arrive in time)"):
        fetched("https://example.org/x.onnx", deadline=0.2, attempts=1)
    released.set()


def test_mock_a_file_system_that_hangs_is_given_up(monkeypatch):
    released = threading.Event()

    class Hanging:
        def info(self, path):
            released.wait(60)

    monkeypatch.setattr(transport, "file_system", lambda url: (Hanging(), url))
    with pytest.raises(UnreachableError, match=r"s3://bucket/x\.onnx cannot be reached \(TimeoutError"):
        fetched("s3://bucket/x.onnx", deadline=0.2, attempts=1)
    released.set()


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses(address):
    assert urls.is_private(address)
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(DownloadError, match=r"inside of a private network.*pass --allow-private"):
        urls.check_public(f"https://{host}/x.onnx", address, "https://example.org/x.onnx")


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address):
    assert not urls.is_private(address)
    urls.check_public("https://example.org/x.onnx", address, "https://example.org/x.onnx")


def test_a_private_address_is_not_asked_before_it_is_allowed(monkeypatch):
    with pytest.raises(DownloadError, match=r"is at 192\.168\.255\.254, inside of a private network") as caught:
        fetched("https://192.168.255.254/x.onnx")
    assert not isinstance(caught.value, UnreachableError)
    with settings.choosing("SMARTFRZ_ALLOW_PRIVATE", "1"):
        urls.check_public("https://192.168.255.254/x.onnx", "192.168.255.254", "https://example.org/x.onnx")


def test_a_private_address_is_not_asked_for_through_a_proxy_either(server, monkeypatch):
    """A proxy looks up names itself, so that only addresses that are numbers can be checked."""
    monkeypatch.setenv("SMARTFRZ_ALLOW_HTTP", "1")
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    before = len(server.lines())
    with pytest.raises(DownloadError, match=r"is at 169\.254\.169\.254, inside of a private network"):
        fetched(METADATA)
    assert len(server.lines()) == before
    with pytest.raises(DownloadError, match="cannot be fetched: 404"):
        fetched("http://example.org/x.onnx")
    assert server.lines()[-1].startswith("GET http://example.org/x.onnx")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_an_encrypted_download_through_a_proxy(tmp_path, monkeypatch):
    """The proxy is on this machine, which is private, and looks up the name itself."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=zoo.example.org"]
    command += ["-addext", "subjectAltName=DNS:zoo.example.org", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    (tmp_path / "served").mkdir()
    shutil.copy(BASE, tmp_path / "served" / "x.onnx")
    encrypted = ServerProcess(tmp_path / "log", "zoo_server.py", tmp_path / "served", certificate, key)
    port = int(encrypted.url.rpartition(":")[2])
    asked = []

    class Tunnel(socketserver.StreamRequestHandler):
        def handle(self):
            asked.append(self.rfile.readline().decode().split()[:2])
            while self.rfile.readline().strip():
                pass
            with socket.create_connection(("127.0.0.1", port)) as other:
                self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
                back = threading.Thread(target=self.pump, args=(other, self.connection), daemon=True)
                back.start()
                self.pump(self.connection, other)
                back.join()

        def pump(self, source, target):
            with contextlib.suppress(OSError):
                while content := source.recv(2**16):
                    target.sendall(content)
                target.shutdown(socket.SHUT_WR)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Tunnel) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.server_address[1]}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        try:
            assert fetched("https://zoo.example.org/plain/x.onnx") == CONTENT
        finally:
            encrypted.stop()
            proxy.shutdown()
    assert asked == [["CONNECT", "zoo.example.org:443"]]


def test_the_page_of_a_redirect_is_not_read(server):
    with pytest.raises(DownloadError, match="302"):
        fetched(f"{server.url}/flood", deadline=30, attempts=1)


def test_an_error_does_not_repeat_what_a_terminal_obeys(server):
    with pytest.raises(DownloadError, match=r"404 .*gone\. Check the address") as error:
        fetched(f"{server.url}/reason", attempts=1)
    assert str(error.value).isprintable()


def test_a_redirect_into_a_private_network_is_not_followed(server, monkeypatch):
    monkeypatch.setenv("SMARTFRZ_ALLOW_HTTP", "1")
    with pytest.raises(DownloadError, match=r"169\.254\.169\.254, inside of a private network"):
        fetched(f"{server.url}/redirect?to={METADATA}")


def test_a_name_that_leads_to_this_machine_is_private(server, monkeypatch):
    """Whoever owns a name can let it lead anywhere. The system's resolver is asked for another name here."""
    port = server.url.rpartition(":")[2]
    asked, looked_up = [], socket.getaddrinfo

    def resolve(host, *arguments, **options):
        asked.append(host)
        return looked_up("127.0.0.1", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setenv("SMARTFRZ_ALLOW_HTTP", "1")
    url = f"http://zoo.example.org:{port}/plain/x.onnx"
    with pytest.raises(DownloadError, match=r"zoo\.example\.org.* is at 127\.0\.0\.1, inside of a private network"):
        fetched(url)
    asked.clear()
    monkeypatch.setenv("SMARTFRZ_ALLOW_PRIVATE", "1")
    assert fetched(url) == CONTENT
    assert asked == ["zoo.example.org"]  # once: a second answer could be another one

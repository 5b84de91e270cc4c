"""`examples/nginx.conf` in front of a server, if there is an nginx."""

import http.client
import importlib.util
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from serving_process import ServingProcess, binary, histories

from smartfrz.errors import ServerError
from smartfrz.predictor.remote import RemotePredictor

pytestmark = pytest.mark.skipif(importlib.util.find_spec("kserve") is None, reason="needs kserve")
NGINX, OPENSSL = shutil.which("nginx"), shutil.which("openssl")
if not NGINX or not OPENSSL:
    pytest.skip("nginx and openssl are needed", allow_module_level=True)

EXAMPLE = Path(__file__).parents[1] / "examples" / "nginx.conf"
KEY = "0123456789abcdef0123456789abcdef"
BODY, HEADERS = binary(*histories(3, 5, 64))
INFER = "/v2/models/tiny/infer"


@pytest.fixture(scope="module")
def proxy(predictor_file, tmp_path_factory):
    """The port of nginx, and its certificate."""
    folder = tmp_path_factory.mktemp("nginx")
    server = ServingProcess(folder / "log", str(predictor_file), "--max-connections-per-peer", 1000)
    made = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost")
    names = ("-addext", "subjectAltName=DNS:localhost", "-keyout", folder / "key.pem", "-out", folder / "cert.pem")
    subprocess.run([OPENSSL, *made, *names], check=True, capture_output=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    text = EXAMPLE.read_text()
    for old, new in {
        "CHANGE-THIS-KEY": KEY,
        "/etc/ssl/predictors.pem": folder / "cert.pem",
        "/etc/ssl/predictors.key": folder / "key.pem",
        "listen 443": f"listen 127.0.0.1:{port}",
        "127.0.0.1:8080": f"127.0.0.1:{server.port}",
        "127.0.0.1:8081": f"127.0.0.1:{server.grpc_port}",
        "/run/nginx.pid": folder / "nginx.pid",
        "client_body_timeout 5s": "client_body_timeout 1s",
        "access_log off;": "access_log off; "
        + " ".join(
            f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        ),
    }.items():
        assert old in text
        text = text.replace(old, str(new))
    (folder / "nginx.conf").write_text(text)
    command = [NGINX, "-c", folder / "nginx.conf", "-p", folder, "-e", folder / "error.log", "-g", "daemon off;"]
    process = subprocess.Popen(command)
    until = time.monotonic() + 20
    while time.monotonic() < until and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            time.sleep(0.1)
    yield port, folder / "cert.pem", server
    process.terminate()
    process.wait()
    server.kill()


def request(proxy, method, path, body=None, headers=None):
    port, certificate, _ = proxy
    context = ssl.create_default_context(cafile=certificate)
    connection = http.client.HTTPSConnection("localhost", port, timeout=30, context=context)
    try:
        connection.request(method, path, body, headers or {})
        return connection.getresponse().status
    finally:
        connection.close()


def test_who_has_a_key_is_served(proxy, monkeypatch):
    port, certificate, server = proxy
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    remote = RemotePredictor(f"https://localhost:{port}/{KEY}/tiny")
    history, lengths = histories(3, 5, 64)
    direct = RemotePredictor(server.url("tiny")).predict(history, lengths)
    np.testing.assert_array_equal(remote.predict(history, lengths).confidence, direct.confidence)
    assert request(proxy, "POST", INFER, BODY, HEADERS | {"X-Api-Key": KEY}) == 200


def test_who_has_none_is_not(proxy, monkeypatch):
    port, certificate, _ = proxy
    assert request(proxy, "POST", INFER, BODY, HEADERS) == 401
    assert request(proxy, "POST", INFER, BODY, HEADERS | {"X-Api-Key": "no"}) == 401
    assert request(proxy, "GET", "/no/v2/models/tiny") == 401
    assert request(proxy, "GET", "/metrics") == 404
    assert request(proxy, "GET", "/v2/health/live") == 200
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with pytest.raises(ServerError, match="status 401"):
        RemotePredictor(f"https://localhost:{port}/no/tiny")


def test_a_slow_body_does_not_reach_the_server(proxy):
    port, certificate, server = proxy
    before = server.metrics().get('smartfrz_rejected_total{reason="slow"}', 0)
    context = ssl.create_default_context(cafile=certificate)
    head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: {KEY}\r\nContent-Length: 1000\r\n\r\nx"
    plain = socket.create_connection(("127.0.0.1", port), timeout=30)
    with context.wrap_socket(plain, server_hostname="localhost") as connection:
        connection.sendall(head.encode())
        answer = connection.recv(1000)
    assert not answer or answer.startswith(b"HTTP/1.1 408 ")
    assert server.metrics().get('smartfrz_rejected_total{reason="slow"}', 0) == before


def test_grpc_needs_the_key(proxy):
    grpc = pytest.importorskip("grpc")
    port, certificate, _ = proxy
    credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
    method = "/inference.GRPCInferenceService/ServerLive"
    with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
        live = channel.unary_unary(method)
        assert live(b"", metadata=[("x-api-key", KEY)], timeout=20) == b"\x08\x01"
        with pytest.raises(grpc.RpcError) as caught:
            live(b"", timeout=20)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED

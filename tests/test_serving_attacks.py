"""`smartfrz serve`, as a process, beside clients that hold on to it."""

import contextlib
import json
import socket
import threading
import time

import pytest
from serving_process import ServingProcess, binary, histories, question

pytest.importorskip("kserve")

MIB = 2**20
HISTORY, LENGTHS = histories(3, 5, 64)
GOOD = question(HISTORY, LENGTHS)
BODY, HEADERS = binary(HISTORY, LENGTHS)
POST = b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\n"
LIMITS = ("--max-request-bytes", 2 * MIB, "--max-json-bytes", MIB // 4, "--max-connections", 60)
LIMITS += ("--max-connections-per-peer", 60)


@pytest.fixture(scope="module")
def server(predictor_file, tmp_path_factory):
    """A server that waits for nobody."""
    log = tmp_path_factory.mktemp("server") / "log"
    deadlines = ("--header-seconds", 1.5, "--stall-seconds", 1.5, "--min-rate", 10**5, "--body-seconds", 8)
    process = ServingProcess(log, str(predictor_file), *LIMITS, *deadlines)
    yield process
    process.kill()
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def patient(predictor_file, tmp_path_factory):
    """A server of which no deadline is near."""
    log = tmp_path_factory.mktemp("server") / "log"
    deadlines = ("--header-seconds", 300, "--stall-seconds", 300, "--min-rate", 1, "--body-seconds", 300)
    process = ServingProcess(log, str(predictor_file), *LIMITS, *deadlines)
    yield process
    process.kill()
    assert "Traceback" not in log.read_text()


@contextlib.contextmanager
def attackers(server, sent, number):
    """Connections that have sent something and wait."""
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(number):
            connections.append(stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60)))
            with contextlib.suppress(OSError):
                connections[-1].sendall(sent)
        yield connections


def answers(server):
    """Check that honest requests are answered, and health."""
    for _ in range(5):
        assert server.request("POST", "/v2/models/tiny/infer", BODY, HEADERS, timeout=20)[0] == 200
        assert server.request("GET", "/v2/health/live", timeout=20)[0] == 200
        assert server.request("GET", "/metrics", timeout=20)[0] == 200


BINARY = POST + b"Inference-Header-Content-Length: 2\r\n"
SLOW = {
    "announced bodies": BINARY + b"Content-Length: 2097152\r\n\r\nx",
    "chunked bodies": BINARY + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n",
    "bodies that stop at the end": BINARY + b"Content-Length: 2097152\r\n\r\n" + b"x" * 2090000,
    "headers": POST,
    "nothing": b"",
}


@pytest.mark.parametrize("sent", SLOW.values(), ids=SLOW)
def test_whoever_waits_holds_nobody_up(patient, sent):
    """Room is for what has arrived, and of those that fill it, or all connections, the silent ones go."""
    with attackers(patient, sent, 12 if b"Content-Length: 2097152" in sent or b"chunked" in sent else 150):
        answers(patient)
    answers(patient)


@pytest.mark.parametrize("sent", SLOW.values(), ids=SLOW)
def test_whoever_waits_is_sent_away(server, sent):
    with attackers(server, sent, 3) as connections:
        for connection in connections:
            with contextlib.suppress(ConnectionResetError):
                received = b""
                while piece := connection.recv(65536):
                    received += piece
                assert not received or received.startswith(b"HTTP/1.1 408 ")
    answers(server)


def test_headers_that_drip_are_not_waited_for(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        with pytest.raises(OSError):  # noqa: PT011 - whichever way the system says so
            for _ in range(100):
                connection.sendall(b"X-A: b\r\n")
                time.sleep(0.1)


def test_a_body_that_drips_is_not_waited_for(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(BINARY + b"Content-Length: 100000\r\n\r\n")
        with pytest.raises(OSError):  # noqa: PT011 - whichever way the system says so
            for _ in range(100):
                connection.sendall(b"xx")
                time.sleep(0.1)


def test_health_is_answered_while_all_connections_are_at_work(predictor_file, tmp_path):
    """A client whose request has its answer coming is not cut off; the next one is told to come again."""
    limits = ("--max-connections", 4, "--max-delay-ms", 1000, "--max-connections-per-peer", 4)
    server = ServingProcess(tmp_path / "log", str(predictor_file), *limits)
    statuses = []
    try:
        # Each asks for more layers than fit beside the others, so that they wait for a second each.
        waiting = [
            threading.Thread(target=lambda: statuses.append(server.ask("tiny", BODY, HEADERS)[0])) for _ in range(4)
        ]
        for thread in waiting:
            thread.start()
        time.sleep(0.5)
        assert server.request("GET", "/v2/health/live")[0] == 200
        assert server.request("GET", "/metrics")[0] == 200
        status, headers, body = server.request("POST", "/v2/models/tiny/infer", BODY, HEADERS)
        assert status == 503
        assert headers["Connection"] == "close"
        assert "too many connections" in json.loads(body)["error"]
        for thread in waiting:
            thread.join()
        assert statuses == [200] * 4
        assert server.ask("tiny", BODY, HEADERS)[0] == 200
    finally:
        server.kill()


def test_json_is_limited_more_than_binary_data(server):
    long = json.dumps(GOOD).encode() + b" " * (MIB // 4)
    status, answer = server.ask("tiny", long)
    assert status == 413
    assert f"expected at most {MIB // 4} bytes. Send tensors as binary data" in answer["error"]
    # What is called binary data is not JSON, whatever its header says.
    status, answer = server.ask("tiny", long, {"Inference-Header-Content-Length": str(len(long))})
    assert status == 413
    assert "JSON of " in answer["error"]
    assert server.ask("tiny", BODY + b" " * MIB, HEADERS)[0] == 400  # read, and not as large as it claims


def test_what_the_grace_period_is_too_short_for_gets_503(predictor_file, tmp_path):
    server = ServingProcess(tmp_path / "log", str(predictor_file), "--max-delay-ms", 1000, "--grace-seconds", 0)
    answers = []
    asking = threading.Thread(
        target=lambda: answers.append(server.request("POST", "/v2/models/tiny/infer", BODY, HEADERS))
    )
    asking.start()
    time.sleep(0.5)  # it waits for others to be run with
    try:
        assert server.terminate() == 0
    finally:
        server.kill()
    asking.join()
    status, headers, body = answers[0]
    assert status == 503
    assert headers["Retry-After"] == "1"
    assert "shuts down" in json.loads(body)["error"]
    assert "Traceback" not in (tmp_path / "log").read_text()

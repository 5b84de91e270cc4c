"""`smartfrz serve`, as a process, beside clients that hold on to it."""

import contextlib
import importlib.util
import json
import socket
import subprocess
import sys
import threading
import time

import pytest
from serving_process import ServingProcess, binary, histories, question

pytestmark = pytest.mark.skipif(importlib.util.find_spec("kserve") is None, reason="needs kserve")

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
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while piece := connection.recv(65536):
                    received += piece
            assert not received or received.startswith(b"HTTP/1.1 408 ")
    answers(server)


def is_cut_off(connection, piece):
    """Whether the server ends a connection that sends a piece ten times a second."""
    try:
        for _ in range(100):
            connection.sendall(piece)
            time.sleep(0.1)
    except OSError:
        return True
    return False


def test_headers_that_drip_are_not_waited_for(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        assert is_cut_off(connection, b"X-A: b\r\n")


def test_a_body_that_drips_is_not_waited_for(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(BINARY + b"Content-Length: 100000\r\n\r\n")
        assert is_cut_off(connection, b"xx")


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


def run_grpc(code, server, *arguments):
    """Run code of a gRPC client in a process of its own, and return what it prints. kserve's names are tritonclient's."""
    prelude = (
        "import asyncio, sys, time, grpc, numpy as np\n"
        "from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb\n"
        "METHOD = '/inference.GRPCInferenceService/ModelInfer'\n"
        "tensor = pb.ModelInferRequest.InferInputTensor\n"
        "def request(**more):\n"
        "    inputs = [tensor(name='history', datatype='FP32', shape=[3, 5, 64]),"
        " tensor(name='lengths', datatype='INT64', shape=[3])]\n"
        "    raw = [np.ones((3, 5, 64), np.float32).tobytes(), np.full(3, 5).tobytes()]\n"
        "    given = dict(model_name='tiny', inputs=inputs, raw_input_contents=raw) | more\n"
        "    return pb.ModelInferRequest(**given).SerializeToString()\n"
        "def channel(**options):\n"
        "    more = [('grpc.use_local_subchannel_pool', 1)]\n"
        "    return grpc.aio.insecure_channel(sys.argv[1], options=more)\n"
        "async def ask(open_channel, content):\n"
        "    try:\n"
        "        return len(await open_channel.unary_unary(METHOD)(content, timeout=30)) > 0\n"
        "    except grpc.aio.AioRpcError as error:\n"
        "        return f'{error.code().name}: {error.details()}'\n"
        "async def never():\n"
        "    await asyncio.sleep(3600)\n"
        "    yield b''\n"
        "async def silent(open_channel):\n"
        "    try:\n"
        "        return await open_channel.stream_unary(METHOD)(never(), timeout=60)\n"
        "    except grpc.aio.AioRpcError as error:\n"
        "        return f'{error.code().name}: {error.details()}'\n"
    )
    command = [sys.executable, "-c", prelude + code, f"127.0.0.1:{server.grpc_port}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_silent_calls_hold_nobody_up(patient):
    code = """
async def main():
    async with channel() as quiet, channel() as honest:
        calls = [asyncio.create_task(silent(quiet)) for _ in range(64)]
        await asyncio.sleep(2)
        print([await ask(honest, request()) for _ in range(5)])
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
asyncio.run(main())
"""
    assert run_grpc(code, patient) == ["[True, True, True, True, True]"]


def test_a_silent_call_is_ended(predictor_file, tmp_path):
    server = ServingProcess(tmp_path / "log", str(predictor_file), "--body-seconds", 1)
    try:
        code = "async def main():\n    async with channel() as c: print(await silent(c))\nasyncio.run(main())\n"
        assert run_grpc(code, server)[0].startswith("DEADLINE_EXCEEDED: The message did not arrive within 1 s")
    finally:
        server.kill()


def test_lists_of_numbers_over_grpc_are_limited_more_than_raw_tensors(server):
    code = """
async def main():
    size = int(sys.argv[2])
    many = tensor(name='history', datatype='FP32', shape=[1, 1, 64])
    many.contents.int64_contents.extend([1] * size)
    async with channel() as c:
        print(await ask(c, request(inputs=[many], raw_input_contents=[])))
        print(await ask(c, b'\\x2a\\x00' * size))  # inputs without anything
        print(await ask(c, request(raw_input_contents=[b'x' * 4 * size, b'x'])))
        print(await ask(c, request()))
asyncio.run(main())
"""
    lists, empty, raw, good = run_grpc(code, server, MIB // 4)
    assert lists.startswith(f"RESOURCE_EXHAUSTED: The message holds more than {MIB // 4} bytes besides")
    assert empty.startswith("RESOURCE_EXHAUSTED: The message holds more than")
    assert raw.startswith("INVALID_ARGUMENT")
    assert good == "True"


def test_idle_connections_to_grpc_are_closed(server):
    address = ("127.0.0.1", server.grpc_port)
    with socket.create_connection(address, timeout=30) as connection, contextlib.suppress(ConnectionResetError):
        while connection.recv(1000):
            pass


def test_what_the_grace_period_is_too_short_for_is_unavailable(predictor_file, tmp_path):
    server = ServingProcess(tmp_path / "log", str(predictor_file), "--max-delay-ms", 1000, "--grace-seconds", 0)
    code = """
import os, signal
async def main():
    async with channel() as c:
        asking = asyncio.create_task(ask(c, request()))
        await asyncio.sleep(0.5)  # it waits for others to be run with
        os.kill(int(sys.argv[2]), signal.SIGTERM)
        print(await asking)
asyncio.run(main())
"""
    try:
        assert run_grpc(code, server, server.pid) == [
            "UNAVAILABLE: The server shuts down, and had no time left for this request. Try again later."
        ]
        assert server.process.wait(60) == 0
    finally:
        server.kill()
    assert "Traceback" not in (tmp_path / "log").read_text()

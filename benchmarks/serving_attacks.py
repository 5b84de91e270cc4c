"""A server under attack: `python -m benchmarks.serving_attacks [--seconds 15] [--attacks idle,json] [--output FILE.jsonl]`.

Starts `smartfrz serve` on this machine, once for each attack, with room for 256 open files as on many systems (`ulimit -Sn
256`). Twelve honest clients, eight over REST and four over gRPC, ask again and again about eight layers; each attempt has 10
seconds and is not repeated. A thirteenth asks for health and for the metrics four times a second. Every decision is
compared with that of the file. The attackers live in a process of their own, and open anew whatever the server closes.

Prints, for each attack: honest answers, those lost or wrong, the longest that one took, the longest that health and metrics
took (30 s and no answer count as 30 s), and the server's memory.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import re
import resource
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.serving import HEADER, ask, message, questions, watch
from smartfrz import zoo
from smartfrz.comparing.lines import add_line

METHOD = "/inference.GRPCInferenceService/ModelInfer"
PATIENCE, PROBE_PATIENCE = 10.0, 30.0
LAYERS, MIB = 8, 2**20
POST = "POST /v2/models/{} HTTP/1.1\r\nHost: localhost\r\n"


def start(predictor):
    """The server's process, and the ports of REST and gRPC."""
    code = "from smartfrz.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", predictor, "--port", "0", "--grpc-port", "0", "--device", "cpu"]

    def few_files():
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, preexec_fn=few_files
    )
    ports = []
    for line in process.stdout:
        if found := re.search(r"^(?:REST and /metrics|gRPC): .*:(\d+)$", line):
            ports.append(int(found[1]))
        if len(ports) == 2:
            return process, *ports
    raise SystemExit("the server did not start")


# The honest ones.


def grpc_message(name, history, lengths):
    """A request over gRPC, serialized."""
    from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb

    arrays = {"history": ("FP32", history), "lengths": ("INT64", lengths)}
    tensor = pb.ModelInferRequest.InferInputTensor
    request = pb.ModelInferRequest(
        model_name=name,
        inputs=[tensor(name=n, datatype=d, shape=a.shape) for n, (d, a) in arrays.items()],
        outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="confidence")],
        raw_input_contents=[history.tobytes(), lengths.tobytes()],
    )
    return request.SerializeToString()


async def ask_grpc(stub, request):
    """The confidences."""
    from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb

    answer = pb.ModelInferResponse.FromString(await stub(request, timeout=PATIENCE))
    output = answer.outputs[0]
    if answer.raw_output_contents:
        return np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(output.shape)
    return np.array(output.contents.fp32_contents, np.float32).reshape(output.shape)


async def honest(attempt, expected, number, until, results):
    """One training that asks, and asks again after a moment."""
    turn = number
    while time.perf_counter() < until:
        begin, which = time.perf_counter(), turn % len(expected)
        try:
            confidence = await asyncio.wait_for(attempt(which), PATIENCE)
        except Exception as error:
            results.append((time.perf_counter() - begin, "lost", f"{type(error).__name__} {error}"[:120]))
        else:
            right = confidence.shape == expected[which].shape and np.allclose(confidence, expected[which], atol=1e-6)
            results.append((time.perf_counter() - begin, "right" if right else "wrong", ""))
        turn += 1
        await asyncio.sleep(0.2)


async def probe(port, path, until, times):
    """Asks for health or metrics, on a new connection each time."""

    async def once():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            return (await reader.read()).startswith(b"HTTP/1.1 200")
        finally:
            writer.close()

    while time.perf_counter() < until:
        begin, answered = time.perf_counter(), False
        with contextlib.suppress(TimeoutError, OSError):
            answered = await asyncio.wait_for(once(), PROBE_PATIENCE)
        times.append(time.perf_counter() - begin if answered else PROBE_PATIENCE)
        await asyncio.sleep(0.25)


# The attackers. Each attack is a list of coroutines that are started again when they end.


async def send_slowly(port, head, first=b"", piece=b"a", pause=1.0):
    """Sends a piece each second, and never ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + first)
        while not reader.at_eof():
            writer.write(piece)
            await writer.drain()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(1000), pause)
    finally:
        writer.close()


async def send_again_and_again(port, content, size=2**18):
    """Sends a large request, reads the answer, and starts again."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for begin in range(0, len(content), size):
            writer.write(content[begin : begin + size])
            await writer.drain()
        await reader.read()
    finally:
        writer.close()


async def stay_silent(port):
    """Opens a connection and says nothing."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        await reader.read()
    finally:
        writer.close()


def _channel(port):
    import grpc

    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options)


async def call_silently(port, calls=8):
    """Calls several times on one connection without sending a message."""
    async with _channel(port) as channel:
        stub = channel.stream_unary(METHOD)

        async def never():
            await asyncio.sleep(3600)
            yield b""

        async def call():
            while True:
                with contextlib.suppress(Exception):
                    await stub(never())
                await asyncio.sleep(0.05)

        await asyncio.gather(*(call() for _ in range(calls)))


async def call_with_lists(port, content):
    """Sends a large message over gRPC whose tensors are lists of numbers."""
    async with _channel(port) as channel:
        await channel.unary_unary(METHOD)(content)


def json_request(name, size):
    """A request in JSON of about `size` bytes that claims what it holds."""
    number = "0.12345678901234567,"
    count = size // len(number) // 1024 * 1024
    tensors = '{{"inputs":[{{"name":"history","datatype":"FP32","shape":[{},1,1024],"data":[{}]}},'
    body = tensors.format(count // 1024, (number * count)[:-1])
    body += '{"name":"lengths","datatype":"INT64","shape":[1],"data":[1]}]}'
    head = POST.format(f"{name}/infer") + f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return (head + body).encode()


def grpc_lists(name, size):
    """A request over gRPC of about `size` bytes whose numbers are in a list of one-byte integers."""
    from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb

    tensor = pb.ModelInferRequest.InferInputTensor
    history = tensor(name="history", datatype="FP32", shape=[1, 1, 1024])
    history.contents.int64_contents.extend([1] * size)
    return pb.ModelInferRequest(model_name=name, inputs=[history]).SerializeToString()


def attackers(attack, name, port, grpc_port):
    """The functions that each return one attacker's coroutine."""
    # As binary data, since large JSON is refused at once.
    infer = POST.format(f"{name}/infer") + f"{HEADER}: 2\r\n"
    announced = f"{infer}Content-Length: {32 * MIB}\r\n\r\n"
    chunked = f"{infer}Transfer-Encoding: chunked\r\n\r\n"
    if attack == "8 slow bodies":
        return [lambda: send_slowly(port, announced)] * 8
    if attack == "8 slow chunked bodies":
        return [lambda: send_slowly(port, chunked, piece=b"1\r\na\r\n")] * 8
    if attack == "8 bodies that stop at 30 MB":
        return [lambda: send_slowly(port, announced, b"a" * 30 * 10**6)] * 8
    if attack == "200 slow bodies":
        return [lambda: send_slowly(port, announced)] * 200
    if attack == "200 slow headers":
        return [lambda: send_slowly(port, infer, piece=b"X-A: b\r\n")] * 200
    if attack == "64 silent gRPC calls":
        return [lambda: call_silently(grpc_port)] * 8
    if attack == "400 idle sockets":
        return [lambda: stay_silent(port)] * 400
    if attack == "400 idle sockets to gRPC":
        return [lambda: stay_silent(grpc_port)] * 400
    if attack == "4 JSON bodies of 31 MB":
        content = json_request(name, 31 * 10**6)
        return [lambda: send_again_and_again(port, content)] * 4
    if attack == "4 gRPC messages of 31 MB in lists":
        content = grpc_lists(name, 31 * 10**6)
        return [lambda: call_with_lists(grpc_port, content)] * 4
    return []


ATTACKS = [
    "none",
    "8 slow bodies",
    "8 slow chunked bodies",
    "8 bodies that stop at 30 MB",
    "200 slow bodies",
    "200 slow headers",
    "64 silent gRPC calls",
    "400 idle sockets",
    "400 idle sockets to gRPC",
    "4 JSON bodies of 31 MB",
    "4 gRPC messages of 31 MB in lists",
]


def attack_until_killed(attack, name, port, grpc_port):
    """The attackers' process."""

    async def again(one):
        while True:
            with contextlib.suppress(Exception):
                await one()
            await asyncio.sleep(0.1)

    async def everyone():
        await asyncio.gather(*(again(one) for one in attackers(attack, name, port, grpc_port)))

    asyncio.run(everyone())


async def measure(process, port, grpc_port, predictor, asked, attack, seconds):
    """One attack's line of results."""
    name = predictor.info.name
    expected = [predictor.predict(*question).confidence for question in asked]
    rest = [message(name, *question) for question in asked]
    messages = [grpc_message(name, *question) for question in asked]
    results, health, memory = [], [], []

    async def over_rest(which):
        status, confidence = await ask(port, rest[which])
        if status != 200:
            raise RuntimeError(f"status {status}")
        return confidence

    async with contextlib.AsyncExitStack() as stack:
        stubs = [(await stack.enter_async_context(_channel(grpc_port))).unary_unary(METHOD) for _ in range(4)]
        for stub in stubs:  # trainings have been connected for a while
            await ask_grpc(stub, messages[0])
        watching = asyncio.create_task(watch(process.pid, memory))
        attacking = multiprocessing.get_context("spawn").Process(
            target=attack_until_killed, args=(attack, name, port, grpc_port), daemon=True
        )
        if attack != "none":
            attacking.start()
            await asyncio.sleep(4)
        until = time.perf_counter() + seconds
        clients = [over_rest] * 8
        clients += [lambda which, stub=stub: ask_grpc(stub, messages[which]) for stub in stubs]
        await asyncio.gather(
            *(honest(attempt, expected, number, until, results) for number, attempt in enumerate(clients)),
            *(probe(port, path, until, health) for path in ("/v2/health/live", "/metrics")),
        )
        watching.cancel()
        if attack != "none":
            attacking.kill()
            attacking.join()
    right = [taken for taken, what, _ in results if what == "right"]
    return {
        "attack": attack,
        "answered": len(right),
        "lost": sum(what == "lost" for _, what, _ in results),
        "wrong": sum(what == "wrong" for _, what, _ in results),
        "median_s": round(statistics.median(right), 2) if right else None,
        "longest_s": round(max(right), 2) if right else None,
        "health_longest_s": round(max(health), 2),
        "rss_mib": memory[0],
        "rss_mib_highest": max(memory),
        "losses": sorted({why for _, what, why in results if what == "lost"})[:3],
        "server_ended": process.poll() is not None,
        "seconds": seconds,
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
    }


def main():
    """Attack and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--predictor", default=zoo.DEFAULT)
    parser.add_argument(
        "--attacks", default=",".join(ATTACKS), help="several with commas; a part of the name is enough"
    )
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    predictor = zoo.load(arguments.predictor, device="cpu")
    asked = list(questions(predictor.info, LAYERS, 8))
    chosen = [attack for attack in ATTACKS if any(part in attack for part in arguments.attacks.split(","))]
    columns = ("attack", "answered", "lost", "wrong", "longest_s", "health_longest_s", "rss_mib", "rss_mib_highest")
    for attack in chosen:
        process, port, grpc_port = start(arguments.predictor)
        try:
            line = asyncio.run(measure(process, port, grpc_port, predictor, asked, attack, arguments.seconds))
        finally:
            process.kill()
            process.wait()
        if arguments.output:
            with contextlib.redirect_stdout(sys.stderr):
                add_line(arguments.output, line)
        print("| " + " | ".join(str(line[column]) for column in columns) + " |", json.dumps(line["losses"]), flush=True)


if __name__ == "__main__":
    socket.setdefaulttimeout(60)
    main()

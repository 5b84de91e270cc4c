"""Load on a server: `python -m benchmarks.serving [--jobs 200] [--rounds 3] [--output FILE.jsonl]`.

Starts `smartfrz serve` on this machine, and as many training jobs as asked for, all of which ask at once: about 54 layers
with 30 records of 1024 weights each (6.6 MB of binary data over REST), again as soon as they are answered, each so often
as `--rounds` says, for at most `--seconds`. Every answer is compared with that of the file. Prints decisions a second (one
is the answer for one job at one freezing stage), latencies as a job sees them, what was lost, the server's memory, second by
second, and the processor time that it took for a decision, which depends less on what else runs. The jobs take their
share of the processors, too; so does whatever else runs, which the load average tells.

`--without-server` times the same questions in this process instead, one after the other on one thread.
"""

import argparse
import asyncio
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.arguments import errors_as_messages, positive
from smartfrz import zoo
from smartfrz.comparing.lines import add_line

HEADER = "Inference-Header-Content-Length"
CHUNK = 2**18


def questions(info, layers, number):
    """Histories of random walks, and their lengths."""
    rng = np.random.default_rng(0)
    for _ in range(number):
        start = rng.normal(size=(layers, 1, info.tailored_size)) * 0.05
        steps = rng.normal(size=(layers, info.window, info.tailored_size)) * 1e-3
        yield (start + steps.cumsum(axis=1)).astype(np.float32), np.full(layers, info.window)


def message(name, history, lengths):
    """The whole HTTP request."""
    arrays = {"history": ("FP32", history), "lengths": ("INT64", lengths)}
    header = {
        "inputs": [
            {"name": n, "datatype": d, "shape": list(a.shape), "parameters": {"binary_data_size": a.nbytes}}
            for n, (d, a) in arrays.items()
        ],
        "outputs": [{"name": "confidence"}],
    }
    text = json.dumps(header).encode()
    body = text + history.tobytes() + lengths.tobytes()
    head = (
        f"POST /v2/models/{name}/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        f"{HEADER}: {len(text)}\r\nContent-Type: application/octet-stream\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


async def ask(port, request):
    """Status, and the confidences."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        view = memoryview(request)
        for start in range(0, len(view), CHUNK):
            writer.write(view[start : start + CHUNK])
            await writer.drain()
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    status = int(head.split()[1])
    if status != 200:
        return status, None
    output = json.loads(body)["outputs"][0]
    return status, np.array(output["data"], np.float32).reshape(output["shape"])


async def job(port, number, requests, expected, rounds, until, results):
    """One training: asks, waits for the answer, asks again."""
    for turn in range(rounds):
        if time.perf_counter() > until:
            return
        which = (number + turn) % len(requests)
        begin = time.perf_counter()
        try:
            status, confidence = await ask(port, requests[which])
        except (OSError, IndexError, ValueError) as error:
            status, confidence = repr(error), None
        right = confidence is not None and bool(np.allclose(confidence, expected[which], atol=1e-6))
        results.append((time.perf_counter() - begin, status, right))


async def watch(pid, memory):
    """The server's memory in MiB, each second."""
    while True:
        text = Path(f"/proc/{pid}/status").read_text()
        memory.append(round(int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024))
        await asyncio.sleep(1)


def processor_seconds(pid):
    """What a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def load(port, pid, requests, expected, arguments):
    """All jobs at once."""
    results, memory = [], []
    watching = asyncio.create_task(watch(pid, memory))
    begin = time.perf_counter()
    until = begin + arguments.seconds
    await asyncio.gather(
        *(job(port, n, requests, expected, arguments.rounds, until, results) for n in range(arguments.jobs))
    )
    seconds = time.perf_counter() - begin
    watching.cancel()
    return results, memory, seconds


def start(arguments):
    """The server's process and port."""
    code = "from smartfrz.cli import main; main()"
    options = ["--port", "0", "--grpc-port", "0", "--device", "cpu", "--threads", str(arguments.threads)]
    command = [sys.executable, "-c", code, "serve", arguments.predictor, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if found := re.search(r"^REST and /metrics: .*:(\d+)$", line):
            process.stdout.readline()
            return process, int(found[1])
    raise SystemExit("the server did not start")


def batches(port):
    """Mean requests and layers in a run, as the server's metrics tell."""
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    sums = {
        (what, kind): sum(map(float, re.findall(rf"^smartfrz_batch_{what}_{kind}{{.*}} (\S+)$", text, re.MULTILINE)))
        for what, kind in itertools.product(("requests", "layers"), ("sum", "count"))
    }
    return {what: sums[what, "sum"] / max(1, sums[what, "count"]) for what in ("requests", "layers")}


def without_server(predictor, asked, rounds):
    """Milliseconds of processor time for each question in this process."""
    times = []
    for history, lengths in itertools.chain.from_iterable([asked] * rounds):
        begin = time.process_time()
        predictor.predict(history, lengths)
        times.append(1e3 * (time.process_time() - begin))
    return times


@errors_as_messages()
def main(given=None):
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--predictor", default=zoo.DEFAULT)
    parser.add_argument("--jobs", type=positive, default=200)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--layers", type=positive, default=54)
    parser.add_argument("--seconds", type=float, default=120, help="after which no job asks again")
    parser.add_argument("--threads", type=positive, default=os.cpu_count())
    parser.add_argument("--output", type=Path)
    parser.add_argument("--without-server", action="store_true")
    arguments = parser.parse_args(given)
    predictor = zoo.load(arguments.predictor, device="cpu")
    asked = list(questions(predictor.info, arguments.layers, 8))
    line = {"layers": arguments.layers, "window": predictor.info.window, "tailored_size": predictor.info.tailored_size}
    if arguments.without_server:
        times = without_server(predictor, asked, arguments.rounds)
        line |= {"what": "without server", "decisions": len(times)}
        line |= {"processor_ms_per_decision": round(statistics.median(times), 1), "minimum": round(min(times), 1)}
        add_line(arguments.output, line | {"load_average": round(os.getloadavg()[0], 1)})
        return
    expected = [predictor.predict(*question).confidence for question in asked]
    requests = [message(predictor.info.name, *question) for question in asked]
    process, port = start(arguments)
    try:
        before = processor_seconds(process.pid)
        results, memory, seconds = asyncio.run(load(port, process.pid, requests, expected, arguments))
        used = processor_seconds(process.pid) - before
        together = batches(port)
    finally:
        process.terminate()
        process.wait()
    times = [1e3 * taken for taken, _, right in results if right]
    lost = [status for _, status, right in results if not right]
    if not times:
        sys.exit(f"No job had a right answer within {arguments.seconds:g} seconds; lost: {lost[:5]}")
    p50, p99 = np.percentile(times, [50, 99])
    third = len(memory) // 3
    line |= {
        "what": "load",
        "jobs": arguments.jobs,
        "threads": arguments.threads,
        "decisions": len(times),
        "lost": len(lost),
        "seconds": round(seconds, 1),
        "decisions_per_second": round(len(times) / seconds, 2),
        "processor_ms_per_decision": round(1e3 * used / max(1, len(times)), 1),
        "layers_per_second": round(len(times) * arguments.layers / seconds),
        "p50_ms": round(float(p50)),
        "p99_ms": round(float(p99)),
        "requests_per_run": round(together["requests"], 2),
        "layers_per_run": round(together["layers"], 1),
        "rss_mib": memory[:: max(1, len(memory) // 20)],
        "rss_mib_highest_in_thirds": [max(memory[i * third : (i + 1) * third], default=0) for i in range(3)],
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
    }
    add_line(arguments.output, line)
    if lost:
        raise SystemExit(f"lost: {lost[:5]}")


if __name__ == "__main__":
    main()

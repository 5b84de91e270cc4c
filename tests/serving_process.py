"""`smartfrz serve` as a real process, and requests to it over plain HTTP."""

import http.client
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np

_COMMAND = "from smartfrz.cli import main; main(prog_name='smartfrz')"


def command(*arguments):
    """The command line of `smartfrz serve`."""
    return [sys.executable, "-c", _COMMAND, "serve", *map(str, arguments)]


class ServingProcess:
    """A server on the CPU that listens on free ports and is ready for requests.

    Attributes:
        port: Port of REST.
        grpc_port: Port of gRPC.
        pid: Id of the process.
    """

    def __init__(self, log, *arguments, port=0):
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command("--port", port, "--grpc-port", 0, "--device", "cpu", *arguments),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.pid = self.process.pid
        until = time.monotonic() + 120
        while not (found := re.search(r"^gRPC: .*:(\d+)$", log.read_text(), re.MULTILINE)):
            if self.process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        self.grpc_port = int(found[1])
        self.port = int(re.search(r"/metrics: http://127.0.0.1:(\d+)$", log.read_text(), re.MULTILINE)[1])

    def url(self, name):
        return f"http://127.0.0.1:{self.port}/{name}"

    def request(self, method, path, body=None, headers=None, timeout=60):
        """Return status, headers and body of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def get(self, path):
        """Return the status and the answer's JSON."""
        status, _, body = self.request("GET", path)
        return status, json.loads(body)

    def ask(self, name, body, headers=None):
        """Send a request for decisions, objects as JSON, and return the status and the answer's JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, _, answer = self.request("POST", f"/v2/models/{name}/infer", content, headers)
        return status, json.loads(answer)

    def metrics(self):
        """Return the value of each sample by its text."""
        _, _, body = self.request("GET", "/metrics")
        lines = [line.rpartition(" ") for line in body.decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    def rss(self):
        """Return the memory in use in MiB."""
        with open(f"/proc/{self.pid}/status") as file:
            return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1]) / 1024

    def terminate(self, timeout=60):
        """Send SIGTERM, wait, and return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def kill(self):
        self.process.kill()
        self.process.wait()


def question(history, lengths, **more):
    """Return a request in JSON."""
    return {
        "inputs": [
            {"name": "history", "datatype": "FP32", "shape": list(history.shape), "data": history.ravel().tolist()},
            {"name": "lengths", "datatype": "INT64", "shape": list(lengths.shape), "data": lengths.tolist()},
        ],
        **more,
    }


def binary(history, lengths, **more):
    """Return a request with binary data, and its headers."""
    arrays = {"history": ("FP32", history), "lengths": ("INT64", lengths)}
    header = {
        "inputs": [
            {"name": n, "datatype": d, "shape": list(a.shape), "parameters": {"binary_data_size": a.nbytes}}
            for n, (d, a) in arrays.items()
        ],
        **more,
    }
    text = json.dumps(header).encode()
    headers = {"Inference-Header-Content-Length": str(len(text)), "Content-Type": "application/octet-stream"}
    return text + history.tobytes() + lengths.tobytes(), headers


def outputs(answer):
    """Return the arrays of an answer in JSON by name."""
    return {o["name"]: np.array(o["data"], np.float32).reshape(o["shape"]) for o in answer["outputs"]}


def histories(num_layers, window, size, seed=0):
    """Return a history of random walks, and lengths of which the first is the whole window."""
    rng = np.random.default_rng(seed)
    history = rng.normal(size=(num_layers, window, size)).cumsum(axis=1).astype(np.float32)
    lengths = rng.integers(1, window + 1, num_layers)
    lengths[0] = window
    return history, lengths

"""Sends garbage to every endpoint of a server: `python tests/fuzz_serving.py REST_PORT GRPC_PORT NAME NUMBER [SEED]`.

Random bytes, requests with random bytes changed, random JSON, wrong shapes, NaN, claims of sizes that nothing follows, on
random paths, with random methods and headers; over gRPC, messages that are no messages, on every method. Prints how many of
each status came back, as JSON. It is an error if a connection is not answered, or if the server answers that it failed.
"""

import collections
import http.client
import json
import random
import sys

import numpy as np
from serving_process import binary, histories, question

PATHS = ["/v2", "/v2/health/live", "/v2/health/ready", "/v2/models", "/v2/models/{}", "/v2/models/{}/ready", "/metrics"]
PATHS += [
    "/",
    "/openapi.json",
    "/v2/models/{}/versions/1/infer",
    "/v2/repository/models/{}/unload",
    "/v1/models/{}:predict",
]
METHODS = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]
RPCS = [
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelInfer",
    "RepositoryModelLoad",
]
RPCS += ["RepositoryModelUnload", "NoSuchMethod"]
HEADERS = [
    "Inference-Header-Content-Length",
    "Content-Type",
    "Content-Encoding",
    "Accept",
    "ce-contenttype",
    "ce-id",
    "X",
]
SCALARS = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    1e999,
    2**63,
    10**30,
    "",
    "history",
    "lengths",
    "FP32",
    "INT64",
    "x" * 3000,
    [],
    {},
]


def some_json(rng, depth=4):
    """Return any value."""
    if depth == 0 or rng.random() < 0.4:
        return rng.choice(SCALARS)
    if rng.random() < 0.5:
        return [some_json(rng, depth - 1) for _ in range(rng.randrange(5))]
    keys = ["inputs", "outputs", "parameters", "id", "name", "shape", "datatype", "data", "binary_data_size", "x"]
    return {rng.choice(keys): some_json(rng, depth - 1) for _ in range(rng.randrange(6))}


def places(value, found=()):
    """Return every place in a JSON value as its container and key."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = list(found)
    for key, inner in list(pairs)[:20]:
        found.append((value, key))
        found += places(inner)
    return found


def altered_json(rng):
    """Return a good request in which one to three values are replaced."""
    request = json.loads(
        json.dumps(question(*histories(rng.randint(1, 3), rng.randint(1, 4), 64, seed=rng.randrange(100))))
    )
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(places(request))
        container[key] = some_json(rng, 2)
    return json.dumps(request).encode()


def altered_binary(rng):
    """Return a good request with binary data in which bytes, the header, or the end are changed."""
    history, lengths = histories(rng.randint(1, 3), rng.randint(1, 4), 64, seed=rng.randrange(100))
    if rng.random() < 0.3:
        history[0, 0, rng.randrange(64)] = rng.choice([np.nan, np.inf, 1e38])
    body, headers = binary(history, lengths)
    body = bytearray(body)
    kind = rng.randrange(4)
    if kind == 0:
        for _ in range(rng.randint(1, 8)):
            body[rng.randrange(len(body))] = rng.randrange(256)
    elif kind == 1:
        del body[rng.randrange(len(body)) :]
    elif kind == 2:
        headers["Inference-Header-Content-Length"] = rng.choice(
            ["0", "-1", "x", "9" * 30, str(rng.randrange(9000)), ""]
        )
    else:
        end = int(headers["Inference-Header-Content-Length"])
        header = json.loads(body[:end])
        container, key = rng.choice(places(header))
        container[key] = some_json(rng, 2)
        text = json.dumps(header).encode()
        body[:end] = text
        headers["Inference-Header-Content-Length"] = str(len(text))
    return bytes(body), headers


def some_request(rng, name):
    """Return method, path, body and headers."""
    model = rng.choice([*[name] * 12, "none", "%00", "..%2f", "x" * 500, "%ff%fe"])
    if rng.random() < 0.75:
        method, path = "POST", f"/v2/models/{model}/infer"
    else:
        method, path = rng.choice(METHODS), rng.choice(PATHS).format(model)
    headers, body = {}, None
    kind = rng.randrange(5)
    if kind == 0:
        body = rng.randbytes(rng.choice([0, 1, 10, 1000, 50_000]))
    elif kind == 1:
        body = json.dumps(some_json(rng)).encode()
    elif kind == 2:
        body = altered_json(rng)
    elif kind == 3:
        body, headers = altered_binary(rng)
    elif rng.random() < 0.02:
        body = b"[" * (4 * 2**20)
    for _ in range(rng.randrange(2)):
        headers[rng.choice(HEADERS)] = rng.choice(["gzip", "0", "-7", "application/json", "x" * 2000, "\xff", "a, b"])
    return method, path, body, headers


def over_rest(rng, port, name, number):
    """Send requests over REST and return how many of each status came back."""
    counts = collections.Counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for _ in range(number):
        method, path, body, headers = some_request(rng, name)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        response.read()
        counts[response.status] += 1
        if response.status >= 500:
            raise SystemExit(f"{response.status}: {method} {path} {headers} {(body or b'')[:2000]!r}")
    connection.close()
    return counts


def over_grpc(rng, port, name, number):
    """Send raw bytes as messages over gRPC and return how many of each code came back."""
    import grpc

    counts = collections.Counter()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for _ in range(number):
            method = channel.unary_unary(f"/inference.GRPCInferenceService/{rng.choice(RPCS)}")
            message = rng.randbytes(rng.choice([0, 1, 5, 20, 500]))
            if rng.random() < 0.7:  # fields of a request: a name, raw contents, and bytes that may be tensors
                message = b"\x0a" + bytes([len(name)]) + name.encode() + rng.choice([b"\x2a", b"\x3a", b"\x22"])
                message += bytes([rng.randrange(40)]) + rng.randbytes(rng.randrange(60))
            try:
                method(message, timeout=60)
                counts["OK"] += 1
            except grpc.RpcError as error:
                counts[error.code().name] += 1
                if error.code().name not in EXPECTED_CODES:
                    raise SystemExit(f"{error.code()}: {error.details()}: {message!r}") from error
    return counts


EXPECTED_CODES = {"INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED"}


def main():
    port, grpc_port, name, number, *seed = sys.argv[1:]
    rng = random.Random(int(seed[0]) if seed else 0)
    rest = over_rest(rng, int(port), name, int(number) * 4 // 5)
    rpc = over_grpc(rng, int(grpc_port), name, int(number) - int(number) * 4 // 5)
    print(json.dumps({"rest": dict(sorted(rest.items())), "grpc": dict(sorted(rpc.items()))}))


if __name__ == "__main__":
    main()

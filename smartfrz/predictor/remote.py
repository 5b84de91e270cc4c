"""A predictor that runs on a server, queried over the Open Inference Protocol with the standard library alone.

It has a small retry loop of its own. urllib3's `Retry` does not pause before the first retry, draws its jitter from the
random state that training uses, and has no deadline for all attempts. urllib3's pool logs a warning for each failed attempt.
"""

import contextlib
import http.client
import json
import logging
import math
import random
import re
import socket
import ssl
import threading
import time
from concurrent.futures import Future
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
from numpy.typing import NDArray

from smartfrz.errors import PredictorFileError, ServerError
from smartfrz.predictor.contract import (
    ATTENTION,
    CONFIDENCE,
    HISTORY,
    LENGTHS,
    LOSS,
    POSITION,
    PREFIX,
    PredictorInfo,
    find_fault,
    find_invalid,
)
from smartfrz.predictor.runtime import Prediction

logger = logging.getLogger("smartfrz")
TIMEOUT = 10.0
RETRIES = 2
HEADER_LENGTH = "Inference-Header-Content-Length"
_LAYERS_PER_REQUEST = 64
_FIRST_PAUSE = 0.2
_MAX_ANSWER = 4 * 2**20
_RETRY_STATUSES = (408, 429, 500, 502, 503, 504)


class _AttemptFailed(Exception):
    """An attempt failed in a way that may not happen again."""


class RemotePredictor:
    """A client of `smartfrz serve`, or of another server that speaks the protocol.

    It reads the facts about the predictor from the server's metadata when it is created. Each freezing stage opens a new
    connection, and asks about no more layers at once than the server accepts.

    Args:
        url: `http://host:port/NAME`. The path may have a prefix, as in `https://host/predictors/NAME`, or be the
            protocol's own `/v2/models/NAME`.
        timeout: Seconds that a freezing stage waits for the answer, all attempts and the whole of each answer included.
        retries: Number of further attempts after a failure that may be temporary, with growing pauses between them.
            While the server is known to be down there are none: each stage costs one attempt.

    Attributes:
        url: The given address without `/v2/models`.
        info: Facts about the predictor.
        sha256: SHA-256 of the predictor's file on the server.
        positional: True if the predictor reads the positions of layers and the server accepts them.
        reads_loss: True if the predictor reads the training loss and the server accepts it.

    Raises:
        ServerError: If the server cannot be reached, or has no predictor of that name.
    """

    def __init__(self, url: str, *, timeout: float = TIMEOUT, retries: int = RETRIES):
        if not timeout > 0 or not math.isfinite(timeout):
            raise ValueError(f"`timeout` is {timeout!r}; expected a positive number of seconds.")
        if retries < 0:
            raise ValueError(f"`retries` is {retries!r}; expected 0 or more.")
        parts = urlsplit(url)
        prefix, _, name = parts.path.rstrip("/").rpartition("/")
        if parts.scheme not in ("http", "https") or not parts.hostname or not name:
            raise ServerError(f"{url!r} is not the address of a predictor on a server; expected http://host:port/NAME.")
        prefix = prefix.removesuffix("/v2/models")
        self.url = f"{parts.scheme}://{parts.netloc}{prefix}/{name}"
        self._secure = parts.scheme == "https"
        self._address = (parts.hostname, parts.port)
        self._path = f"{prefix}/v2/models/{quote(name, safe='%')}"
        self._timeout = timeout
        self._retries = retries
        self._down = False
        self._random = random.Random()  # training draws from the global one
        self._read_metadata(self._parse_object(self._ask("GET", self._path)[0]))

    def _read_metadata(self, described: dict[str, Any]) -> None:
        """Check and keep what the server says about its predictor."""
        properties = described.get("properties")
        if not isinstance(properties, dict) or not all(isinstance(value, str) for value in properties.values()):
            raise ServerError(
                f"{self.url} is a model, but its metadata have no 'properties' of a SmartFRZ predictor. Serve it with "
                "smartfrz serve."
            )
        try:
            self.info = PredictorInfo.from_metadata(properties, self.url)
            self.sha256 = properties[PREFIX + "sha256"]
            max_layers = int(properties.get(PREFIX + "max_layers", _LAYERS_PER_REQUEST))
        except (PredictorFileError, KeyError, ValueError) as error:
            raise ServerError(f"{self.url} does not describe a predictor that this version can use: {error}") from error
        if not re.fullmatch("(?!0{64})[0-9a-f]{64}", self.sha256) or max_layers < 1:
            raise ServerError(
                f"{self.url} reports the checksum {self.sha256[:80]!r} and max_layers {max_layers}; expected 64 hexadecimal "
                "digits, not all zero, and a positive number. Update the server."
            )
        inputs = described.get("inputs")
        names = [given.get("name") for given in inputs if isinstance(given, dict)] if isinstance(inputs, list) else []
        self.positional = POSITION in names
        self.reads_loss = LOSS in names
        self._layers_per_request = min(max_layers, _LAYERS_PER_REQUEST)

    def predict(
        self,
        history: NDArray[np.float32],
        lengths: NDArray[np.int64],
        position: NDArray[np.float32] | None = None,
        loss: NDArray[np.float32] | None = None,
    ) -> Prediction:
        """Return the server's answer to the question that `Predictor.predict` answers.

        A loss is not sent unless `reads_loss`: a server that does not list that input refuses it.

        Raises:
            ServerError: If there is no usable answer in time. The first of several failures in a row is also logged.
        """
        until = time.monotonic() + self._timeout
        answers = []
        try:
            for start in range(0, len(history), self._layers_per_request):
                part = slice(start, start + self._layers_per_request)
                positions = None if position is None else position[part]
                losses = None if loss is None or not self.reads_loss else loss[part]
                answers.append(self._predict(history[part], lengths[part], positions, losses, until))
        except ServerError as error:
            if not self._down:
                logger.warning(
                    "%s Training goes on, and nothing freezes until the server answers: it is asked again at each "
                    "freezing stage.",
                    error,
                )
            self._down = True
            raise
        if self._down:
            logger.info("%s answers again.", self.url)
            self._down = False
        return Prediction(*(np.concatenate(arrays) for arrays in zip(*answers, strict=True)))

    def _predict(
        self,
        history: NDArray[np.float32],
        lengths: NDArray[np.int64],
        position: NDArray[np.float32] | None,
        loss: NDArray[np.float32] | None,
        until: float,
    ) -> Prediction:
        tensors: dict[str, tuple[str, NDArray[Any]]] = {
            HISTORY: ("FP32", history.astype("<f4")),
            LENGTHS: ("INT64", lengths.astype("<i8")),
        }
        if position is not None:
            tensors[POSITION] = ("FP32", position.astype("<f4"))
        if loss is not None:
            tensors[LOSS] = ("FP32", loss.astype("<f4"))
        header = {
            "inputs": [
                {
                    "name": name,
                    "datatype": datatype,
                    "shape": list(array.shape),
                    "parameters": {"binary_data_size": array.nbytes},
                }
                for name, (datatype, array) in tensors.items()
            ],
            "outputs": [{"name": name, "parameters": {"binary_data": True}} for name in (CONFIDENCE, ATTENTION)],
        }
        text = json.dumps(header).encode()
        body = text + b"".join(array.tobytes() for _, array in tensors.values())
        headers = {HEADER_LENGTH: str(len(text)), "Content-Type": "application/octet-stream"}
        answer, length = self._ask("POST", f"{self._path}/infer", body, headers, until)
        return self._read_prediction(answer, length, history.shape[:2])

    def _read_prediction(self, body: bytes, length: str | None, shape: tuple[int, ...]) -> Prediction:
        """Read the arrays in an answer and check them."""
        # Python refuses to convert thousands of digits.
        end = int(length) if length and re.fullmatch("[0-9]{1,18}", length) else len(body)
        answer = self._parse_object(body[:end])
        parameters, outputs = answer.get("parameters"), answer.get("outputs")
        sha256 = parameters.get(PREFIX + "sha256") if isinstance(parameters, dict) else None
        if sha256 not in (None, self.sha256):
            raise ServerError(
                f"{self.url} answers with another predictor than when this run began. Restart the run, or serve the old one."
            )
        arrays, start = {}, end
        for output in outputs if isinstance(outputs, list) else ():
            try:
                size = output.get("parameters", {}).get("binary_data_size")
                if size is None:
                    with np.errstate(all="ignore"):  # what float32 cannot hold is infinite, and refused below
                        array = np.array(output["data"], np.float32)
                else:
                    array = np.frombuffer(body[start : start + size], "<f4")
                    start += size
                arrays[output["name"]] = array.reshape(output["shape"]).astype(np.float32)
            except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
                raise ServerError(f"{self.url} answers with a tensor that cannot be read ({error!r}).") from error
        if fault := find_fault(arrays, *shape):
            raise ServerError(f"{self.url} {fault}.")
        if find_invalid(arrays[CONFIDENCE], arrays[ATTENTION]).any():
            raise ServerError(
                f"{self.url} answers with numbers that are no confidences; expected rows that sum to 1, "
                "with values from 0 to 1."
            )
        return Prediction(arrays[CONFIDENCE], arrays[ATTENTION])

    def _parse_object(self, text: bytes) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ServerError(
                f"{self.url} does not answer with JSON ({error}). Check that a predictor is served there."
            ) from error
        if not isinstance(value, dict):
            raise ServerError(f"{self.url} answers with {type(value).__name__}; expected an object.")
        return value

    def _ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        until: float | None = None,
    ) -> tuple[bytes, str | None]:
        """Return the body of the answer and the header that gives the length of its JSON, if there is one."""
        until = time.monotonic() + self._timeout if until is None else until
        attempt = 0
        while True:
            try:
                return self._attempt(method, path, body, headers or {}, until)
            except _AttemptFailed as error:
                # Random, so that jobs that were turned away together do not come back together.
                pause = _FIRST_PAUSE * 2**attempt * self._random.uniform(0.5, 1.5)
                attempt += 1
                if self._down or attempt > self._retries or time.monotonic() + pause >= until:
                    raise ServerError(f"{self.url} does not answer ({error}).") from error
                time.sleep(pause)

    def _attempt(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str], until: float
    ) -> tuple[bytes, str | None]:
        late = f"not within {self._timeout:g} s"
        left = until - time.monotonic()
        if left <= 0:
            raise _AttemptFailed(late)
        connection = self._open(left)
        answer: Future[tuple[int, str | None, bytes]] = Future()

        def exchange() -> None:
            try:
                connection.request(method, path, body, headers)
                with connection.getresponse() as response:
                    content = self._read_content(response, until)
                answer.set_result((response.status, response.headers.get(HEADER_LENGTH), content))
            except BaseException as error:  # raised again by answer.result()
                answer.set_exception(error)
            finally:
                connection.close()

        # In a thread, since a socket's timeout starts again with each byte, so that a server could drip headers for ever.
        threading.Thread(target=exchange, name="smartfrz-remote", daemon=True).start()
        try:
            status, length, content = answer.result(left)
        except (OSError, http.client.HTTPException) as error:  # TimeoutError is an OSError
            _hang_up(connection)
            raise _AttemptFailed(f"{type(error).__name__}: {error}" if str(error) else late) from error
        if status == 200:
            return content, length
        message = content[:300].decode(errors="replace")
        if status in _RETRY_STATUSES:
            raise _AttemptFailed(f"status {status}: {message}")
        raise ServerError(f"{self.url} refuses, with status {status}: {message}")

    def _open(self, timeout: float) -> http.client.HTTPConnection:
        host, port = self._address
        if self._secure:
            return http.client.HTTPSConnection(host, port, timeout=timeout, context=ssl.create_default_context())
        return http.client.HTTPConnection(host, port, timeout=timeout)

    def _read_content(self, response: http.client.HTTPResponse, until: float) -> bytes:
        content = bytearray()
        while piece := response.read1(65536):
            content += piece
            if len(content) > _MAX_ANSWER:
                raise ServerError(f"{self.url} answers with more than {_MAX_ANSWER >> 20} MiB; expected a few KiB.")
            if time.monotonic() > until:
                raise TimeoutError
        if response.length:  # bytes that were announced and did not come
            raise http.client.IncompleteRead(bytes(content), response.length)
        return bytes(content)

    def __repr__(self) -> str:
        return f"RemotePredictor({self.url!r}, {self.info.name!r}, threshold={self.info.threshold:.3g})"


def _hang_up(connection: http.client.HTTPConnection) -> None:
    """Wake the thread that still reads from the connection; it closes it."""
    with contextlib.suppress(OSError, AttributeError):  # there is no socket before it connects and after it has ended
        connection.sock.shutdown(socket.SHUT_RDWR)

"""A predictor on a server: asked over the Open Inference Protocol, with the standard library alone."""

import http.client
import json
import logging
import math
import random
import re
import ssl
import time
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
from numpy.typing import NDArray

from smartfrz.errors import PredictorFileError, ServerError
from smartfrz.predictor.contract import ATTENTION, CONFIDENCE, HISTORY, LENGTHS, POSITION, PREFIX, PredictorInfo
from smartfrz.predictor.runtime import Prediction

logger = logging.getLogger("smartfrz")
TIMEOUT = 10.0
RETRIES = 2
HEADER_LENGTH = "Inference-Header-Content-Length"
_LAYERS_PER_REQUEST = 64  # of a server that does not say how many it takes
_FIRST_PAUSE = 0.2
_MAX_ANSWER = 4 * 2**20
_AGAIN = (408, 429, 500, 502, 503, 504)  # answers after which another attempt may help


class _NotNow(Exception):
    """An attempt failed, and another one may not."""


class RemotePredictor:
    """Asks a server that `smartfrz serve` or another server of the protocol runs.

    It knows of the predictor what the server's metadata say when it is made. The server is asked at
    each freezing stage, over a new connection, about at most so many layers at once as it takes.

    Args:
        url: `http://host:port/NAME`; a prefix of the path, as in `https://host/predictors/NAME`, and
            the protocol's own `/v2/models/NAME` will do as well.
        timeout: Seconds that a freezing stage waits at most for the answer, all attempts together.
        retries: Further attempts where one fails that may succeed later, with growing pauses. While
            the server is known to be away, there are none: a stage costs one attempt.

    Attributes:
        url: As given, without `/v2/models`.
        info: Facts of the predictor.
        sha256: Which predictor it is.
        positional: Whether the server passes on where in the network a layer stands, and the predictor reads it.

    Raises:
        ServerError: If the server cannot be reached, or does not have a predictor of that name.
    """

    def __init__(self, url: str, *, timeout: float = TIMEOUT, retries: int = RETRIES):
        if not timeout > 0 or not math.isfinite(timeout):
            raise ValueError(f"`timeout` is {timeout!r}; expected a positive number of seconds.")
        if retries < 0:
            raise ValueError(f"`retries` is {retries!r}; expected 0 or more.")
        parts = urlsplit(url)
        prefix, _, name = parts.path.rstrip("/").rpartition("/")
        if parts.scheme not in ("http", "https") or not parts.hostname or not name:
            raise ServerError(f"{url!r} is no address of a predictor on a server; expected http://host:port/NAME.")
        prefix = prefix.removesuffix("/v2/models")
        self.url = f"{parts.scheme}://{parts.netloc}{prefix}/{name}"
        self._secure = parts.scheme == "https"
        self._address = (parts.hostname, parts.port)
        self._path = f"{prefix}/v2/models/{quote(name, safe='%')}"
        self._timeout = timeout
        self._retries = retries
        self._away = False
        self._random = random.Random()  # not the one that training draws from
        self._learn(self._object(self._ask("GET", self._path)[0]))

    def _learn(self, described: dict[str, Any]) -> None:
        """Take over what the server says of its predictor."""
        properties = described.get("properties")
        if not isinstance(properties, dict) or not all(isinstance(value, str) for value in properties.values()):
            raise ServerError(
                f"{self.url} is a model, but its metadata have no 'properties' of a SmartFRZ predictor. Serve it with "
                "smartfrz serve."
            )
        try:
            self.info = PredictorInfo.from_metadata(properties, self.url)
            self.sha256 = properties[PREFIX + "sha256"]
            most = int(properties.get(PREFIX + "max_layers", _LAYERS_PER_REQUEST))
        except (PredictorFileError, KeyError, ValueError) as error:
            raise ServerError(f"{self.url} does not describe a predictor that is read here: {error}") from error
        if not re.fullmatch("(?!0{64})[0-9a-f]{64}", self.sha256) or most < 1:
            raise ServerError(f"{self.url} has a checksum or a number of layers that cannot be. Update the server.")
        inputs = described.get("inputs")
        names = [given.get("name") for given in inputs if isinstance(given, dict)] if isinstance(inputs, list) else []
        self.positional = POSITION in names
        self._layers_per_request = min(most, _LAYERS_PER_REQUEST)

    def predict(
        self, history: NDArray[np.float32], lengths: NDArray[np.int64], position: NDArray[np.float32] | None = None
    ) -> Prediction:
        """As `Predictor.predict`, from the server.

        Raises:
            ServerError: If there is no answer in time, or none that can be used. The first time in a row
                it is logged as well.
        """
        until = time.monotonic() + self._timeout
        answers = []
        try:
            for start in range(0, len(history), self._layers_per_request):
                part = slice(start, start + self._layers_per_request)
                place = None if position is None else position[part]
                answers.append(self._predict(history[part], lengths[part], place, until))
        except ServerError as error:
            if not self._away:
                logger.warning(
                    "%s Training goes on, and nothing freezes until there is an answer: the server is asked again at "
                    "each freezing stage.",
                    error,
                )
            self._away = True
            raise
        if self._away:
            logger.info("%s answers again.", self.url)
            self._away = False
        return Prediction(*(np.concatenate(arrays) for arrays in zip(*answers, strict=True)))

    def _predict(
        self,
        history: NDArray[np.float32],
        lengths: NDArray[np.int64],
        position: NDArray[np.float32] | None,
        until: float,
    ) -> Prediction:
        tensors: dict[str, tuple[str, NDArray[Any]]] = {
            HISTORY: ("FP32", history.astype("<f4")),
            LENGTHS: ("INT64", lengths.astype("<i8")),
        }
        if position is not None:
            tensors[POSITION] = ("FP32", position.astype("<f4"))
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
        return self._prediction(answer, length, history.shape[:2])

    def _prediction(self, body: bytes, length: str | None, shape: tuple[int, ...]) -> Prediction:
        """The arrays in an answer."""
        end = int(length) if length and length.isdecimal() else len(body)
        answer = self._object(body[:end])
        parameters, outputs = answer.get("parameters"), answer.get("outputs")
        sha256 = parameters.get(PREFIX + "sha256") if isinstance(parameters, dict) else None
        if sha256 not in (None, self.sha256):
            raise ServerError(
                f"{self.url} answers with another predictor than when this run began. Start the run anew."
            )
        arrays, start = {}, end
        for output in outputs if isinstance(outputs, list) else ():
            try:
                size = output.get("parameters", {}).get("binary_data_size")
                if size is None:
                    array = np.array(output["data"], np.float32)
                else:
                    array = np.frombuffer(body[start : start + size], "<f4")
                    start += size
                arrays[output["name"]] = array.reshape(output["shape"]).astype(np.float32)
            except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
                raise ServerError(f"{self.url} answers with a tensor that cannot be read ({error!r}).") from error
        expected = {CONFIDENCE: (shape[0], 2), ATTENTION: tuple(shape)}
        received = {name: array.shape for name, array in arrays.items()}
        if received != expected or not all(((array >= 0) & (array <= 1.0001)).all() for array in arrays.values()):
            raise ServerError(
                f"{self.url} answers with {str(received)[:200]}; expected {expected}, with values from 0 to 1."
            )
        return Prediction(arrays[CONFIDENCE], arrays[ATTENTION])

    def _object(self, text: bytes) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ServerError(
                f"{self.url} does not answer with JSON ({error}); is it a server of predictors?"
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
        """The body of the answer, and how much of it is JSON, if the rest is not."""
        until = time.monotonic() + self._timeout if until is None else until
        attempt = 0
        while True:
            try:
                return self._attempt(method, path, body, headers or {}, until)
            except _NotNow as error:
                # Jobs that were turned away together shall not come back together.
                pause = _FIRST_PAUSE * 2**attempt * self._random.uniform(0.5, 1.5)
                attempt += 1
                if self._away or attempt > self._retries or time.monotonic() + pause >= until:
                    raise ServerError(f"{self.url} does not answer ({error}).") from error
                time.sleep(pause)

    def _attempt(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str], until: float
    ) -> tuple[bytes, str | None]:
        host, port = self._address
        left = until - time.monotonic()
        if left <= 0:
            raise _NotNow(f"not within {self._timeout:g} s")
        connection: http.client.HTTPConnection
        if self._secure:
            connection = http.client.HTTPSConnection(host, port, timeout=left, context=ssl.create_default_context())
        else:
            connection = http.client.HTTPConnection(host, port, timeout=left)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            content = self._content(response, until)
        except (OSError, http.client.HTTPException) as error:
            raise _NotNow(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()
        if response.status == 200:
            return content, response.headers.get(HEADER_LENGTH)
        said = content[:300].decode(errors="replace")
        if response.status in _AGAIN:
            raise _NotNow(f"status {response.status}: {said}")
        raise ServerError(f"{self.url} refuses, with status {response.status}: {said}")

    def _content(self, response: http.client.HTTPResponse, until: float) -> bytes:
        content = bytearray()
        while piece := response.read1(65536):
            content += piece
            if len(content) > _MAX_ANSWER:
                raise ServerError(f"{self.url} answers with more than {_MAX_ANSWER >> 20} MiB; expected a few KiB.")
            if time.monotonic() > until:
                raise _NotNow(f"not within {self._timeout:g} s")
        if response.length:  # it said that there would be more
            raise _NotNow("the answer breaks off")
        return bytes(content)

    def __repr__(self) -> str:
        return f"RemotePredictor({self.url!r}, {self.info.name!r}, threshold={self.info.threshold:.3g})"

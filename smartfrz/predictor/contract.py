"""The predictor file: names, shapes and metadata of the ONNX graph.

    in   history     float32 [layers, window, tailored_size]   oldest first, the last row is now
    in   lengths     int64   [layers]                          how many of the last rows are real
    in   position    float32 [layers]                          optional, and only if `POSITIONAL`: where in the network
                                                               the layer is; see `check_position`
    in   loss        float32 [layers, window]                  optional, and only if `READS_LOSS`: mean training loss
                                                               since the record before; see `check_loss`
    out  confidence  float32 [layers, 2]                       keep training, freeze (Eq. 4)
    out  attention   float32 [layers, window]                  alpha of Eq. 2, zero on padding

`layers` and `window` are dynamic. The graph does all normalisation, so callers pass plain sampled weights.
docs/format.md describes the file for readers in other languages.

The facts about a predictor are metadata properties of the file, strings whose names start with `smartfrz.`;
`PredictorInfo` lists them. `smartfrz.sha256` is the SHA-256 of the whole file with those 64 characters set to `0`,
so that a damaged or altered file can be noticed without a second file.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smartfrz.control.quality import Calibration, parse_qualities
from smartfrz.errors import PredictorFileError
from smartfrz.files import unique_keys

FORMAT_VERSION = 1
HISTORY, LENGTHS, CONFIDENCE, ATTENTION = "history", "lengths", "confidence", "attention"
POSITION, LOSS = "position", "loss"
PREFIX = "smartfrz."
REPRESENTATIONS = ("raw", "trajectory", "trajectory+loss")
POSITIONAL = ("trajectory", "trajectory+loss")  # representations whose graphs have the input `position`
READS_LOSS = ("trajectory+loss",)  # representations whose graphs have the input `loss`, too
UNKNOWN_POSITION = -1.0
UNKNOWN_LOSS = 0.0
MAX_HISTORY = 2**20  # values in the history of one layer, window * tailored_size; the shipped predictors read 30,720
MIN_RECORD_FRACTION = 1e-4  # a stage at every few steps of a long run would hold training up
_MAX_NAME = 200
_MAX_DEPTH = 50  # of lists and objects in one another; the shipped predictors have 4
_TOLERANCE = 1e-3  # of float32 sums
_NO_HASH = b"0" * 64
_HASH = re.compile(rb"smartfrz\.sha256\x12\x40([0-9a-f]{64})")


@dataclass(frozen=True)
class PredictorInfo:
    """Facts about a predictor, from the metadata of its file.

    Attributes:
        name: Name of the predictor, for example `smartfrz-base`.
        tailored_size: Length of a tailored vector.
        window: Number of timestamps that the predictor was trained to read; shorter histories are masked.
        representation: First transformation of the weights in the graph; one of `REPRESENTATIONS`.
        threshold: Confidence from which a layer is frozen, in (0, 1).
        record_fraction: Fraction of a run between two records: one over the number of records per run.
        dataset_sha256: SHA-256 of the recordings that it was trained on.
        license: SPDX identifier.
        metrics: Held-out results and the label rule, as JSON.
        min_records: Length of the shortest history that it was trained to judge.
        qualities: What the qualities `same`, `balanced` and `fast` stand for; those that were measured.
    """

    name: str
    tailored_size: int
    window: int
    representation: str
    threshold: float
    record_fraction: float
    dataset_sha256: str = ""
    license: str = "Apache-2.0"
    metrics: dict[str, Any] = field(default_factory=dict)
    min_records: int = 4
    qualities: dict[str, Calibration] = field(default_factory=dict)

    def to_metadata(self) -> dict[str, str]:
        """Return the metadata properties, including the format version and an empty checksum."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        values["metrics"] = json.dumps(self.metrics, sort_keys=True)
        values["qualities"] = json.dumps({name: quality.to_dict() for name, quality in self.qualities.items()})
        if not self.qualities:
            del values["qualities"]
        values |= {"format_version": FORMAT_VERSION, "sha256": _NO_HASH.decode()}
        return {PREFIX + key: value if isinstance(value, str) else repr(value) for key, value in values.items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], file: str) -> "PredictorInfo":
        """Read and check the metadata properties of `file`.

        Raises:
            PredictorFileError: If one is missing or out of range, or the format version is not supported.
        """
        version = metadata.get(PREFIX + "format_version")
        if version is None:
            raise PredictorFileError(
                f"{file!r} is an ONNX file, but no SmartFRZ predictor: it has no metadata 'smartfrz.format_version'. "
                "Pass a file that smartfrz-build train made."
            )
        if version != str(FORMAT_VERSION):
            raise PredictorFileError(
                f"{file!r} has format_version {version}; this version of smartfrz reads {FORMAT_VERSION}. "
                "Update with: pip install --upgrade smartfrz, or use a predictor of that format."
            )
        try:
            info = cls(
                name=metadata[PREFIX + "name"],
                tailored_size=int(metadata[PREFIX + "tailored_size"]),
                window=int(metadata[PREFIX + "window"]),
                representation=metadata[PREFIX + "representation"],
                threshold=float(metadata[PREFIX + "threshold"]),
                record_fraction=float(metadata[PREFIX + "record_fraction"]),
                dataset_sha256=metadata[PREFIX + "dataset_sha256"],
                license=metadata[PREFIX + "license"],
                metrics=_parse_object(metadata[PREFIX + "metrics"]),
                min_records=int(metadata.get(PREFIX + "min_records", "4")),
                qualities=parse_qualities(_parse_object(metadata.get(PREFIX + "qualities", "{}"))),
            )
            unprintable = find_unprintable(info.metrics)
        except (KeyError, ValueError, RecursionError) as error:
            raise PredictorFileError(
                f"{file!r} has a missing or unreadable metadata property ({error}). Export it again."
            ) from error
        in_range = (
            info.tailored_size > 0
            and info.window > 1
            and 0 < info.threshold < 1
            and MIN_RECORD_FRACTION <= info.record_fraction <= 1
            and math.isfinite(info.threshold)
            and 1 <= info.min_records <= info.window
            and info.window * info.tailored_size <= MAX_HISTORY
            and len(info.name) <= _MAX_NAME
        )
        if not in_range:
            raise PredictorFileError(
                f"{file!r} has metadata out of range: name={info.name[:80]!r}, tailored_size={info.tailored_size}, "
                f"window={info.window}, threshold={info.threshold}, record_fraction={info.record_fraction}, "
                f"min_records={info.min_records}; expected positive numbers, window * tailored_size of at most "
                f"{MAX_HISTORY}, and a name of at most {_MAX_NAME} characters. Export it again."
            )
        texts = {key: getattr(info, key) for key in ("name", "dataset_sha256", "license")}
        for key, text in {**texts, "metrics": unprintable or ""}.items():
            if len(text) > _MAX_NAME or not text.isprintable():
                raise PredictorFileError(
                    f"{file!r} has the metadata property {key!r} with {text[:80]!a}, {len(text)} characters; expected "
                    f"at most {_MAX_NAME}, without control characters. Export it again."
                )
        return info


def _parse_object(text: str) -> dict[str, Any]:
    value = json.loads(text, object_pairs_hook=unique_keys)
    if not isinstance(value, dict):
        raise ValueError(f"received {type(value).__name__}; expected an object")
    return value


def find_unprintable(value: Any, depth: int = 0) -> str | None:
    """Return the first text with control characters or lone surrogates in a JSON value, keys included, or None.

    A terminal obeys such characters.

    Args:
        value: The value.
        depth: In how many lists and objects it is.

    Raises:
        ValueError: If it is in more than `_MAX_DEPTH` of them, which Python could read, but not write.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(f"lists and objects are nested more than {_MAX_DEPTH} deep")
    if isinstance(value, str):
        return None if value.isprintable() else value
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return next((found for part in parts if (found := find_unprintable(part, depth + 1)) is not None), None)


def find_fault(arrays: Mapping[str, NDArray[Any]], num_layers: int, num_records: int) -> str | None:
    """Return what is wrong with the shapes of a predictor's answer, or None.

    Args:
        arrays: The outputs by name.
        num_layers: Number of layers that were asked about.
        num_records: Length of their histories.
    """
    expected = {CONFIDENCE: (num_layers, 2), ATTENTION: (num_layers, num_records)}
    received = {name: array.shape for name, array in arrays.items()}
    return None if received == expected else f"answers with {str(received)[:200]}; expected {expected}"


def find_invalid(confidence: NDArray[np.float32], attention: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return which layers have an answer that is none: values that are not from 0 to 1, or that do not sum to 1.

    Args:
        confidence: float32 `[layers, 2]`.
        attention: float32 `[layers, window]`.

    Returns:
        bool `[layers]`.
    """
    in_range = [((array >= 0) & (array <= 1 + _TOLERANCE)).all(1) for array in (confidence, attention)]
    with np.errstate(all="ignore"):  # a warning may be an error in the training around it
        sums_to_one = abs(confidence.sum(1) - 1) <= _TOLERANCE
    valid: NDArray[np.bool_] = in_range[0] & in_range[1] & sums_to_one
    return ~valid


def check_position(position: NDArray[np.float32], info: PredictorInfo) -> None:
    """Check that a predictor reads positions, and that these values are positions. Their number is not checked.

    Args:
        position: Place of each layer in execution order, float32 `[layers]`: 0 for the first layer of the network, 1 for
            the last, -1 where it is not known.
        info: Facts about the predictor.

    Raises:
        ValueError: If the predictor reads no position, or a value is out of range.
    """
    if info.representation not in POSITIONAL:
        raise ValueError(
            f"Predictor {info.name!r} reads no position: its representation is {info.representation!r}. "
            f"Leave `position` out, or use a predictor that was exported with {', '.join(POSITIONAL)}."
        )
    wrong = position[~((position == UNKNOWN_POSITION) | ((position >= 0) & (position <= 1)))]
    if wrong.size:
        raise ValueError(
            f"position holds the value {wrong[0]:g}; expected values from 0, the first layer, to 1, the last, or "
            f"{UNKNOWN_POSITION} where that is not known."
        )


def check_loss(loss: NDArray[np.float32], history_shape: tuple[int, ...], info: PredictorInfo) -> None:
    """Check that a predictor reads losses, and that there is one for each record.

    Args:
        loss: Mean training loss of the steps since the record before, one for each row of the history, float32
            `[layers, window]`. In any unit: only ratios are looked at. A value that is zero or less, infinite or NaN means
            that the loss is not known.
        history_shape: Shape of the history, `(layers, window, tailored_size)`.
        info: Facts about the predictor.

    Raises:
        ValueError: If the predictor reads no loss, or dtype or shape are wrong.
    """
    if info.representation not in READS_LOSS:
        raise ValueError(
            f"Predictor {info.name!r} reads no loss: its representation is {info.representation!r}. Leave `loss` out, or "
            f"use a predictor that was exported with {', '.join(READS_LOSS)}."
        )
    if loss.shape != history_shape[:2] or loss.dtype != np.float32:
        raise ValueError(
            f"loss is {loss.dtype} {loss.shape}; expected float32 {history_shape[:2]}, one value for each row of the "
            "history."
        )


def seal(content: bytes) -> bytes:
    """Write the checksum into a serialised predictor and return the result; any checksum in it is replaced.

    Raises:
        ValueError: If the content has no checksum property, or more than one.
    """
    blank, _ = _blank(content)
    return blank.replace(b"smartfrz.sha256\x12\x40" + _NO_HASH, b"smartfrz.sha256\x12\x40" + _digest(blank))


def check_seal(content: bytes, file: str) -> str:
    """Compare the checksum in a file with its content, and return it.

    Raises:
        PredictorFileError: If the content has no checksum, or a different one.
    """
    try:
        blank, recorded = _blank(content)
    except ValueError:
        raise PredictorFileError(
            f"{file!r} ({len(content)} bytes) is not a SmartFRZ predictor, or is cut: it has no 'smartfrz.sha256'. "
            "Pass a file that smartfrz-build train made, or copy the file again."
        ) from None
    if recorded != _digest(blank):
        raise PredictorFileError(
            f"{file!r} is damaged or was altered: its SHA-256 is {_digest(blank).decode()[:12]}..., it was made with "
            f"{recorded.decode()[:12]}.... Copy or download the file again."
        )
    return recorded.decode()


def _blank(content: bytes) -> tuple[bytes, bytes]:
    # In protobuf a property's value follows its key: field 2 (0x12), 64 bytes long (0x40).
    found = _HASH.findall(content)
    if len(found) != 1:
        raise ValueError(f"expected one property 'smartfrz.sha256' of 64 characters, found {len(found)}")
    return content.replace(found[0], _NO_HASH), found[0]


def _digest(blank: bytes) -> bytes:
    return hashlib.sha256(blank).hexdigest().encode()

"""A predictor on ONNX Runtime. The only module that imports onnxruntime."""

import importlib.metadata
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smartfrz.errors import MissingDependencyError, PredictorFileError
from smartfrz.predictor.contract import (
    ATTENTION,
    CONFIDENCE,
    ENCODING_SIZE,
    HISTORY,
    INCREMENTAL,
    KEYS,
    LENGTHS,
    PAST_KEYS,
    PAST_VALUES,
    POSITION,
    POSITIONAL,
    VALUES,
    PredictorInfo,
    check_position,
    check_seal,
)
from smartfrz.predictor.inspection import MAX_FILE_SIZE, check_onnx

logger = logging.getLogger("smartfrz")
Device = Literal["auto", "cpu", "cuda"]
_CUDA = "CUDAExecutionProvider"
_ROWS_PER_RUN = 240  # what the graph works on stays in a core's cache then


class Prediction(NamedTuple):
    """The predictor's answer.

    Attributes:
        confidence: Float32 `[layers, 2]`: keep training, freeze. Rows sum to 1.
        attention: Float32 `[layers, window]`: how much each timestamp counted, zero on padding.
    """

    confidence: NDArray[np.float32]
    attention: NDArray[np.float32]


class Advance(NamedTuple):
    """The answer of a predictor that was fed only what is new.

    Attributes:
        confidence: As in `Prediction`.
        attention: As in `Prediction`, over the past and the new records.
        keys: Float32 `[layers, new, 64]`, to be passed as past next time.
        values: As `keys`.
    """

    confidence: NDArray[np.float32]
    attention: NDArray[np.float32]
    keys: NDArray[np.float32]
    values: NDArray[np.float32]


class Predictor:
    """One predictor file, checked and ready to be asked.

    Args:
        path: The ONNX file.
        device: `"cpu"`, `"cuda"`, or `"auto"` for CUDA where ONNX Runtime can use it.
        num_threads: Threads of ONNX Runtime. One, since its spinning threads slow the training around it.

    Raises:
        PredictorFileError: If the file is missing, damaged, or not a predictor that is read here.
        MissingDependencyError: If onnxruntime is absent or installed twice, or CUDA was asked for
            and cannot be used.
    """

    def __init__(self, path: str | os.PathLike[str], *, device: Device = "auto", num_threads: int = 1):
        if device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"`device` is {device!r}; expected 'auto', 'cpu' or 'cuda'.")
        self.path = Path(path)
        file = str(path)
        try:
            with self.path.open("rb") as opened:
                content = opened.read(MAX_FILE_SIZE + 1)
        except OSError as error:
            raise PredictorFileError(
                f"Cannot read predictor {file!r}: {error.strerror}. Pass the path of an ONNX file that smartfrz-build "
                "train made, or the name 'smartfrz-base'."
            ) from error
        if len(content) > MAX_FILE_SIZE:
            raise PredictorFileError(
                f"{file!r} is larger than {MAX_FILE_SIZE >> 20} MiB; expected a predictor of a few MiB. Pass a file that "
                "smartfrz-build train made."
            )
        self.sha256 = check_seal(content, file)
        check_onnx(content, file)
        self._session = _session(content, file, device, num_threads)
        self.info = PredictorInfo.from_metadata(self._session.get_modelmeta().custom_metadata_map, file)
        self._check_graph(file)
        self._fetched_only = _onnxruntime().RunOptions()
        self._fetched_only.only_execute_path_to_fetches = True
        self.device = "cuda" if _CUDA in self._session.get_providers() else "cpu"
        self._run = _BoundRun(self._session, "cuda") if self.device == "cuda" else self._session.run

    def _check_graph(self, file: str) -> None:
        # Dynamic dimensions come as names, fixed ones as integers.
        session = self._session
        optional = session.get_overridable_initializers()
        found = {v.name: (v.type, v.shape) for v in (*session.get_inputs(), *optional, *session.get_outputs())}
        expected: dict[str, tuple[str, list[int | None]]] = {
            HISTORY: ("tensor(float)", [None, None, self.info.tailored_size]),
            LENGTHS: ("tensor(int64)", [None]),
            CONFIDENCE: ("tensor(float)", [None, 2]),
            ATTENTION: ("tensor(float)", [None, None]),
        }
        self._incremental = self.info.representation in INCREMENTAL and KEYS in found  # older files have none
        if self._incremental:
            encodings = ("tensor(float)", [None, None, ENCODING_SIZE])
            expected |= dict.fromkeys((PAST_KEYS, PAST_VALUES, KEYS, VALUES), encodings)
        self._positional = self.info.representation in POSITIONAL
        if self._positional:
            expected[POSITION] = ("tensor(float)", [None])
        for name, (dtype, shape) in expected.items():
            received = found.get(name)
            fits = (
                received is not None
                and received[0] == dtype
                and len(received[1]) == len(shape)
                and all(
                    isinstance(got, int) == (want is not None) and want in (None, got)
                    for got, want in zip(received[1], shape, strict=True)
                )
            )
            if not fits or len(found) != len(expected):
                raise PredictorFileError(
                    f"{file!r} breaks the predictor contract at {name!r}: received {received}, expected {dtype} "
                    f"{shape} (None is dynamic), and no tensors but {list(expected)}. Export it with smartfrz-build train."
                )

    def predict(
        self, history: NDArray[np.float32], lengths: NDArray[np.int64], position: NDArray[np.float32] | None = None
    ) -> Prediction:
        """Ask for the confidence that each layer can be frozen now.

        Args:
            history: Tailored weights, float32 `[layers, window, tailored_size]`, oldest first.
            lengths: How many of the last rows are real, int64 `[layers]`.
            position: Where in the network each layer stands, in execution order: 0 for the first one, 1 for the last,
                -1 where that is not known; float32 `[layers]`. For predictors that are `positional`; by default
                unknown, which costs some accuracy.

        Returns:
            Confidences and attention.

        Raises:
            ValueError: If shapes or dtypes are not those of this predictor.
        """
        self._check_history(history, lengths)
        if position is not None:
            self._check_position(position, len(history))
        together = max(1, _ROWS_PER_RUN // history.shape[1]) if self.device == "cpu" else len(history)
        if len(history) <= together:
            feed: dict[str, NDArray[Any]] = {HISTORY: history, LENGTHS: lengths}
            if position is not None:
                feed[POSITION] = position
            return Prediction(*self._run([CONFIDENCE, ATTENTION], feed))
        parts = [slice(start, start + together) for start in range(0, len(history), together)]
        answers = [
            self.predict(history[part], lengths[part], None if position is None else position[part]) for part in parts
        ]
        return Prediction(*(np.concatenate(arrays) for arrays in zip(*answers, strict=True)))

    @property
    def positional(self) -> bool:
        """Whether it looks at where in the network a layer stands: `predict` can be given a `position`."""
        return self._positional

    def _check_position(self, position: NDArray[np.float32], num_layers: int) -> None:
        if position.shape != (num_layers,) or position.dtype != np.float32:
            raise ValueError(
                f"position is {position.dtype} {position.shape}; expected float32 ({num_layers},), one value a layer."
            )
        check_position(position, self.info)

    @property
    def incremental(self) -> bool:
        """Whether past records need not be fed again: `encode` and `advance` can be used."""
        return self._incremental

    def encode(self, history: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys and values of records, without asking; for predictors that are `incremental`.

        Args:
            history: As in `predict`. For `steps`, the first row is only where the first step starts.

        Returns:
            Keys and values, float32 `[layers, new, 64]`: of every row for `raw`, of every row but the
            first for `steps`.

        Raises:
            ValueError: If the shape or dtype is not that of this predictor, or it is not incremental.
        """
        self._check_incremental()
        lengths = np.full(len(history), history.shape[1], np.int64)
        self._check_history(history, lengths)
        answer = self._run([KEYS, VALUES], {HISTORY: history, LENGTHS: lengths}, self._fetched_only)
        return answer[0], answer[1]

    def advance(
        self,
        newest: NDArray[np.float32],
        keys: NDArray[np.float32],
        values: NDArray[np.float32],
        lengths: NDArray[np.int64],
    ) -> Advance:
        """As `predict`, from the newest records and what was kept of those before.

        Args:
            newest: Tailored weights, float32 `[layers, rows, tailored_size]`: for `raw` the records
                whose encodings are not among `keys`; for `steps` those, and the one before them.
            keys: Of the records before, oldest first, float32 `[layers, past, 64]`, left-padded.
            values: As `keys`.
            lengths: How many of the last `past + rows` records are real, int64 `[layers]`.

        Returns:
            Confidences, attention `[layers, past + rows]`, and the keys and values of the new records.

        Raises:
            ValueError: If shapes or dtypes are not those of this predictor, or it is not incremental.
        """
        self._check_incremental()
        past = keys.shape[1] if keys.ndim == 3 else 0
        expected = (len(newest), past, ENCODING_SIZE)
        if not keys.shape == values.shape == expected or not keys.dtype == values.dtype == np.float32:
            raise ValueError(
                f"keys and values are {keys.dtype} {keys.shape} and {values.dtype} {values.shape}; expected both float32 "
                f"{expected}. Pass what encode() or advance() returned for these layers."
            )
        self._check_history(newest, lengths, past)
        feed: dict[str, NDArray[Any]] = {HISTORY: newest, LENGTHS: lengths, PAST_KEYS: keys, PAST_VALUES: values}
        return Advance(*self._run([CONFIDENCE, ATTENTION, KEYS, VALUES], feed))

    def _check_incremental(self) -> None:
        if not self._incremental:
            raise ValueError(
                f"Predictor {self.info.name!r} is not incremental: its representation is {self.info.representation!r}. "
                f"Use predict(), or a predictor that was exported with one of {', '.join(INCREMENTAL)}."
            )

    def _check_history(self, history: NDArray[np.float32], lengths: NDArray[np.int64], past: int = 0) -> None:
        name, size = self.info.name, self.info.tailored_size
        window = self.info.window - past
        if history.ndim != 3 or history.shape[2] != size or not 0 < history.shape[1] <= window:
            raise ValueError(
                f"history has shape {history.shape}, but predictor {name!r} reads [layers, 1 to {window}, {size}]. Make "
                "the WeightHistory with the predictor's own window and tailored_size."
            )
        num_records = past + history.shape[1]
        if lengths.shape != history.shape[:1] or (lengths < 1).any() or (lengths > num_records).any():
            raise ValueError(
                f"lengths is {lengths.tolist()} for a history of shape {history.shape}; expected one value in 1 to "
                f"{num_records} for each layer."
            )
        if history.dtype != np.float32 or lengths.dtype != np.int64:
            raise ValueError(
                f"history and lengths are {history.dtype} and {lengths.dtype}; expected float32 and int64. Use .astype."
            )

    def __repr__(self) -> str:
        info = self.info
        return (
            f"Predictor({info.name!r}, window={info.window}, tailored_size={info.tailored_size}, "
            f"threshold={info.threshold:.3g}, device={self.device!r})"
        )


def _onnxruntime() -> Any:
    """The onnxruntime module, if exactly one build of it is installed."""
    installed = []
    for distribution in ("onnxruntime", "onnxruntime-gpu"):
        try:
            importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        installed.append(distribution)
    if len(installed) > 1:
        # They share one import folder: the last one installed wins, and removing one breaks the other.
        raise MissingDependencyError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; expected one of them. Type: "
            'pip uninstall -y onnxruntime onnxruntime-gpu, and then pip install "smartfrz[cpu]" or pip install '
            '"smartfrz[gpu]"'
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"SmartFRZ asks its predictor through onnxruntime, which cannot be imported ({error}). Type: pip install "
            '"smartfrz[cpu]", or on a machine with an NVIDIA GPU: pip install "smartfrz[gpu]"'
            + (f" (with --force-reinstall: {installed[0]} is listed, but its files are gone)" if installed else "")
        ) from error
    return onnxruntime


class _BoundRun:
    """As `InferenceSession.run`, with inputs and outputs bound to the memory of a device.

    The history stays on the host, where it is made from samples of all layers and shifted by a row at each record. A
    decision copies it once, a few MiB, into buffers on the device that are kept from call to call; nothing is copied
    between the nodes of the graph, and all answers come back at the end.

    Args:
        session: The session.
        device: `"cuda"`; `"cpu"` is the same without copies, and what is tested where there is no GPU.
    """

    def __init__(self, session: Any, device: str):
        self._session, self._device = session, device
        self._buffers: dict[str, Any] = {}
        self._lock = threading.Lock()  # callers in several threads share the buffers

    def __call__(
        self, outputs: Sequence[str], feed: Mapping[str, NDArray[Any]], options: Any = None
    ) -> list[NDArray[np.float32]]:
        with self._lock:
            binding = self._session.io_binding()
            for name, array in feed.items():
                binding.bind_ortvalue_input(name, self._on_device(name, array))
            for name in outputs:
                binding.bind_output(name, self._device)
            self._session.run_with_iobinding(binding, options)
            return list(binding.copy_outputs_to_cpu())

    def _on_device(self, name: str, array: NDArray[Any]) -> Any:
        array = np.ascontiguousarray(array)
        buffer = self._buffers.get(name)
        if buffer is not None and tuple(buffer.shape()) == array.shape and array.size:
            buffer.update_inplace(array)
        else:
            buffer = self._buffers[name] = _onnxruntime().OrtValue.ortvalue_from_numpy(array, self._device)
        return buffer


def _session(content: bytes, file: str, device: Device, num_threads: int) -> Any:
    """A session on the GPU if it is to be there and can be, else on the CPU."""
    ort = _onnxruntime()
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    session, reason = None, ""
    # What is available is what was compiled in, not what works here: only the session can tell.
    if device != "cpu" and _CUDA in ort.get_available_providers():
        session, reason = _cuda_session(ort, content, options, quiet=device == "auto")
        if session is None and device == "auto":
            _say_once(
                "The GPU build of ONNX Runtime cannot use a GPU here%s: predictors run on the CPU. It needs an NVIDIA GPU, "
                'its driver, CUDA and cuDNN; if you want the CPU, pass device="cpu" or install "smartfrz[cpu]".',
                f" ({reason})" if reason else "",
            )
    if device == "cuda" and session is None:
        raise MissingDependencyError(
            f"device='cuda' was asked for, but ONNX Runtime cannot use it{f' ({reason})' if reason else ''}; it has "
            f"{ort.get_available_providers()}. Install the GPU build, pip uninstall -y onnxruntime; pip install "
            '"smartfrz[gpu]", with CUDA and cuDNN, or pass device="auto".'
        )
    if session is not None:
        return session
    try:
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except (
        state.Fail,
        state.InvalidProtobuf,
        state.InvalidGraph,
        state.InvalidArgument,
        state.NotImplemented,
    ) as error:
        raise PredictorFileError(
            f"ONNX Runtime cannot load {file!r}: {error}. Copy the file again, or update onnxruntime."
        ) from error


def _cuda_session(ort: Any, content: bytes, options: Any, *, quiet: bool) -> tuple[Any, str]:
    """A session on the GPU; None, and why if that is known, where there is none that can be used."""
    if quiet:
        ort.set_default_logger_severity(4)  # no error lines where falling back is fine
    try:
        # In full float32, as on the CPU and in PyTorch; and without its own fallback, which prints.
        providers = [(_CUDA, {"use_tf32": "0"}), "CPUExecutionProvider"]
        session = ort.InferenceSession(content, options, providers=providers, enable_fallback=0)
    except Exception as error:
        # CUDA fails in many ways; a file that is at fault fails on the CPU as well, and is told then.
        return None, str(error).strip().partition("\n")[0][:200]
    finally:
        ort.set_default_logger_severity(2)
    return (session, "") if _CUDA in session.get_providers() else (None, "")


_said: set[str] = set()


def _say_once(message: str, *values: object) -> None:
    """Log a warning once in a process: a training makes several predictors."""
    if message not in _said:
        _said.add(message)
        logger.warning(message, *values)

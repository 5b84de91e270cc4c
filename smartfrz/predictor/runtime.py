"""`Predictor`: one predictor file, run by ONNX Runtime. No other module imports onnxruntime."""

import functools
import hashlib
import importlib.metadata
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smartfrz.errors import MissingDependencyError, PredictionError, PredictorFileError
from smartfrz.files import open_regular
from smartfrz.predictor.contract import (
    ATTENTION,
    CONFIDENCE,
    HISTORY,
    LENGTHS,
    LOSS,
    POSITION,
    POSITIONAL,
    READS_LOSS,
    PredictorInfo,
    check_loss,
    check_position,
    check_seal,
    find_fault,
    find_invalid,
)
from smartfrz.predictor.deadline import call_within
from smartfrz.predictor.inspection import MAX_FILE_SIZE, check_onnx

logger = logging.getLogger("smartfrz")
Device = Literal["auto", "cpu", "cuda"]
Providers = Sequence[str | tuple[str, dict[str, Any]]]  # as ONNX Runtime takes them
_CUDA = "CUDAExecutionProvider"
_ROWS_PER_RUN = 240  # few enough that intermediate results stay in the cache of a core
MAX_MEMORY = (
    256 * 2**20
)  # bytes of tensors of all predictors on the CPU; a decision of smartfrz-base takes less than 16 MiB
MAX_GPU_MEMORY = 4 * 2**30  # bytes of tensors of one predictor on the GPU, which judges all layers at once
MAX_DIFFERENCE = 0.02  # between the confidences that a provider and the CPU compute
DEADLINE = 30.0  # seconds for loading, and for each question about any number of layers; eight take a few milliseconds


class Prediction(NamedTuple):
    """Answer of a predictor.

    Attributes:
        confidence: Keep training, freeze: float32 `[layers, 2]`. Rows sum to 1.
        attention: How much each timestamp counted, float32 `[layers, window]`; zero on padding.
    """

    confidence: NDArray[np.float32]
    attention: NDArray[np.float32]


class Predictor:
    """A predictor file, checked and loaded.

    Args:
        path: The ONNX file.
        device: `"cpu"`, `"cuda"`, or `"auto"` for CUDA where ONNX Runtime can use it.
        num_threads: Threads of ONNX Runtime. The default is one: more of them slow down the training around it.
        providers: Execution providers of ONNX Runtime, in the order of preference, in the place of `device`: names such
            as `"OpenVINOExecutionProvider"`, or pairs of a name and its options. Whatever they cannot run, the CPU runs.
            The limits of memory are those of the CPU; limit the memory of a GPU through the options of its provider.

    Attributes:
        sha256: SHA-256 of the file, as `sha256sum` and the zoo give it.
        seal: The checksum inside of the file, `smartfrz.sha256` of docs/format.md: what it was made with.
        device: `"cuda"` if inputs and outputs are bound to the memory of a GPU, else `"cpu"`.
        providers: Names of the execution providers in use.

    Raises:
        ValueError: If both `device` and `providers` are given, or `providers` is no list of providers.
        PredictorFileError: If the file is missing, damaged, or not a predictor of a supported format, or if a first
            decision on made-up weights takes more time or memory than a predictor needs.
        PredictionError: If the answers of `providers` differ from those of the CPU.
        MissingDependencyError: If onnxruntime is not installed or installed twice, or if CUDA or a provider was requested
            and cannot be used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        device: Device = "auto",
        num_threads: int = 1,
        providers: Providers | None = None,
    ):
        if device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"`device` is {device!r}; expected 'auto', 'cpu' or 'cuda'.")
        if providers is not None:
            _check_providers(providers, device)
        self.path = Path(path).expanduser()
        file = str(path)
        content = _read_file(self.path, file)
        self.seal = check_seal(content, file)
        self.sha256 = hashlib.sha256(content).hexdigest()
        check_onnx(content, file)
        try:
            self._session = call_within(DEADLINE, lambda: open_session(content, file, device, num_threads, providers))
        except TimeoutError as error:
            raise PredictorFileError(
                f"ONNX Runtime does not get ready to run {file!r} ({error}). Export it again with smartfrz-build train."
            ) from None
        self._opened = device, num_threads, providers
        self.info = PredictorInfo.from_metadata(self._session.get_modelmeta().custom_metadata_map, file)
        _check_graph(self._session, self.info, file)
        self.providers: list[str] = self._session.get_providers()
        self.device = "cuda" if _CUDA in self.providers else "cpu"
        self._run = BoundRun(self._session, "cuda") if self.device == "cuda" else self._session.run
        self._given_up = False
        self._fault_logged = False
        answer = self._try_out(file)
        if set(self.providers) - {_CUDA, "CPUExecutionProvider"}:
            self._compare_with_cpu(answer, open_session(content, file, "cpu", num_threads))

    def _made_up_feed(self) -> dict[str, NDArray[Any]]:
        window, size = self.info.window, self.info.tailored_size
        history = np.linspace(-1, 1, 2 * window * size, dtype=np.float32).reshape(2, window, size)
        return {HISTORY: history, LENGTHS: np.array([window, self.info.min_records], np.int64)}

    def _compare_with_cpu(self, answer: Prediction, session: Any) -> None:
        """Refuse providers that compute something else: OpenVINO's was seen to be off by 0.2."""
        expected = session.run([CONFIDENCE], self._made_up_feed())[0]
        apart = float(np.abs(answer.confidence - expected).max())
        if not apart <= MAX_DIFFERENCE:
            raise PredictionError(
                f"{', '.join(self.providers)} give other answers than the CPU for {str(self.path)!r}: confidences are up to "
                f"{apart:.3f} apart on made-up weights; expected at most {MAX_DIFFERENCE}. Leave `providers` out, or choose "
                "another provider, precision or version of ONNX Runtime."
            )

    def _try_out(self, file: str) -> Prediction:
        """Refuse a predictor that cannot answer a question about two layers."""
        try:
            answer = self._ask(self._made_up_feed(), time.monotonic() + DEADLINE)
            invalid = find_invalid(*answer)
        except PredictionError as error:
            raise PredictorFileError(
                f"{file!r} cannot be used: on made-up weights, {error}. Export it again with smartfrz-build train."
            ) from error
        if invalid.any():
            raise PredictorFileError(
                f"{file!r} cannot be used: on made-up weights it answers with numbers that are no confidences; expected "
                "rows that sum to 1, with values from 0 to 1. Export it again with smartfrz-build train."
            )
        return answer

    def predict(
        self,
        history: NDArray[np.float32],
        lengths: NDArray[np.int64],
        position: NDArray[np.float32] | None = None,
        loss: NDArray[np.float32] | None = None,
    ) -> Prediction:
        """Return the confidence that each layer can be frozen now.

        Args:
            history: Tailored weights, float32 `[layers, window, tailored_size]`, oldest first.
            lengths: How many of the last rows are real, int64 `[layers]`.
            position: Place of each layer in execution order, float32 `[layers]`: 0 for the first layer, 1 for the last,
                -1 where it is not known. Only for predictors that are `positional`, which are somewhat less accurate
                without it.
            loss: Mean training loss since the record before, for each row of the history, float32 `[layers, window]`; zero
                or less, infinite or NaN where it is not known. Only for predictors with `reads_loss`, which are less
                accurate without it.

        Returns:
            Confidences and attention. A layer for which the graph computes no number from 0 to 1 has NaN as confidences.

        Raises:
            ValueError: If shapes or dtypes are not those of this predictor.
            PredictionError: If the predictor has no usable answer, or takes too long or too much memory. The first
                time is also logged.
        """
        self._check_history(history, lengths)
        feed: dict[str, NDArray[Any]] = {HISTORY: history, LENGTHS: lengths}
        if position is not None:
            self._check_position(position, len(history))
            feed[POSITION] = position
        if loss is not None:
            check_loss(loss, history.shape, self.info)
            feed[LOSS] = loss
        together = max(1, _ROWS_PER_RUN // history.shape[1]) if self.device == "cpu" else len(history)
        until = time.monotonic() + DEADLINE
        if len(history) <= together:
            return self._answer(feed, until)
        parts = [slice(start, start + together) for start in range(0, len(history), together)]
        answers = [self._answer({name: array[part] for name, array in feed.items()}, until) for part in parts]
        return Prediction(*(np.concatenate(arrays) for arrays in zip(*answers, strict=True)))

    def _answer(self, feed: dict[str, NDArray[Any]], until: float) -> Prediction:
        """Ask, and make what is no confidence NaN, which no threshold is below."""
        try:
            answer = self._ask(feed, until)
        except PredictionError as error:
            self._warn(str(error))
            raise
        invalid = find_invalid(*answer)
        if invalid.any():
            self._warn(f"the answer for {invalid.sum()} layers is none, as happens if weights overflow")
            answer.confidence[invalid] = np.nan
        return answer

    def _warn(self, fault: str) -> None:
        if not self._fault_logged:
            logger.warning("%s: %s. Training goes on; a layer without an answer does not freeze.", self.path, fault)
        self._fault_logged = True

    def _ask(self, feed: dict[str, NDArray[Any]], until: float) -> Prediction:
        """Ask ONNX Runtime, and check the answer as that of a server is checked.

        Raises:
            PredictionError: If there is no usable answer in time.
        """
        if self._given_up:
            raise PredictionError("the predictor is not asked again after a question that did not come to an end")
        options = import_onnxruntime().RunOptions()
        options.log_severity_level = 4  # what fails is said here
        try:
            arrays = call_within(until - time.monotonic(), lambda: self._run([CONFIDENCE, ATTENTION], feed, options))
        except TimeoutError:
            options.terminate = True  # ends the run after the node that it is at
            self._given_up = True
            raise PredictionError(f"the predictor gives no answer (no end after {DEADLINE:g} s)") from None
        except _runtime_errors() as error:
            raise PredictionError(f"ONNX Runtime cannot run it ({str(error)[:300]})") from error
        if fault := find_fault(dict(zip((CONFIDENCE, ATTENTION), arrays, strict=True)), *feed[HISTORY].shape[:2]):
            raise PredictionError(f"the predictor {fault}")
        return Prediction(*arrays)

    @property
    def positional(self) -> bool:
        """Whether the predictor looks at the layers' places in the network: `predict` accepts a `position`."""
        return self.info.representation in POSITIONAL

    @property
    def reads_loss(self) -> bool:
        """Whether the predictor looks at the training loss: `predict` accepts a `loss`."""
        return self.info.representation in READS_LOSS

    def _check_position(self, position: NDArray[np.float32], num_layers: int) -> None:
        if position.shape != (num_layers,) or position.dtype != np.float32:
            raise ValueError(
                f"position is {position.dtype} {position.shape}; expected float32 ({num_layers},), one value a layer."
            )
        check_position(position, self.info)

    def _check_history(self, history: NDArray[np.float32], lengths: NDArray[np.int64]) -> None:
        info = self.info
        if history.ndim != 3 or history.shape[2] != info.tailored_size or not 0 < history.shape[1] <= info.window:
            raise ValueError(
                f"history has shape {history.shape}, but predictor {info.name!r} reads [layers, 1 to {info.window}, "
                f"{info.tailored_size}]. Make the WeightHistory with the predictor's own window and tailored_size."
            )
        num_layers, num_records, _ = history.shape
        if lengths.shape != (num_layers,) or (lengths < 1).any() or (lengths > num_records).any():
            raise ValueError(
                f"lengths is {lengths.tolist()} for a history of shape {history.shape}; expected one value in 1 to "
                f"{num_records} for each layer."
            )
        if history.dtype != np.float32 or lengths.dtype != np.int64:
            raise ValueError(
                f"history and lengths are {history.dtype} and {lengths.dtype}; expected float32 and int64. Use .astype."
            )

    def __copy__(self) -> "Predictor":
        """Return the predictor itself, which nothing changes; ONNX Runtime's session cannot be copied."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Predictor":
        """Return the predictor itself, as `__copy__` does."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle where the file is, to open it again there."""
        return _reopen, (type(self), str(self.path.absolute()), self.sha256, *self._opened)

    def __repr__(self) -> str:
        info = self.info
        return (
            f"Predictor({info.name!r}, window={info.window}, tailored_size={info.tailored_size}, "
            f"threshold={info.threshold:.3g}, device={self.device!r})"
        )


def _reopen(
    kind: type[Predictor], path: str, sha256: str, device: Device, num_threads: int, providers: Providers | None
) -> Predictor:
    """Open the file of a pickled predictor.

    Raises:
        PredictorFileError: If it is missing, or another predictor is there now.
    """
    predictor = kind(path, device=device, num_threads=num_threads, providers=providers)
    if predictor.sha256 != sha256:
        raise PredictorFileError(
            f"{path!r} holds predictor {predictor.sha256[:12]}..., but the pickle was made with {sha256[:12]}.... Put "
            "the same file there, or make the predictor anew."
        )
    return predictor


def _read_file(path: Path, file: str) -> bytes:
    try:
        with open_regular(path) as opened:
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
    return content


def _check_graph(session: Any, info: PredictorInfo, file: str) -> None:
    """Check that the graph has the tensors of the contract, and no others."""
    optional = session.get_overridable_initializers()
    found = {v.name: (v.type, v.shape) for v in (*session.get_inputs(), *optional, *session.get_outputs())}
    expected: dict[str, tuple[str, list[int | None]]] = {
        HISTORY: ("tensor(float)", [None, None, info.tailored_size]),
        LENGTHS: ("tensor(int64)", [None]),
        CONFIDENCE: ("tensor(float)", [None, 2]),
        ATTENTION: ("tensor(float)", [None, None]),
    }
    if info.representation in POSITIONAL:
        expected[POSITION] = ("tensor(float)", [None])
    if info.representation in READS_LOSS:
        expected[LOSS] = ("tensor(float)", [None, None])
    for name in (*expected, *found):
        dtype, shape = expected.get(name, ("no such tensor", []))
        received = found.get(name)
        if received is None or received[0] != dtype or not _has_shape(received[1], shape):
            raise PredictorFileError(
                f"{file!r} breaks the predictor contract at {name!r}: received {received}, expected {dtype} "
                f"{shape} (None is dynamic), and no tensors but {list(expected)}. Export it with smartfrz-build train."
            )
    if required := {v.name for v in session.get_inputs()} - {HISTORY, LENGTHS}:
        raise PredictorFileError(
            f"{file!r} breaks the predictor contract at {min(required)!r}: the input has no default; expected an "
            "initializer of the same name. Export it with smartfrz-build train."
        )


def _has_shape(received: Sequence[int | str], expected: Sequence[int | None]) -> bool:
    # ONNX Runtime gives dynamic dimensions as names and fixed ones as integers.
    return len(received) == len(expected) and all(
        isinstance(got, int) == (want is not None) and want in (None, got)
        for got, want in zip(received, expected, strict=True)
    )


def import_onnxruntime() -> Any:
    """Import onnxruntime; `smartfrz/__init__.py` has switched off its telemetry, unless the user decided otherwise.

    Raises:
        MissingDependencyError: If no build of it is installed, or two are.
    """
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


class BoundRun:
    """A replacement for `InferenceSession.run` with inputs and outputs bound to the memory of a device.

    The history stays on the host, where it is assembled from samples of all layers. Each decision copies it once, a few
    MiB, into buffers on the device that are reused from call to call. Nothing is copied between the nodes of the graph,
    and all outputs come back at the end.

    Args:
        session: The session.
        device: `"cuda"`. With `"cpu"` nothing is copied; tests use it on machines without a GPU.
    """

    def __init__(self, session: Any, device: str):
        self._session, self._device = session, device
        self._buffers: dict[str, Any] = {}
        self._lock = threading.Lock()  # callers in several threads share the buffers

    def __call__(
        self, outputs: Sequence[str], feed: Mapping[str, NDArray[Any]], options: Any = None
    ) -> list[NDArray[np.float32]]:
        """Feed arrays by input name, and return the named outputs."""
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
            buffer = self._buffers[name] = import_onnxruntime().OrtValue.ortvalue_from_numpy(array, self._device)
        return buffer


def open_session(
    content: bytes, file: str, device: Device, num_threads: int, providers: Providers | None = None
) -> Any:
    """Open an ONNX Runtime session on the GPU if one is wanted and usable, else on the CPU.

    Args:
        content: The ONNX file.
        file: Name of the file, for messages.
        device: As for `Predictor`.
        num_threads: As for `Predictor`.
        providers: As for `Predictor`.

    Returns:
        The `InferenceSession`.

    Raises:
        PredictorFileError: If ONNX Runtime cannot load the file.
        MissingDependencyError: If onnxruntime is not installed, or CUDA or a provider was requested and cannot be used.
    """
    ort = import_onnxruntime()
    _limit_memory()
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # what fails is said here, not with escapes of a terminal on standard error
    options.add_session_config_entry("session.load_model_format", "ONNX")  # the format that was checked
    options.add_session_config_entry("session.use_env_allocators", "1")
    if providers is not None:
        return _session_of(ort, content, file, options, providers)
    session, reason = None, ""
    # "Available" providers are compiled in, but may not work here: only opening a session tells.
    if device != "cpu" and _CUDA in ort.get_available_providers():
        session, reason = _cuda_session(ort, content, options, quiet=device == "auto")
        if session is None and device == "auto":
            warn_once(
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
        # Constants are not folded: that would run parts of the graph while it is loaded, outside of the memory limit.
        # Falling back to another provider would print to standard output.
        return ort.InferenceSession(
            content,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["ConstantFolding"],
            enable_fallback=0,
        )
    except _runtime_errors() as error:
        raise PredictorFileError(
            f"ONNX Runtime cannot load {file!r}: {error}. Copy the file again, or update onnxruntime."
        ) from error


@functools.cache
def _limit_memory() -> None:
    """Give all predictors of this process one pool of memory on the CPU, which does not grow beyond `MAX_MEMORY`.

    A graph of a few bytes can ask for any amount. The limit also bounds the time that one node takes.
    """
    ort = import_onnxruntime()
    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    # 1: grow by what is asked for, rather than by doubling
    pool = ort.OrtArenaCfg({"max_mem": MAX_MEMORY, "arena_extend_strategy": 1})
    try:
        ort.create_and_register_allocator(place, pool)
    except (
        _runtime_errors()
    ):  # versions that refuse a second pool: the training script has made one, with its own limit
        logger.debug("The pool of memory that this process has already made in ONNX Runtime is used.", exc_info=True)


@functools.cache
def _runtime_errors() -> tuple[type[Exception], ...]:
    """Return what ONNX Runtime raises if it cannot load or run a file."""
    import_onnxruntime()
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.InvalidProtobuf,
        state.NoSuchFile,
        state.NotImplemented,
        state.RuntimeException,
        RuntimeError,
        UnicodeDecodeError,  # of its message, which has a name from the file
    )


def _check_providers(providers: Providers, device: Device) -> None:
    if device != "auto":
        raise ValueError(
            f"`device` is {device!r} and `providers` is {providers!r}; expected one of them: both say where ONNX Runtime "
            "runs the predictor. Leave one out."
        )
    names = [] if isinstance(providers, str) else [_name_of(provider) for provider in providers]
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"`providers` is {providers!r}; expected a list of execution providers of ONNX Runtime, for example "
            "['OpenVINOExecutionProvider'] or [('OpenVINOExecutionProvider', {'device_type': 'CPU'})]."
        )


def _name_of(provider: Any) -> Any:
    # LightningCLI and YAML make lists of pairs.
    return provider[0] if isinstance(provider, (tuple, list)) and len(provider) == 2 else provider


def _session_of(ort: Any, content: bytes, file: str, options: Any, providers: Providers) -> Any:
    """Open a session with the execution providers that the user named, and no others but the CPU."""
    available, names = ort.get_available_providers(), [_name_of(provider) for provider in providers]
    if absent := [name for name in names if name not in available]:
        raise MissingDependencyError(
            f"`providers` names {', '.join(absent)}, which the installed build of ONNX Runtime does not have; it has "
            f"{', '.join(available)}. Install the build that has it in the place of the other (pip uninstall -y "
            "onnxruntime; pip install onnxruntime-openvino, for example), or leave `providers` out."
        )
    try:
        session = ort.InferenceSession(
            content,
            options,
            providers=[provider if isinstance(provider, str) else tuple(provider) for provider in providers],
            disabled_optimizers=["ConstantFolding"],
            enable_fallback=0,
        )
    except _runtime_errors() as error:
        raise PredictorFileError(
            f"ONNX Runtime cannot load {file!r} with providers={list(providers)}: {error}. Correct the options of the "
            "providers, or leave `providers` out."
        ) from error
    if unusable := [name for name in names if name not in session.get_providers()]:
        raise MissingDependencyError(
            f"`providers` names {', '.join(unusable)}, which ONNX Runtime cannot use on this machine; it would run on "
            f"{', '.join(session.get_providers())}. Install what the provider needs, or leave it out of `providers`."
        )
    return session


def _cuda_session(ort: Any, content: bytes, options: Any, *, quiet: bool) -> tuple[Any, str]:
    """Open a session on the GPU. Return None and the reason, if known, where no GPU can be used."""
    if quiet:
        ort.set_default_logger_severity(4)  # no error lines where falling back is fine
    try:
        # Full float32 as on the CPU and in PyTorch, and no fallback by ONNX Runtime, which would print.
        providers = [(_CUDA, {"use_tf32": "0", "gpu_mem_limit": str(MAX_GPU_MEMORY)}), "CPUExecutionProvider"]
        session = ort.InferenceSession(
            content, options, providers=providers, disabled_optimizers=["ConstantFolding"], enable_fallback=0
        )
    except Exception as error:
        # CUDA fails in many ways. If the file is at fault, opening it on the CPU fails as well and says so.
        return None, str(error).strip().partition("\n")[0][:200]
    finally:
        ort.set_default_logger_severity(2)
    return (session, "") if _CUDA in session.get_providers() else (None, "")


@functools.cache
def warn_once(message: str, *values: object) -> None:
    """Log a warning once per process: a training loads several predictors."""
    logger.warning(message, *values)

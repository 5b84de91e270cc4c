"""Export of a trained predictor to one ONNX file with its metadata, and back to a network to train it further."""

import dataclasses
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from smartfrz.errors import PredictorFileError
from smartfrz.files import replacing
from smartfrz.predictor.contract import (
    ATTENTION,
    CONFIDENCE,
    HISTORY,
    LENGTHS,
    LOSS,
    POSITION,
    UNKNOWN_LOSS,
    UNKNOWN_POSITION,
    PredictorInfo,
    seal,
)
from smartfrz.predictor.runtime import Prediction, Predictor
from smartfrz.predictor.training.model import FreezePredictor

TOLERANCE = 1e-5
_MATRIX = 1024  # smallest number of values for which storing a matrix in 8 bits pays
_COMPACT_TOLERANCE = 0.1


def export(model: FreezePredictor, info: PredictorInfo, path: str | os.PathLike[str]) -> float:
    """Write the predictor file, after comparing the answers of ONNX Runtime with those of PyTorch.

    Args:
        model: The trained network.
        info: Facts for the metadata.
        path: The ONNX file; replaced only when all checks have passed.

    Returns:
        The largest absolute difference between the two runtimes, at most 1e-5.

    Raises:
        PredictorFileError: If the exported file answers differently from the network.
        OSError: If the file cannot be written.
    """
    return _write_checked(
        serialise(model, info),
        path,
        measure=lambda written: parity(model, written),
        limit=TOLERANCE,
        failure="The exported predictor differs from the trained network",
        advice="Check the versions of torch, onnx and onnxruntime.",
    )


def _write_checked(
    content: bytes,
    path: str | os.PathLike[str],
    *,
    measure: Callable[[Predictor], float],
    limit: float,
    failure: str,
    advice: str,
) -> float:
    """Write a predictor file; return the largest difference of its answers, or raise if it exceeds the limit."""
    with replacing(path) as temporary:
        temporary.write_bytes(seal(content))
        found = measure(Predictor(temporary, device="cpu"))
        if not found <= limit:  # also refuses NaN
            raise PredictorFileError(f"{failure} by up to {found:.2g}; expected at most {limit}. {advice}")
    return found


def serialise(model: FreezePredictor, info: PredictorInfo) -> bytes:
    """Return the content of the ONNX file, with an empty checksum."""
    proto = _convert(model, info.tailored_size)
    _remove_traces(proto)
    if model.reads_loss:
        _make_optional(proto.graph, LOSS, UNKNOWN_LOSS, 2)
    if model.positional:
        _make_optional(proto.graph, POSITION, UNKNOWN_POSITION, 1)
    proto.graph.name = "predictor"
    proto.producer_version = ""  # so that the same weights give the same file with any version of PyTorch
    return _finish(proto, info)


def _finish(proto: onnx.ModelProto, info: PredictorInfo) -> bytes:
    """Write the metadata into a model and return its bytes."""
    onnx.helper.set_model_props(proto, dict(sorted(info.to_metadata().items())))
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString(deterministic=True)


def _convert(model: FreezePredictor, tailored_size: int) -> onnx.ModelProto:
    layers = torch.export.Dim("layers", min=1, max=65536)
    window = torch.export.Dim("window", min=1, max=4096)
    # Odd example sizes: 1 or 2 would be taken for constants.
    example = [torch.randn(3, 7, tailored_size), torch.tensor([7, 4, 2])]
    inputs, named = [HISTORY, LENGTHS], {}
    shapes: dict[str, dict[int, torch.export.Dim]] = {"history": {0: layers, 1: window}, "lengths": {0: layers}}
    if model.positional:
        named = {"position": torch.tensor([0.0, 0.5, UNKNOWN_POSITION])}
        inputs, shapes = [*inputs, POSITION], shapes | {"position": {0: layers}}
    if model.reads_loss:
        named["loss"] = torch.rand(3, 7)
        inputs, shapes = [*inputs, LOSS], shapes | {"loss": {0: layers, 1: window}}
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # notes of the exporter on its own internals
        program = torch.onnx.export(
            model.eval(),
            tuple(example),
            kwargs=named,
            dynamo=True,
            input_names=inputs,
            output_names=[CONFIDENCE, ATTENTION],
            dynamic_shapes=shapes,
            external_data=False,
            verbose=False,
        )
        if program is None:
            raise PredictorFileError("torch.onnx.export made nothing; expected a program. Update torch and onnxscript.")
        # Without going through a file, the weights would still be kept outside of the model.
        program.save(str(Path(folder) / "predictor.onnx"), external_data=False)
        return onnx.load(Path(folder) / "predictor.onnx")


def _remove_traces(proto: onnx.ModelProto) -> None:
    """Remove stack traces, which hold paths of this machine."""
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        del value.metadata_props[:]
    del proto.graph.metadata_props[:]
    del proto.metadata_props[:]


def _make_optional(graph: onnx.GraphProto, name: str, unknown: float, axes: int) -> None:
    """Give an input a default of one value, which the graph repeats for the first `axes` axes of the history."""
    (value,) = (value for value in graph.input if value.name == name)
    shape, given = f"optional_{name}_shape", f"{name}_of_layers"
    for axis in range(axes):
        value.type.tensor_type.shape.dim[axis].dim_param = f"optional_{name}_{axis}"  # 1 in the default
    graph.initializer.append(onnx.numpy_helper.from_array(np.full((1,) * axes, unknown, np.float32), name))
    for node in graph.node:
        node.input[:] = [given if used == name else used for used in node.input]
    graph.node.insert(0, onnx.helper.make_node("Shape", [HISTORY], [shape], start=0, end=axes))
    graph.node.insert(1, onnx.helper.make_node("Expand", [name, shape], [given]))


def compact(source: str | os.PathLike[str], path: str | os.PathLike[str], name: str) -> float:
    """Write a copy of a predictor file with weights of 8 bits: a quarter of the size, and nearly the same answers.

    Matrices become int8 with one scale per column. The graph multiplies them out (`DequantizeLinear`, a standard
    operator) and computes in float32 as before, so a decision takes as long. The copy cannot be trained further.

    Args:
        source: A predictor file.
        path: The file to write; replaced only when all checks have passed.
        name: Name of the new predictor.

    Returns:
        The largest absolute difference of confidences, on random histories.

    Raises:
        PredictorFileError: If `source` is no predictor, or the answers differ by more than 0.1.
        OSError: If the file cannot be written.
    """
    original = Predictor(source, device="cpu")
    proto = onnx.load(source)
    for tensor in list(proto.graph.initializer):
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2 and np.prod(tensor.dims) >= _MATRIX:
            _store_as_int8(proto.graph, tensor)
    del proto.metadata_props[:]
    info = dataclasses.replace(
        original.info, name=name, metrics=original.info.metrics | {"compact_of": original.sha256}
    )
    return _write_checked(
        _finish(proto, info),
        path,
        measure=lambda written: compare(original, written),
        limit=_COMPACT_TOLERANCE,
        failure=f"With weights of 8 bits the answers of {str(source)!r} differ",
        advice="Keep the file as it is.",
    )


def with_info(source: str | os.PathLike[str], info: PredictorInfo, path: str | os.PathLike[str]) -> None:
    """Write a copy of a predictor file with other facts in its metadata, after checking that it answers the same.

    Args:
        source: A predictor file.
        info: The facts.
        path: The file to write, which may be `source`; replaced only when all checks have passed.

    Raises:
        PredictorFileError: If `source` is no predictor.
        OSError: If the file cannot be written.
    """
    original = Predictor(source, device="cpu")
    proto = onnx.load(source)
    del proto.metadata_props[:]
    _write_checked(
        _finish(proto, info),
        path,
        measure=lambda written: compare(original, written),
        limit=0.0,
        failure=f"With other metadata the answers of {str(source)!r} differ",
        advice="Keep the file as it is.",
    )


def _store_as_int8(graph: onnx.GraphProto, tensor: onnx.TensorProto) -> None:
    values = onnx.numpy_helper.to_array(tensor)
    scale = np.maximum(np.abs(values).max(axis=0) / 127.0, np.finfo(np.float32).tiny).astype(np.float32)
    rounded = np.clip(np.rint(values / scale), -127, 127).astype(np.int8)
    name = tensor.name
    graph.initializer.remove(tensor)
    graph.initializer.append(onnx.numpy_helper.from_array(rounded, f"{name}_int8"))
    graph.initializer.append(onnx.numpy_helper.from_array(scale, f"{name}_scale"))
    graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", [f"{name}_int8", f"{name}_scale"], [name], axis=1))


class Question(NamedTuple):
    """Arguments of `Predictor.predict`."""

    history: NDArray[np.float32]
    lengths: NDArray[np.int64]
    position: NDArray[np.float32] | None
    loss: NDArray[np.float32] | None


def parity(model: FreezePredictor, predictor: Predictor, rounds: int = 8, seed: int = 0) -> float:
    """Return the largest absolute difference between PyTorch and ONNX Runtime on random histories."""
    model.eval()

    def differ(question: Question) -> Iterable[NDArray[np.float32]]:
        expected = _ask_network(model, question)
        return [a - e for a, e in zip(predictor.predict(*question), expected, strict=True)]

    return _largest_difference(predictor, differ, rounds, seed)


def compare(one: Predictor, other: Predictor) -> float:
    """Return the largest absolute difference of two predictors' confidences on random histories."""

    def differ(question: Question) -> Iterable[NDArray[np.float32]]:
        return [one.predict(*question).confidence - other.predict(*question).confidence]

    return _largest_difference(one, differ, rounds=8, seed=0)


def _ask_network(model: FreezePredictor, question: Question) -> Prediction:
    with torch.no_grad():
        answer = model(*(None if array is None else torch.from_numpy(array) for array in question))
    return Prediction(*(tensor.numpy() for tensor in answer))


def _largest_difference(
    predictor: Predictor, differ: Callable[[Question], Iterable[NDArray[np.float32]]], rounds: int, seed: int
) -> float:
    """Return the largest absolute value that `differ` yields on random questions; NaN if there is one."""
    rng = np.random.default_rng(seed)
    found = [np.abs(d).max() for _ in range(rounds) for d in differ(_random_question(predictor, rng))]
    # np.max, since Python's max() drops NaN: a network that answers NaN must not pass
    return float(np.max(found))


def _random_question(predictor: Predictor, rng: np.random.Generator) -> Question:
    """Draw a question. Most have what the predictor reads beside weights, known for two thirds of the layers or records."""
    history, lengths = _random_histories(predictor, rng)
    position = None
    if predictor.positional and rng.random() < 0.75:
        position = rng.uniform(size=len(history)).astype(np.float32)
        position[::3] = UNKNOWN_POSITION
    loss = None
    if predictor.reads_loss and rng.random() < 0.75:
        loss = np.exp(rng.normal(size=history.shape[:2])).astype(np.float32)
        loss[:, ::3] = UNKNOWN_LOSS
    return Question(history, lengths, position, loss)


def _random_histories(predictor: Predictor, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    num_layers, window = int(rng.integers(1, 60)), int(rng.integers(1, predictor.info.window + 1))
    walk = rng.normal(size=(num_layers, window, predictor.info.tailored_size)) * 10.0 ** rng.uniform(-4, 0)
    history = (walk.cumsum(axis=1) + rng.normal(size=(num_layers, 1, 1))).astype(np.float32)
    history[1:2] = 0.0  # a layer that starts at zero, like the last norm of many residual blocks
    return history, rng.integers(1, window + 1, num_layers)


_OTHER_BASE = "Continue from a file that smartfrz-build train made, or train from scratch."


def restore(path: str | os.PathLike[str]) -> FreezePredictor:
    """Read the network of a predictor file, after comparing its answers with the file's.

    Args:
        path: A file that `export` wrote.

    Returns:
        The network, float32, in eval mode; its `state_dict` equals that of the network that was exported.

    Raises:
        PredictorFileError: If the file is no predictor, or its weights do not fit such a network, for example because it
            was quantised or made by other software.
    """
    predictor = Predictor(path, device="cpu")
    failure = f"The weights in {str(path)!r} cannot be read back into a network to be trained"
    try:
        model = FreezePredictor(predictor.info.tailored_size, predictor.info.representation)
        found = _read_weights(onnx.load(path).graph)
        model.load_state_dict({name: torch.from_numpy(values.copy()) for name, values in found.items()})
        difference = parity(model, predictor)
    except (RuntimeError, TypeError, ValueError) as error:
        raise PredictorFileError(f"{failure} ({error}). {_OTHER_BASE}") from error
    if not difference <= TOLERANCE:
        raise PredictorFileError(f"{failure}: the answers differ by {difference:.2g}. {_OTHER_BASE}")
    return model.eval()


def _read_weights(graph: onnx.GraphProto) -> dict[str, NDArray[np.float32]]:
    """Recover the state_dict that was exported; the exporter keeps most names and folds the rest.

    A linear layer on a matrix keeps the names of weight and bias. On a batch of matrices it becomes `MatMul` with a
    nameless transposed weight, and `Add` with the bias.
    """
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    state = {name: value for name, value in values.items() if name.endswith((".weight", ".bias"))}
    made_by = {output: node for node in graph.node for output in node.output}
    for add in (node for node in graph.node if node.op_type == "Add"):
        for bias, product in (add.input, add.input[::-1]):
            before = made_by.get(product)
            if bias in state and before is not None and before.op_type == "MatMul" and before.input[1] in values:
                state[bias.replace(".bias", ".weight")] = values[before.input[1]].T
    return state

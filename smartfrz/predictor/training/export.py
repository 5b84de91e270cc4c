"""A trained predictor to one ONNX file that says all about itself, and back, to train it further."""

import dataclasses
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
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
    ENCODING_SIZE,
    HISTORY,
    KEYS,
    LENGTHS,
    PAST_KEYS,
    PAST_VALUES,
    POSITION,
    UNKNOWN_POSITION,
    VALUES,
    PredictorInfo,
    seal,
)
from smartfrz.predictor.runtime import Prediction, Predictor
from smartfrz.predictor.sorting import replace_sorts
from smartfrz.predictor.training.model import FreezePredictor

TOLERANCE = 1e-5
_MATRIX = 1024  # values from which a matrix is worth storing in 8 bits
_COMPACT_TOLERANCE = 0.1


def export(model: FreezePredictor, info: PredictorInfo, path: str | os.PathLike[str]) -> float:
    """Write the predictor file, after comparing ONNX Runtime's answers with PyTorch's.

    Args:
        model: The trained network.
        info: What goes into the metadata.
        path: The ONNX file; replaced only when all checks have passed.

    Returns:
        The largest absolute difference between the two runtimes, at most 1e-5.

    Raises:
        PredictorFileError: If the exported file answers differently from the network.
        OSError: If the file cannot be written.
    """
    return _write(
        serialise(model, info),
        path,
        difference=lambda written: parity(model, written),
        most=TOLERANCE,
        failure="The exported predictor differs from the trained network",
        advice="Check the versions of torch, onnx and onnxruntime.",
    )


def _write(
    content: bytes,
    path: str | os.PathLike[str],
    *,
    difference: Callable[[Predictor], float],
    most: float,
    failure: str,
    advice: str,
) -> float:
    """Write a predictor file, and keep it if its answers differ by no more than allowed; by how much they do."""
    with replacing(path) as temporary:
        temporary.write_bytes(seal(content))
        found = difference(Predictor(temporary, device="cpu"))
        if not found <= most:  # NaN neither
            raise PredictorFileError(f"{failure} by up to {found:.2g}; expected at most {most}. {advice}")
    return found


def serialise(model: FreezePredictor, info: PredictorInfo) -> bytes:
    """The ONNX file's content, with an empty checksum."""
    layers = torch.export.Dim("layers", min=1, max=65536)
    window = torch.export.Dim("window", min=1, max=4096)
    model = model.eval()
    # Odd example sizes: 1 or 2 would be taken for constants.
    example = [torch.randn(3, 7, info.tailored_size), torch.tensor([7, 4, 2])]
    inputs, outputs = [HISTORY, LENGTHS], [CONFIDENCE, ATTENTION]
    shapes: dict[str, dict[int, torch.export.Dim]] = {"history": {0: layers, 1: window}, "lengths": {0: layers}}
    if model.incremental:
        past = torch.export.Dim("past", min=0, max=4096)
        example += [torch.randn(3, 5, ENCODING_SIZE), torch.randn(3, 5, ENCODING_SIZE)]
        inputs, outputs = [*inputs, PAST_KEYS, PAST_VALUES], [*outputs, KEYS, VALUES]
        shapes |= {"past_keys": {0: layers, 1: past}, "past_values": {0: layers, 1: past}}
    named = {}
    if model.positional:
        named = {"position": torch.tensor([0.0, 0.5, UNKNOWN_POSITION])}
        inputs, shapes = [*inputs, POSITION], shapes | {"position": {0: layers}}
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # the exporter's notes on its own internals
        program = torch.onnx.export(
            model,
            tuple(example),
            kwargs=named,
            dynamo=True,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=shapes,
            external_data=False,
            verbose=False,
        )
        if program is None:
            raise PredictorFileError("torch.onnx.export made nothing; expected a program. Update torch and onnxscript.")
        # Straight from memory the weights would still be held outside of the model.
        program.save(str(Path(folder) / "predictor.onnx"), external_data=False)
        proto = onnx.load(Path(folder) / "predictor.onnx")
    for node in proto.graph.node:
        del node.metadata_props[:]  # stack traces with paths of this machine
        node.doc_string = ""
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        del value.metadata_props[:]
    del proto.graph.metadata_props[:]
    del proto.metadata_props[:]
    replace_sorts(proto.graph)
    if model.incremental:
        none = np.zeros((1, 0, ENCODING_SIZE), np.float32)
        _make_optional(proto.graph, {PAST_KEYS: none, PAST_VALUES: none})
    if model.positional:
        _make_optional(proto.graph, {POSITION: np.full(1, UNKNOWN_POSITION, np.float32)})
    proto.graph.name = "predictor"
    proto.producer_version = ""  # the same weights give the same file under any patch release
    onnx.helper.set_model_props(proto, dict(sorted(info.to_metadata().items())))
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString(deterministic=True)


def _make_optional(graph: onnx.GraphProto, defaults: dict[str, NDArray[np.float32]]) -> None:
    """Give inputs a default: one row, which is repeated for any number of layers."""
    nodes = [onnx.helper.make_node("Shape", [HISTORY], ["optional_layers"], start=0, end=1)]
    ones = onnx.numpy_helper.from_array(
        np.ones(len(next(iter(defaults.values())).shape) - 1, np.int64), "optional_ones"
    )
    graph.initializer.append(ones)
    nodes.append(onnx.helper.make_node("Concat", ["optional_layers", ones.name], ["optional_shape"], axis=0))
    for name, default in defaults.items():
        (value,) = (value for value in graph.input if value.name == name)
        value.type.tensor_type.shape.dim[0].dim_param = "optional_layers"  # 1 in the default
        graph.initializer.append(onnx.numpy_helper.from_array(default, name))
        for node in graph.node:
            node.input[:] = [f"{name}_of_layers" if used == name else used for used in node.input]
        nodes.append(onnx.helper.make_node("Expand", [name, "optional_shape"], [f"{name}_of_layers"]))
    graph.node.reverse()
    graph.node.extend(reversed(nodes))
    graph.node.reverse()


def compact(source: str | os.PathLike[str], path: str | os.PathLike[str], name: str) -> float:
    """Write a predictor file again with weights of 8 bits: a quarter of the size, and nearly the same answers.

    Matrices become int8 with one scale a column; the graph multiplies them out (`DequantizeLinear`, a standard
    operator) and computes in float32 as before, so that a decision takes as long. Such a file cannot be trained further.

    Args:
        source: A predictor file.
        path: The file to make; replaced only when all checks have passed.
        name: Its name.

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
    onnx.helper.set_model_props(proto, dict(sorted(info.to_metadata().items())))
    onnx.checker.check_model(proto, full_check=True)
    return _write(
        proto.SerializeToString(deterministic=True),
        path,
        difference=lambda written: _difference(original, written),
        most=_COMPACT_TOLERANCE,
        failure=f"With weights of 8 bits the answers of {str(source)!r} differ",
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


def _difference(one: Predictor, other: Predictor) -> float:
    """Largest difference of two predictors' confidences on random histories."""
    return _largest(
        one.predict(*question).confidence - other.predict(*question).confidence
        for question in _random_questions(one, rounds=8, seed=0)
    )


def parity(model: FreezePredictor, predictor: Predictor, rounds: int = 8, seed: int = 0) -> float:
    """Largest absolute difference between PyTorch and ONNX Runtime on random histories."""

    def differences() -> Iterator[NDArray[np.float32]]:
        for history, lengths, position in _random_questions(predictor, rounds, seed):
            placed = {} if position is None else {"position": torch.from_numpy(position)}
            with torch.no_grad():
                expected = model.eval()(torch.from_numpy(history), torch.from_numpy(lengths), **placed)
            answers = predictor.predict(history, lengths, position)
            yield from (a - e.numpy() for a, e in zip(answers, expected, strict=True))
            if predictor.incremental:
                yield from (a - b for a, b in zip(_advanced(predictor, history, lengths), answers, strict=True))

    return _largest(differences())


class _Question(NamedTuple):
    """Arguments of `Predictor.predict`."""

    history: NDArray[np.float32]
    lengths: NDArray[np.int64]
    position: NDArray[np.float32] | None


def _random_questions(predictor: Predictor, rounds: int, seed: int) -> Iterator[_Question]:
    """What a predictor can be asked; if it reads positions, most have them, known for some of the layers."""
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        history, lengths = _random_histories(predictor, rng)
        position = None
        if predictor.positional and rng.random() < 0.75:
            position = rng.uniform(size=len(history)).astype(np.float32)
            position[::3] = UNKNOWN_POSITION
        yield _Question(history, lengths, position)


def _random_histories(predictor: Predictor, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    num_layers, window = int(rng.integers(1, 60)), int(rng.integers(1, predictor.info.window + 1))
    walk = rng.normal(size=(num_layers, window, predictor.info.tailored_size)) * 10.0 ** rng.uniform(-4, 0)
    history = (walk.cumsum(axis=1) + rng.normal(size=(num_layers, 1, 1))).astype(np.float32)
    history[1:2] = 0.0  # a layer that starts at zero, as the last norm of many residual blocks
    return history, rng.integers(1, window + 1, num_layers)


def _largest(differences: Iterable[NDArray[np.float32]]) -> float:
    """Largest absolute value; NaN if there is one."""
    # np.max, since Python's max() drops NaN: a network that answers NaN must not pass
    return float(np.max([np.abs(difference).max() for difference in differences]))


def _advanced(predictor: Predictor, history: NDArray[np.float32], lengths: NDArray[np.int64]) -> Prediction:
    """The answer to the newest record, the others fed one by one before it."""
    before = 1 if predictor.info.representation == "steps" else 0
    kept = np.zeros((2, len(history), 0, ENCODING_SIZE), np.float32)
    window = history.shape[1]
    for now in range(before, window):
        # Lengths as they were then; padding has none, and any will do.
        then = np.clip(lengths - (window - now - 1), 1, now + 1)
        answer = predictor.advance(np.ascontiguousarray(history[:, now - before : now + 1]), kept[0], kept[1], then)
        kept = np.concatenate([kept, np.stack([answer.keys, answer.values])], axis=2)
    return Prediction(answer.confidence, answer.attention) if window > before else predictor.predict(history, lengths)


def restore(path: str | os.PathLike[str]) -> FreezePredictor:
    """The network in a predictor file, in eval mode, after comparing its answers with the file's.

    Args:
        path: A file that `export` wrote, by any version of it.

    Returns:
        The network, float32; its `state_dict` is that of the network that was exported.

    Raises:
        PredictorFileError: If the file is no predictor, or its weights are not those of such a network: it was quantised,
            say, or made by other software.
    """
    predictor = Predictor(path, device="cpu")
    info = predictor.info
    model = FreezePredictor(info.tailored_size, info.representation)
    found = _weights(onnx.load(path).graph)
    try:
        model.load_state_dict({name: torch.from_numpy(values.copy()) for name, values in found.items()})
        difference = parity(model, predictor)
    except (RuntimeError, TypeError) as error:
        raise PredictorFileError(f"{_not_restored(path)} ({error}). {_OTHER_BASE}") from error
    if not difference <= TOLERANCE:
        raise PredictorFileError(f"{_not_restored(path)}: the answers differ by {difference:.2g}. {_OTHER_BASE}")
    return model.eval()


_OTHER_BASE = "Continue from a file that smartfrz-build train made, or train from scratch."


def _not_restored(path: str | os.PathLike[str]) -> str:
    return f"The weights in {str(path)!r} cannot be read back into a network to be trained"


def _weights(graph: onnx.GraphProto) -> dict[str, NDArray[np.float32]]:
    """The state_dict that was exported; the exporter keeps most names, and folds the rest.

    A linear layer on a matrix keeps both names. On a batch of them it becomes `MatMul` with a nameless transposed weight,
    and `Add` with the bias. The first layer of `Motion.through` becomes a `Split` of the weight, one part of which is
    added to the nameless bias as a column.
    """
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    state = {name: value for name, value in values.items() if name.endswith((".weight", ".bias"))}
    made_by = {output: node for node in graph.node for output in node.output}
    for add in graph.node:
        if add.op_type != "Add":
            continue
        for one, other in (add.input, add.input[::-1]):
            before = made_by.get(other)
            if one not in values or before is None:
                continue
            if before.op_type == "MatMul" and one in state and before.input[1] in values:
                state[one.replace(".bias", ".weight")] = values[before.input[1]].T
            elif before.op_type == "Split" and before.input[0] in state:
                state[before.input[0].replace(".weight", ".bias")] = values[one].ravel()
    return state

"""Export to a model repository of Triton Inference Server: `NAME/config.pbtxt` and `NAME/1/model.onnx`."""

import json
import os
import re
from pathlib import Path

from smartfrz.errors import RegistryError
from smartfrz.files import replacing
from smartfrz.predictor.contract import ATTENTION, CONFIDENCE, HISTORY, LENGTHS, PREFIX, PredictorInfo
from smartfrz.predictor.runtime import Predictor
from smartfrz.zoo import registry

MAX_LAYERS = 1024  # in a batch; a client splits a larger request
_QUEUE_DELAY = 2000  # microseconds
_FACTS = ("window", "tailored_size", "representation", "threshold", "record_fraction", "min_records")


def export(path: str | os.PathLike[str], folder: Path, *, name: str = "", max_layers: int = MAX_LAYERS) -> Path:
    """Write a predictor into a model repository.

    Args:
        path: The predictor file; its contract is checked.
        folder: The repository, which is created if it does not exist. Other models in it stay as they are.
        name: Name of the model there; '' for the one in the file.
        max_layers: Maximum number of layers in a batch, 0 for no batching.

    Returns:
        The model's folder.

    Raises:
        PredictorFileError: If the file cannot be used.
        RegistryError: If the name is not allowed.
        OSError: If something cannot be written.
    """
    predictor = Predictor(path, device="cpu")
    name = name or predictor.info.name
    if not re.fullmatch(registry.NAME, name):  # it becomes a folder, and may come from an untrusted file
        raise RegistryError(
            f"{name!r} is no name of a model; expected {registry.NAME_EXPECTED}. Pass another one with --name."
        )
    place = folder / name
    # The configuration comes last, since Triton may be polling the folder.
    with replacing(place / "1" / "model.onnx") as temporary:
        temporary.write_bytes(Path(path).read_bytes())
    with replacing(place / "config.pbtxt") as temporary:
        temporary.write_text(config(predictor.info, predictor.sha256, name, max_layers), encoding="utf-8")
    return place


def config(info: PredictorInfo, sha256: str, name: str, max_layers: int = MAX_LAYERS) -> str:
    """Return the model configuration as protobuf text.

    Triton's batch dimension is the layers: the answer about one layer does not depend on the others, so Triton may
    combine requests from several trainings if their windows are equally long. `position` and `loss` are left out, since
    Triton's ONNX Runtime backend accepts no optional inputs: they are unknown to the predictor.

    Args:
        info: The predictor's metadata.
        sha256: SHA-256 of the predictor's file.
        name: Name of the model and of its folder.
        max_layers: Maximum number of layers in a batch, and so in a request. 0 for no batching.

    Returns:
        With batching, a request's `lengths` is int64 `[layers, 1]`, since Triton's inputs need a dimension besides the
        batch. Without, it is `[layers]`, as in the file.
    """
    batched = max_layers > 0
    rows = [] if batched else [-1]
    inputs = [_tensor(HISTORY, "FP32", [*rows, -1, info.tailored_size])]
    inputs.append(
        _tensor(LENGTHS, "INT64", [1], "reshape { shape: [ ] }") if batched else _tensor(LENGTHS, "INT64", rows)
    )
    outputs = [_tensor(CONFIDENCE, "FP32", [*rows, 2]), _tensor(ATTENTION, "FP32", [*rows, -1])]
    facts = {PREFIX + key: str(getattr(info, key)) for key in _FACTS} | {PREFIX + "sha256": sha256}
    lines = [
        f"name: {json.dumps(name)}",
        'backend: "onnxruntime"',
        'default_model_filename: "model.onnx"',
        f"max_batch_size: {max_layers}",
        *(f"input {{ {tensor} }}" for tensor in inputs),
        *(f"output {{ {tensor} }}" for tensor in outputs),
        *([f"dynamic_batching {{ max_queue_delay_microseconds: {_QUEUE_DELAY} }}"] if batched else []),
        *(f'parameters {{ key: "{k}" value {{ string_value: {json.dumps(v)} }} }}' for k, v in facts.items()),
    ]
    return "\n".join(lines) + "\n"


def _tensor(name: str, dtype: str, dims: list[int], more: str = "") -> str:
    return f'name: "{name}" data_type: TYPE_{dtype} dims: [ {", ".join(map(str, dims))} ] {more}'.rstrip()

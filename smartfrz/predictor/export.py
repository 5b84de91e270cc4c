"""A trained predictor to one ONNX file that says all about itself."""

import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch

from smartfrz.errors import PredictorFileError
from smartfrz.files import replacing
from smartfrz.predictor.contract import ATTENTION, CONFIDENCE, HISTORY, LENGTHS, PredictorInfo, seal
from smartfrz.predictor.model import FreezePredictor
from smartfrz.predictor.runtime import Predictor

TOLERANCE = 1e-5


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
    with replacing(path) as temporary:
        temporary.write_bytes(seal(serialise(model, info)))
        difference = parity(model, Predictor(temporary, device="cpu"))
        if not difference <= TOLERANCE:
            raise PredictorFileError(
                f"The exported predictor differs from the trained network by {difference:.2g}; expected at most "
                f"{TOLERANCE}. Check the versions of torch, onnx and onnxruntime."
            )
    return difference


def serialise(model: FreezePredictor, info: PredictorInfo) -> bytes:
    """The ONNX file's content, with an empty checksum."""
    layers = torch.export.Dim("layers", min=1, max=65536)
    window = torch.export.Dim("window", min=1, max=4096)
    model = model.eval()
    # Odd example sizes: 1 or 2 would be taken for constants.
    example = torch.randn(3, 7, info.tailored_size), torch.tensor([7, 4, 2])
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # the exporter's notes on its own internals
        program = torch.onnx.export(
            model,
            example,
            dynamo=True,
            input_names=[HISTORY, LENGTHS],
            output_names=[CONFIDENCE, ATTENTION],
            dynamic_shapes={"history": {0: layers, 1: window}, "lengths": {0: layers}},
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
    proto.graph.name = "predictor"
    proto.producer_version = ""  # the same weights give the same file under any patch release
    onnx.helper.set_model_props(proto, dict(sorted(info.to_metadata().items())))
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString(deterministic=True)


def parity(model: FreezePredictor, predictor: Predictor, rounds: int = 8, seed: int = 0) -> float:
    """Largest absolute difference between PyTorch and ONNX Runtime on random histories."""
    rng = np.random.default_rng(seed)
    worst = 0.0
    for _ in range(rounds):
        num_layers, window = int(rng.integers(1, 60)), int(rng.integers(1, predictor.info.window + 1))
        walk = rng.normal(size=(num_layers, window, predictor.info.tailored_size)) * 10.0 ** rng.uniform(-4, 0)
        history = (walk.cumsum(axis=1) + rng.normal(size=(num_layers, 1, 1))).astype(np.float32)
        history[1:2] = 0.0  # a layer that starts at zero, as the last norm of many residual blocks
        lengths = rng.integers(1, window + 1, num_layers)
        with torch.no_grad():
            expected = model.eval()(torch.from_numpy(history), torch.from_numpy(lengths))
        answers = predictor.predict(history, lengths)
        # np.max, since Python's max() drops NaN: a network that answers NaN must not pass
        worst = np.max([worst, *(np.abs(a - e.numpy()).max() for a, e in zip(answers, expected, strict=True))])
    return float(worst)

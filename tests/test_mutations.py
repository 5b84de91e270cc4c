"""Predictors and recordings that were changed on purpose, with checksums that fit: refused, or used within the contract."""

import copy
import random

import numpy as np
import pytest
from builder_fixtures import recorded_run

onnx = pytest.importorskip("onnx")
pytest.importorskip("pyarrow")

from smartfrz.dataset_builder.labelling import labelled_runs  # noqa: E402
from smartfrz.dataset_builder.labels import LabelRule  # noqa: E402
from smartfrz.dataset_builder.storage import read_run, write_run  # noqa: E402
from smartfrz.errors import DatasetFormatError, PredictionError, PredictorFileError  # noqa: E402
from smartfrz.predictor.contract import find_invalid, seal  # noqa: E402
from smartfrz.predictor.runtime import Predictor  # noqa: E402
from smartfrz.zoo import embedded_folder  # noqa: E402

NUMBERS = [np.nan, np.inf, -np.inf, -1.0, 0.0, 0.5, 1.0, 1.5, 3e38, -1e-9, 2.0**62, -(2.0**63)]
TEXTS = ["", "nan", "-1", "1e999", "0", "99999999999", "x" * 10**5, "[]"]


def with_other_bytes(content, rng):
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def cast(value, dtype):
    """The value as an array of this dtype; integers that are too large become the largest one."""
    if dtype.kind in "iu":
        value = 0 if np.isnan(value) else min(max(value, np.iinfo(dtype).min), np.iinfo(dtype).max)
        return np.array(int(value) if np.isfinite(value) else 0, dtype)
    with np.errstate(over="ignore"):
        return np.array(value, dtype)


def with_other_graph(content, rng):
    model = onnx.load_from_string(content)
    graph, node, kind = model.graph, rng.choice(model.graph.node), rng.randrange(6)
    if kind == 0:
        node.op_type = rng.choice([other.op_type for other in graph.node])
    elif kind == 1:
        names = [name for other in graph.node for name in other.output] + ["history", "lengths"]
        node.input[rng.randrange(len(node.input))] = rng.choice(names)
    elif kind == 2:
        tensor = rng.choice(graph.initializer)
        array = onnx.numpy_helper.to_array(tensor)
        changed = np.full(array.shape, cast(rng.choice([0, -1, 2, 1e9, 2**31]), array.dtype))
        tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
    elif kind == 3:
        rng.choice([a for other in graph.node for a in other.attribute]).i = rng.choice([0, -1, 5, 2**40])
    elif kind == 4:
        graph.node.remove(node)
    else:
        rng.choice([p for p in model.metadata_props if p.key != "smartfrz.sha256"]).value = rng.choice(TEXTS)
    return model.SerializeToString()


def test_a_predictor_under_a_new_seal_is_refused_or_answers_within_the_contract(tmp_path):
    rng = random.Random(0)
    original = embedded_folder() / "smartfrz-tiny.onnx"
    content = original.read_bytes()
    info = Predictor(original, device="cpu").info
    path = tmp_path / "mutated.onnx"
    history = np.random.default_rng(0).normal(size=(3, info.window, info.tailored_size)).cumsum(1).astype(np.float32)
    outcomes = set()
    for _ in range(60):
        path.write_bytes(seal(rng.choice([with_other_bytes, with_other_graph])(content, rng)))
        try:
            predictor = Predictor(path, device="cpu")
        except PredictorFileError:
            outcomes.add("refused")
            continue
        window = predictor.info.window
        try:
            answer = predictor.predict(history[:, :window], np.minimum([window, 5, 9], window))
        except PredictionError:
            outcomes.add("no answer")
            continue
        assert answer.confidence.shape == (3, 2)
        assert np.isnan(answer.confidence[find_invalid(*answer)]).all()  # which no threshold is below
        outcomes.add("answered")
    assert {"refused", "answered"} <= outcomes


def mutate(run, rng):
    """Change one array, one fact or the names of the layers of a run."""
    kind = rng.choice(["array"] * 3 + ["fact", "layers"])
    if kind == "array":
        array = getattr(run, rng.choice(["step", "progress", "loss", "learning_rate", "cka", "weights"]))
        value = cast(rng.choice(NUMBERS), array.dtype) if rng.random() < 0.7 else rng.choice(array.flat)
        array[... if rng.random() < 0.5 else np.unravel_index(rng.randrange(array.size), array.shape)] = value
    elif kind == "fact":
        inner, keys = run.facts, rng.choice([("name",), ("architecture",), ("recipe", "data"), ("accuracies",)])
        inner = inner if len(keys) == 1 else inner[keys[0]]
        inner[keys[-1]] = rng.choice([*NUMBERS, *TEXTS, None, True, 10**400, "../../x", "a\x1b[2J", "\ud800", [], {}])
    elif rng.random() < 0.5:
        run.layers[rng.randrange(len(run.layers))] = rng.choice([run.layers[0], "", "../../x", "a\x1b[2J", "a\nb"])
    else:
        rng.shuffle(run.layers)


def test_a_recording_under_a_new_checksum_is_refused_or_can_be_trained_on(tmp_path):
    rng = random.Random(0)
    original = recorded_run(layers=3, timestamps=14, pool=4)
    path = tmp_path / "run.parquet"
    outcomes = set()
    for _ in range(100):
        run = copy.deepcopy(original)
        mutate(run, rng)
        write_run(path, run)
        try:
            read = read_run(path)
        except DatasetFormatError:
            outcomes.add("refused")
            continue
        for name in ("progress", "loss", "learning_rate", "weights"):
            assert np.isfinite(getattr(read, name)).all(), name
        assert len(labelled_runs([read], LabelRule(), 6)) == 1
        outcomes.add("read")
    assert outcomes == {"refused", "read"}

import contextlib
import hashlib
import importlib.metadata
import itertools
import logging
import os
import pickle
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from smartfrz import zoo  # noqa: E402
from smartfrz.errors import MissingDependencyError, PredictionError, PredictorFileError  # noqa: E402
from smartfrz.predictor import runtime  # noqa: E402
from smartfrz.predictor.contract import PREFIX, seal  # noqa: E402
from smartfrz.predictor.runtime import Predictor  # noqa: E402

HISTORY = np.zeros((3, 5, 64), np.float32)
LENGTHS = np.array([5, 1, 3])

# history, lengths, message
BAD_INPUTS = {
    "tailored size": (HISTORY[..., :63], LENGTHS, r"shape \(3, 5, 63\), but .*'tiny' reads \[layers, 1 to 10, 64\]"),
    "window": (np.zeros((3, 11, 64), np.float32), LENGTHS, r"shape \(3, 11, 64\).*1 to 10, 64\]. Make the Weight"),
    "no window": (HISTORY[:, :0], LENGTHS, r"shape \(3, 0, 64\)"),
    "one layer's history": (HISTORY[0], LENGTHS, r"shape \(5, 64\)"),
    "number of lengths": (HISTORY, LENGTHS[:2], r"lengths is \[5, 1\] .* one value in 1 to 5 for each layer"),
    "length 0": (HISTORY, np.array([5, 0, 3]), r"lengths is \[5, 0, 3\]"),
    "length over the window": (HISTORY, np.array([5, 6, 3]), r"lengths is \[5, 6, 3\]"),
    "history dtype": (HISTORY.astype(np.float64), LENGTHS, "are float64 and int64; expected float32 and int64. Use"),
    "lengths dtype": (HISTORY, LENGTHS.astype(np.int32), "are float32 and int32; expected float32 and int64. Use"),
}


@pytest.fixture(scope="module")
def predictor(predictor_file):
    return Predictor(predictor_file, device="cpu")


@pytest.fixture(scope="module")
def content(predictor_file):
    return predictor_file.read_bytes()


@pytest.fixture(scope="module")
def session(content):
    return runtime.open_session(content, "tiny.onnx", "cpu", 1)


@pytest.fixture
def write(tmp_path):
    """Writes bytes, or a model whose checksum is then made right, and returns the path."""

    def write(what):
        path = tmp_path / "altered.onnx"
        if not isinstance(what, bytes):
            for entry in what.metadata_props:
                if entry.key == PREFIX + "sha256":
                    entry.value = "0" * 64
            what = seal(what.SerializeToString(deterministic=True))
        path.write_bytes(what)
        return path

    return write


def with_metadata(content, **changes):
    model = onnx.load_from_string(content)
    values = {p.key: p.value for p in model.metadata_props} | {PREFIX + k: v for k, v in changes.items()}
    onnx.helper.set_model_props(model, {k: v for k, v in values.items() if v is not None})
    return model


def identity_model(shape=("n", 4)):
    value = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", value[:1], value[1:])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


def test_what_a_file_says_of_itself(predictor, tiny_info, predictor_file):
    assert predictor.info == tiny_info
    assert predictor.path == predictor_file
    assert predictor.device == "cpu"
    assert predictor.seal.encode() in predictor_file.read_bytes()
    assert predictor.sha256 == hashlib.sha256(predictor_file.read_bytes()).hexdigest()
    assert repr(predictor) == "Predictor('tiny', window=10, tailored_size=64, threshold=0.5, device='cpu')"


def test_answers_have_the_shapes_of_the_contract(predictor):
    rng = np.random.default_rng(0)
    history = rng.normal(size=HISTORY.shape).astype(np.float32)
    confidence, attention = predictor.predict(history, LENGTHS)
    assert confidence.dtype == attention.dtype == np.float32
    assert confidence.shape == (3, 2)
    assert attention.shape == (3, 5)
    np.testing.assert_allclose(confidence.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(attention.sum(1), 1, atol=1e-6)
    for row, length in zip(attention, LENGTHS, strict=True):
        assert (row[: 5 - length] == 0).all()
        assert (row[5 - length :] > 0).all()


def test_asking_does_not_change_the_input(predictor):
    history, lengths = HISTORY + 1, LENGTHS.copy()
    predictor.predict(history, lengths)
    assert (history == 1).all()
    np.testing.assert_array_equal(lengths, LENGTHS)


@pytest.mark.parametrize("filling", [0.0, 1.0, -1e6, 1e6])
def test_what_stands_in_the_padding_does_not_matter(predictor, filling):
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(4, 3, 64)).cumsum(axis=1).astype(np.float32)
    alone = predictor.predict(rows, np.full(4, 3))
    padded = np.concatenate([np.full((4, 5, 64), filling, np.float32), rows], axis=1)
    answers = predictor.predict(padded, np.full(4, 3))
    # Other shapes are summed in another order: float32 rounding.
    np.testing.assert_allclose(answers.confidence, alone.confidence, atol=1e-6)
    np.testing.assert_allclose(answers.attention[:, 5:], alone.attention, atol=1e-6)
    assert (answers.attention[:, :5] == 0).all()


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs(predictor, case):
    history, lengths, message = BAD_INPUTS[case]
    with pytest.raises(ValueError, match=message):
        predictor.predict(history, lengths)


def test_one_thread_that_does_not_spin(content):
    options = runtime.open_session(content, "tiny.onnx", "cpu", 1).get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.inter_op_num_threads == 1
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


@pytest.mark.parametrize(("options", "expected"), [({}, 1), ({"num_threads": 2}, 2)])
def test_the_number_of_threads_reaches_onnxruntime(predictor_file, monkeypatch, options, expected):
    opened, real = [], ort.InferenceSession
    monkeypatch.setattr(ort, "InferenceSession", lambda *a, **k: opened.append(real(*a, **k)) or opened[-1])
    Predictor(predictor_file, device="cpu", **options)
    assert [session.get_session_options().intra_op_num_threads for session in opened] == [expected]


def test_providers(content, predictor_file):
    assert runtime.open_session(content, "tiny.onnx", "cpu", 1).get_providers() == ["CPUExecutionProvider"]
    auto = runtime.open_session(content, "tiny.onnx", "auto", 1)
    cuda = "CUDAExecutionProvider" in auto.get_providers()
    assert Predictor(predictor_file, device="auto").device == ("cuda" if cuda else "cpu")


def test_cuda_where_there_is_none(predictor_file):
    if Predictor(predictor_file, device="auto").device == "cuda":
        pytest.skip("this machine has CUDA")
    with pytest.raises(MissingDependencyError, match=r"device='cuda' was asked for.*smartfrz\[gpu\].*device=\"auto\""):
        Predictor(predictor_file, device="cuda")


@pytest.fixture
def mock_gpu_build(monkeypatch):
    """As if CUDA were compiled in; a session asked for it gets what `behaviour` says. Nothing is said yet."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    runtime.warn_once.cache_clear()
    real = ort.InferenceSession

    def behave(behaviour):
        def session(content, options, providers, **more):
            assert more["enable_fallback"] == 0  # it would print
            if providers[0] == "CPUExecutionProvider":
                return real(content, options, providers=providers)
            name, chosen = providers[0]
            assert (name, chosen["use_tf32"]) == ("CUDAExecutionProvider", "0")
            assert int(chosen["gpu_mem_limit"]) == runtime.MAX_GPU_MEMORY
            return behaviour(real(content, options, providers=["CPUExecutionProvider"]))

        monkeypatch.setattr(ort, "InferenceSession", session)

    return behave


def no_device(session):
    raise RuntimeError("CUDA failure 100: no CUDA-capable device is detected\nand more")


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [(lambda session: session, ""), (no_device, " (CUDA failure 100: no CUDA-capable device is detected)")],
)
def test_mock_gpu_build_without_a_usable_gpu_says_so_once_and_uses_the_cpu(
    mock_gpu_build, behaviour, reason, predictor_file, caplog, capfd
):
    mock_gpu_build(behaviour)
    for _ in range(2):
        assert Predictor(predictor_file).device == "cpu"
    (message,) = caplog.messages
    assert f"cannot use a GPU here{reason}: predictors run on the CPU" in message
    Predictor(predictor_file, device="cpu").predict(HISTORY, LENGTHS)
    assert len(caplog.messages) == 1
    assert capfd.readouterr() == ("", "")
    with pytest.raises(MissingDependencyError, match=r"device='cuda' was asked for, but ONNX Runtime cannot use it"):
        Predictor(predictor_file, device="cuda")


def test_mock_gpu_runs_are_bound_and_in_one_piece(mock_gpu_build, predictor_file, predictor, monkeypatch):
    sessions = []

    class OnGpu:
        """A session that says it runs on a GPU, and counts."""

        def __init__(self, session):
            self._session, self.bound = session, 0
            sessions.append(self)

        def get_providers(self):
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

        def run_with_iobinding(self, *arguments):
            self.bound += 1
            self._session.run_with_iobinding(*arguments)

        def __getattr__(self, name):
            assert name != "run"
            return getattr(self._session, name)

    mock_gpu_build(OnGpu)
    on_cpu = runtime.BoundRun
    monkeypatch.setattr(runtime, "BoundRun", lambda session, device: on_cpu(session, {"cuda": "cpu"}[device]))
    gpu = Predictor(predictor_file)
    assert gpu.device == "cuda"
    history = np.random.default_rng(0).normal(size=(100, 10, 64)).cumsum(1).astype(np.float32)
    lengths = np.full(100, 10)
    answer = gpu.predict(history, lengths)
    assert [session.bound for session in sessions] == [2]  # the first one when it was loaded
    np.testing.assert_allclose(answer.confidence, predictor.predict(history, lengths).confidence, atol=1e-6)


def test_bound_runs_answer_as_plain_ones(predictor, session):
    """On the CPU: there the buffers are its own memory."""
    bound, rng = runtime.BoundRun(session, "cpu"), np.random.default_rng(0)
    for shape in ((3, 5, 64), (3, 5, 64), (4, 10, 64), (2, 1, 64)):
        history = rng.normal(size=shape).astype(np.float32)
        kept, lengths = history.copy(), np.full(shape[0], shape[1])
        answer = bound(["confidence", "attention"], {"history": history, "lengths": lengths})
        for one, other in zip(answer, predictor.predict(history, lengths), strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(history, kept)
        assert bound(["attention"], {"history": history[:, ::-1], "lengths": lengths})[0].shape == shape[:2]
    np.testing.assert_array_equal(history, kept)


def test_bound_runs_take_optional_inputs_or_do_without(loss_predictor_file):
    predictor, rng = Predictor(loss_predictor_file, device="cpu"), np.random.default_rng(0)
    session = runtime.open_session(loss_predictor_file.read_bytes(), "hearing.onnx", "cpu", 1)
    bound, history = runtime.BoundRun(session, "cpu"), rng.normal(size=(3, 5, 64)).cumsum(1).astype(np.float32)
    position, loss = np.linspace(0, 1, 3, dtype=np.float32), np.tile(np.linspace(2, 1, 5, dtype=np.float32), (3, 1))
    answers = []
    for optional in ({"position": position, "loss": loss}, {"position": position}, {"loss": loss}, {}):
        (answer,) = bound(["confidence"], {"history": history, "lengths": LENGTHS} | optional)
        np.testing.assert_array_equal(answer, predictor.predict(history, LENGTHS, **optional).confidence)
        answers.append(answer)
    assert min(np.abs(one - other).max() for one, other in itertools.combinations(answers, 2)) > 1e-5


def test_bound_runs_of_several_threads_do_not_mix(predictor, session):
    bound, rng = runtime.BoundRun(session, "cpu"), np.random.default_rng(0)
    histories, lengths = rng.normal(size=(16, 6, 10, 64)).astype(np.float32), np.full(6, 10)
    expected = [predictor.predict(history, lengths).confidence for history in histories]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda h: bound(["confidence"], {"history": h, "lengths": lengths})[0], histories))
    for one, other in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_unknown_device(predictor_file):
    with pytest.raises(ValueError, match="`device` is 'gpu'; expected 'auto', 'cpu' or 'cuda'"):
        Predictor(predictor_file, device="gpu")


def test_a_missing_file(tmp_path):
    with pytest.raises(PredictorFileError, match=r"none.onnx': No such file or directory. Pass the path of an ONNX"):
        Predictor(tmp_path / "none.onnx")


def test_a_folder(tmp_path):
    with pytest.raises(PredictorFileError, match=r"Is a directory\. Pass the path"):
        Predictor(tmp_path)


@settings(max_examples=25)
@given(st.floats(0, 1, exclude_max=True))
def test_a_truncated_file(tmp_path_factory, content, share):
    path = tmp_path_factory.getbasetemp() / "truncated.onnx"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(PredictorFileError, match=r"truncated.onnx' .*(or is cut|is damaged).*[Cc]opy"):
        Predictor(path)


@settings(max_examples=25)
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_one_altered_byte(tmp_path_factory, content, share, change):
    position = int(share * len(content))
    path = tmp_path_factory.getbasetemp() / "tampered.onnx"
    path.write_bytes(content[:position] + bytes([content[position] ^ change]) + content[position + 1 :])
    with pytest.raises(PredictorFileError, match=r"tampered.onnx' .*(or is cut|is damaged or was altered)"):
        Predictor(path)


def test_a_higher_threshold_written_into_the_metadata_is_noticed(content, write):
    model = with_metadata(content, threshold="0.01")
    with pytest.raises(PredictorFileError, match="is damaged or was altered"):
        Predictor(write(model.SerializeToString()))


def test_a_foreign_onnx_file(write):
    with pytest.raises(PredictorFileError, match=r"is not a SmartFRZ predictor.*smartfrz-build train made"):
        Predictor(write(identity_model().SerializeToString()))


def test_a_foreign_graph_with_our_metadata(content, write):
    model = identity_model()
    model.metadata_props.extend(onnx.load_from_string(content).metadata_props)
    with pytest.raises(PredictorFileError, match=r"contract at 'history': received None, expected tensor\(float\)"):
        Predictor(write(model))


def input_of(model, name="loss"):
    return next(value for value in model.graph.input if value.name == name)


def default_of(model, values):
    """Give the input another default."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "loss")
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(values), "loss"))


def without_loss(model):
    model.graph.input.remove(input_of(model))


def with_required_loss(model):
    model.graph.initializer.remove(next(tensor for tensor in model.graph.initializer if tensor.name == "loss"))


def with_another_input(model):
    model.graph.input.add().CopyFrom(input_of(model))
    model.graph.input[-1].name = "losses"


def with_axes(model, number):
    dim = onnx.TensorShapeProto(dim=[{"dim_param": f"d{i}"} for i in range(number)]).dim
    del input_of(model).type.tensor_type.shape.dim[:]
    input_of(model).type.tensor_type.shape.dim.extend(dim)


def with_integers(model):
    input_of(model).type.tensor_type.elem_type = onnx.TensorProto.INT64


def with_fixed_window(model):
    input_of(model).type.tensor_type.shape.dim[1].dim_value = 1


ODD_LOSSES = {
    "none": (without_loss, r"breaks the predictor contract at 'loss': received None, expected tensor\(float\)"),
    "required": (with_required_loss, "breaks the predictor contract at 'loss': the input has no default; expected an"),
    "two of them": (with_another_input, r"breaks the predictor contract at 'losses'.* no tensors but .*'loss'\]"),
    "one axis": (
        lambda model: with_axes(model, 1),
        r"(ONNX Runtime cannot load|breaks the predictor contract at 'loss')",
    ),
    "sixty axes": (lambda model: with_axes(model, 60), "has a tensor of 60 axes; expected at most 8"),
    "integers": (with_integers, "(ONNX Runtime cannot load|breaks the predictor contract at 'loss')"),
    "a fixed window": (with_fixed_window, r"breaks the predictor contract at 'loss': .*1\].*None is dynamic"),
    "a default of integers": (lambda model: default_of(model, [[0]]), "ONNX Runtime cannot load"),
    "a default of sixty axes": (
        lambda model: default_of(model, np.zeros((1,) * 60, np.float32)),
        "has a constant of 60 axes; expected at most 8",
    ),
    "a default of other sizes": (
        lambda model: default_of(model, np.zeros((3, 7), np.float32)),
        "(cannot be used: on made-up weights|ONNX Runtime cannot load)",
    ),
    "a default of text": (
        lambda model: default_of(model, np.array([["long"]], object)),
        "contains text in tensors",
    ),
}


@pytest.mark.parametrize("case", ODD_LOSSES)
def test_a_graph_whose_loss_is_odd(loss_predictor_file, write, case):
    change, message = ODD_LOSSES[case]
    model = onnx.load(loss_predictor_file)
    change(model)
    with pytest.raises(PredictorFileError, match=message):
        Predictor(write(model), device="cpu")


@pytest.mark.parametrize("representation", ["raw", "trajectory"])
def test_a_graph_with_a_loss_that_its_representation_does_not_read(loss_predictor_file, write, representation):
    model = with_metadata(loss_predictor_file.read_bytes(), representation=representation)
    with pytest.raises(PredictorFileError, match=r"breaks the predictor contract at '(position|loss)'.*no tensors but"):
        Predictor(write(model), device="cpu")


def test_a_graph_that_onnxruntime_cannot_load(content, write):
    model = onnx.load_from_string(content)
    model.graph.node[0].op_type = "Xor"
    with pytest.raises(PredictorFileError, match=r"ONNX Runtime cannot load .*Xor.*update onnxruntime"):
        Predictor(write(model))


def test_a_message_of_onnxruntime_that_is_no_text(content, write):
    """It quotes names from the file; which one it quotes depends on the version of ONNX Runtime."""
    names = {
        name.encode() for node in onnx.load_from_string(content).graph.node for name in (*node.input, *node.output)
    }
    for name in sorted(name for name in names if len(name) > 2):
        start = content.find(name, content.find(name) + 1)
        damaged = content[: start + len(name) - 1] + b"\xfb" + content[start + len(name) :]
        with contextlib.suppress(PredictorFileError):
            Predictor(write(seal(damaged)), device="cpu")


def test_another_format_version(content, write):
    with pytest.raises(PredictorFileError, match="has format_version 2; this version of smartfrz reads 1"):
        Predictor(write(with_metadata(content, format_version="2")))


def test_another_tailored_size_than_the_graph(content, write):
    message = r"contract at 'history': received .*64\]\), expected tensor\(float\) \[None, None, 128\].*Export it"
    with pytest.raises(PredictorFileError, match=message):
        Predictor(write(with_metadata(content, tailored_size="128")))


def test_a_missing_property(content, write):
    with pytest.raises(PredictorFileError, match=r"missing or unreadable metadata property \('smartfrz.window'\)"):
        Predictor(write(with_metadata(content, window=None)))


def test_dimensions_have_to_be_dynamic(content, write):
    model = onnx.load_from_string(content)
    next(v for v in model.graph.input if v.name == "lengths").type.tensor_type.shape.dim[0].dim_value = 3
    with pytest.raises(PredictorFileError, match=r"contract at 'lengths': .*\[3\].*None is dynamic"):
        Predictor(write(model))


def test_providers_are_passed_through(predictor_file, predictor):
    chosen = ["CPUExecutionProvider"]
    for providers in (chosen, [("CPUExecutionProvider", {})], [["CPUExecutionProvider", {}]]):
        loaded = Predictor(predictor_file, providers=providers)
        assert loaded.providers == chosen
        np.testing.assert_array_equal(
            loaded.predict(HISTORY, LENGTHS).confidence, predictor.predict(HISTORY, LENGTHS).confidence
        )
    assert pickle.loads(pickle.dumps(loaded)).providers == chosen
    assert zoo.load("smartfrz-tiny", providers=chosen).providers == chosen
    assert zoo.load(predictor_file, providers=chosen).providers == chosen


def test_providers_that_cannot_be_used_are_named(predictor_file):
    message = r"`providers` names NoExecutionProvider, which the installed build .* does not have; it has .*CPUExec"
    with pytest.raises(MissingDependencyError, match=message):
        Predictor(predictor_file, providers=["NoExecutionProvider", "CPUExecutionProvider"])
    for wrong in ([], "CPUExecutionProvider", [3], [("CPUExecutionProvider",)]):
        with pytest.raises(ValueError, match=r"`providers` is .*; expected a list of execution providers"):
            Predictor(predictor_file, providers=wrong)
    with pytest.raises(ValueError, match="expected one of them: both say where ONNX Runtime runs"):
        Predictor(predictor_file, device="cpu", providers=["CPUExecutionProvider"])


def test_mock_a_provider_that_is_compiled_in_and_cannot_start(predictor_file, monkeypatch):
    ort = runtime.import_onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(
        ort, "InferenceSession", lambda *_, **__: SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    )
    with pytest.raises(MissingDependencyError, match=r"CUDAExecutionProvider, which ONNX Runtime cannot use on this"):
        Predictor(predictor_file, providers=["CUDAExecutionProvider"])


def test_mock_a_provider_that_computes_something_else(predictor_file, monkeypatch):
    ort = runtime.import_onnxruntime()
    monkeypatch.setattr(ort.InferenceSession, "get_providers", lambda self: ["OtherExecutionProvider"])
    chosen = {"providers": ["CPUExecutionProvider"]}
    monkeypatch.setattr(runtime, "_session_of", lambda ort, content, *_: runtime.open_session(content, "x", "cpu", 1))
    assert Predictor(predictor_file, **chosen).providers == ["OtherExecutionProvider"]
    own = Predictor._try_out

    def other(self, file):
        answer = own(self, file)
        return answer._replace(confidence=answer.confidence + np.float32(0.1))

    monkeypatch.setattr(Predictor, "_try_out", other)
    with pytest.raises(
        PredictionError, match=r"OtherExecutionProvider give other .* up to 0\.100 apart .* at most 0\.02"
    ):
        Predictor(predictor_file, **chosen)


def test_mock_another_build_of_onnxruntime_counts(predictor_file, monkeypatch):
    """As onnxruntime-openvino and -directml: the module is there, but no distribution of a name that we know."""

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert Predictor(predictor_file).device == "cpu"


def test_mock_both_builds_of_onnxruntime(predictor_file, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    message = (
        r"both installed and overwrite each other.*pip uninstall -y onnxruntime onnxruntime-gpu, and then pip install"
    )
    with pytest.raises(MissingDependencyError, match=message):
        Predictor(predictor_file)


def test_mock_no_build_of_onnxruntime(predictor_file, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        MissingDependencyError, match=r"pip install \"smartfrz\[cpu\]\".*\"smartfrz\[gpu\]\"$"
    ) as caught:
        Predictor(predictor_file)
    assert isinstance(caught.value, ImportError)


def test_mock_a_build_that_lost_its_files(predictor_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"--force-reinstall: onnxruntime\S* is listed"):
        Predictor(predictor_file)


def test_loading_says_nothing(predictor_file, caplog, capfd):
    with caplog.at_level(logging.DEBUG, "smartfrz"):
        Predictor(predictor_file).predict(HISTORY, LENGTHS)
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_zoo_loads_paths_and_passes_predictors_on(predictor, predictor_file, tmp_path, monkeypatch):
    assert zoo.load(predictor) is predictor
    assert zoo.load(str(predictor_file)).sha256 == predictor.sha256
    shutil.copy(predictor_file, tmp_path / "no_suffix")
    assert zoo.load(tmp_path / "no_suffix", device="cpu").sha256 == predictor.sha256
    shutil.copy(predictor_file, tmp_path / "here.onnx")
    monkeypatch.chdir(tmp_path)
    assert zoo.load("here.onnx").sha256 == predictor.sha256


def expensive_model(content, nodes, shape):
    """The predictor with nodes beside it that compute `big` from `seed`, and whose result is added to the answer."""
    model = onnx.load_from_string(content)
    graph, helper = model.graph, onnx.helper
    for output in graph.node:
        output.output[:] = ["kept" if name == "confidence" else name for name in output.output]
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(shape, np.int64), "wide"))
    graph.node.extend(
        [
            helper.make_node("ReduceMax", ["history"], ["most"], keepdims=0),
            helper.make_node("Sub", ["most", "most"], ["seed"]),
            helper.make_node("Expand", ["seed", "wide"], ["big0"]),
            *(helper.make_node("MatMul", [f"big{i}"] * 2, [f"big{i + 1}"]) for i in range(nodes)),
            helper.make_node("ReduceMax", [f"big{nodes}"], ["top"], keepdims=0),
            helper.make_node("Add", ["kept", "top"], ["confidence"]),
        ]
    )
    return model


@pytest.mark.parametrize("shape", [(2 * 10**9,), (40000, 40000)])
def test_a_graph_that_takes_more_memory_than_a_predictor_needs_is_refused(content, write, shape):
    with pytest.raises(PredictorFileError, match=r"cannot be used: on made-up weights, ONNX Runtime cannot run it"):
        Predictor(write(expensive_model(content, 0, shape)), device="cpu")


def test_a_graph_that_takes_more_time_than_a_predictor_needs_is_refused(content, write, monkeypatch):
    monkeypatch.setattr(runtime, "DEADLINE", 0.3)
    with pytest.raises(
        PredictorFileError, match=r"made-up weights, the predictor gives no answer \(no end after 0.3 s"
    ):
        Predictor(write(expensive_model(content, 300, (1500, 1500))), device="cpu")


def test_a_predictor_that_once_did_not_answer_in_time_is_not_asked_again(content, write, monkeypatch, caplog):
    predictor = Predictor(write(expensive_model(content, 6, (1500, 1500))), device="cpu")
    monkeypatch.setattr(runtime, "DEADLINE", 0.01)
    with pytest.raises(PredictionError, match="gives no answer"):
        predictor.predict(HISTORY, LENGTHS)
    monkeypatch.undo()
    with pytest.raises(PredictionError, match="is not asked again"):
        predictor.predict(HISTORY, LENGTHS)
    assert [message for message in caplog.messages if "Training goes on" in message] == [caplog.messages[0]]


def test_mock_the_deadline_is_that_of_all_layers(predictor_file, monkeypatch):
    predictor = Predictor(predictor_file, device="cpu")
    run = predictor._run

    def take_a_while(*arguments):
        time.sleep(0.1)
        return run(*arguments)

    monkeypatch.setattr(predictor, "_run", take_a_while)
    monkeypatch.setattr(runtime, "DEADLINE", 0.25)
    monkeypatch.setattr(runtime, "_ROWS_PER_RUN", 1)
    history = np.repeat(HISTORY[:1], 8, axis=0)
    with pytest.raises(PredictionError, match=r"gives no answer \(no end after 0\.25 s\)"):
        predictor.predict(history, np.ones(8, np.int64))


def test_a_layer_whose_weights_overflow_has_no_answer_and_the_others_have_theirs(predictor_file, caplog):
    predictor = Predictor(predictor_file, device="cpu")
    history = np.random.default_rng(0).normal(size=HISTORY.shape).astype(np.float32)
    expected = predictor.predict(history[:2], LENGTHS[:2])
    history[2] = 1e30
    for _ in range(2):
        answer = predictor.predict(history, LENGTHS)
        assert np.isnan(answer.confidence[2]).all()
        np.testing.assert_allclose(answer.confidence[:2], expected.confidence, atol=1e-6)
    assert len(caplog.messages) == 1
    assert "a layer without an answer does not freeze" in caplog.messages[0]


LOAD = """
import sys
import numpy as np
from smartfrz import zoo
predictor = zoo.load(sys.argv[1], device="cpu")
predictor.predict(np.zeros((1, 5, predictor.info.tailored_size), np.float32), np.array([5]))
"""


@pytest.mark.parametrize("chosen", [None, "0"])
def test_onnxruntime_does_not_report_to_its_makers_unless_the_user_chose_that(predictor_file, tmp_path, chosen):
    env = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"} | {"HOME": str(tmp_path)}
    env |= {"XDG_CACHE_HOME": str(tmp_path / "cache")} | ({"ORT_DISABLE_TELEMETRY": chosen} if chosen else {})
    say = "import os\nprint(os.environ['ORT_DISABLE_TELEMETRY'])"
    run = subprocess.run(
        [sys.executable, "-c", LOAD + say, str(predictor_file)], env=env, check=True, capture_output=True, text=True
    )
    assert (run.stdout, run.stderr) == (f"{chosen or 1}\n", "")
    if chosen is None:
        assert list(tmp_path.rglob("*")) == []


def test_what_onnx_runtime_says_about_a_file_is_not_printed(predictor_file, tmp_path, capfd):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(predictor_file)
    zero = onnx.numpy_helper.from_array(np.zeros(1, np.int64), "zero")
    model.graph.initializer.append(zero)
    model.graph.node.append(onnx.helper.make_node("Div", ["lengths", "zero"], ["quotient"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("quotient", onnx.TensorProto.INT64, [None]))
    {p.key: p for p in model.metadata_props}["smartfrz.sha256"].value = "0" * 64
    (tmp_path / "zero.onnx").write_bytes(seal(model.SerializeToString()))
    with pytest.raises(PredictorFileError, match=r"cannot load|breaks the predictor contract"):
        Predictor(tmp_path / "zero.onnx", device="cpu")
    assert capfd.readouterr() == ("", "")

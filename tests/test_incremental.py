"""Predictors that are fed only what is new decide as those that are fed the whole window."""

import copy
import io
import pickle
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_adapter import ChangePredictor, NumpyAdapter, make_info

from smartfrz import zoo
from smartfrz.control.controller import FreezeController
from smartfrz.control.history import EncodedHistory, WeightHistory
from smartfrz.control.options import FreezeOptions
from smartfrz.errors import PredictorFileError
from smartfrz.predictor.contract import ENCODING_SIZE, PREFIX, REPRESENTATIONS, PredictorInfo, seal
from smartfrz.predictor.runtime import Advance, Predictor

SIZE, WINDOW = 32, 6
NEWEST = {"raw": 1, "steps": 2}  # rows of an incremental call
BEFORE = {"raw": 0, "steps": 1}  # of those, rows that are not new


class Plain:
    """A predictor that does not say that it is incremental."""

    def __init__(self, predictor):
        self.info, self.sha256, self.predict = predictor.info, predictor.sha256, predictor.predict


@dataclass
class ChangeEncoder(ChangePredictor):
    """A `ChangePredictor` whose keys are the records themselves: equal to the last bit."""

    incremental: bool = True
    info: PredictorInfo = field(default_factory=lambda: make_info(window=5))
    calls: list = field(default_factory=list)

    def encode(self, history):
        self.calls.append(history.shape)
        keys = np.pad(history, ((0, 0), (0, 0), (0, ENCODING_SIZE - history.shape[2])))
        return keys, np.zeros_like(keys)

    def advance(self, newest, keys, values, lengths):
        now, nothing = self.encode(newest)
        seen = np.concatenate([keys, now], axis=1)[..., : newest.shape[2]]
        return Advance(*self.predict(seen, lengths), now, nothing)


@pytest.fixture(scope="module", params=NEWEST)
def predictor(request, tmp_path_factory):
    """An untrained network whose answers differ much between layers."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    from smartfrz.predictor.training.export import TOLERANCE, export
    from smartfrz.predictor.training.model import FreezePredictor

    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = FreezePredictor(SIZE, request.param)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 1.8
    info = make_info(tailored_size=SIZE, window=WINDOW, representation=request.param)
    path = tmp_path_factory.mktemp("incremental") / "predictor.onnx"
    assert export(model, info, path) <= TOLERANCE
    return Predictor(path, device="cpu")


def walk(num_layers, num_records, seed=0):
    """Weights on a random walk, float32 `[layers, records, SIZE]`."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-3, 0, (num_layers, 1, 1))
    steps = rng.normal(size=(num_layers, num_records, SIZE)) * scale
    return (rng.normal(size=(num_layers, 1, SIZE)) + steps.cumsum(axis=1)).astype(np.float32)


def assert_close(got, wanted):
    # Other batch sizes are summed in another order: float32 rounding.
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


def test_both_forms_are_one_graph_and_the_plain_one_knows_of_two_inputs(predictor):
    assert predictor.incremental
    session = predictor._session
    assert [v.name for v in session.get_inputs()] == ["history", "lengths"]
    assert {v.name for v in session.get_overridable_initializers()} == {"past_keys", "past_values"}
    assert [v.name for v in session.get_outputs()] == ["confidence", "attention", "keys", "values"]
    weights = walk(3, WINDOW)
    everything = session.run(None, {"history": weights, "lengths": np.array([6, 1, 3])})
    new = WINDOW - BEFORE[predictor.info.representation]
    assert [a.shape for a in everything] == [(3, 2), (3, WINDOW), (3, new, 64), (3, new, 64)]


def test_the_first_record_of_steps_gets_no_attention(predictor):
    lengths = np.array([6, 3, 2, 1])
    attention = predictor.predict(walk(4, WINDOW), lengths).attention
    for row, length in zip(attention, lengths, strict=True):
        first = WINDOW - length + BEFORE[predictor.info.representation]
        assert (row[:first] == 0).all()
        assert (row[first:] > 0).all()


@settings(max_examples=15)
@given(st.integers(0, 2**32), st.integers(1, 12), st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_a_sliding_window_gives_the_same_answers_as_the_whole_one(predictor, seed, first, ages):
    """`ages`: how many records each layer has at the first of `first` to `first` + 3."""
    before = BEFORE[predictor.info.representation]
    weights = walk(len(ages), first + 13, seed)
    keys, values = (np.zeros((len(ages), 0, 64), np.float32) for _ in range(2))
    for now in range(before, first + 4):
        lengths = np.array([min(now + 1, WINDOW, max(1, age + now - first)) for age in ages])
        newest = np.ascontiguousarray(weights[:, now - before : now + 1])
        got = predictor.advance(newest, keys, values, lengths)
        window = np.ascontiguousarray(weights[:, max(0, now + 1 - WINDOW) : now + 1])
        wanted = predictor.predict(window, lengths)
        assert_close(got.confidence, wanted.confidence)
        assert_close(got.attention, wanted.attention)
        encoded = predictor.encode(newest)
        assert_close(encoded[0], got.keys)
        assert_close(encoded[1], got.values)
        room = WINDOW - NEWEST[predictor.info.representation]
        keys = np.concatenate([keys, got.keys], axis=1)[:, -room:]
        values = np.concatenate([values, got.values], axis=1)[:, -room:]


def test_the_inputs_of_this_file_lead_to_different_answers(predictor):
    answer = predictor.predict(walk(40, WINDOW), np.full(40, WINDOW))
    assert answer.confidence[:, 1].std() > 1e-3
    assert np.abs(answer.attention.max(1) - 1 / WINDOW).max() > 1e-2


def test_histories_agree_on_any_course_of_events(predictor):
    @settings(max_examples=15)
    @given(st.integers(0, 2**32))
    def agree(seed):
        rng = np.random.default_rng(seed)
        plain, encoded = WeightHistory(WINDOW, SIZE), EncodedHistory(predictor)
        current = dict(zip("abcd", walk(4, 1, seed)[:, 0], strict=True))
        for _ in range(25):
            active = [layer for layer in current if rng.random() < 0.95]
            for layer in set(current) - set(active):
                plain.drop(layer)
                encoded.drop(layer)
            vectors = {layer: current[layer] + rng.normal(size=SIZE).astype(np.float32) * 0.1 for layer in active}
            current |= vectors
            for layer in active:
                if rng.random() < 0.04:
                    vectors[layer] = vectors[layer].copy()
                    vectors[layer][rng.integers(SIZE)] = rng.choice([np.nan, np.inf, -np.inf])
            encoded.record(vectors, ask=bool(asking := rng.random() < 0.6))
            for layer, vector in vectors.items():
                plain.append(layer, vector)
            assert [encoded.length(layer) for layer in current] == [plain.length(layer) for layer in current]
            assert [encoded.is_finite(n) for n in active] == [plain.is_finite(n) for n in active]
            asked = [layer for layer in active if plain.is_finite(layer)]
            if asking and asked:
                wanted = predictor.predict(*plain.windows(asked))[0][:, 1]
                assert_close(list(encoded.confidence(asked).values()), wanted)

    agree()


def controller_of(predictor, adapter=None, **options):
    adapter = adapter or NumpyAdapter.random({f"layer{i}": 60 for i in range(6)}, seed=3)
    options = {"record_every": 1, "decide_every": 2, "patience": 2} | options
    return FreezeController(adapter, predictor, FreezeOptions(**options)), adapter


def run(controller, adapter, steps):
    for _ in range(steps):
        adapter.train_step()
        controller.step()


def course(controller, adapter):
    """Layers freeze, are thawed and freeze again; one holds NaN for a while."""
    run(controller, adapter, 24)
    controller.thaw()
    run(controller, adapter, 3)
    last = controller.active[-1]
    good = adapter.arrays[last].copy()
    adapter.arrays[last][:] = np.nan
    run(controller, adapter, 2)
    adapter.arrays[last], adapter.velocity[last] = good, np.zeros_like(good)
    run(controller, adapter, 20)


def same_decisions(controllers, atol):
    facts = "step", "timestamp", "layer", "action", "reason"
    events = [[[getattr(e, fact) for fact in facts] for e in controller.events] for controller in controllers]
    assert events[0] == events[1]
    confidences = [[e.confidence for e in controller.events] for controller in controllers]
    np.testing.assert_allclose(*confidences, rtol=0, atol=atol)
    assert controllers[0].frozen == controllers[1].frozen


def test_a_controller_decides_the_same_from_kept_encodings():
    controllers = []
    for predictor in ChangeEncoder(), ChangePredictor(info=make_info(window=5)):
        controller, adapter = controller_of(predictor, threshold=0.8)
        course(controller, adapter)
        controllers.append(controller)
    same_decisions(controllers, atol=0)
    reasons = {event.reason for event in controllers[0].events}
    assert {"confident", "below_threshold", "not_finite", "by_hand"} <= reasons
    assert set(controllers[0].state_dict()["history"]) == set(controllers[0].active)


def test_a_record_is_encoded_once():
    predictor = ChangeEncoder()
    controller, adapter = controller_of(predictor, threshold=1.0, dry_run=True)
    run(controller, adapter, 30)
    assert predictor.calls == [(6, 1, 8)] * 30


def middle_threshold(predictor):
    """One that some layers reach and others do not, and that no confidence is close to."""
    controller, adapter = controller_of(Plain(predictor), threshold=1.0)
    run(controller, adapter, 24)
    values = np.sort([e.confidence for e in controller.events if np.isfinite(e.confidence)])
    middle = len(values) // 2
    gap = middle + int(np.argmax(np.diff(values[middle : middle + 8])))
    return float(values[gap : gap + 2].mean())


def test_a_real_network_decides_the_same_from_kept_encodings(predictor):
    threshold = middle_threshold(predictor)
    controllers = []
    for used in predictor, Plain(predictor):
        controller, adapter = controller_of(used, threshold=threshold)
        course(controller, adapter)
        controllers.append(controller)
    assert isinstance(controllers[0]._policy.history, EncodedHistory)
    assert isinstance(controllers[1]._policy.history, WeightHistory)
    same_decisions(controllers, atol=1e-5)
    assert {"confident", "below_threshold", "not_finite", "by_hand"} <= {e.reason for e in controllers[0].events}


@pytest.mark.parametrize("stop", [0, 1, 2, 5, 6, 7, 13, 27])
def test_a_resumed_run_decides_as_an_uninterrupted_one(predictor, stop):
    threshold = middle_threshold(predictor)
    whole, whole_adapter = controller_of(predictor, threshold=threshold)
    run(whole, whole_adapter, 40)
    first, first_adapter = controller_of(predictor, threshold=threshold)
    run(first, first_adapter, stop)
    state = pickle.loads(pickle.dumps(first.state_dict()))
    kept = copy.deepcopy(state)
    second_adapter = NumpyAdapter(first_adapter.arrays)
    second_adapter.velocity = copy.deepcopy(first_adapter.velocity)
    second, _ = controller_of(predictor, second_adapter, threshold=0.3)
    second.load_state_dict(state)
    run(second, second_adapter, 40 - stop)
    assert repr(second.events) == repr(whole.events)  # to the last bit; repr: NaN differs from itself
    assert second.frozen == whole.frozen
    np.testing.assert_equal(state, kept)


def test_a_saved_training_reads_as_plain_weights_and_goes_on_bit_for_bit(predictor):
    torch = pytest.importorskip("torch")
    from smartfrz.adapters.torch import SmartFRZ

    def training():
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        return model, optimizer, SmartFRZ(model, optimizer, predictor, record_every=1, dry_run=True)

    def train(model, optimizer, freezer, steps, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(4, 8, generator=generator)).square().mean().backward()
            optimizer.step()
            freezer.step()

    model, optimizer, freezer = training()
    train(model, optimizer, freezer, 9, seed=1)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "freezer": freezer.state_dict()}, buffer)
    train(model, optimizer, freezer, 9, seed=2)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed = training()
    resumed[0].load_state_dict(saved["model"])
    resumed[2].load_state_dict(saved["freezer"])
    train(*resumed, 9, seed=2)
    assert repr(resumed[2].events) == repr(freezer.events)
    assert {event.step for event in freezer.events} >= {2, 8, 10, 18}


def test_what_is_kept_is_small(predictor):
    history = EncodedHistory(predictor)
    for row in walk(1, 3 * WINDOW)[0]:
        history.record({"a": row}, ask=False)
    before = BEFORE[predictor.info.representation]
    assert history.state_dict()["a"].shape == (before * SIZE + (WINDOW - before) * 2 * ENCODING_SIZE,)


def test_callers_cannot_change_what_is_kept(predictor):
    history, row = EncodedHistory(predictor), walk(1, 1)[0, 0]
    for _ in range(3):
        history.record({"a": row}, ask=True)
    kept = copy.deepcopy(history.state_dict())
    row += 1
    history.state_dict()["a"][:] = 9
    np.testing.assert_array_equal(history.state_dict()["a"], kept["a"])


def test_a_vector_of_another_length_changes_nothing(predictor):
    history = EncodedHistory(predictor)
    with pytest.raises(ValueError, match=r"layer 'b' holds vectors of length 32: received shape \(3,\)\. Tailor with"):
        history.record({"a": walk(1, 1)[0, 0], "b": np.zeros(3, np.float32)}, ask=True)
    assert history.length("a") == 0


@pytest.mark.parametrize("shape", [(SIZE + 1,), (3, SIZE), (16,)])
def test_a_saved_history_of_something_else(predictor, shape):
    history = EncodedHistory(predictor)
    with pytest.raises(ValueError, match=r"layer 'a' was saved with shape .*with the same predictor"):
        history.load_state_dict({"a": np.zeros(shape, np.float32)})
    assert history.state_dict() == {}


def past(num_layers, num_records, dtype=np.float32):
    return np.zeros((num_layers, num_records, 64), dtype)


# newest, keys, values, lengths, message
BAD_INPUTS = {
    "keys of other layers": (
        2,
        past(3, 2),
        past(3, 2),
        [3, 3],
        r"keys and values are float32 \(3, 2, 64\) .*expected both",
    ),
    "fewer values": (2, past(2, 2), past(2, 1), [3, 3], r"expected both float32 \(2, 2, 64\)\. Pass what encode"),
    "float64": (2, past(2, 2, np.float64), past(2, 2, np.float64), [3, 3], r"keys and values are float64"),
    "too many": (
        2,
        past(2, WINDOW),
        past(2, WINDOW),
        [3, 3],
        r"history has shape \(2, ., 32\), but .* reads \[layers, 1 to",
    ),
    "length": (2, past(2, 2), past(2, 2), [3, 5], r"lengths is \[3, 5\] .* one value in 1 to"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs(predictor, case):
    num_layers, keys, values, lengths, message = BAD_INPUTS[case]
    newest = walk(num_layers, NEWEST[predictor.info.representation])
    with pytest.raises(ValueError, match=message):
        predictor.advance(newest, keys, values, np.array(lengths))


def test_a_predictor_that_is_not_incremental_says_so():
    other = zoo.load("smartfrz-base", device="cpu")
    assert not other.incremental
    message = (
        r"'smartfrz-base' is not incremental: its representation is 'trajectory'.*predict\(\), .* one of raw, steps"
    )
    with pytest.raises(ValueError, match=message):
        other.encode(np.zeros((2, 1, 64), np.float32))
    with pytest.raises(ValueError, match=message):
        other.advance(np.zeros((2, 1, 64), np.float32), past(2, 1), past(2, 1), np.array([2, 2]))


def altered(predictor, tmp_path, alter):
    """The path of an altered copy whose checksum is right."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(predictor.path)
    alter(model)
    for entry in model.metadata_props:
        if entry.key == PREFIX + "sha256":
            entry.value = "0" * 64
    path = tmp_path / "altered.onnx"
    path.write_bytes(seal(model.SerializeToString(deterministic=True)))
    return path


def test_a_file_from_before_there_was_a_past_still_loads(predictor, tmp_path):
    def drop_the_past(model):
        del model.graph.input[2:], model.graph.output[2:]

    old = Predictor(altered(predictor, tmp_path, drop_the_past), device="cpu")
    assert not old.incremental
    weights, lengths = walk(3, WINDOW), np.array([6, 2, 4])
    for got, wanted in zip(old.predict(weights, lengths), predictor.predict(weights, lengths), strict=True):
        assert_close(got, wanted)
    controller, adapter = controller_of(old)
    run(controller, adapter, 4)
    assert isinstance(controller._policy.history, WeightHistory)


def without_values(model):
    del model.graph.output[3:]


def with_keys_of_another_size(model):
    (value,) = (v for v in model.graph.input if v.name == "past_keys")
    value.type.tensor_type.shape.dim[1].dim_value = 5


def of_another_representation(model):
    for entry in model.metadata_props:
        if entry.key == PREFIX + "representation":
            entry.value = "motion"


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (without_values, r"contract at '.*no tensors but .*'past_keys', 'past_values', 'keys', 'values'"),
        (with_keys_of_another_size, r"contract at 'past_keys': .*5, 64\]|cannot load"),
        (
            of_another_representation,
            r"contract at '.*no tensors but \['history', 'lengths', 'confidence', 'attention'\]",
        ),
    ],
)
def test_a_graph_that_breaks_the_contract(predictor, tmp_path, alter, message):
    with pytest.raises(PredictorFileError, match=message):
        Predictor(altered(predictor, tmp_path, alter), device="cpu")


def test_steps_by_hand():
    torch = pytest.importorskip("torch")
    from smartfrz.predictor.training.model import represent

    history = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [6.0, 8.0]]])
    seen = represent(history, torch.ones(1, 3, dtype=torch.bool), "steps")
    first, second = (25 / 2) ** 0.5, (100 / 2) ** 0.5
    expected = torch.tensor([[[0.0, 0.0], [2 / first, 4 / first], [3 / second, 4 / second]]])
    torch.testing.assert_close(seen, expected)
    assert "steps" in REPRESENTATIONS

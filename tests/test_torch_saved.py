"""Saved states of `SmartFRZ` for PyTorch that something damaged: each is refused, and nothing changes before."""

import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_state import VALUES, changed, places

torch = pytest.importorskip("torch")

from torch_runs import Net, train  # noqa: E402

from smartfrz.adapters.state_file import from_json, read_state, to_json, write_state  # noqa: E402
from smartfrz.adapters.torch import SmartFRZ  # noqa: E402
from smartfrz.adapters.torch.saved import seal, to_arrays, to_tensors  # noqa: E402
from smartfrz.baselines import AutoFreeze  # noqa: E402
from smartfrz.control.state import sealed  # noqa: E402
from smartfrz.errors import StateError  # noqa: E402

OPTIONS = {"total_steps": 40, "verbose": False}


def run(steps, model=None):
    """A network that was trained for so many steps, its optimizer and its freezer."""
    model = model or Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    freezer = SmartFRZ(model, optimizer, AutoFreeze(steps_per_epoch=8, intervals_per_epoch=2), **OPTIONS)
    train(model, optimizer, freezer, 0, steps)
    return model, optimizer, freezer


STATE = run(10)[2].state_dict()
STARTED = run(10)
TENSORS = st.just(torch.zeros(3)) | st.just(torch.zeros(2, 2, dtype=torch.int32)) | st.just(torch.eye(2).to_sparse())
PLACES = [place for place in places(STATE) if "history" not in place]


def all_of(model, freezer):
    """Everything that loading may change."""
    flags = [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()]
    training = [module.training for module in model.modules()]
    return flags, training, freezer.frozen_layers, list(freezer.layers), to_arrays(freezer.state_dict())


@st.composite
def mutated(draw):
    # Half of them outside of the controller's part, which has hundreds of places.
    outside = [place for place in PLACES if place[0] != "controller"]
    place = draw(st.sampled_from(outside) | st.sampled_from(PLACES))
    if draw(st.integers(0, 4)) == 0:
        return changed(place, lambda container, key: container.pop(key), STATE)
    value = draw(VALUES | TENSORS)
    return changed(place, lambda container, key: container.__setitem__(key, value), STATE)


def same(one, other):
    return text_of(one) == text_of(other)


def text_of(value):
    return json.dumps(to_arrays(value), default=lambda a: [str(a.dtype), a.shape, a.tobytes().hex()], sort_keys=True)


def assert_refused_without_a_change(state, started=STARTED):
    model, _, freezer = started
    before = all_of(model, freezer)
    with pytest.raises(StateError):
        freezer.load_state_dict(state)
    np.testing.assert_equal(all_of(model, freezer), before)


def is_sparse(value):
    return isinstance(value, torch.Tensor) and value.is_sparse


def holds_sparse(value):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return is_sparse(value) or any(map(holds_sparse, inner))


def test_the_state_holds_what_the_cases_are_about():
    assert STATE["gradients"]
    assert STATE["norms"]
    assert STATE["controller"]["frozen"]


@settings(max_examples=300, deadline=None)
@given(mutated())
def test_a_change_is_noticed_and_changes_nothing(state):
    if not holds_sparse(state) and same(state, STATE):
        run(1)[2].load_state_dict(state)
    else:
        assert_refused_without_a_change(state)


def resealed(state):
    """The state with digests that fit: the controller's, and that of the whole."""
    if isinstance(state.get("controller"), dict):
        state = state | {"controller": sealed(to_arrays(state["controller"]))}
    return seal(state)


@settings(max_examples=100, deadline=None)
@given(mutated())
def test_a_change_under_new_digests_is_refused_or_can_be_trained_on(state):
    model, optimizer, freezer = run(1)
    before = all_of(model, freezer)
    try:
        freezer.load_state_dict(resealed(state))
    except StateError:
        np.testing.assert_equal(all_of(model, freezer), before)
        return
    train(model, optimizer, freezer, 1, 4)
    freezer.state_dict()


@pytest.mark.parametrize("place", [("norms", "norm2", 0), ("gradients", "conv2.weight")])
def test_a_flipped_bit_of_what_the_adapter_holds_is_noticed(place):
    def flip(container, key):
        container[key] = container[key].clone()
        container[key].view(torch.uint8).flatten()[3] ^= 4

    assert_refused_without_a_change(changed(place, flip, STATE))


def resume(state):
    _, _, freezer = run(0)
    freezer.load_state_dict(state)
    return to_arrays(freezer.state_dict())


def test_detours_over_files_and_text_are_no_change(tmp_path):
    torch.save(STATE, tmp_path / "state.pt")
    write_state(to_arrays(STATE), tmp_path / "state.npz")
    expected = to_arrays(STATE)
    for state in (
        torch.load(tmp_path / "state.pt", weights_only=True),
        to_tensors(read_state(tmp_path / "state.npz")),
        to_tensors(from_json(to_json(to_arrays(STATE)))),
    ):
        np.testing.assert_equal(resume(state), expected)


def test_bfloat16_statistics_take_the_detour_as_well():
    state = copy.deepcopy(STATE)
    for norm in state["norms"].values():
        norm[:2] = [statistic.bfloat16() for statistic in norm[:2]]
    state = seal(state)
    expected = resume(state)
    np.testing.assert_equal(resume(to_tensors(to_arrays(state))), expected)


# place, value, part of the message
MESSAGES = [
    (("seconds",), "3", r"state\['seconds'\] is '3'; expected a number from 0"),
    (("reentrant",), 1, r"state\['reentrant'\] is 1; expected True or False"),
    (("started",), False, r"started is False; expected True, as there is a state of the controller"),
    (("started",), "yes", r"started is 'yes'; expected True"),
    (("controller",), [], r"controller is \[\]; expected a dict"),
    (("layers", 0, "norms"), "norm1", r"state\['layers'\]\[0\]\['norms'\] is 'norm1'; expected a list"),
    (("layers", 0, "forward_flops"), -1, r"\['forward_flops'\] is -1; expected an integer from 0"),
    (("norms", "norm2"), [1, 2], r"state\['norms'\]\['norm2'\] is \[1, 2\]; expected a list of 3"),
    (("norms", "norm2", 2), 1.5, r"state\['norms'\]\['norm2'\]\[2\] is 1\.5; expected an integer from 0"),
    (("gradients", "conv2.weight"), 1.0, r"state\['gradients'\]\['conv2\.weight'\] is 1\.0; expected an array"),
    (("sha256",), "", r"state\['sha256'\] is ''; expected the SHA-256 of the values that were saved"),
    (("seconds",), 1e9, r"state\['sha256'\] is '[0-9a-f]{64}'; expected the SHA-256"),
]


@pytest.mark.parametrize(("place", "value", "message"), MESSAGES)
def test_the_message_names_what_is_wrong(place, value, message):
    state = changed(place, lambda container, key: container.__setitem__(key, value), STATE)
    with pytest.raises(StateError, match=message):
        STARTED[2].load_state_dict(state)


# place, value, part of the message: what the digest fits, but not the model
MISFITS = [
    (("layers", 0, "norms"), ["conv9"], r"name modules that Net does not have: \['conv9'\]"),
    (("layers", 0, "weights"), ["conv9.weight"], r"name parameters that Net does not have: \['conv9\.weight'\]"),
    (("layers", 1, "name"), "conv1", r"layers'\] is .*; expected layers with different names, at least one"),
    (("norms", "norm9"), [torch.zeros(6), torch.zeros(6), 1], r"a batch norm 'norm9' .* Net has no such batch norm"),
    (
        ("norms", "norm2"),
        [torch.zeros(2), torch.zeros(2), 1],
        r"'norm2' of shape \(2,\), and Net has one of shape \(6,\)",
    ),
    (("gradients", "x"), torch.zeros(2), r"a parameter 'x' of shape \(2,\), and Net has no such parameter"),
    (("gradients", "conv2.bias"), torch.zeros(2), r"of shape \(2,\), and Net has one of shape \(6,\)"),
]


@pytest.mark.parametrize(("place", "value", "message"), MISFITS)
def test_what_does_not_fit_the_model_changes_nothing(place, value, message):
    state = seal(changed(place, lambda container, key: container.__setitem__(key, value), STATE))
    with pytest.raises(StateError, match=message):
        STARTED[2].load_state_dict(state)
    assert_refused_without_a_change(state)


@pytest.mark.parametrize("state", [None, 3, [], "text"])
def test_what_is_no_dict_is_named(state):
    with pytest.raises(
        StateError, match=r"load_state_dict received .*; expected what SmartFRZ\.state_dict\(\) returned"
    ):
        STARTED[2].load_state_dict(state)
    assert_refused_without_a_change(state)

"""What the saved state of a controller, and of a whole run, must look like, and a digest that notices changes."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, get_args

import numpy as np

from smartfrz.control.decision import Action, Reason
from smartfrz.control.ordering import FreezeOrder
from smartfrz.errors import StateError

_DIGEST = "sha256"
_MAX_VALUES = 50_000_000  # a run of 10,000 freezing stages and 200 layers saves 18 million
_MAX_DEPTH = 50  # of lists and dicts in one another; a state has 6
Check = Callable[[Any, str], None]  # raises StateError for a value that is wrong; the text says where it is


def _a(what: str, fine: Callable[[Any], bool]) -> Check:
    def check(value: Any, where: str) -> None:
        if not fine(value):
            raise _wrong(where, value, what)

    return check


def _wrong(where: str, value: Any, expected: str) -> StateError:
    shown = " ".join(repr(value).split())  # an array's has line breaks
    return StateError(
        f"The saved state is damaged: {where} is {shown:.100}; expected {expected}. Resume from another checkpoint, or "
        "start without a state."
    )


def _is_number(value: Any) -> bool:
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return bool(-(2**63) <= value < 2**63)  # what a float can be made of
    return isinstance(value, float | np.floating)


def _integer(least: int) -> Check:
    return _a(
        f"an integer from {least}",
        lambda v: isinstance(v, int | np.integer) and not isinstance(v, bool) and bool(least <= v < 2**63),
    )


def _number(low: float, high: float = math.inf) -> Check:
    return _a(f"a number from {low} to {high}", lambda v: _is_number(v) and bool(low <= v <= high) and v != math.inf)


def _or(other: Check, what: str, fine: Callable[[Any], bool]) -> Check:
    def check(value: Any, where: str) -> None:
        if not fine(value):
            try:
                other(value, where)
            except StateError as error:
                raise StateError(str(error).replace("; expected ", f"; expected {what}, or ")) from None

    return check


def _one_of(values: Collection[str]) -> Check:
    return _a(f"one of {', '.join(values)}", lambda v: isinstance(v, str) and v in values)


def _list(item: Check, length: int | None = None) -> Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, list | tuple) or length not in (None, len(value)):
            raise _wrong(where, value, "a list" if length is None else f"a list of {length}")
        for index, entry in enumerate(value):
            item(entry, f"{where}[{index}]")

    return check


def _by_layer(item: Check) -> Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise _wrong(where, value, "a dict")
        for layer, entry in value.items():
            _TEXT(layer, f"a key of {where}")
            item(entry, f"{where}[{layer!r}]")

    return check


def _record(**fields: Check) -> Check:
    """Check a dict by the fields named here; what a later version adds is left alone."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise _wrong(where, value, "a dict")
        for name, field in fields.items():
            if name not in value:
                raise _wrong(where, sorted(map(str, value)), f"the key {name!r} among these")
            field(value[name], f"{where}[{name!r}]")

    return check


def _is_nan(value: Any) -> bool:
    return isinstance(value, float | np.floating) and math.isnan(value)


_TEXT = _a("text", lambda v: isinstance(v, str))
_BOOL = _a("True or False", lambda v: isinstance(v, bool | np.bool_))
_NUMBERS = _a("an array of numbers", lambda v: isinstance(v, np.ndarray) and v.dtype.kind in "biuf")
_FRACTIONS = _a("an array of floats", lambda v: isinstance(v, np.ndarray) and v.dtype.kind == "f")
_CONFIDENCE = _or(_number(0, 1), "NaN", _is_nan)
_RATES = _list(_a("a number", lambda v: _is_number(v) and not _is_nan(v)))


def _change(value: Any, where: str) -> None:
    _list(_a("a step and two texts", lambda v: isinstance(v, int | str)), 3)(value, where)
    for check, entry in zip((_integer(0), _one_of(("joined", "appeared", "left")), _TEXT), value, strict=True):
        check(entry, where)


def _norm(value: Any, where: str) -> None:
    _list(lambda *_: None, 3)(value, where)
    for index, check in enumerate((_FRACTIONS, _FRACTIONS, _integer(0))):
        check(value[index], f"{where}[{index}]")
    if value[0].shape != value[1].shape:
        raise _wrong(f"{where}[1]", value[1], f"a variance of the mean's shape, {value[0].shape}")


# What adapters save besides.
FLAG = _BOOL
COUNT_OR_NONE = _or(_integer(0), "None", lambda v: v is None)
ARRAYS = _by_layer(_a("an array of numbers", lambda v: isinstance(v, np.ndarray) and v.dtype.kind in "biufc"))
PARTS_OF_ARRAYS = _by_layer(ARRAYS)

_DUE = _one_of(("look", "stage"))
_STATE = _record(
    predictor=_TEXT,
    layers=_list(_TEXT),
    schedule=_record(
        record_every=_integer(1),
        decide_every=_integer(1),
        threshold=_a("a confidence in (0, 1]", lambda v: _is_number(v) and bool(0 < v <= 1)),
        patience=_integer(1),
        dry_run=_BOOL,
        seed=_integer(0),
        freeze_order=_one_of(get_args(FreezeOrder)),
        freeze_every=_integer(1),
        steps_per_change=_number(0),
        thaw_on_restart=_BOOL,
    ),
    total_steps=_or(_integer(1), "None", lambda v: v is None),
    num_steps=_integer(0),
    num_records=_integer(0),
    frozen=_by_layer(_integer(0)),
    streaks=_by_layer(_integer(0)),
    warned=_list(_TEXT),
    learning_rates=_list(_RATES, 2),
    costs=_by_layer(_list(_number(0), 3)),
    decision_seconds=_number(0),
    events=_list(
        _record(
            step=_integer(0),
            timestamp=_integer(-1),
            layer=_TEXT,
            confidence=_CONFIDENCE,
            action=_one_of(get_args(Action)),
            reason=_one_of(get_args(Reason)),
            threshold=_CONFIDENCE,
            since=_or(_integer(0), "None", lambda v: v is None),
        )
    ),
    unpaid_steps=_list(_integer(0)),
    watch=_record(barred=_list(_TEXT), pending=_list(_TEXT), believed=_list(_TEXT), held=_list(_TEXT)),
    looked_at=_integer(0),
    layer_changes=_list(_change),
    history=_by_layer(_NUMBERS),
)


def check_extent(state: Any) -> None:
    """Check that a state has an end: lists in a pickle may hold themselves, or be shared until they unfold without end.

    Raises:
        StateError: If lists and dicts are nested too deep, or hold more values than a run saves.
    """
    _measure(state, {}, 0)


def _measure(value: Any, known: dict[int, tuple[int, int]], depth: int) -> tuple[int, int]:
    """Return how many values there are in a value, and how many lists and dicts in one another."""
    if not isinstance(value, Mapping | list | tuple):
        return 1, 0
    if id(value) not in known:
        values, height = 1, 1
        if depth <= _MAX_DEPTH:
            for part in value.values() if isinstance(value, Mapping) else value:
                more, deep = _measure(part, known, depth + 1)
                values, height = values + more, max(height, deep + 1)
        if depth > _MAX_DEPTH or height > _MAX_DEPTH or values > _MAX_VALUES:
            raise StateError(
                "The saved state is damaged: it holds lists or dicts that hold themselves, that are nested more than "
                f"{_MAX_DEPTH} deep, or that hold more than {_MAX_VALUES} values. Resume from another checkpoint, or start "
                "without a state."
            )
        known[id(value)] = values, height
    return known[id(value)]


def sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state with its digest."""
    return {**state, _DIGEST: _digest(state)}


def check_fields(state: Any) -> None:
    """Check that each value of a state is there, and of a kind and in a range that a run can have.

    Raises:
        StateError: If one is not; the message names it.
    """
    _STATE(state, "controller")
    if "due" in state:  # only where a run was saved between a record and the step after it
        _DUE(state["due"], "controller['due']")


def check_run(state: Any, layer: type, more: Mapping[str, Check]) -> None:
    """Check that each value of a run's saved state is there, and of a kind and in a range that a run can have.

    Args:
        state: What is checked. Tensors are arrays by now.
        layer: The dataclass whose fields a stored layer holds: texts, integers and tuples of texts.
        more: Checks of what only this adapter saves, by the name.

    Raises:
        StateError: If one is not; the message names it.
    """
    kinds: dict[Any, Check] = {str: _TEXT, int: _integer(0)}
    fields = {field.name: kinds.get(field.type, _list(_TEXT)) for field in dataclasses.fields(layer)}
    stored = _list(_record(**fields))
    _record(seconds=_number(0), layers=stored, norms=_by_layer(_norm), **more)(state, "state")
    check_fields(state["controller"])
    names = [entry["name"] for entry in state["layers"]]
    if not names or len(set(names)) < len(names):
        raise _wrong("state['layers']", names, "layers with different names, at least one")


def check_unchanged(state: Mapping[str, Any]) -> None:
    """Check that no value of a run's saved state was changed since it was saved.

    Raises:
        StateError: If one was.
    """
    _check_digest(state, "state")


def check_contents(state: Mapping[str, Any]) -> None:
    """Check that the values of a state go together, and that none was changed since it was saved.

    Raises:
        StateError: If they do not, or one was.
    """
    for name in ("frozen", "streaks"):
        unknown = [layer for layer in state[name] if layer not in state["layers"]]
        if unknown:
            raise _wrong(f"controller[{name!r}]", unknown, "names of its layers")
    for index, event in enumerate(state["events"]):
        if event["step"] > state["num_steps"]:
            raise _wrong(f"controller['events'][{index}]['step']", event["step"], f"at most {state['num_steps']}")
        if event["timestamp"] >= state["num_records"]:
            where = f"controller['events'][{index}]['timestamp']"
            raise _wrong(where, event["timestamp"], f"less than {state['num_records']}, the records so far")
    for name in ("num_records", "looked_at"):
        if state[name] > state["num_steps"]:
            raise _wrong(f"controller[{name!r}]", state[name], f"at most {state['num_steps']}, the steps so far")
    _check_frozen(state)
    _check_digest(state, "controller")


def _check_frozen(state: Mapping[str, Any]) -> None:
    """Check that what is frozen is what the events and the changes of the layers leave frozen."""
    latest = {event["layer"]: event for event in state["events"] if event["action"] != "keep"}
    froze = {layer: event["step"] for layer, event in latest.items() if event["action"] != "thaw"}
    for layer, step in state["frozen"].items():
        if froze.get(layer) != step:
            raise _wrong(f"controller['frozen'][{layer!r}]", step, f"{froze.get(layer)}, as its events say")
    left = {layer: step for step, what, layer in state["layer_changes"] if what == "left"}
    for layer, step in froze.items():
        # A run that goes on after a dry run trains what that one would have frozen.
        done = latest[layer]["action"] == "freeze" and left.get(layer, -1) < step
        if done and layer not in state["frozen"]:
            raise _wrong("controller['frozen']", list(state["frozen"]), f"{layer!r} among these, as its events say")


def _check_digest(state: Mapping[str, Any], where: str) -> None:
    saved = state.get(_DIGEST)
    if not isinstance(saved, str) or saved != _digest(state):
        raise _wrong(f"{where}[{_DIGEST!r}]", saved, "the SHA-256 of the values that were saved")


def _digest(state: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    _add(digest.update, {key: value for key, value in state.items() if key != _DIGEST})
    return digest.hexdigest()


def _add(update: Callable[[bytes], None], value: Any) -> None:
    """Hash a value so that it counts neither what kind of list it is in nor in which order a dict is."""
    if isinstance(value, np.ndarray):
        update(f"array {value.dtype.str} {value.shape} ".encode())
        update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        update(f"dict {len(value)} ".encode())
        for key in sorted(value, key=str):
            _add(update, str(key))
            _add(update, value[key])
    elif isinstance(value, list | tuple):
        update(f"list {len(value)} ".encode())
        for entry in value:
            _add(update, entry)
    else:
        plain = value.item() if isinstance(value, np.generic) else value
        update(f"{type(plain).__name__} {plain!r} ".encode("utf-8", "surrogatepass"))

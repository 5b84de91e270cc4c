"""Checks the version of Keras, since freezing inside of `fit` needs private attributes of Keras."""

import inspect
import warnings
from collections.abc import Mapping
from importlib import import_module

from smartfrz.errors import MissingDependencyError

OLDEST, NEWEST = (3, 12), (3, 15)  # the tested versions; pyproject.toml has the same bounds

# The attributes that the other modules use, by the class in which to look for them.
_EVERYWHERE = {
    "keras.layers.Layer": ("_layers", "_trainable_variables", "_get_regularization_losses"),
    "keras.Model": ("make_train_function",),
    "keras.Sequential": ("_functional",),
    "keras.src.models.functional.Functional": ("operations", "_nodes_by_depth"),
    "keras.optimizers.Optimizer": (
        "_iterations",
        "_learning_rate",
        "_trainable_variables",
        "_trainable_variables_indices",
        "_model_variables_moving_average",
        "_var_key",
    ),
    "keras.callbacks.CallbackList": ("callbacks",),
    "keras.callbacks.ModelCheckpoint": ("_save_model",),
    "keras.callbacks.BackupAndRestore": ("_save_model", "backup_dir"),
}
_BY_BACKEND = {"jax": {"keras.src.backend.jax.trainer.JAXTrainer": ("jax_state_sync", "_jax_state")}}


def list_private_attributes(backend: str) -> dict[str, tuple[str, ...]]:
    """Return the attributes that the adapter needs on this backend, by the full name of their class."""
    return _EVERYWHERE | _BY_BACKEND.get(backend, {})


def find_absent_attributes(needed: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return the needed attributes that the installed Keras does not have, as `Class.attribute`.

    No layer or optimizer is made: the first one would make the backend claim its devices.
    """
    absent = []
    for path, attributes in needed.items():
        module, _, name = path.rpartition(".")
        try:
            known = _list_attributes(getattr(import_module(module), name))
        except (ImportError, AttributeError):
            known = set()
        absent += [f"{name}.{attribute}" for attribute in attributes if attribute not in known]
    return absent


def _list_attributes(kind: type) -> set[str]:
    """Return the names that a class has or that its methods use, since methods set the attributes of instances."""
    names: set[str] = set()
    for base in kind.__mro__:
        for name, value in vars(base).items():
            names.add(name)
            code = getattr(inspect.unwrap(value), "__code__", None) if callable(value) else None
            names.update(code.co_names if code else ())
    return names


def check_version(found: str, absent: list[str]) -> None:
    """Refuse a version of Keras that lacks what freezing needs, and warn of one that was not tested.

    Args:
        found: The version of Keras, such as `"3.15.1"`.
        absent: From `find_absent_attributes`.

    Raises:
        MissingDependencyError: If anything is absent.
    """
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
    install = f'pip install "keras>={oldest},<{NEWEST[0]}.{NEWEST[1] + 1}"'
    if absent:
        raise MissingDependencyError(
            f"smartfrz.adapters.keras needs private attributes that Keras {found} does not have: {', '.join(absent)}. "
            f"It was tested with Keras {oldest} to {newest}. Install one of these versions: {install}"
        )
    if not OLDEST <= tuple(int(part) for part in found.split(".")[:2]) <= NEWEST:
        warnings.warn(
            f"smartfrz.adapters.keras was tested with Keras {oldest} to {newest}; found {found}, which has the private "
            f"attributes that freezing needs, but may use them differently. To be safe: {install}",
            stacklevel=2,
        )

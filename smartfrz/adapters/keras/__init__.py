"""SmartFRZ for `model.fit` of Keras 3, on the TensorFlow, JAX and PyTorch backends."""

try:
    import keras as _keras
except ImportError as error:
    import os as _os

    from smartfrz.errors import MissingDependencyError, install_command

    _chosen = _os.environ.get("KERAS_BACKEND") or "tensorflow"
    _extras = ("keras", _chosen) if _chosen in ("tensorflow", "torch") else ("keras",)
    raise MissingDependencyError(
        "smartfrz.adapters.keras needs Keras 3 and the backend that KERAS_BACKEND names (TensorFlow by default), which "
        f"cannot be imported: {error}. Type: {install_command(*_extras, more='jax' if _chosen == 'jax' else '')}. "
        "For another backend, set KERAS_BACKEND to torch or jax first."
    ) from error
else:
    # Before the rest: the modules below need what an old Keras does not have.
    from smartfrz.adapters.keras import versions as _versions

    _needed = _versions.list_private_attributes(_keras.backend.backend())
    _versions.check_version(_keras.__version__, _versions.find_absent_attributes(_needed))

from smartfrz.adapters.keras.callback import SmartFRZ as SmartFRZ
from smartfrz.adapters.keras.freezing import KerasAdapter as KerasAdapter
from smartfrz.adapters.keras.layers import Layer as Layer
from smartfrz.adapters.keras.layers import trace_layers as trace_layers
from smartfrz.control.report import Report as Report

__all__ = ["KerasAdapter", "Layer", "Report", "SmartFRZ", "trace_layers"]

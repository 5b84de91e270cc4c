"""Layer freezing that a learned predictor decides."""

import os as _os  # not one of the public names

# Without it, ONNX Runtime reports to its makers and keeps a device id in the user's cache. It is read on loading, and other
# packages and processes that we start may load it before we do.
_os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
__all__ = ["__version__"]

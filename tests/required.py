"""Optional frameworks that must not be missing: a skipped test would pass for a good one.

Continuous integration names what it has installed in `SMARTFRZ_REQUIRED`, as in `torch,transformers`. A backend of
Keras is named as in `keras-jax`: Keras and the backend.
"""

import importlib.util
import os


def missing():
    """Modules that `SMARTFRZ_REQUIRED` names and that cannot be found."""
    names = [name.strip() for name in os.environ.get("SMARTFRZ_REQUIRED", "").split(",")]
    return [name for name in names if name and not all(map(importlib.util.find_spec, name.split("-")))]

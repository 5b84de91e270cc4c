"""Optional frameworks that must not be missing: a skipped test would pass for a good one.

Continuous integration names what it has installed in `SMARTFRZ_REQUIRED`, as in `torch,transformers`. A backend of
Keras is named as in `keras-jax`: Keras and the backend. `node` stands for what the JavaScript example needs.
"""

import importlib.util
import os
import shutil
from pathlib import Path

NODE_PACKAGE = Path(__file__).parent.parent / "examples" / "node_modules" / "onnxruntime-web"


def missing():
    """Modules that `SMARTFRZ_REQUIRED` names and that cannot be found."""
    names = [name.strip() for name in os.environ.get("SMARTFRZ_REQUIRED", "").split(",")]
    return [name for name in names if name and not there(name)]


def there(name):
    """Whether what a name of `SMARTFRZ_REQUIRED` stands for is installed."""
    if name == "node":
        return shutil.which("node") is not None and NODE_PACKAGE.exists()
    return all(map(importlib.util.find_spec, name.split("-")))

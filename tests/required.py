"""Optional frameworks that must not be missing: a skipped test would pass for a good one.

Continuous integration names what it has installed in `SMARTFRZ_REQUIRED`, as in `torch,transformers`.
"""

import importlib.util
import os


def missing():
    """Modules that `SMARTFRZ_REQUIRED` names and that cannot be found."""
    names = [name.strip() for name in os.environ.get("SMARTFRZ_REQUIRED", "").split(",")]
    return [name for name in names if name and importlib.util.find_spec(name) is None]

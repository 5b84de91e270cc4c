"""Where the benchmarks are, for their tests; importing this makes them importable, or skips the test module.

Import it before `benchmarks`, and take torch from it: alphabetical order does the rest.
"""

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("pandas")
ROOT = Path(__file__).parent.parent
if not (ROOT / "benchmarks").exists():
    pytest.skip("the source distribution has no benchmarks", allow_module_level=True)
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import gc
import importlib.util
import sys

import numpy as np
import pytest
from hypothesis import settings
from required import missing

pytest.register_assert_rewrite("adapter_contract", "framework_runs", "keras_runs")

# The same examples at every run, and no limit on time: a busy machine is no failure.
settings.register_profile("smartfrz", derandomize=True, deadline=None, database=None, max_examples=50)
settings.load_profile("smartfrz")

if importlib.util.find_spec("torch"):
    import torch

    torch.set_num_threads(1)


def pytest_configure(config):
    if missing():
        raise pytest.UsageError(f"SMARTFRZ_REQUIRED names modules that are not installed: {', '.join(missing())}")


@pytest.fixture(scope="module", autouse=True)
def nothing_holds_the_compiler():
    """Fail the module that leaves a hold, not a later one of the same process whose models are not compiled then."""
    yield
    compiling = sys.modules.get("smartfrz.adapters.torch.compiling")
    if compiling is not None and compiling.EagerHold.holders:
        gc.collect()
        assert not compiling.EagerHold.holders, "A freezer of this module was neither closed nor dropped."


TINY = {"name": "tiny", "tailored_size": 64, "window": 10, "representation": "raw"}


@pytest.fixture(scope="session")
def tiny_model():
    """An untrained predictor network, seed 0."""
    pytest.importorskip("torch")
    from smartfrz.predictor.training.model import FreezePredictor

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FreezePredictor(TINY["tailored_size"], TINY["representation"]).eval()


@pytest.fixture(scope="session")
def tiny_info():
    from numpy_adapter import make_info

    return make_info(**TINY, dataset_sha256="d" * 64, metrics={"auc": 0.9, "rule": {"tolerance": 0.01}})


@pytest.fixture(scope="session")
def predictor_file(tiny_model, tiny_info, tmp_path_factory):
    """The file of `tiny_model`. Read only: copy it to alter it."""
    pytest.importorskip("onnxscript")
    from smartfrz.predictor.training.export import export

    path = tmp_path_factory.mktemp("predictor") / "tiny.onnx"
    export(tiny_model, tiny_info, path)
    return path


@pytest.fixture(scope="session")
def loss_predictor_file(tmp_path_factory):
    """The file of an untrained network that reads positions and the training loss. Read only."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    from numpy_adapter import make_info

    from smartfrz.predictor.training.export import export
    from smartfrz.predictor.training.model import FreezePredictor

    info = make_info(**TINY | {"name": "hearing", "representation": "trajectory+loss"})
    path = tmp_path_factory.mktemp("predictor") / "hearing.onnx"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FreezePredictor(info.tailored_size, info.representation)
    model.adjust(np.array([0.1, 0.9, -0.2, 0.8, 0.1]))  # a new network would not look at the loss
    export(model, info, path)
    return path


@pytest.fixture(scope="session")
def eager_predictor(tmp_path_factory):
    """A predictor of the usual size that freezes whatever it is asked about, with a record at each of nine steps."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    from smartfrz.predictor.contract import PredictorInfo
    from smartfrz.predictor.training.export import export
    from smartfrz.predictor.training.model import FreezePredictor

    info = PredictorInfo("eager", 1024, 30, "raw", threshold=0.01, record_fraction=1 / 9)
    path = tmp_path_factory.mktemp("predictor") / "eager.onnx"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        export(FreezePredictor(info.tailored_size, info.representation), info, path)
    return str(path)

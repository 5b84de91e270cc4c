"""On a real GPU: adapter, prefix cache, baselines, recording, and ONNX Runtime where its build can use one."""

from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU that PyTorch can use", allow_module_level=True)

from numpy_adapter import MockLossPredictor, ScriptedPredictor, script  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402
from torch_runs import NET, Net, attach, batch, moved, parts, seeded, values  # noqa: E402

from smartfrz import zoo  # noqa: E402
from smartfrz.adapters.torch import PrefixCache, SmartFRZ, trace_layers  # noqa: E402
from smartfrz.adapters.torch.copying import copy_later  # noqa: E402
from smartfrz.adapters.torch.costs import measure_step  # noqa: E402
from smartfrz.adapters.torch.layers import LayerReader  # noqa: E402
from smartfrz.baselines import AutoFreeze, GradES, LinearFreezing, WeightChange  # noqa: E402
from smartfrz.baselines.similarity_guided import SimilarityGuided  # noqa: E402
from smartfrz.dataset_builder.recording import record  # noqa: E402
from smartfrz.dataset_builder.similarity import layer_grams  # noqa: E402
from smartfrz.dataset_builder.storage import read_run  # noqa: E402
from smartfrz.errors import MissingDependencyError  # noqa: E402

STEPS = 12
REGISTRY = Path(__file__).parents[1] / "registry"


@pytest.fixture(autouse=True)
def exact():
    """Float32 as on the CPU, and the same algorithms at every run."""
    found = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = found


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def network():
    """`Net`, without dropout: a GPU draws other random numbers than a CPU."""
    model = seeded(Net)
    model.dropout.p = 0.0
    return model


def train(model, optimizer, freezer, steps, *, device="cuda", start=0, context=None, scaler=None):
    losses = []
    for step in range(start, start + steps):
        inputs, targets = (tensor.to(device) for tensor in batch(step))
        with context or torch.autocast(device, enabled=False):
            loss = cross_entropy(model(inputs), targets)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        if freezer is not None:
            freezer.step()
        losses.append(loss.item())
    return losses


def test_frozen_layers_do_not_move_and_the_others_learn():
    model = network().cuda()
    optimizer = sgd(model)
    freezer = attach(model, optimizer, NET, {"conv1"}, {"conv2"})
    train(model, optimizer, freezer, 3)  # stages are at every second step, and decided about after the next one
    before = values(model)
    train(model, optimizer, freezer, 2, start=3)
    assert not parts(moved(before, model), ["conv1"])
    before = values(model)
    train(model, optimizer, freezer, STEPS, start=5)
    assert parts(moved(before, model), NET) == parts(before, ["head"])
    assert [layer for _, _, layer in freezer.report().changes] == ["conv1", "conv2"]
    assert all(p.grad is None for name, p in model.named_parameters() if name.startswith("conv"))


def test_training_and_decisions_are_those_of_the_cpu(monkeypatch):
    ran = {}
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(LayerReader, "_always_later", device == "cpu")
        model = network().to(device)
        optimizer = sgd(model)
        freezer = SmartFRZ(model, optimizer, zoo.load("smartfrz-base"), total_steps=90, device="cpu")
        ran[device] = train(model, optimizer, freezer, 90, device=device), freezer.report(), model
    np.testing.assert_allclose(ran["cpu"][0], ran["cuda"][0], atol=2e-3)
    one, other = (ran[device][1] for device in ran)
    assert one.changes
    assert [layer for _, _, layer in one.changes] == [layer for _, _, layer in other.changes]
    assert {decision.step for decision in one.decisions} == {decision.step for decision in other.decisions}


def test_sampled_weights_are_those_of_the_cpu():
    model = network()
    layers = trace_layers(model.eval(), batch(0)[0])
    positions = {layer.name: np.arange(0, 18, 3) for layer in layers}
    here = LayerReader(model, layers).tailored(positions)
    there = LayerReader(model.cuda(), trace_layers(model, batch(0)[0].cuda())).tailored(positions)
    assert list(here) == list(there)
    for layer, sampled in here.items():
        np.testing.assert_array_equal(sampled, there[layer])


@contextmanager
def no_waiting():
    """Raise where the host waits for the GPU, unless for an event."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_weights_are_copied_into_pinned_memory_while_the_gpu_is_busy():
    model = network().cuda()
    layers = trace_layers(model, batch(0)[0].cuda())
    reader = LayerReader(model, layers)
    assert reader.reads_later
    positions = {layer: np.arange(0, 18, 3) for layer in NET}
    expected = reader.tailored(positions)  # this moves the positions to the GPU
    torch.cuda._sleep(10**9)
    with no_waiting():
        later = reader.tailored_later(positions)
        copied = copy_later(torch.arange(5, device="cuda"))
    assert not torch.cuda.current_stream().query(), "the GPU is still behind"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    for layer, sampled in later().items():
        np.testing.assert_array_equal(sampled, expected[layer])
    assert copied().is_pinned()
    assert copied().tolist() == [0, 1, 2, 3, 4]
    with no_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        copied().cuda().sum().item()
    model.head.cpu()
    assert not LayerReader(model, layers).reads_later, "on two devices"


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("frozen", [False, True])
def test_recording_looking_and_deciding_wait_for_nothing_as_long_as_nothing_freezes(frozen):
    model = network().cuda()
    optimizer = sgd(model)
    freezer = attach(model, optimizer, NET, {"conv1"} if frozen else set())
    train(
        model, optimizer, freezer, 5
    )  # at the first stage it waits, to see that every layer has moved since the start
    for step in range(5, STEPS):
        inputs, targets = (tensor.cuda() for tensor in batch(step))
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda._sleep(10**7)
        with no_waiting():
            freezer.step()
    assert sorted({event.step for event in freezer.events}) == [3, 5, 7, 9, 11]
    assert freezer.frozen_layers == (["conv1"] if frozen else [])
    freezer.close()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_losses_for_a_mock_predictor_are_added_up_and_read_without_waiting():
    model, predictor = network().cuda(), MockLossPredictor()
    optimizer = sgd(model)
    options = {"record_every": 2, "decide_every": 1, "patience": 1, "threshold": 0.5, "verbose": False}
    freezer = SmartFRZ(model, optimizer, predictor, **options)
    losses = []
    for step in range(STEPS):
        inputs, targets = (tensor.cuda() for tensor in batch(step))
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        torch.cuda._sleep(10**7)
        with no_waiting() if step >= 5 else nullcontext():
            freezer.step(loss)
    means = torch.stack(losses[:10]).reshape(5, 2).mean(1).cpu()
    np.testing.assert_allclose(predictor.losses[-1], means.expand(3, 5), rtol=1e-5)
    assert freezer.state_dict()["controller"]["history"]["..losses"].tolist()[:2] == [0, 0]
    freezer.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_with_a_scaler(dtype):
    model = network().cuda()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cuda", enabled=dtype is torch.float16)
    freezer = attach(model, optimizer, NET, {"conv1"})
    losses = train(model, optimizer, freezer, STEPS, context=torch.autocast("cuda", dtype=dtype), scaler=scaler)
    assert np.isfinite(losses).all()
    assert [layer for _, _, layer in freezer.report().changes] == ["conv1"]


@pytest.mark.parametrize("stop", [3, 4])  # after the fourth step a decision is due
def test_a_run_that_is_resumed_goes_on_as_if_nothing_had_happened(tmp_path, stop):
    def start(stages_done=0):
        model = network().cuda()
        optimizer, predictor = sgd(model), ScriptedPredictor(script(NET, {"conv1"}, {"conv2"})[stages_done:])
        return model, optimizer, attach(model, optimizer, NET, predictor=predictor)

    whole = start()
    expected = train(*whole, STEPS)
    first, second = start(), start(1)
    found = train(*first, stop)
    torch.save([part.state_dict() for part in first], tmp_path / "run.pt")
    for part, state in zip(second, torch.load(tmp_path / "run.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    found += train(*second, STEPS - stop, start=stop)
    assert found == expected
    assert not moved(values(whole[0]), second[0])


@pytest.mark.parametrize("policy", ["linear", "autofreeze", "grades", "weight change", "oracle"])
def test_baselines(policy):
    model, reference = network().cuda(), network().cuda()
    optimizer, other = sgd(model), sgd(reference)
    train(reference, other, None, 40)
    made = {
        "linear": lambda: LinearFreezing(0.3),
        "autofreeze": lambda: AutoFreeze(epochs=4),
        "grades": lambda: GradES(100.0),
        "weight change": lambda: WeightChange(limit=0.5, tailored_size=16),
        "oracle": lambda: SimilarityGuided(model, reference, batch(0)[0].cuda()),
    }[policy]()
    freezer = SmartFRZ(model, optimizer, made, total_steps=40)
    assert np.isfinite(train(model, optimizer, freezer, 40)).all()
    assert freezer.report().changes


def test_cka_and_flops_are_those_of_the_cpu():
    found = []
    for device in ("cpu", "cuda"):
        model, (inputs, targets) = network().to(device), (tensor.to(device) for tensor in batch(0))
        layers = trace_layers(model.eval(), inputs)
        grams = layer_grams(model, layers, inputs)
        work = measure_step(model, lambda: cross_entropy(model(inputs), targets))  # noqa: B023
        found.append((grams, work.forward_flops, work.backward_flops))
    (grams, *flops), (others, *other_flops) = found
    assert flops == other_flops
    for layer, gram in grams.items():
        np.testing.assert_allclose(gram, others[layer], rtol=1e-3, atol=1e-3 * np.abs(gram).max())


def test_the_prefix_cache_leaves_the_curve_as_it_is():
    data = TensorDataset(*batch(0, 24, 2, 7, 7))
    curves = []
    for cache in (None, PrefixCache(memory="10MB", profile=False)):
        model = network().cuda()
        optimizer = sgd(model)
        freezer = attach(model, optimizer, NET, {"conv1"}, {"conv2"}, cache=cache)
        order = torch.Generator().manual_seed(0)
        loader = DataLoader(PrefixCache.indexed(data), 8, shuffle=True, generator=order)
        losses = []
        for _ in range(8):
            for ids, inputs, targets in loader:
                with freezer.batch(ids):
                    loss = cross_entropy(model(inputs.cuda()), targets.cuda())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                freezer.step()
                losses.append(loss.item())
        curves.append(losses)
    np.testing.assert_allclose(*curves, atol=1e-4)
    use = freezer.report().cache
    assert use.hits > use.misses > 0


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_compiled_model_freezes():
    model = network().cuda()
    optimizer = sgd(model)
    # compiled models freeze at a quarter of the stages: the second, the fourth and so on of these, a step later
    freezer = attach(model, optimizer, NET, set(), {"conv1"}, total_steps=STEPS)
    compiled = torch.compile(model)
    train(compiled, optimizer, freezer, 5)
    assert freezer.frozen_layers == ["conv1"]
    before = values(model)
    assert np.isfinite(train(compiled, optimizer, freezer, STEPS - 5, start=5)).all()
    assert not parts(moved(before, model), ["conv1"])
    assert parts(moved(before, model), ["head"])


def test_recording(tmp_path):
    from builder_fixtures import tiny_recipe

    recipe = tiny_recipe(tmp_path)
    one = read_run(record(recipe, tmp_path / "cpu", device="cpu"))
    other = read_run(record(recipe, tmp_path / "cuda", device="cuda"))
    assert other.layers == one.layers
    assert other.facts["layer_facts"] == one.facts["layer_facts"]
    np.testing.assert_array_equal(one.step, other.step)
    np.testing.assert_allclose(one.weights[:, 0], other.weights[:, 0], atol=0.05)  # its dropout differs
    assert np.nanmin(other.cka[:, -1]) > 0.5


@pytest.fixture(params=["smartfrz-base", "smartfrz-raw", "smartfrz-tiny"])
def both(request):
    """A predictor on the CPU and on the GPU."""
    try:
        return tuple(zoo.load(request.param, device=device, registries=[str(REGISTRY)]) for device in ("cpu", "cuda"))
    except MissingDependencyError as error:
        pytest.skip(f"ONNX Runtime cannot use the GPU: {error}")


def test_a_predictor_on_the_gpu_answers_as_on_the_cpu(both):
    here, there = both
    assert (here.device, there.device) == ("cpu", "cuda")
    info, random = here.info, np.random.default_rng(0)
    for layers, records in ((3, 5), (3, 5), (50, info.window), (1, 1)):
        shape = (layers, records, info.tailored_size)
        history = (random.normal(size=shape).cumsum(1) / 10).astype(np.float32)
        lengths = random.integers(1, records + 1, layers)
        where = np.linspace(0, 1, layers, dtype=np.float32) if here.positional else None
        loss = np.exp(random.normal(size=shape[:2])).astype(np.float32) if here.reads_loss else None
        for one, other in zip(*(p.predict(history, lengths, where, loss) for p in both), strict=True):
            # with weights of 8 bits, what is multiplied is rounded to 8 bits, too
            np.testing.assert_allclose(one, other, atol=1e-2 if info.name == "smartfrz-tiny" else 1e-5)


def test_a_run_that_is_decided_on_the_gpu(both):
    changes = []
    for predictor in both:
        model = network().cuda()
        optimizer = sgd(model)
        freezer = SmartFRZ(model, optimizer, predictor, total_steps=90)
        train(model, optimizer, freezer, 90)
        changes.append([list(change) for change in freezer.report().changes])
    assert changes[0] == changes[1]


def test_the_benchmark_at_real_size_splits_the_time_of_the_gpu():
    import benchmark_source  # noqa: F401  (or the test is skipped)

    from benchmarks import full_size
    from benchmarks.methods import methods_of

    setting, size = full_size.Setting(zoo.load("smartfrz-base"), "cuda"), full_size.TOYS["deit"]
    data = [(full_size.on_device(inputs, "cuda"), targets.cuda()) for inputs, targets in size.data()]
    run = full_size.SizedRun(size, data, methods_of(setting)["smartfrz"], 0)
    while run.advance(10):
        pass
    result = run.finish()
    split = result.details["split"]
    assert all(value > 0 for value in split.values())
    assert sum(split.values()) == pytest.approx(result.train_seconds, abs=1e-3)

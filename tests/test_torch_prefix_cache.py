"""The prefix cache in real training loops. One test per trap."""

import copy
import inspect
import io
import logging
import pickle
from contextlib import nullcontext

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset, TensorDataset  # noqa: E402
from torch_runs import NET, Net, attach, batch, mlp, moved, seeded, values  # noqa: E402

from smartfrz.adapters.torch import PrefixCache  # noqa: E402
from smartfrz.adapters.torch.cache.cut import CutFinder  # noqa: E402
from smartfrz.adapters.torch.cache.store import ActivationStore  # noqa: E402

SAMPLES = 22  # the last batch is a partial one
BATCH = 8
FIVE = ["0", "2", "4", "6", "8"]
SIZES = (5, 9, 8, 7, 6, 3)


def always(**options):
    """A cache that does not wait until it pays; on networks this small it would not."""
    return PrefixCache(**{"memory": "1MB", "profile": False} | options)


def data(shape=(2, 7, 7), samples=SAMPLES):
    generator = torch.Generator().manual_seed(11)
    return TensorDataset(
        torch.randn(samples, *shape, generator=generator) + 0.5, torch.randint(3, (samples,), generator=generator)
    )


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


class Loop:
    """A run of some epochs, shuffled; the same random numbers in every run."""

    def __init__(self, model, freezer, optimizer, dataset, *, drop_last=False, seed=0, workers=0, accumulate=1):
        self.model, self.freezer, self.optimizer = model, freezer, optimizer
        self.order = torch.Generator().manual_seed(seed)
        self.loader = DataLoader(dataset, BATCH, shuffle=True, generator=self.order, drop_last=drop_last)
        self.losses, self.accumulate, self.step = [], accumulate, 0

    def loss(self, inputs, targets):
        return nn.functional.cross_entropy(self.model(inputs), targets)

    def epochs(self, number):
        for _ in range(number):
            self.model.train()
            for ids, *inputs_and_targets in self.loader:
                torch.manual_seed(self.step)  # dropout depends on the step alone
                with self.freezer.batch(ids):
                    loss = self.loss(*inputs_and_targets)
                loss.backward()
                self.losses.append(loss.item())
                self.step += 1
                if self.step % self.accumulate == 0:
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    self.freezer.step()
        return self


@pytest.fixture
def cuts(monkeypatch):
    """The cuts that were found, the latest one last."""
    found, find = [], CutFinder.find
    monkeypatch.setattr(CutFinder, "find", lambda self, previous: found.append(find(self, previous)) or found[-1])
    return found


def run(
    cache=None, epochs=6, *, make=Net, layers=NET, stages=({"conv1"},), dataset=None, loop=Loop, steps=None, **options
):
    """A run in which layers freeze at steps 2, 4, 6 and so on, as `stages` says."""
    model = seeded(make)
    optimizer = sgd(model)
    freezer = attach(model, optimizer, layers, *stages, cache=cache, total_steps=steps)
    wrapped = PrefixCache.indexed(dataset or data())
    made = loop(model, freezer, optimizer, wrapped, **options)
    return made.epochs(epochs)


def use(run):
    return run.freezer.report().cache


def assert_same_curve(one, other, tolerance=1e-5):
    assert len(one.losses) == len(other.losses)
    assert max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True)) <= tolerance
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


# The proof


def test_the_loss_curve_of_a_cnn_is_the_one_without_a_cache():
    plain, cached = run(), run(always())
    assert_same_curve(plain, cached)
    assert use(plain) is None
    # 18 steps, frozen after the second one: 14 of the 16 cached ones lie in epochs whose samples all were kept
    assert use(cached).hits + use(cached).misses == 5 * SAMPLES + SAMPLES - 2 * BATCH
    assert use(cached).misses == SAMPLES
    assert use(cached).cut == "conv2"


def small_bert():
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        hidden_dropout_prob=0.0,  # inside of the prefix it would be off with a cache, and on without
        attention_probs_dropout_prob=0.0,
        classifier_dropout=0.2,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


class BertLoop(Loop):
    def loss(self, ids, mask, targets):
        return self.model(input_ids=ids, attention_mask=mask, labels=targets).loss


def sentences():
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(4, 11, (SAMPLES, 1), generator=generator)
    mask = (torch.arange(10)[None] < lengths).long()
    ids = torch.randint(1, 60, (SAMPLES, 10), generator=generator) * mask
    return TensorDataset(ids, mask, torch.randint(3, (SAMPLES,), generator=generator))


def bert_layers():
    inside = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    each = [*inside, "intermediate.dense", "output.dense"]
    embeddings = [f"bert.embeddings.{kind}_embeddings" for kind in ("word", "token_type", "position")]
    blocks = [f"bert.encoder.layer.{block}.{name}" for block in range(3) for name in each]
    return [*embeddings, *blocks, "bert.pooler.dense", "classifier"]


def test_the_loss_curve_of_bert_is_the_one_without_a_cache():
    layers = bert_layers()
    options = {"make": small_bert, "layers": layers, "dataset": sentences(), "loop": BertLoop}
    stages = (set(layers[:9]), set(), set(), set(layers[9:15]))
    plain, cached = run(stages=stages, **options), run(always(), stages=stages, **options)
    assert_same_curve(plain, cached)
    assert use(cached).cut == "bert.encoder.layer.2"
    assert use(cached).hits > 2 * SAMPLES


def test_hooks_of_skipped_modules_do_not_fire():
    made = run(always(), epochs=4)
    fired = []
    for name, module in made.model.named_modules():
        module.register_forward_hook(lambda *_, name=name: fired.append(name))
        module.register_forward_pre_hook(lambda *_, name=name: fired.append(name))
    made.loader = DataLoader(made.loader.dataset, BATCH, drop_last=True)
    made.epochs(1)
    assert set(fired) == {"", "conv2", "norm2", "dropout", "head"}
    assert len(fired) == 2 * 2 * 5


class Unnamed(Loop):
    """Says nothing of which samples a batch has."""

    def epochs(self, number):
        self.freezer.batch = lambda ids: nullcontext()
        return super().epochs(number)


def test_samples_without_ids_are_known_by_their_content():
    plain, cached = run(), run(always(), loop=Unnamed)
    assert_same_curve(plain, cached)
    assert use(cached).misses == SAMPLES
    assert use(cached).hits > 2 * SAMPLES
    assert "forward" in cached.model.__dict__
    assert inspect.signature(cached.model.forward) == inspect.signature(
        type(cached.model).forward.__get__(cached.model)
    )
    cached.freezer.close()
    assert "forward" not in cached.model.__dict__


def test_the_same_inputs_at_another_place_of_a_batch_are_found():
    model = seeded(Net)
    freezer = attach(model, sgd(model), NET, {"conv1"}, cache=always())
    inputs, targets = data().tensors
    for step in range(6):
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(inputs[order]), targets[order]).backward()
        freezer.step()
    assert (use_of(freezer).hits, use_of(freezer).misses) == (66, 22)


def test_without_ids_augmentation_is_noticed_when_no_sample_came_back(caplog):
    class Augmenting(Seeded, Unnamed):
        """Neither ids, nor views."""

    options = {"dataset": Augmented(), "loop": Augmenting}
    plain, cached = run(**options), run(always(), steps=18, **options)
    assert_same_curve(plain, cached)
    assert 0 < use(cached).misses < 18 * BATCH
    assert use(cached).hits == 0
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(messages) == 1
    assert "no sample came back between" in messages[0]
    assert (use(cached).memory_bytes, use(cached).cut) == (0, None)
    assert "forward" not in cached.model.__dict__


def test_without_ids_batches_that_are_padded_to_their_own_length_are_noticed(caplog):
    model = seeded(Net)
    freezer = attach(model, sgd(model), NET, {"conv1"}, cache=always(), total_steps=16)
    inputs, targets = data((2, 30, 30)).tensors
    for step in range(16):
        rows = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(step))[:8]
        nn.functional.cross_entropy(model(inputs[rows, :, : 7 + step]), targets[rows]).backward()
        freezer.step()
    assert "padded to the longest one of a batch" in caplog.text
    assert use_of(freezer).hits == 0


def test_without_ids_passes_without_gradients_run_as_they_are():
    model = seeded(Net)
    freezer = attach(model, sgd(model), NET, {"conv1"}, cache=always())
    inputs, targets = data().tensors
    for _ in range(5):
        nn.functional.cross_entropy(model(inputs), targets).backward()
        freezer.step()
    hits, ran = use_of(freezer).hits, []
    model.conv1.register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        model(inputs)
    model.eval()(inputs)
    assert (len(ran), use_of(freezer).hits) == (2, hits)
    assert hits > 0


def test_ids_once_given_say_which_forward_passes_are_cached():
    model = seeded(Net)
    freezer = attach(model, sgd(model), NET, {"conv1"}, cache=always())
    inputs, targets = data().tensors
    for step in range(6):
        if step == 3:
            with freezer.batch(range(SAMPLES)):
                pass
        nn.functional.cross_entropy(model(inputs), targets).backward()
        freezer.step()
    assert (use_of(freezer).hits, use_of(freezer).misses) == (0, 22)


def use_of(freezer):
    return freezer.report().cache


# Traps


class Augmented(Dataset):
    """Adds noise of the process' random numbers to each sample."""

    def __init__(self):
        self.inner = data()

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        inputs, target = self.inner[index]
        return inputs + 0.1 * torch.randn(inputs.shape), target


class Seeded(Loop):
    def epochs(self, number):
        torch.manual_seed(77)
        return super().epochs(number)


def test_augmentation_is_noticed(caplog):
    plain, cached = run(dataset=Augmented(), loop=Seeded), run(always(), dataset=Augmented(), loop=Seeded)
    assert_same_curve(plain, cached, tolerance=0)
    assert use(cached).hits == 0
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(messages) == 1
    assert "is not what it was when it was last seen" in messages[0]
    assert "PrefixCache.indexed(dataset, views=2)" in messages[0]
    assert "is not in use: sample" in str(cached.freezer.report())
    assert (use(cached).memory_bytes, use(cached).cut) == (0, None)


class Flipped(Dataset):
    def __init__(self):
        self.inner = data()

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        inputs, target = self.inner[index]
        return (inputs.flip(2) if torch.rand(()) < 0.5 else inputs), target


@pytest.mark.parametrize("workers", [0, 2])
def test_views_come_back(workers):
    indexed = PrefixCache.indexed(Flipped(), views=2)
    loader = DataLoader(indexed, BATCH, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    epochs = []
    for _ in range(4):
        seen = {}
        for ids, inputs, _ in loader:
            seen |= {int(key): row for key, row in zip(ids, inputs, strict=True)}
        epochs.append(seen)
    assert torch.equal(before, torch.get_rng_state())
    for epoch, seen in enumerate(epochs):
        assert sorted(seen) == [2 * index + epoch % 2 for index in range(SAMPLES)]
        assert all(torch.equal(seen[key], epochs[epoch % 2][key]) for key in seen)
    plain = data().tensors[0]
    flipped = [not torch.equal(epochs[e][2 * i + e], plain[i]) for i in range(SAMPLES) for e in (0, 1)]
    assert [sum(flipped[i : i + 2]) for i in range(0, 2 * SAMPLES, 2)] == [1] * SAMPLES  # both sides of each
    assert 5 < sum(flipped[::2]) < 17
    other = PrefixCache.indexed(Flipped(), views=2, seed=1)
    assert [torch.equal(other[i][1], plain[i]) for i in range(SAMPLES)] != [not f for f in flipped[::2]]
    resumed = PrefixCache.indexed(Flipped(), views=2, epoch=3)
    assert [resumed[4][0], resumed[4][0], resumed[-1][0]] == [9, 8, 43]


def test_views_in_a_run():
    class Viewed(Loop):
        def __init__(self, model, freezer, optimizer, dataset, **options):
            super().__init__(model, freezer, optimizer, PrefixCache.indexed(Flipped(), views=2), **options)

    plain, cached = run(loop=Viewed), run(always(), loop=Viewed)
    assert_same_curve(plain, cached)
    assert use(cached).misses == 2 * SAMPLES
    assert use(cached).hits == 5 * SAMPLES + SAMPLES - 2 * BATCH - 2 * SAMPLES


@pytest.mark.parametrize("bad", [{"views": 0}, {"epoch": -1}])
def test_views_out_of_range(bad):
    with pytest.raises(ValueError, match="expected 1 or more views, and an epoch of 0 or more"):
        PrefixCache.indexed(data(), **bad)


def test_a_stream_has_no_ids():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(TypeError, match="received a Stream; expected a data set with __len__ and __getitem__"):
        PrefixCache.indexed(Stream())


def test_drop_last():
    plain, cached = run(drop_last=True), run(always(), drop_last=True)
    assert_same_curve(plain, cached)
    assert use(cached).misses <= SAMPLES
    assert use(cached).hits > BATCH * 4


@pytest.mark.parametrize("memory", ["1MB", 9 * 400, 1])
def test_more_samples_than_fit(memory):
    """A row is 400 bytes: 22, 9 or none of them fit."""
    plain, cached = run(), run(always(memory=memory))
    assert_same_curve(plain, cached)
    assert use(cached).memory_bytes == {"1MB": 22, 9 * 400: 9, 1: 0}[memory] * 400
    assert (use(cached).hits > 0) == (memory != 1)
    if memory == 1:
        assert "has no room: a sample takes 400 bytes, and 0 of 6 fit" in use(cached).reason


def test_memory_and_disk():
    plain, cached = run(), run(always(memory=9 * 400, disk="1MB"))
    assert_same_curve(plain, cached)
    assert use(cached).misses == SAMPLES
    assert use(cached).disk_bytes > 0


def test_a_full_disk_in_a_run(caplog):
    """The system refuses the file: a limit on the size of files stands for the full disk."""
    resource = pytest.importorskip("resource")
    plain, before = run(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 * 2**20, before[1]))
    try:
        cached = run(always(memory=9 * 400, disk="100MB"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_same_curve(plain, cached)
    assert (use(cached).memory_bytes, use(cached).disk_bytes) == (9 * 400, 0)
    assert caplog.text.count("The activation cache gets no more room in") == 1
    assert use(cached).hits > SAMPLES


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_rounded_activations(dtype, tolerance):
    plain, cached = run(), run(always(dtype=dtype))
    assert use(cached).hits > 3 * SAMPLES
    assert_same_losses(plain, cached, tolerance)


def assert_same_losses(one, other, tolerance):
    differences = [abs(a - b) for a, b in zip(one.losses, other.losses, strict=True)]
    assert max(differences) <= tolerance


def test_gradient_accumulation():
    options = {"accumulate": 2, "epochs": 8}
    plain, cached = run(**options), run(always(), **options)
    assert_same_curve(plain, cached)
    assert use(cached).misses == SAMPLES


class Autocast(Loop):
    def loss(self, inputs, targets):
        with torch.autocast("cpu", torch.bfloat16):
            return super().loss(inputs, targets)


def test_mixed_precision(cuts):
    plain, cached = run(loop=Autocast), run(always(), loop=Autocast)
    assert_same_curve(plain, cached)
    assert use(cached).hits > 3 * SAMPLES
    (leaf,) = cuts[-1].leaves
    assert leaf.dtype == torch.bfloat16
    assert use(cached).memory_bytes == SAMPLES * 200  # bit for bit, in two bytes


def test_mixed_precision_that_begins_later():
    class Later(Loop):
        def loss(self, inputs, targets):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.step >= 9):
                return super().loss(inputs, targets)

    plain, cached = run(loop=Later), run(always(), loop=Later)
    assert_same_curve(plain, cached)
    assert use(cached).misses == SAMPLES + 3 * SAMPLES  # what was kept is of another precision


def test_evaluation_between_epochs():
    class Evaluating(Loop):
        def epochs(self, number):
            self.answers = []
            for _ in range(number):
                super().epochs(1)
                for mode in (self.model.eval, self.model.train):  # with other inputs, and other sizes
                    mode()
                    with torch.no_grad():
                        self.answers.append(self.model(batch(len(self.answers), 5, 2, 9, 9)[0]))
                self.model.eval()
                with torch.no_grad(), self.freezer.batch([0, 1]):
                    self.answers.append(self.model(batch(len(self.answers), 2, 2, 7, 7)[0]))
            return self

    plain, cached = run(loop=Evaluating), run(always(), loop=Evaluating)
    assert_same_curve(plain, cached)
    for one, other in zip(plain.answers, cached.answers, strict=True):
        torch.testing.assert_close(one, other)
    assert use(cached).misses == SAMPLES


MOVING = {"make": lambda: mlp(*SIZES), "layers": FIVE, "dataset": data((5,))}


STAGES = ({"0"}, set(), {"2"}, set(), set(), set(), {"4"})  # at steps 2, 6 and 14, of three steps an epoch


def test_a_cut_that_moves():
    plain, cached = run(stages=STAGES, epochs=9, **MOVING), run(always(), stages=STAGES, epochs=9, **MOVING)
    assert_same_curve(plain, cached)
    assert use(cached).cut == "6"
    # the one in the second epoch is met by few samples, and each of the others computes every sample once
    assert 2 * SAMPLES < use(cached).misses <= 3 * SAMPLES
    assert use(cached).hits + use(cached).misses == 8 * SAMPLES + SAMPLES - 2 * BATCH
    assert use(cached).memory_bytes == SAMPLES * 4 * 7


def test_a_cut_that_moves_when_nothing_more_fits():
    """A row of 36 bytes becomes one of 32, then 28; memory for ten of the largest."""
    plain = run(stages=STAGES, epochs=9, **MOVING)
    cached = run(always(memory=360), stages=STAGES, epochs=9, **MOVING)
    assert_same_curve(plain, cached)
    assert use(cached).cut == "6"
    assert use(cached).memory_bytes <= 360
    assert use(cached).hits > SAMPLES


@pytest.mark.parametrize(("steps", "cut"), [(None, "4"), (60, "4"), (18, "2")])
def test_a_cut_stays_where_too_little_of_the_run_is_left(steps, cut):
    """The second layer freezes at step 14 of 18, when the rest of the run is little more than an epoch."""
    stages = ({"0"}, set(), set(), set(), set(), set(), {"2"})
    plain, cached = run(stages=stages, **MOVING), run(always(), stages=stages, steps=steps, **MOVING)
    assert_same_curve(plain, cached)
    assert use(cached).cut == cut
    assert (use(cached).misses == SAMPLES) == (cut == "2")


class Thawing(Loop):
    names = None

    def epochs(self, number):
        super().epochs(number - 3)
        self.freezer.thaw(self.names)
        return super().epochs(3)


@pytest.mark.parametrize("names", [None, ["2"]])
def test_thawing_drops_what_is_no_longer_valid(names):
    thawing = type("Thawing", (Thawing,), {"names": names})
    stages = (set(), {"0", "2"})
    plain = run(stages=stages, loop=thawing, **MOVING)
    cached = run(always(), stages=stages, loop=thawing, **MOVING)
    assert_same_curve(plain, cached)
    assert use(cached).cut == (None if names is None else "2")
    assert use(cached).misses == (SAMPLES if names is None else 2 * SAMPLES)


def test_thawing_behind_the_cut_keeps_everything():
    thawing = type("Thawing", (Thawing,), {"names": ["6"]})
    cached = run(always(), stages=(set(), {"0", "2", "6"}), loop=thawing, **MOVING)
    assert (use(cached).cut, use(cached).misses) == ("4", SAMPLES)


def changing(change):
    """A loop in which the user does something to the model after the third epoch."""

    class Changing(Loop):
        def epochs(self, number):
            super().epochs(3)
            change(self)
            return super().epochs(number - 3)

    return Changing


def load_other_weights(loop):
    state = {name: value + 0.01 for name, value in loop.model.state_dict().items()}
    loop.model.load_state_dict(state)


def swap_and_swap_back(loop):
    before = values(loop.model)
    load_other_weights(loop)
    loop.model.load_state_dict(before)


def unfreeze_by_hand(loop):
    loop.model[0].requires_grad_(True)


def write_past_every_counter(loop):
    """`.data` has a version counter of its own."""
    loop.model[0].weight.data.add_(0.3)


@pytest.mark.parametrize(
    ("change", "misses", "kept"),
    [
        (load_other_weights, 30, False),  # the layer has moved: it is thawed at the next record
        (swap_and_swap_back, SAMPLES, True),
        (unfreeze_by_hand, SAMPLES, False),
        (write_past_every_counter, SAMPLES, False),
    ],
)
def test_weights_of_the_prefix_that_change(change, misses, kept, caplog, monkeypatch):
    monkeypatch.setattr("smartfrz.adapters.torch.cache.prefix.AUDIT_EVERY", 1)
    options = {"stages": (set(), {"0"}), "loop": changing(change), **MOVING}
    plain, cached = run(**options), run(always(), **options)
    assert_same_curve(plain, cached)
    assert (use(cached).misses, use(cached).cut is not None) == (misses, kept)
    assert ("what was kept is not what the model computes now" in caplog.text) == (change is write_past_every_counter)


def dropping():
    return nn.Sequential(nn.Linear(5, 9), nn.Dropout(0.5), nn.Linear(9, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))


def test_dropout_inside_of_the_prefix_is_off():
    def off(loop):
        loop.model[1].p = 0.0

    options = {"make": dropping, "layers": ["0", "2", "5"], "dataset": data((5,))}
    stages = (set(), set(), set(), {"0"})
    plain = run(stages=stages, loop=type("Off", (FromStep,), {"at": 8, "change": staticmethod(off)}), **options)
    cached = run(always(), stages=stages, **options)
    assert_same_curve(plain, cached)
    assert use(cached).cut == "2"
    assert all(module.training for module in cached.model.modules())


class FromStep(Loop):
    """Changes something once so many steps were made."""

    def loss(self, inputs, targets):
        if self.step >= self.at:
            self.change(self)
        return super().loss(inputs, targets)


def test_batch_norm_of_the_prefix_is_in_eval():
    cached = run(always(), stages=({"conv1"},))
    assert not cached.model.norm1.training
    assert cached.model.norm2.training
    before = values(cached.model)
    cached.epochs(1)
    assert {name for name in moved(before, cached.model) if "1" in name} == set()


def test_a_batch_norm_that_still_learns_is_not_in_the_prefix():
    class Partly(Loop):
        def __init__(self, model, *rest, **options):
            super().__init__(model, *rest, **options)
            for parameter in (*model.conv1.parameters(), *model.norm1.parameters()):
                parameter.requires_grad_(False)

    plain, cached = run(stages=(), loop=Partly, layers=NET[1:]), run(always(), stages=(), loop=Partly, layers=NET[1:])
    assert_same_curve(plain, cached)
    assert use(cached).cut in (None, "norm1")


def test_what_the_user_froze_is_cached_too():
    class Frozen(Loop):
        def __init__(self, model, *rest, **options):
            super().__init__(model, *rest, **options)
            model[0].requires_grad_(False)

    cached = run(always(), stages=(), loop=Frozen, **(MOVING | {"layers": FIVE[1:]}))
    assert (use(cached).cut, use(cached).misses) == ("2", SAMPLES)


# Resumed runs and copies


def states(loop):
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (loop.model, loop.optimizer, loop.freezer)], file)
    return file


def resumed(loop, cache, file, stages, **options):
    file.seek(0)
    model = seeded(options["make"], seed=9)
    optimizer = sgd(model)
    freezer = attach(model, optimizer, options["layers"], *stages, cache=cache)
    for part, state in zip((model, optimizer, freezer), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    made = Loop(model, freezer, optimizer, PrefixCache.indexed(options["dataset"]))
    made.order.set_state(loop.order.get_state())
    made.step = loop.step
    return made


def test_a_resumed_run():
    stages = (set(), {"0", "2"})
    whole, first = run(stages=stages, epochs=8, **MOVING), run(always(), stages=stages, epochs=4, **MOVING)
    file = states(first)
    first.freezer.close()
    second = resumed(first, always(), file, (), **MOVING).epochs(4)
    assert first.losses + second.losses == pytest.approx(whole.losses, abs=1e-5)
    assert not [n for n, v in whole.model.state_dict().items() if not torch.allclose(v, second.model.state_dict()[n])]
    assert use(second).misses == SAMPLES


def test_copies_and_pickles_of_the_model_inside_of_a_batch():
    cached = run(always())
    inputs = data().tensors[0][:4]
    with cached.freezer.batch([0, 1, 2, 3]):
        copied, read = copy.deepcopy(cached.model), pickle.loads(pickle.dumps(cached.model))
    for model in (copied, read, cached.model):
        assert "forward" not in vars(model) or model is not cached.model
        before = use(cached).hits
        torch.testing.assert_close(model.eval()(inputs), cached.model.eval()(inputs))
        assert use(cached).hits == before
    with torch.no_grad():
        copied.conv1.weight.zero_()
        copied.norm1.weight.zero_()
    assert not torch.allclose(copied.eval()(inputs), cached.model.eval()(inputs))


# Refusals


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.middle = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        first = self.down(x).relu()
        return self.head(self.up(torch.cat([first, self.middle(first)], 1)).mean((2, 3)))


def test_a_model_that_cannot_be_cut_is_trained_without(caplog):
    caplog.set_level(logging.INFO)
    options = {"make": UNet, "layers": ["down", "middle", "up", "head"], "stages": ({"down"},)}
    plain, cached = run(**options), run(always(), **options)
    assert_same_curve(plain, cached, tolerance=0)
    assert "at 'middle': behind the cut aten.cat.default reads a tensor" in use(cached).reason
    assert "at 'middle': behind the cut aten.cat.default reads a tensor" in caplog.text
    assert use(cached).hits == 0


class Wandering(nn.Module):
    """After so many passes it takes another way."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.limit = float("inf")

    def forward(self, x):
        first = self.first(x)
        x = self.second(first)
        self.limit -= 1
        return self.third(x + first if self.limit < 0 else x)


def test_a_model_that_later_reads_from_its_prefix(caplog):
    def after(loop):
        loop.model.limit = 4

    options = {"make": Wandering, "layers": ["first", "second", "third"], "dataset": data((5,))}
    options |= {"stages": ({"first"},), "loop": changing(after)}
    plain, cached = run(**options), run(always(), **options)
    assert plain.losses[:13] == pytest.approx(cached.losses[:13], abs=1e-5)
    assert plain.losses == pytest.approx(cached.losses, abs=1e-5)
    assert "the model no longer does what it did when it was checked: behind the cut aten.add" in caplog.text
    assert use(cached).hits > 0


def test_torch_compile_is_refused(caplog):
    torch._dynamo.reset()
    model = seeded(lambda: mlp(*SIZES))
    freezer = attach(model, sgd(model), FIVE, set(), set(), set(), {"0"}, set(), total_steps=12, cache=always())
    compiled = torch.compile(model, backend="eager")
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    for _ in range(12):
        with freezer.batch(range(8)):
            compiled(inputs).sum().backward()
        freezer.step()
    torch._dynamo.reset()
    assert freezer.frozen_layers == ["0"]
    assert "torch.compile is in use in this process" in use_of(freezer).reason
    assert caplog.text.count("The activation cache is off") == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            x = self.first(x)
            return self.third(torch.utils.checkpoint.checkpoint(self.second, x, use_reentrant=reentrant).tanh())

    options = {"make": Checkpointed, "layers": ["first", "second", "third"], "dataset": data((5,))}
    stages = (set(), {"first"}, set(), set(), {"second"})
    plain, cached = run(stages=stages, **options), run(always(), stages=stages, **options)
    assert_same_curve(plain, cached)
    if reentrant:
        assert "reentrant gradient checkpointing" in use(cached).reason
    else:  # before the second one starts a checkpoint; before the third there is none
        assert (use(cached).cut, use(cached).misses) == ("third", SAMPLES)


def test_data_parallel_is_refused():
    model = nn.DataParallel(seeded(Net))
    with pytest.raises(ValueError, match=r"`cache` and a model in nn\.DataParallel"):
        attach(model, sgd(model), NET, cache=always())


def test_inputs_that_want_gradients_run_as_they_are():
    cached = run(always())
    inputs = data().tensors[0][:4].requires_grad_()
    cached.model.train()
    before = use(cached).hits
    with cached.freezer.batch(range(4)):
        cached.model(inputs).sum().backward()
    assert inputs.grad.abs().sum() > 0
    assert use(cached).hits == before


def test_wrong_ids():
    cached = run(always())
    message = r"received 3 ids, but the model's inputs have the shapes \[\(4, 2, 7, 7\)\]"
    with pytest.raises(ValueError, match=message), cached.freezer.batch([0, 1, 2]):
        cached.model.train()(data().tensors[0][:4])
    assert "forward" not in vars(cached.model)
    for ids in ("abc", 3, ["a"], torch.tensor([[1]]), [0.5]):
        message = "expected one integer for each sample of the batch"
        with pytest.raises(TypeError, match=message), cached.freezer.batch(ids):
            pass


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"memory": "much"}, "`memory` is 'much'; expected a number of bytes"),
        ({"disk": -1}, "`disk` is -1; expected a number of bytes"),
        ({"dtype": "int4"}, "`dtype` is 'int4'; expected one of float32"),
        ({"memory": 0}, "`memory` and `disk` are both 0"),
    ],
)
def test_options_out_of_range(bad, message):
    with pytest.raises(ValueError, match=message):
        PrefixCache(**bad)


# Whether it pays


class Clock:
    """Stands still, but for what `sleep` adds: measured times do not depend on what else the machine does."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("smartfrz.adapters.torch.cache.prefix.time", clock)
    monkeypatch.setattr("smartfrz.adapters.torch.cache.trial.time", clock)
    monkeypatch.setattr(Slow, "clock", clock)
    return clock


class Slow(nn.Linear):
    """Takes 30 ms of the clock."""

    clock = None

    def forward(self, x):
        self.clock.sleep(0.03)
        return super().forward(x)


@pytest.mark.parametrize("slow", [0, 2])
def test_it_starts_only_where_it_pays_by_a_clock_of_ours(slow, clock, caplog):
    caplog.set_level(logging.INFO)

    def make():
        model = mlp(*SIZES)
        model[slow].__class__ = Slow
        return model

    cached = run(always(profile=True), stages=({"0"},), epochs=12, **(MOVING | {"make": make}))
    if slow == 0:
        assert (use(cached).cut, use(cached).misses) == ("2", SAMPLES)
        assert use(cached).seconds_saved > 0
        assert "at '2' starts: 36 bytes a sample; forward pass of 6 samples" in caplog.text
    else:
        assert use(cached).hits == 0
        assert use(cached).cut is None


def test_it_stops_where_reading_takes_longer_with_a_store_that_is_made_slow(clock, monkeypatch, caplog):
    cached = run(always(profile=True), stages=({"0"},), epochs=4, make=slow_front, layers=FIVE, dataset=data((5,)))
    assert use(cached).cut == "2"
    get = ActivationStore.get
    monkeypatch.setattr(ActivationStore, "get", lambda store, keys: clock.sleep(0.3) or get(store, keys))
    monkeypatch.setattr("smartfrz.adapters.torch.cache.prefix.AUDIT_EVERY", 4)
    cached.epochs(4)
    assert "reading took" in caplog.text
    assert "is not in use: reading took" in str(cached.freezer.report())


def slow_front():
    model = mlp(*SIZES)
    model[0].__class__ = Slow
    return model


def test_the_report():
    cached = run(always())
    text = str(cached.freezer.report())
    assert f"The activation cache keeps the inputs of 'conv2'. {use(cached).hits} samples read, 22 computed; " in text
    assert cached.freezer.report().to_dict()["cache"]["hits"] == use(cached).hits
    cached.freezer.close()
    assert "is not in use: it was closed" in str(cached.freezer.report())


class Biased(nn.Module):
    """A bias that the first layer computes for every sample alike crosses the cut, and is written into behind it."""

    class First(nn.Linear):
        def forward(self, x):
            return super().forward(x), self.bias.detach()[None] * 1.0

    class Second(nn.Linear):
        def forward(self, x, bias):
            bias += 1
            return super().forward(x + bias)

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = self.First(5, 6), self.Second(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.third(self.second(*self.first(x)))


def test_what_is_alike_for_every_sample_is_not_spoilt_by_the_layer_that_gets_it(cuts):
    options = {"make": Biased, "layers": ["first", "second", "third"], "stages": ({"first"},), "dataset": data((5,))}
    plain, cached = run(**options), run(always(), **options)
    assert_same_curve(plain, cached)
    assert list(cuts[-1].constants) == [1]
    assert use(cached).misses == SAMPLES


def test_a_last_batch_of_one_sample():
    options = {"dataset": data(samples=17), "epochs": 6}
    plain, cached = run(**options), run(always(), **options)
    assert_same_curve(plain, cached)
    assert use(cached).misses == 17


class CallsParts(Loop):
    """Never calls the model itself in training, only its parts; evaluates the model after each step."""

    def loss(self, inputs, targets):
        hidden = inputs
        for part in self.model:
            hidden = part(hidden)
        loss = nn.functional.cross_entropy(hidden, targets)
        with torch.no_grad():
            self.model.eval()(inputs)
        self.model.train()
        return loss


@pytest.mark.parametrize("loop", [CallsParts, type("UnnamedParts", (CallsParts, Unnamed), {})])
def test_where_only_parts_of_the_model_are_called_the_cache_is_off_and_says_why(loop):
    options = {"make": lambda: mlp(*SIZES), "layers": FIVE, "stages": [{"0", "2"}], "dataset": data((5,))}
    plain, cached = run(loop=loop, **options), run(always(), loop=loop, **options)
    assert_same_curve(plain, cached)
    assert cached.freezer.frozen_layers == ["0", "2"]
    assert use(cached).cut is None
    assert "calls the parts of the model one by one" in use(cached).reason
    assert use(cached).hits == use(cached).misses == 0

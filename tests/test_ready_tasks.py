"""`smartfrz compare` on pictures and texts: real files, real networks, few steps."""

import csv
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from builder_fixtures import invoke
from PIL import Image
from torch import nn

from smartfrz.cli import main
from smartfrz.comparing.lines import read_lines
from smartfrz.comparing.own_task import build_task
from smartfrz.comparing.ready_tasks import ReadyOptions, picture_network, picture_source, read_texts, text_source
from smartfrz.errors import RecipeError

NETWORK = """
from torch import nn

def small(classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, classes))
"""


@pytest.fixture
def pictures(tmp_path):
    """Twenty pictures of each of three classes, told apart by their colour."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("red", "green", "blue")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(20):
            pixels = rng.integers(0, 100, (12, 12, 3), dtype=np.uint8)
            pixels[:, :, label] += np.uint8(120)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{index}.png")
    return tmp_path / "pictures"


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.csv"
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines)
        writer.writerow(["number", "text", "label"])
        for index in range(60):
            good = index % 2
            writer.writerow([index, f"a {'good' if good else 'bad'} film, {index}", "like" if good else "dislike"])
    return file


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A tiny BERT with random weights and its tokenizer, saved as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film", ",", *map(str, range(60))]
    tokenizer = transformers.BertTokenizerFast(vocab={word: index for index, word in enumerate(words)})
    tokenizer.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def call(tmp_path, *arguments):
    return invoke(main, "compare", *arguments, "--output", tmp_path / "out", "--fewer-steps", "50")


def test_pictures_and_a_network_of_ones_own(tmp_path, pictures, eager_predictor, monkeypatch):
    (tmp_path / "mynetworks.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    given = ["--pictures", "pictures", "--network", "mynetworks:small", "--image-size", 16, "--epochs", 8]
    result = call(tmp_path, *given, "--batch-size", 8, "--learning-rate", 0.01, "--predictor", eager_predictor)
    assert result.exit_code == 0, result.output
    assert "With one seed, SmartFRZ with eager.onnx" in result.stdout
    assert "The test data has 12 samples" in result.stdout
    full = read_lines(tmp_path / "out" / "runs.jsonl")
    assert {line["full_steps"] for line in full} == {48}
    assert {line["task"] for line in full} == {"mynetworks:small on the pictures in pictures"}


@pytest.mark.slow
def test_the_bundled_network_is_pretrained_and_fits_the_classes(pictures):
    task = build_task(picture_source(pictures, ReadyOptions("efficientnet-lite0", image_size=32)))
    model = task.model(0)
    assert model(torch.stack([task.train[i][0] for i in range(2)])).shape == (2, 3)
    assert (len(task.train), len(task.test)) == (48, 12)
    assert not set(task.train.indices) & set(task.test.indices)
    with pytest.raises(RecipeError, match="comes with weights only"):
        picture_network("efficientnet-lite0", 3, pretrained=False)


def test_pictures_that_are_split_already_stay_so(tmp_path, pictures, monkeypatch):
    (tmp_path / "mynetworks.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    for split, number in (("train", 4), ("test", 2)):
        for name in ("red", "green", "blue"):
            (tmp_path / "both" / split / name).mkdir(parents=True)
            for index in range(number):
                shutil.copy(pictures / name / f"{index}.png", tmp_path / "both" / split / name)
    task = picture_source(tmp_path / "both", ReadyOptions("mynetworks:small", image_size=8)).build()
    assert (len(task.train), len(task.test)) == (12, 6)


def test_the_version_follows_the_pictures_and_the_options(pictures):
    options = ReadyOptions("resnet18")
    first = picture_source(pictures, options).version
    assert picture_source(pictures, options).version == first
    assert picture_source(pictures, ReadyOptions("resnet18", epochs=3)).version != first
    (pictures / "red" / "0.png").unlink()
    assert picture_source(pictures, options).version != first


class MockTorchvision:
    """A library with one network of 1000 classes, and one whose last layer is another."""

    @staticmethod
    def list_models():
        return ["tiny", "odd"]

    @staticmethod
    def get_model(name, weights, num_classes=1000):
        last = nn.Linear(4, num_classes) if name == "tiny" else nn.Conv2d(3, 3, 1)
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.Flatten(), last)


def test_of_a_torchvision_network_the_last_layer_is_replaced_and_the_colours_are_its_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", MockTorchvision)
    monkeypatch.setitem(sys.modules, "torchvision.models", MockTorchvision)
    for pretrained in (True, False):
        network = picture_network("tiny", 5, pretrained)()
        assert network(torch.zeros(2, 3, 8, 8)).shape == (2, 5)
    white = picture_network("tiny", 5, True)()[0](torch.ones(1, 3, 1, 1)).flatten()
    assert white.tolist() == pytest.approx([2.249, 2.429, 2.64], abs=1e-3)  # as torchvision's own transforms make it
    with pytest.raises(RecipeError, match="no linear one of 1000 classes"):
        picture_network("odd", 5, True)()


@pytest.mark.parametrize("name", ["transformers:some/model", "keras:ResNet50"])
def test_a_network_that_is_not_for_pictures_is_refused(name):
    with pytest.raises(RecipeError, match="expected a network of torchvision or timm for pictures"):
        picture_network(name, 3, pretrained=True)


def test_a_missing_folder_is_named(tmp_path):
    result = call(tmp_path, "--pictures", tmp_path / "gone", "--network", "resnet18")
    assert "which is no folder; expected one with train/<class>/" in " ".join(result.stderr.split())
    assert result.exit_code == 1


def test_texts_and_a_saved_model(tmp_path, texts, language_model, eager_predictor):
    given = ["--texts", texts, "--network", language_model, "--epochs", 8, "--batch-size", 8]
    result = call(tmp_path, *given, "--learning-rate", 0.005, "--predictor", eager_predictor)
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert figures["figures"][0]["steps"] == 48
    assert figures["figures"][0]["metric"]["mean"] > 0.9  # it tells good from bad
    assert any(run["frozen"] for run in figures["runs"])


@pytest.mark.parametrize("from_scratch", [True, False])
def test_a_text_model_starts_from_its_weights_or_not(texts, language_model, from_scratch):
    task = build_task(text_source(texts, ReadyOptions(str(language_model), from_scratch=from_scratch)))
    torch.manual_seed(0)
    one = task.model(0).bert.embeddings.word_embeddings.weight
    torch.manual_seed(1)
    other = task.model(1).bert.embeddings.word_embeddings.weight
    assert torch.equal(one, other) != from_scratch


TEXTS = {
    "no column": ("text,class\na,b\n", "has the columns ['text', 'class']; expected text and label"),
    "nothing": ("", "has the columns []"),
    "no label": ("text,label\na,b\nc,\n", "Row 2 of"),
    "one label": ("text,label\na,b\nc,b\n", "has 1 different labels in 2 rows"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts_that_cannot_be_used_are_explained(case, tmp_path):
    content, message = TEXTS[case]
    (tmp_path / "texts.csv").write_text(content)
    with pytest.raises(RecipeError) as raised:
        read_texts(tmp_path / "texts.csv")
    assert message in str(raised.value)


def test_a_missing_file_and_a_missing_model_are_named(tmp_path, texts):
    pytest.importorskip("transformers")
    with pytest.raises(RecipeError, match="which is no file"):
        read_texts(tmp_path / "gone.csv")
    with pytest.raises(RecipeError, match="which transformers cannot read"):
        text_source(texts, ReadyOptions(str(tmp_path))).build()

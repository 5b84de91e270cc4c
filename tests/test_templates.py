"""`smartfrz-build new`: recipes from model names."""

import re
import sys
import types

import numpy as np
import pytest
from builder_fixtures import invoke, write_digit_recipes
from PIL import Image

from smartfrz.dataset_builder import templates
from smartfrz.dataset_builder.checking import check_recipe, describe
from smartfrz.dataset_builder.cli import main as build
from smartfrz.dataset_builder.models import build_model
from smartfrz.dataset_builder.recipes import load_recipe
from smartfrz.dataset_builder.templates import NewRecipe, default_file, recipe_text, resolve_name
from smartfrz.errors import MissingDependencyError, RecipeError

FAMILIES = {
    "resnet18": "residual-cnn",
    "wide_resnet50_2": "residual-cnn",
    "mobilenet_v3_small": "inverted-residual-cnn",
    "vgg11_bn": "plain-cnn",
    "vit_b_16": "transformer",
    "distilbert-base-uncased": "transformer",
    "all-MiniLM-L6": "transformer",
    "poolformer_s12": "poolformer",
    "5": "other",
}


def saved_bert(folder):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=3, **sizes)).save_pretrained(folder)
    return folder


def write_pictures(folder, classes=3, number=8):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in range(classes):
            place = folder / split / f"class{name}"
            place.mkdir(parents=True)
            for index in range(number):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{index}.png")
    return folder


@pytest.fixture
def mock_libraries(monkeypatch):
    """Stand-ins for torchvision and timm with two model names each, nothing else."""
    for library, names in (("torchvision", ["resnet18", "vgg11"]), ("timm", ["resnet18", "convnext_tiny"])):
        module, models = types.ModuleType(library), types.ModuleType(f"{library}.models")
        module.list_models = models.list_models = lambda names=names: list(names)
        monkeypatch.setitem(sys.modules, library, module)
        monkeypatch.setitem(sys.modules, f"{library}.models", models)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_guessed(name):
    assert templates._family(name) == FAMILIES[name]


def test_bare_names_are_looked_up_with_mock_libraries(mock_libraries):
    assert resolve_name("resnet18") == "torchvision:resnet18"
    assert resolve_name("timm:resnet18") == "timm:resnet18"
    assert resolve_name("convnext_tiny.in12k") == "timm:convnext_tiny.in12k"


@pytest.mark.parametrize("name", ["resnet81", "torchvision:resnet81", "timm:resnet81"])
def test_unknown_names_are_told_with_mock_libraries(mock_libraries, name):
    with pytest.raises(RecipeError, match=r"Unknown model 'resnet81': not in .*Did you mean 'resnet18'\?"):
        resolve_name(name)


@pytest.mark.parametrize(
    ("name", "library"), [("resnet18", "torchvision"), ("torchvision:resnet18", "torchvision"), ("timm:x", "timm")]
)
def test_missing_libraries_are_named(monkeypatch, name, library):
    for absent in ("torchvision", "torchvision.models", "timm"):
        monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(MissingDependencyError, match=f"Install one with: pip install {library}"):
        resolve_name(name)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_recipe_of_a_real_library_is_checked(tmp_path, monkeypatch, library):
    pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "photos")
    result = invoke(build, "new", f"{library}:resnet18", "--data", "photos", "--image-size", 32)
    assert result.exit_code == 0, result.output
    recipe = load_recipe("resnet18.toml")
    assert (recipe.model.source, recipe.model.arguments["num_classes"]) == (f"{library}:resnet18", 3)
    assert (recipe.architecture, recipe.data.folder, recipe.data.image_size) == ("residual-cnn", "photos", 32)
    checked = check_recipe(recipe, tmp_path)
    assert len(checked.layers) == 21
    with pytest.raises(RecipeError, match=r"Did you mean 'resnet18'\?"):
        resolve_name(f"{library}:resnet188")


def test_a_saved_transformers_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = saved_bert(tmp_path / "tiny-bert")
    result = invoke(build, "new", "transformers:tiny-bert", "-o", "bert.toml", "--num-classes", "4")
    assert result.exit_code == 0, result.output
    recipe = load_recipe("bert.toml")
    assert recipe.model.source == f"transformers:{folder}"
    assert (recipe.architecture, recipe.data.source, recipe.training.optimizer) == (
        "transformer",
        "my_data:texts",
        "AdamW",
    )
    assert build_model(recipe, 0).config.num_labels == 4
    with pytest.raises(RecipeError, match=r"Did you mean '\./tiny-bert'|Did you mean 'tiny-bert'"):
        resolve_name("transformers:./tiny-bret")


def test_names_of_the_hub_are_taken_as_they_are():
    assert resolve_name("distilbert/distilbert-base-uncased") == "transformers:distilbert/distilbert-base-uncased"
    assert resolve_name("mymodels:build") == "mymodels:build"
    assert str(default_file("distilbert/distilbert-base-uncased")) == "distilbert-base-uncased.toml"
    assert str(default_file("timm:vit_tiny.augreg")) == "vit_tiny.augreg.toml"


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("keras:MobileNetV2", {"classes": 3, "input_shape": [32, 32, 3]}),
        ("keras_hub:resnet_18_imagenet", {"num_classes": 3}),
    ],
)
def test_models_of_keras(tmp_path, model, arguments):
    path = tmp_path / "new.toml"
    path.write_text(recipe_text(NewRecipe(model, num_classes=3, image_size=32), path))
    recipe = load_recipe(path)
    assert (recipe.model.source, recipe.model.arguments) == (model, arguments)
    assert recipe.data.image_size == 32


def test_names_with_quotes_stay_text(tmp_path):
    path = tmp_path / 'a"b.toml'
    path.write_text(recipe_text(NewRecipe("parts:net", data='da"ta:x', architecture="\\"), path))
    recipe = load_recipe(path)
    assert (recipe.name, recipe.data.source, recipe.architecture) == ('a"b', 'da"ta:x', "\\")


def test_a_folder_without_classes_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"holds 0 folders; expected at least two, one a class\. Pass as --data"):
        recipe_text(NewRecipe("parts:net", data=str(tmp_path)), tmp_path / "x.toml")


@pytest.mark.parametrize(
    ("model", "pictures", "expected"),
    [
        ("parts:net", (30, 28), 28),  # nobody knows what the network takes
        ("parts:net", (640, 480), 224),
        ("keras:MobileNetV2", (100, 90), 96),  # halved five times
        ("keras:MobileNetV2", (20, 16), 32),
    ],
)
def test_the_size_of_the_pictures_is_filled_in(tmp_path, model, pictures, expected):
    write_pictures(tmp_path / "pictures")
    for file in (tmp_path / "pictures" / "train").rglob("*.png"):
        Image.new("RGB", pictures).save(file)
    (tmp_path / "pictures" / "train" / "class0" / "0.png").write_bytes(b"damaged")
    path = tmp_path / "new.toml"
    path.write_text(recipe_text(NewRecipe(model, data=str(tmp_path / "pictures")), path))
    recipe = load_recipe(path)
    assert recipe.data.image_size == expected
    if model.startswith("keras"):
        assert recipe.model.arguments == {"classes": 3, "input_shape": [expected, expected, 3]}
    assert recipe.training.epochs == 120  # 24 pictures are one step
    path.write_text(recipe_text(NewRecipe(model, image_size=50), path))  # the folder `pictures` beside it
    assert load_recipe(path).data.image_size == 50


def test_the_size_of_a_real_timm_network_is_filled_in(tmp_path):
    pytest.importorskip("timm")
    write_pictures(tmp_path / "pictures")
    sizes = {}
    for model in ("timm:vit_tiny_patch16_224", "timm:resnet18"):
        path = tmp_path / "new.toml"
        path.write_text(recipe_text(NewRecipe(model), path))
        sizes[model] = load_recipe(path).data.image_size
        assert load_recipe(path).model.arguments["num_classes"] == 3
    assert list(sizes.values()) == [224, 32]  # the pictures have 16


def new(*arguments):
    result = invoke(build, "new", *arguments)
    return result.exit_code, result.output


def test_one_recipe_says_that_it_takes_two(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_digit_recipes(tmp_path)
    code, text = new("digit_parts:cnn", "--data", "digit_parts:digits", "-o", "mine.toml")
    assert code == 0, text
    assert text.startswith("Wrote mine.toml.\nA predictor takes at least two recipes")
    assert text.endswith("  smartfrz-build check mine.toml\n  smartfrz-build run mine.toml another.toml -o my.onnx\n")
    code, text = new("keras:MobileNetV2")
    assert "Still to do: put pictures into pictures/train/<class>/ and test/<class>/, or change [data]." in text


def test_a_family_differs_in_order_and_rate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_digit_recipes(tmp_path)
    arguments = ("digit_parts:cnn", "--data", "digit_parts:digits", "--family", "-o", "my net.toml")
    code, text = new(*arguments)
    assert code == 0, text
    names = ["my net-high-1", "my net-high-2", "my net-low-1", "my net-low-2"]
    recipes = [load_recipe(f"{name}.toml") for name in names]
    assert [recipe.name for recipe in recipes] == names
    assert [(r.seed, r.recording.seed, r.training.learning_rate) for r in recipes] == [
        (0, 1, 0.05), (2, 3, 0.05), (0, 1, 0.015), (2, 3, 0.015)
    ]  # fmt: skip
    assert len({recipe.architecture for recipe in recipes}) == 1
    assert "at least two" not in text
    command = text.splitlines()[-1].strip()
    assert command == f"smartfrz-build run {' '.join(repr(n + '.toml') for n in names)} -o my.onnx"
    (tmp_path / "my net-high-1.toml").unlink()
    assert "'my net-high-2.toml' exists, and is left as it is" in new(*arguments)[1]
    assert not (tmp_path / "my net-high-1.toml").exists()  # all four or none


MODULE = """
import torch

def net(width=3):
    return torch.nn.Linear(width, 2)

def with_width(width, *, depth):
    return torch.nn.Linear(width, depth)

def fails():
    raise ValueError("no weights here")

def text():
    return "no model"
"""


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("own_nets:nett", "", r"model\.source names 'nett', .*Did you mean 'net'\?"),
        ("own_netz:net", "", r"model\.source names module 'own_netz', which cannot be imported.*Put own_netz\.py into"),
        ("own_nets:net", "own_nets:pictures", r"data\.source names 'pictures', which module 'own_nets' does not have"),
        ("own_nets:fails", "", r"own_nets:fails cannot be built: it raises ValueError: no weights here\. Expected"),
        ("own_nets:text", "", r"own_nets:text returns str; expected a callable that returns a PyTorch or Keras model"),
        ("own_broken:net", "", r"Module 'own_broken' cannot be imported: it raises ZeroDivisionError: .*Correct that"),
    ],
)
def test_what_the_user_names_is_tried(tmp_path, monkeypatch, model, data, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_nets.py").write_text(MODULE)
    (tmp_path / "own_broken.py").write_text("1 / 0\n")
    code, text = new(model, *(["--data", data] if data else []), "-o", "x.toml")
    assert code == 1
    assert re.search(message, text)
    assert not (tmp_path / "x.toml").exists()


def test_arguments_to_fill_in_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_nets.py").write_text(MODULE)
    code, text = new("own_nets:with_width", "-o", "x.toml")
    assert code == 0, text
    assert "Still to do: model.arguments of own_nets:with_width: width, depth." in text


# check


@pytest.fixture(scope="module")
def digit_recipe(tmp_path_factory):
    return load_recipe(write_digit_recipes(tmp_path_factory.mktemp("digits"))[0])


def test_a_check_counts_what_a_recording_will_hold(digit_recipe, tmp_path):
    checked = check_recipe(digit_recipe, tmp_path)
    assert checked.layers == {"0": 72, "3": 1152, "6": 8192, "8": 320}
    assert (checked.num_train, checked.num_test, checked.total_steps) == (1200, 597, 4 * 37)
    assert checked.recording_bytes == 4 * 4 * 16 * 64
    assert checked.activation_bytes > 32 * 64 * 4  # the pictures of a batch alone
    assert len(checked.losses) == 2
    assert all(np.isfinite(checked.losses))
    assert checked.total_seconds(16) > 2 * checked.total_steps * checked.step_seconds > 0
    assert list(tmp_path.iterdir()) == []
    text = describe(digit_recipe, checked)
    assert "layers           4\n" in text
    assert "2 x 148 steps, 16 records: about" in text


def edited(recipe, folder, *changes):
    text = (recipe.folder / f"{recipe.name}.toml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = recipe.folder / f"{folder.name}.toml"
    path.write_text(text)
    return load_recipe(path)


def test_initial_weights_that_are_not_made_yet_are_told(digit_recipe, tmp_path):
    recipe = edited(digit_recipe, tmp_path, ("[data]", 'init = "cnn-mnist"\n[data]'))
    assert "'cnn-mnist' is not recorded yet: checked with random weights" in describe(
        recipe, check_recipe(recipe, tmp_path)
    )


def test_too_few_classes_are_told(digit_recipe, tmp_path):
    (digit_recipe.folder / "digit_parts.py").write_text(
        (digit_recipe.folder / "digit_parts.py").read_text().replace("nn.Linear(32, 10)", "nn.Linear(32, classes)")
        .replace("def cnn(width=8", "def cnn(classes=10, width=8")
    )  # fmt: skip
    sys.modules.pop("digit_parts", None)
    recipe = edited(digit_recipe, tmp_path, ("arguments = {}", "arguments = { classes = 4 }"))
    with pytest.raises(RecipeError, match=r"labels from 0 to 9, but the model gives 4 classes; .*model\.arguments"):
        check_recipe(recipe, tmp_path)


def test_an_unknown_callable_is_told(digit_recipe, tmp_path):
    recipe = edited(digit_recipe, tmp_path, ("digit_parts:cnn", "digit_parts:cn"))
    with pytest.raises(RecipeError, match=r"does not have as a callable\. Did you mean 'cnn'\?"):
        check_recipe(recipe, tmp_path)


def test_a_loss_that_is_not_finite_is_told(digit_recipe, tmp_path):
    recipe = edited(digit_recipe, tmp_path, ("learning_rate = 0.03", "learning_rate = 1e35"))
    with pytest.raises(RecipeError, match=r"The loss is (nan|inf) at step 2\. Lower training\.learning_rate"):
        check_recipe(recipe, tmp_path)


@pytest.mark.parametrize("name", ["..", ".hidden", "a/b"])
def test_a_recipe_with_an_impossible_name_is_not_written(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    result = invoke(build, "new", "keras:MobileNetV2", "--name", name, "-o", "x.toml")
    assert result.exit_code == 1
    assert f"name is '{name}'; expected a file name without folders" in result.output + result.stderr
    assert list(tmp_path.iterdir()) == []

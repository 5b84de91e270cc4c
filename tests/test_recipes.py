import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builder_fixtures import TINY_PARTS, tiny_recipe, write_recipe
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from smartfrz.dataset_builder.models import build_data, build_model
from smartfrz.dataset_builder.pictures import image_folder
from smartfrz.dataset_builder.recipes import load_recipe
from smartfrz.dataset_builder.storage import reference_file
from smartfrz.errors import MissingDependencyError, RecipeError

COMMITTED = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))

# what is wrong, text to replace, replacement, part of the message
MISTAKES = {
    "unknown entry": (
        "batch_size",
        "batchsize",
        r"section \[training\]: unknown entry 'batchsize'\. Known: epochs, batch",
    ),
    "unknown section": (
        "[recording]",
        "[recordings]",
        r"the top level: unknown entry 'recordings'\. Known: name, archi",
    ),
    "missing section": ("[training]", "[recording.x]", r"lacks section \[training\]\. See docs/recipes\.md"),
    "missing entry": ("epochs = 2", "", r"lacks an entry: .*'epochs'\. See docs/recipes\.md"),
    "missing architecture": ('architecture = "cnn"', "", r"lacks an entry: .*'architecture'"),
    "section of another type": ("[training]", "[[training]]", r"lacks section \[training\]"),
    "text for a number": (
        "epochs = 2",
        'epochs = "two"',
        r"\[training\]: epochs is 'two'; expected a value of type <clas",
    ),
    "number for text": (
        '"tiny_parts:network"',
        "5",
        r"section \[model\]: source is 5; expected a value of type <class 's",
    ),
    "bad TOML": ("epochs = 2", "epochs == 2", r"is not valid TOML: .*line \d+.*Correct that line"),
    "optimizer": ('"SGD"', '"Sgd"', r"training\.optimizer is 'Sgd'; expected one of \('SGD', 'Adam'"),
    "no epochs": ("epochs = 2", "epochs = 0", r"training\.epochs is 0; expected a positive number"),
    "batch size": ("batch_size = 12", "batch_size = 0", r"training\.batch_size is 0; expected a positive integer"),
    "schedule": (
        "batch_size",
        'schedule = "sine"\nbatch_size',
        r"training\.schedule is 'sine'; expected one of \('cosine",
    ),
    "warmup": ("batch_size", "warmup = 1.0\nbatch_size", r"training\.warmup is 1\.0; expected a fraction"),
    "records": ("records = 8", "records = 3", r"recording\.records is 3; expected at least 4"),
    "pool": ("pool_size = 64", "pool_size = 0", r"recording\.pool_size is 0; expected a positive integer"),
    "probe": ("probe_size = 16", "probe_size = 3", r"recording\.probe_size is 3; expected at least 4"),
    "no data": ('source = "tiny_parts:pictures"', "", r"data is .*; expected either `source` or `folder`"),
    "two kinds of data": ("[data]", '[data]\nfolder = "x"', r"data is .*; expected either `source` or `folder`"),
}

# section, entry as TOML, part of the message
ODD_VALUES = [
    ("data", 'arguments = { name = "a\\u0007" }', r"data\.arguments\.name is 'a\\x07'; expected one line"),
    ("", 'name = ""', "name is ''; expected a file name without folders"),
    ("", 'name = ".."', r"name is '\.\.'; expected .* that does not begin with a dot"),
    ("", 'name = ".hidden"', r"name is '\.hidden'"),
    ("", 'name = "a/b"', "name is 'a/b'"),
    ("", 'name = "a\\\\b"', "name is "),
    ("", 'name = "a\\u0000b"', "name is "),
    ("", 'name = "a\\nb"', "name is "),
    ("", 'name = " a"', "name is ' a'"),
    ("", f'name = "{"a" * 201}"', "name is "),
    ("", 'architecture = ""', "architecture is ''; expected one line of text"),
    ("", "seed = -1", "seed is -1; expected an integer from 0 to 2147483647"),
    ("", "seed = 99999999999999999999999", "seed is 99999999999999999999999; expected an integer from 0 to"),
    ("", "seed = true", "seed is True; expected a value of type <class 'int'>"),
    ("model", 'source = ""', "model.source is ''; expected one line of text"),
    (
        "model",
        'init = "../other"',
        "model.init is '../other'; expected a path that ends in .safetensors, or a file name",
    ),
    ("model", 'init = ".."', r"model.init is '\.\.'"),
    ("model", 'init = "a\\u0000.safetensors"', "model.init is "),
    (
        "model",
        "arguments = { since = 1979-05-27 }",
        "model.arguments is .*; expected text, numbers.*write dates as text",
    ),
    ("data", "arguments = { since = [1979-05-27] }", "data.arguments is .*write dates as text"),
    ("data", 'source = "tiny_parts:pictures\\u0007"', "data is .*; expected one line of text"),
    ("data", "image_size = 0", "data.image_size is 0; expected an integer from 1 to 4096"),
    ("data", "image_size = -3", "data.image_size is -3"),
    ("data", "image_size = 1000000", "data.image_size is 1000000"),
    ("training", "epochs = inf", "training.epochs is inf; expected a positive number up to 10000000"),
    ("training", "epochs = nan", "training.epochs is nan"),
    ("training", "epochs = true", "epochs is True; expected a value of type <class 'float'>"),
    ("training", "batch_size = true", "batch_size is True"),
    ("training", f"batch_size = {10**30}", "training.batch_size is 1000"),
    ("training", "learning_rate = -1", "training.learning_rate is -1; expected a positive number"),
    ("training", "learning_rate = 0.0", "training.learning_rate is 0.0; expected a positive number"),
    ("training", "learning_rate = nan", "training.learning_rate is nan"),
    ("training", "learning_rate = inf", "training.learning_rate is inf"),
    ("training", "momentum = -1", r"training.momentum is -1; expected a number in \[0, 1\)"),
    ("training", "momentum = 1.0", "training.momentum is 1.0"),
    ("training", "weight_decay = -1e-4", "training.weight_decay is -0.0001; expected a finite number from 0"),
    ("training", "weight_decay = nan", "training.weight_decay is nan"),
    ("training", "warmup = nan", "training.warmup is nan"),
    ("training", "label_smoothing = 2.0", r"training.label_smoothing is 2.0; expected a number in \[0, 1\)"),
    ("recording", f"records = {10**30}", "recording.records is 1000.*; expected at least 4, and at most"),
    ("recording", "pool_size = false", "pool_size is False"),
    ("recording", "seed = -5", "recording.seed is -5"),
    ("recording", "reinitialize = 1", "reinitialize is 1; expected a value of type <class 'bool'>"),
]

# section, source, part of the message
SOURCES = {
    "missing module": (
        "model",
        "gone_module:network",
        r"names module 'gone_module', which cannot be imported .*Put gone",
    ),
    "missing data module": (
        "data",
        "gone_module:x",
        r"data\.source names module 'gone_module', which cannot be imported",
    ),
    "missing attribute": (
        "model",
        "tiny_parts:gone",
        r"names 'gone', which module 'tiny_parts' does not have .*Name a f",
    ),
    "not callable": (
        "model",
        "tiny_parts:__name__",
        r"names '__name__', which module 'tiny_parts' does not have as a ca",
    ),
    "no colon": (
        "model",
        "tiny_parts.network",
        r"source is 'tiny_parts\.network'; expected 'module:callable', for exa",
    ),
}

LIBRARIES = {"torchvision": "resnet18", "timm": "resnet18", "transformers": "bert-base-uncased"}


def edited(folder, old, new):
    path = write_recipe(folder)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return path


def write_pictures(folder, classes, number=3, size=(10, 8)):
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(number):
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


def test_a_recipe_is_read(tmp_path):
    recipe = tiny_recipe(tmp_path)
    assert (recipe.name, recipe.architecture, recipe.seed) == ("tiny", "cnn", 0)
    assert recipe.training.epochs == 2
    assert recipe.training.schedule == "cosine"
    assert recipe.recording.records == 8
    assert recipe.folder == tmp_path


def test_the_name_defaults_to_that_of_the_file(tmp_path):
    assert load_recipe(edited(tmp_path, 'name = "tiny"', "")).name == "tiny"


def test_the_same_recipe_elsewhere_has_the_same_digest(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = tiny_recipe(tmp_path / "a"), tiny_recipe(tmp_path / "b")
    assert one.sha256 == other.sha256
    assert one.sha256 != tiny_recipe(tmp_path / "b", learning_rate=0.051).sha256


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(tmp_path, case):
    old, new, message = MISTAKES[case]
    path = edited(tmp_path, old, new)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert "tiny.toml" in str(caught.value)


@pytest.mark.parametrize(("section", "entry", "message"), ODD_VALUES)
def test_values_that_cannot_work_are_refused_where_they_are_read(tmp_path, section, entry, message):
    path = write_recipe(tmp_path)
    key = entry.partition(" =")[0]
    top, *tables = path.read_text().split("\n[")
    tables = {name: rest for name, _, rest in (table.partition("]") for table in tables)}
    if section:
        kept = [line for line in tables[section].splitlines() if not line.startswith(f"{key} ")]
        tables[section] = "\n".join([*kept, entry])
    else:
        top = "\n".join([*(line for line in top.splitlines() if not line.startswith(f"{key} ")), entry])
    path.write_text(top + "".join(f"\n[{name}]{rest}" for name, rest in tables.items()) + "\n")
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert "tiny.toml" in str(caught.value)


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 100_000], ids=["digits", "nesting"])
def test_toml_beyond_all_bounds_is_refused(tmp_path, value):
    with pytest.raises(RecipeError, match="is not valid TOML"):
        load_recipe(edited(tmp_path, "epochs = 2", f"epochs = {value}"))


def test_the_name_of_a_hidden_file_is_refused(tmp_path):
    path = edited(tmp_path, 'name = "tiny"', "")
    with pytest.raises(RecipeError, match=r"name is '\.tiny'"):
        load_recipe(path.rename(tmp_path / ".tiny.toml"))


@pytest.mark.parametrize("name", ["resnet18.a1_in1k", "größe 2", "a+b", "x..y"])
def test_ordinary_names_are_taken(tmp_path, name):
    assert load_recipe(edited(tmp_path, 'name = "tiny"', f'name = "{name}"')).name == name


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"gone\.toml': No such file or directory\. Pass the path of a TOML file"):
        load_recipe(tmp_path / "gone.toml")


def test_a_recipe_that_is_no_text_is_named(tmp_path):
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not valid TOML"):
        load_recipe(tmp_path / "x.toml")


@pytest.mark.parametrize("case", SOURCES)
def test_sources_that_cannot_be_found_are_named(tmp_path, case):
    section, source, message = SOURCES[case]
    recipe = load_recipe(
        edited(tmp_path, {"model": "tiny_parts:network", "data": "tiny_parts:pictures"}[section], source)
    )
    with pytest.raises(RecipeError, match=message):
        build_model(recipe, 0) if section == "model" else build_data(recipe)


def test_a_module_whose_own_import_fails_is_named(tmp_path):
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_missing\n")
    recipe = load_recipe(edited(tmp_path, "tiny_parts:network", "needs_more:network"))
    with pytest.raises(RecipeError, match=r"cannot be imported .*No module named 'a_package_that_is_missing'"):
        build_model(recipe, 0)


def test_model_and_data_are_built(tmp_path):
    recipe = tiny_recipe(tmp_path, model="arguments = { width = 6 }")
    model, (train, test) = build_model(recipe, 0), build_data(recipe)
    assert model(torch.stack([train[i][0] for i in range(4)])).shape == (4, 3)
    assert model[0].out_channels == 6
    assert (len(train), len(test)) == (96, 48)


def test_the_seed_decides_the_initial_weights(tmp_path):
    recipe = tiny_recipe(tmp_path)
    weights = [build_model(recipe, seed)[0].weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_search_path_is_left_as_it_was(tmp_path):
    before = list(sys.path)
    build_model(tiny_recipe(tmp_path), 0)
    assert sys.path == before


def test_two_folders_may_name_their_modules_alike(tmp_path):
    made = []
    for name, width in (("one", 4), ("two", 9)):
        (tmp_path / name).mkdir()
        recipe = tiny_recipe(tmp_path / name)
        (tmp_path / name / "tiny_parts.py").write_text(TINY_PARTS.replace("width=4", f"width={width}"))
        made.append(build_model(recipe, 0)[0].out_channels)
    assert made == [4, 9]


# Initial weights


def with_init(folder, init, **entries):
    return tiny_recipe(folder, model=f'init = "{init}"', **entries)


def test_init_reads_a_file_beside_the_recipe(tmp_path):
    saved = build_model(tiny_recipe(tmp_path), 5).state_dict()
    save_file(saved, tmp_path / "start.safetensors")
    model = build_model(with_init(tmp_path, "start.safetensors"), 0)
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())


def test_init_reads_what_another_recipe_made(tmp_path):
    saved = build_model(tiny_recipe(tmp_path), 5).state_dict()
    save_file(saved, reference_file(tmp_path, "first"))
    model = build_model(with_init(tmp_path, "first"), 0, tmp_path)
    assert torch.equal(model[0].weight, saved["0.weight"])


def test_a_head_for_other_classes_stays_as_initialised(tmp_path):
    saved = build_model(tiny_recipe(tmp_path), 5).state_dict()
    saved["7.weight"], saved["7.bias"] = torch.zeros(10, 72), torch.zeros(10)
    save_file(saved, tmp_path / "start.safetensors")
    model = build_model(with_init(tmp_path, "start.safetensors"), 0)
    assert torch.equal(model[0].weight, saved["0.weight"])
    assert torch.equal(model[7].weight, build_model(tiny_recipe(tmp_path), 0)[7].weight)


@pytest.mark.parametrize("init", ["gone", "gone.safetensors"])
def test_a_missing_checkpoint_is_named(tmp_path, init):
    with pytest.raises(
        RecipeError, match=rf"model\.init is '{init}', but 'gone.*' cannot be read .*Record the recipe it"
    ):
        build_model(with_init(tmp_path, init), 0, tmp_path)


def test_a_damaged_checkpoint_is_named(tmp_path):
    save_file(build_model(tiny_recipe(tmp_path), 5).state_dict(), tmp_path / "start.safetensors")
    content = (tmp_path / "start.safetensors").read_bytes()
    (tmp_path / "start.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(RecipeError, match=r"'start\.safetensors' cannot be read"):
        build_model(with_init(tmp_path, "start.safetensors"), 0)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    save_file(nn.Linear(4, 4).state_dict(), tmp_path / "start.safetensors")
    with pytest.raises(
        RecipeError, match=r"only 0 of the model's 10 tensors are in .* Give a checkpoint of this archit"
    ):
        build_model(with_init(tmp_path, "start.safetensors"), 0)


# A folder of pictures


def test_a_folder_of_pictures(tmp_path):
    write_pictures(tmp_path, ["cat", "ant", "bee"])
    data = image_folder(tmp_path, 6)
    images, labels = data.tensors
    assert images.shape == (9, 3, 6, 6)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert -1 <= images.min() < -0.2
    assert 0.2 < images.max() <= 1


def test_pictures_keep_their_colours(tmp_path):
    for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        (tmp_path / name).mkdir()
        Image.new("RGB", (5, 5), colour).save(tmp_path / name / "picture.png")
    images = image_folder(tmp_path, 4).tensors[0]
    assert images[0, :, 0, 0].tolist() == [-1, -1, 1]
    assert images[1, :, 0, 0].tolist() == [1, -1, -1]


def test_other_files_are_left_out(tmp_path):
    write_pictures(tmp_path, ["a", "b"], number=2)
    (tmp_path / "a" / "Thumbs.db").write_bytes(b"x")
    assert len(image_folder(tmp_path, 4)) == 4


@pytest.mark.parametrize(("classes", "number"), [([], 0), (["only"], 2), (["empty", "folders"], 0)])
def test_too_few_classes_are_refused(tmp_path, classes, number):
    write_pictures(tmp_path, classes, number)
    held = 1 if number else 0
    with pytest.raises(
        RecipeError, match=rf"holds pictures of {held} classes; expected at least two folders, one per class"
    ):
        image_folder(tmp_path, 4)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="gone' holds pictures of 0 classes"):
        image_folder(tmp_path / "gone", 4)


def test_a_damaged_picture_is_named(tmp_path):
    write_pictures(tmp_path, ["a", "b"])
    content = (tmp_path / "b" / "1.png").read_bytes()
    (tmp_path / "b" / "1.png").write_bytes(content[:60])
    with pytest.raises(RecipeError, match=r"1\.png' is not a readable picture .*Remove it"):
        image_folder(tmp_path, 4)


def folder_recipe(folder):
    new = 'folder = "pictures"\nimage_size = 5'
    return load_recipe(edited(folder, 'source = "tiny_parts:pictures"', new))


def test_a_recipe_reads_a_folder_beside_it(tmp_path):
    write_pictures(tmp_path / "pictures" / "train", ["a", "b"])
    write_pictures(tmp_path / "pictures" / "test", ["a", "b"], number=1)
    train, test = build_data(folder_recipe(tmp_path))
    assert (len(train), len(test)) == (6, 2)
    assert test[0][0].shape == (3, 5, 5)


def test_train_and_test_need_the_same_classes(tmp_path):
    write_pictures(tmp_path / "pictures" / "train", ["a", "b", "c"])
    write_pictures(tmp_path / "pictures" / "test", ["b", "c"])
    with pytest.raises(
        RecipeError, match=r"classes \['a', 'b', 'c'\] in train, but \['b', 'c'\] in test; expected the sa"
    ):
        build_data(folder_recipe(tmp_path))


# Model libraries


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_that_is_not_installed_is_named(tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    recipe = load_recipe(edited(tmp_path, "tiny_parts:network", f"{library}:{LIBRARIES[library]}"))
    with pytest.raises(MissingDependencyError, match=rf"takes its model from {library}, .*pip install {library}$"):
        build_model(recipe, 0)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_models_by_library_name(tmp_path, library):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    path = edited(tmp_path, '"tiny_parts:network"', f'"{library}:resnet18"\narguments = {{ num_classes = 3 }}')
    assert build_model(load_recipe(path), 0)(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


def test_a_transformers_model_from_a_folder(tmp_path):
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    from transformers import BertConfig, BertForSequenceClassification

    from smartfrz.training import forward

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(3)
    saved = BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=3, **sizes))
    saved.save_pretrained(tmp_path / "saved")
    path = edited(tmp_path, "tiny_parts:network", f"transformers:{tmp_path / 'saved'}")
    model = build_model(load_recipe(path), 0).eval()
    inputs = {"input_ids": torch.arange(6).reshape(2, 3)}
    with torch.no_grad():
        torch.testing.assert_close(forward(model, inputs), forward(saved.eval(), inputs))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_the_committed_recipes_load(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    names = {other.stem for other in COMMITTED}
    assert not recipe.model.init or recipe.model.init in names


def test_there_are_committed_recipes():
    assert len(COMMITTED) >= 8

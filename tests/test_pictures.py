"""Pictures as people really have them: of any depth, turned, transparent, too large, beside the files of other programs."""

import numpy as np
import pytest
import torch
from PIL import Image

from smartfrz.dataset_builder.class_folders import class_names
from smartfrz.dataset_builder.pictures import image_folder, image_folders
from smartfrz.dataset_builder.templates import NewRecipe, recipe_text
from smartfrz.demo.data import DemoOptions
from smartfrz.demo.pytorch import load_data
from smartfrz.errors import RecipeError

SIZE = 8


@pytest.fixture
def folder(tmp_path):
    """Two classes with one plain picture each, in train and in test."""
    for split in ("train", "test"):
        for name, level in (("cat", 60), ("dog", 200)):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(np.full((SIZE, SIZE, 3), level, np.uint8)).save(tmp_path / split / name / "0.png")
    return tmp_path


def read_one(folder, picture, name="0.png", **options):
    """The picture as the data set has it, `[3, size, size]` in [-1, 1]."""
    (folder / "train" / "cat" / "0.png").unlink()
    picture.save(folder / "train" / "cat" / name, **options)
    return image_folder(folder / "train", SIZE)[0][0]


def as_grey(levels):
    return torch.from_numpy(np.asarray(levels, np.float32) / 127.5 - 1).expand(3, *np.shape(levels))


# Depth


def test_16_bit_pictures_keep_their_levels(folder):
    levels = np.linspace(0, 65535, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)
    read = read_one(folder, Image.fromarray(levels))
    torch.testing.assert_close(read, as_grey(levels / 257), atol=1e-6, rtol=0)


def test_16_bit_pictures_that_use_few_levels_do_not_become_one_grey(folder):
    levels = np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE)
    assert len(read_one(folder, Image.fromarray(levels)).unique()) == SIZE * SIZE


def test_16_bit_pictures_are_resized(folder):
    levels = np.repeat(np.repeat(np.array([[0, 65535]], np.uint16), 32, axis=0), 16, axis=1)
    read = read_one(folder, Image.fromarray(levels))
    assert (read[:, :, 0] == -1).all()
    assert (read[:, :, -1] == 1).all()


@pytest.mark.parametrize(
    ("picture", "what"),
    [(np.full((4, 4), 1 << 20, np.int32), "at most 16 bits"), (np.ones((4, 4), np.float32), "fractions")],
)
def test_pictures_of_unknown_range_are_refused(folder, picture, what):
    Image.fromarray(picture).save(folder / "train" / "cat" / "1.tiff")
    (folder / "train" / "cat" / "1.tiff").rename(folder / "train" / "cat" / "1.png")
    with pytest.raises(RecipeError, match=rf"cat/1\.png' is not a readable picture .*{what}.*save it again as"):
        image_folder(folder / "train", SIZE)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_other_modes_are_read_as_before(folder, mode):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).convert(mode)
    expected = np.array(picture.convert("RGB")).transpose(2, 0, 1)
    if mode == "CMYK":
        read = read_one(folder, picture, "0.jpg", quality=100)
        torch.testing.assert_close(read, torch.from_numpy(expected / 127.5 - 1).float(), atol=0.2, rtol=0)
    else:
        assert torch.equal(read_one(folder, picture), torch.from_numpy(expected).float() / 127.5 - 1)


# Transparency


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("level", [0, 255])
def test_contents_of_the_alpha_channel_alone_are_kept(folder, mode, level):
    alpha = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE)
    picture = Image.new(mode, (SIZE, SIZE), (level,) * len(mode))
    picture.putalpha(Image.fromarray(alpha))
    # black on white, or white on black
    expected = as_grey(alpha if level else 255 - alpha)
    torch.testing.assert_close(read_one(folder, picture), expected, atol=0.01, rtol=0)


def test_hidden_colours_of_transparent_pixels_are_not_seen(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 4), dtype=np.uint8)
    pixels[..., 3] = 0
    pixels[2, 3] = (10, 20, 30, 255)
    read = read_one(folder, Image.fromarray(pixels))
    assert torch.equal(read[:, 2, 3], torch.tensor([10.0, 20, 30]) / 127.5 - 1)
    assert (read != 1).sum() == 3


def test_a_transparent_colour_of_a_palette_becomes_white(folder):
    picture = Image.frombytes("P", (SIZE, SIZE), np.eye(SIZE, dtype=np.uint8).tobytes())
    picture.putpalette([0, 0, 0, 0, 0, 200])
    read = read_one(folder, picture, transparency=0)
    assert (read[:, 0, 1] == 1).all()
    assert torch.equal(read[:, 0, 0], torch.tensor([0.0, 0, 200]) / 127.5 - 1)


# Orientation


@pytest.mark.parametrize("name", ["0.jpg", "0.png", "0.webp"])
def test_exif_orientation_is_followed(folder, name):
    pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
    pixels[:, : SIZE // 2] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: left is shown at the top
    read = read_one(folder, Image.fromarray(pixels), name, exif=exif)
    assert read[:, 0].mean() > 0.9
    assert read[:, -1].mean() < -0.9


# Files and folders of other programs


@pytest.mark.parametrize("junk", [".ipynb_checkpoints", "__MACOSX", ".git", "@eaDir", "__pycache__"])
@pytest.mark.parametrize("splits", [("train",), ("train", "test")])
def test_folders_of_other_programs_are_no_classes(folder, junk, splits):
    for split in splits:
        (folder / split / junk / "cat").mkdir(parents=True)
        (folder / split / junk / "0.png").write_bytes(b"no picture")
    train, test = image_folders(folder, SIZE)
    assert train.tensors[1].tolist() == test.tensors[1].tolist() == [0, 1]
    assert class_names(folder / "train") == ["cat", "dog"]


@pytest.mark.parametrize("junk", ["._0.png", ".0.png", "Thumbs.db", "desktop.ini", ".DS_Store"])
def test_files_of_other_programs_are_no_pictures(folder, junk):
    (folder / "train" / "cat" / junk).write_bytes(b"\0\5\x16\7" + bytes(60))
    assert len(image_folder(folder / "train", SIZE)) == 2


def test_a_new_recipe_does_not_count_folders_of_other_programs(folder):
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    text = recipe_text(NewRecipe("keras:MobileNetV2", str(folder)), folder / "x.toml")
    assert "classes = 2," in text


def test_the_demo_reads_such_a_folder(folder):
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    train, _ = load_data(DemoOptions(data=str(folder), image_size=SIZE))
    assert sorted(train.tensors[1].tolist()) == [0, 1]


# What is refused


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_without_pictures_is_named(folder, split):
    for each in ("train", "test"):
        (folder / each / "ant").mkdir()
        if each != split:
            Image.new("RGB", (4, 4)).save(folder / each / "ant" / "0.png")
    with pytest.raises(
        RecipeError, match=rf"{split}/ant' holds no pictures; expected .*Add pictures, or remove that folder"
    ):
        image_folders(folder, SIZE)


def test_a_picture_that_is_too_large_is_named(folder):
    Image.new("1", (20_000, 20_000)).save(folder / "train" / "cat" / "big.png")
    with pytest.raises(RecipeError, match=r"cat/big\.png' is too large a picture .*400000000 pixels.*a smaller copy"):
        image_folder(folder / "train", SIZE)


def test_a_large_picture_that_pillow_only_warns_about_is_read(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_one(folder, Image.new("RGB", (15, 10), (255, 0, 0)))[:, 0, 0].tolist() == [1, -1, -1]


@pytest.mark.parametrize("name", ["1.png", "1.jpg", "1.webp", "1.bmp"])
def test_damaged_pictures_are_named(folder, name):
    path = folder / "train" / "cat" / name
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, exif=Image.Exif()) if name != "1.bmp" else Image.fromarray(noise).save(path)
    content, rng, messages = path.read_bytes(), np.random.default_rng(1), []
    for _ in range(100):
        damaged = bytearray(content[: int(rng.integers(1, len(content) + 1))])
        damaged[int(rng.integers(len(damaged)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            image_folder(folder / "train", SIZE)
        except RecipeError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert all(name in message for message in messages)

"""Data sets from folders of pictures: arrays of NumPy, or data sets of PyTorch, which is loaded for these only."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from smartfrz.dataset_builder.class_folders import class_names, picture_files
from smartfrz.errors import RecipeError

if TYPE_CHECKING:
    from PIL import Image
    from torch.utils.data import TensorDataset

_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # Pillow's names of pictures with more than 8 bits a pixel
_WHITE = 255


def image_folders(folder: Path, image_size: int) -> "tuple[TensorDataset, TensorDataset]":
    """Read the pictures in `folder/train/<class>/` and `folder/test/<class>/`, as `image_folder` does.

    Raises:
        RecipeError: See `read_folders`.
    """
    train, test = read_folders(folder, image_size)
    return _as_tensors(train), _as_tensors(test)


def image_folder(folder: Path, image_size: int) -> "TensorDataset":
    """Read the pictures in `folder/<class>/`, as `read_folder` does.

    Returns:
        Items `(float32 [3, image_size, image_size], int64)`; classes are numbered by name.

    Raises:
        RecipeError: See `read_folder`.
    """
    return _as_tensors(read_folder(folder, image_size))


Arrays = tuple[NDArray[np.float32], NDArray[np.int64]]


def _as_tensors(data: Arrays) -> "TensorDataset":
    import torch
    from torch.utils.data import TensorDataset

    images, labels = data
    return TensorDataset(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels))


def read_folders(folder: Path, image_size: int) -> tuple[Arrays, Arrays]:
    """Read the pictures in `folder/train/<class>/` and `folder/test/<class>/`, as `read_folder` does.

    Raises:
        RecipeError: If either cannot be read, or the two have different classes.
    """
    train, test = (read_folder(folder / split, image_size) for split in ("train", "test"))
    classes, test_classes = class_names(folder / "train"), class_names(folder / "test")
    if classes != test_classes:
        raise RecipeError(
            f"{str(folder)!r} has the classes {classes} in train, but {test_classes} in test; expected the same. Classes "
            "are numbered by name, so labels would not agree."
        )
    return train, test


def read_folder(folder: Path, image_size: int) -> Arrays:
    """Read the pictures in `folder/<class>/`, resized to a square and scaled to [-1, 1].

    Pictures are turned as their EXIF data say. The 65,536 levels of a 16-bit picture are kept. What is transparent becomes
    white, or black in a picture that would be all white. Hidden files and folders are left out.

    Returns:
        Pictures `[n, image_size, image_size, 3]` and labels `[n]`; classes are numbered by name.

    Raises:
        RecipeError: If there are fewer than two classes with pictures, a class has none, or a picture is damaged or too
            large.
    """
    files = {name: picture_files(folder / name) for name in class_names(folder)}
    empty = [name for name, pictures in files.items() if not pictures]
    if len(files) - len(empty) < 2:
        raise RecipeError(
            f"{str(folder)!r} holds pictures of {len(files) - len(empty)} classes; expected at least two folders, one per "
            "class, with .png or .jpg files in each."
        )
    if empty:
        raise RecipeError(
            f"{str(folder / empty[0])!r} holds no pictures; expected .png or .jpg files in the folder of each class. Add "
            "pictures, or remove that folder."
        )
    pixels = np.stack([_read(file, image_size) for pictures in files.values() for file in pictures])
    labels = np.repeat(np.arange(len(files)), [len(pictures) for pictures in files.values()])
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1.0), labels


def _read(file: Path, image_size: int) -> NDArray[Any]:
    """Return the colours of one picture, `[image_size, image_size, 3]`, from 0 to 255; uint8, or float32 from 16 bits."""
    from PIL import Image

    try:
        # Pillow warns of half the size that it refuses; the warning would not name the file.
        with (
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
            Image.open(file) as picture,
        ):
            return _colours(picture, image_size)
    except (Image.DecompressionBombError, MemoryError) as error:
        raise RecipeError(
            f"{str(file)!r} is too large a picture ({error or 'out of memory'}). Replace it by a smaller copy, "
            "or cut it into several."
        ) from error
    except Exception as error:  # decoders raise errors of a dozen kinds for damaged bytes
        raise RecipeError(
            f"{str(file)!r} is not a readable picture ({error}). Remove it, or save it again as .png or .jpg."
        ) from error


def _colours(picture: "Image.Image", image_size: int) -> NDArray[Any]:
    from PIL import Image, ImageOps

    size, smooth = (image_size, image_size), Image.Resampling.BILINEAR
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in _DEEP:
        grey = Image.fromarray(_grey_of_16_bits(picture)).resize(size, smooth)
        return np.repeat(np.asarray(grey)[:, :, None], 3, axis=2)
    if picture.mode == "F":
        raise ValueError("its pixels are fractions, whose range is not known")
    if picture.has_transparency_data:
        picture = _opaque(picture.convert("RGBA"))
    return np.asarray(picture.convert("RGB").resize(size, smooth))


def _grey_of_16_bits(picture: "Image.Image") -> NDArray[np.float32]:
    """Scale 0..65535 to 0..255, as fractions: many 16-bit pictures use few of their levels."""
    levels = np.asarray(picture)
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError(f"its pixels go from {levels.min()} to {levels.max()}, but at most 16 bits are read")
    return levels.astype(np.float32) / np.float32(257)


def _opaque(picture: "Image.Image") -> "Image.Image":
    """Put a picture on white, or on black where white would leave nothing to see."""
    from PIL import Image

    def put_on(level: int) -> Image.Image:
        background = Image.new("RGBA", picture.size, (level, level, level, 255))
        return Image.alpha_composite(background, picture).convert("RGB")

    on_white = put_on(_WHITE)
    nothing_to_see = np.asarray(on_white).min() == _WHITE
    return put_on(0) if nothing_to_see else on_white

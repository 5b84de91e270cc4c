"""Data sets from folders of pictures."""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

from smartfrz.errors import RecipeError

_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


def image_folders(folder: Path, image_size: int) -> tuple[TensorDataset, TensorDataset]:
    """Read the pictures in `folder/train/<class>/` and `folder/test/<class>/`.

    Returns:
        Data sets to train on and to test on, as `image_folder` makes them.

    Raises:
        RecipeError: If either cannot be read, or the two have different classes.
    """
    train, test = (image_folder(folder / split, image_size) for split in ("train", "test"))
    if _classes(folder / "train") != _classes(folder / "test"):
        raise RecipeError(
            f"{str(folder)!r} has the classes {_classes(folder / 'train')} in train, but {_classes(folder / 'test')} in "
            "test; expected the same. Classes are numbered by name, so labels would not agree."
        )
    return train, test


def image_folder(folder: Path, image_size: int) -> TensorDataset:
    """Read the pictures in `folder/<class>/`, resized to a square and scaled to [-1, 1].

    Returns:
        Items `(float32 [3, image_size, image_size], int64)`; classes are numbered by name.

    Raises:
        RecipeError: If there are fewer than two classes with pictures, or a picture is damaged.
    """
    files = [
        (file, label)
        for label, name in enumerate(_classes(folder))
        for file in sorted((folder / name).iterdir())
        if file.suffix.lower() in _ENDINGS
    ]
    num_classes = len({label for _, label in files})
    if num_classes < 2:
        raise RecipeError(
            f"{str(folder)!r} holds pictures of {num_classes} classes; expected at least two folders, one per class, "
            "with .png or .jpg files in each."
        )
    pixels = np.stack([_read(file, image_size) for file, _ in files])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return TensorDataset(images, torch.tensor([label for _, label in files]))


def _classes(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def _read(file: Path, image_size: int) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as picture:
            small = picture.convert("RGB").resize((image_size, image_size), Image.Resampling.BILINEAR)
    except (UnidentifiedImageError, OSError) as error:
        raise RecipeError(
            f"{str(file)!r} is not a readable picture ({error}). Remove it, or save it again as .png or .jpg."
        ) from error
    return np.asarray(small)

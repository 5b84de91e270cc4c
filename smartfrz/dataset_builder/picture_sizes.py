"""The size to which the pictures of a folder are resized, where the user does not choose one."""

import statistics
from pathlib import Path

from smartfrz.dataset_builder.class_folders import class_names, picture_files

_USUAL = 224  # what most networks are trained on; larger pictures of a folder are made this small
_UNKNOWN = 64
_STEP = 32  # networks of torchvision, timm and Keras halve a picture five times
_PER_CLASS = 8


def choose_size(source: str, folder: Path) -> tuple[int, str]:
    """Choose the size of a recipe's pictures, in pixels.

    A network that takes only one size gets that. Others get their own size, or that of the pictures if they are smaller:
    enlarged pictures cost time and show nothing new.

    Args:
        source: The recipe's `model.source`.
        folder: Folder of the pictures, which need not exist.

    Returns:
        The size, and where it comes from, for a comment.
    """
    own, is_fixed = _size_of_network(source)
    pictures = _size_of_pictures(folder)
    if own and is_fixed:
        return own, "the only size that the network takes"
    if pictures and source.partition(":")[0] in ("torchvision", "timm", "keras", "keras_hub"):
        pictures = max(_STEP, _STEP * round(pictures / _STEP))
    if pictures and pictures <= (own or _USUAL):
        return pictures, "of the pictures"
    if own:
        return own, "what the network was made for"
    return (_USUAL, "smaller than the pictures") if pictures else (_UNKNOWN, "a guess")


def _size_of_network(source: str) -> tuple[int, bool]:
    """Return the size that a network of torchvision or timm was made for, or 0, and whether it takes no other."""
    library, _, name = source.partition(":")
    if library == "timm":
        from timm.models import get_pretrained_cfg

        facts = get_pretrained_cfg(name, allow_unregistered=True)
        return (int(facts.input_size[-1]), bool(facts.fixed_input_size)) if facts else (0, False)
    if library == "torchvision":
        from torchvision.models import get_model_weights

        weights = next(iter(get_model_weights(name)), None)
        crop = getattr(weights.transforms(), "crop_size", [0]) if weights else [0]  # detectors take any size
        return int(crop[0]), name.startswith(("vit_", "maxvit"))
    return 0, False


def _size_of_pictures(folder: Path) -> int:
    """Return the median of the shorter side of some pictures in `folder/train`, or 0 if there are none."""
    from PIL import Image

    sides = []
    for name in class_names(folder / "train"):
        for file in picture_files(folder / "train" / name)[:_PER_CLASS]:
            try:
                with Image.open(file) as picture:  # reads the header only
                    sides.append(min(picture.size))
            except Exception:  # damaged pictures are an error of `check`, which names them
                continue
    return int(statistics.median_low(sides)) if sides else 0

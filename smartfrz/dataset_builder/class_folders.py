"""Folders of pictures, one for each class: which of their entries count."""

from pathlib import Path

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
# Folders that other programs put beside the user's own: archives of macOS, Python, Synology, Windows.
_JUNK = {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found"}


def class_names(folder: Path) -> list[str]:
    """Return the names of the classes in a folder, sorted; hidden folders and those of other programs are no classes."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not _is_junk(p)) if folder.is_dir() else []


def picture_files(folder: Path) -> list[Path]:
    """Return the pictures of one class, sorted; hidden files such as `._1.png` of macOS are no pictures."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in ENDINGS and not _is_junk(p))


def _is_junk(path: Path) -> bool:
    return path.name.startswith(".") or path.name.lower() in _JUNK

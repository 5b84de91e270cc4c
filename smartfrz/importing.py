"""Find the function that a text such as `mymodels:resnet20` names."""

import difflib
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smartfrz.errors import MissingDependencyError, RecipeError


def import_callable(source: str, folder: Path, what: str) -> Callable[..., Any]:
    """Import the callable that `module:callable` names.

    Args:
        source: The text.
        folder: Searched first for the module, for example the folder of a recipe.
        what: What the text is, to begin an error message with, for example `"model.source"`.

    Returns:
        The function or class.

    Raises:
        RecipeError: If the text has another form, the module cannot be imported, or it has no such callable.
    """
    module_name, _, attribute = source.partition(":")
    if not module_name or not attribute:
        raise RecipeError(
            f"{what} is {source!r}; expected 'module:callable', for example 'mymodels:resnet20', with mymodels.py in "
            f"{str(folder)!r}."
        )
    try:
        with importable(folder):
            module = importlib.import_module(module_name)
    except ImportError as error:
        raise RecipeError(
            f"{what} names module {module_name!r}, which cannot be imported ({error}). Put "
            f"{module_name.partition('.')[0]}.py into {str(folder)!r}, or install the package that has it."
        ) from error
    found: Callable[..., Any] | None = getattr(module, attribute, None)
    if found is None or not callable(found):
        names = [name for name, value in vars(module).items() if callable(value)]
        close = difflib.get_close_matches(attribute, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise RecipeError(
            f"{what} names {attribute!r}, which module {module_name!r} does not have as a callable.{hint} Name a "
            "function or class of that module."
        )
    return found


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Search a folder first for modules, for the length of the block."""
    _forget_namesakes(folder)
    importlib.invalidate_caches()
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _forget_namesakes(folder: Path) -> None:
    # Recipes in two folders may name their modules alike and be recorded by one process. Forget a module that came from
    # another recipe's folder, which is no longer on the search path.
    for name in {path.stem for path in folder.glob("*.py")} & set(sys.modules):
        loaded = Path(getattr(sys.modules[name], "__file__", None) or "")
        if loaded.name == f"{name}.py" and loaded.parent != folder and str(loaded.parent) not in sys.path:
            del sys.modules[name]


def error_of_import(library: str, error: Exception) -> MissingDependencyError:
    """Return the error for a library that is installed and cannot be imported, as torchvision beside another PyTorch."""
    return MissingDependencyError(
        f"{library} is installed, but its import fails ({type(error).__name__}: {error}). It needs a torchvision of the "
        "same build as PyTorch. Install both from one index, for CPUs with: pip install --force-reinstall torch torchvision "
        "--index-url https://download.pytorch.org/whl/cpu. Or name the model as module:callable."
    )

"""Every exception that SmartFRZ raises on purpose.

    SmartFRZError
      PredictorFileError       not a predictor of ours, damaged, or of a format that is not read here
      ChecksumError            a file differs from its recorded SHA-256
      UnknownPredictorError    no predictor of that name
      RegistryError            a list of predictors that cannot be read as written, or be added to
      DownloadError            a file that cannot be fetched or kept, or is refused
        UnreachableError       no answer, or one that breaks off: trying again may help
      PredictionError          a predictor that gives no usable answer
        ServerError            a server of predictors that does not answer, or not as it should
      UnsupportedModelError    a model in which nothing can be frozen
      StateError               a saved state that does not belong to this model or predictor
      RecipeError              a recipe that cannot be run as written
      DatasetFormatError       a recorded run that cannot be read
      ResultsError             results of a comparison that cannot be read
      UsageError               a call at a moment at which it cannot be answered (also a RuntimeError)
      DistributedError         processes that train together and do not do the same (also a RuntimeError)
      MissingDependencyError   an optional package is absent (also an ImportError)

Wrong argument values raise `ValueError` or `TypeError`. A message says what was received, what was
expected and how to fix it.
"""

import importlib.metadata
import importlib.util


def printable(text: str) -> str:
    """Return a text without the characters that a terminal obeys, which files and servers could send to it."""
    return "".join(character for character in text if character in "\n\t" or character.isprintable())


class SmartFRZError(Exception):
    """Base of all errors below."""

    def __str__(self) -> str:
        """Return the message, which may quote a file or a server, without what a terminal obeys."""
        return printable(super().__str__())


class PredictorFileError(SmartFRZError):
    """Not an ONNX file that keeps the predictor contract."""


class ChecksumError(SmartFRZError):
    """A file's SHA-256 differs from the recorded one."""


class UnknownPredictorError(SmartFRZError, LookupError):
    """No predictor of that name is known."""


class RegistryError(SmartFRZError):
    """A registry breaks its format, or a new entry contradicts it."""


class DownloadError(SmartFRZError):
    """A file cannot be fetched or kept, or is refused."""


class UnreachableError(DownloadError):
    """There is no answer, or it breaks off; trying again may help."""


class PredictionError(SmartFRZError):
    """A predictor gives no usable answer."""


class ServerError(PredictionError):
    """A server of predictors does not answer, or with what cannot be used."""


class UnsupportedModelError(SmartFRZError):
    """Nothing in the model can be frozen."""


class StateError(SmartFRZError):
    """A saved state does not belong to this model or predictor."""


class UsageError(SmartFRZError, RuntimeError):
    """A call at a moment at which it cannot be answered."""


class DistributedError(SmartFRZError, RuntimeError):
    """One process does not come to a freezing stage, or comes with another model."""


class RecipeError(SmartFRZError):
    """A recipe cannot be run as written."""


class DatasetFormatError(SmartFRZError):
    """A recorded run cannot be read."""


class ResultsError(SmartFRZError):
    """Results of a comparison cannot be read."""


class MissingDependencyError(SmartFRZError, ImportError):
    """An optional package is not installed, or two that exclude each other are."""


def install_command(*extras: str, more: str = "") -> str:
    """Return the whole command that installs optional packages, with the ONNX Runtime that belongs to them.

    Args:
        *extras: Extras of this package, for example `"torch"`.
        more: Other packages, separated by spaces.

    Returns:
        For example `pip install "smartfrz[torch,cpu]"`. The extra is `gpu` where the CUDA build of ONNX Runtime is
        installed, which the other build would overwrite; and none where another build of it is, such as
        `onnxruntime-openvino`.

    Example:
        >>> install_command("torch").startswith('pip install "smartfrz[torch')
        True
    """
    wanted = ",".join((*extras, *_runtime_extra()))
    return f'pip install "smartfrz[{wanted}]"{f" {more}" if more else ""}' if wanted else f"pip install {more}"


def _runtime_extra() -> tuple[str, ...]:
    for distribution, extra in {"onnxruntime": "cpu", "onnxruntime-gpu": "gpu"}.items():
        try:
            importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        return (extra,)
    try:
        found = importlib.util.find_spec("onnxruntime")
    except ImportError:  # of a finder that keeps it from being imported
        found = None
    return () if found else ("cpu",)


def not_installed(user: str, package: object, *extras: str, more: str = "") -> MissingDependencyError:
    """Return the error that says what needs a package, and which command installs it.

    Args:
        user: What needs it, to begin the message with: "The demo".
        package: Name of the package.
        *extras: As for `install_command`.
        more: As for `install_command`.
    """
    return MissingDependencyError(
        f"{user} needs {package}, which is not installed. Type: {install_command(*extras, more=more)}"
    )

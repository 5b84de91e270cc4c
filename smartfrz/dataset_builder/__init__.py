"""Datasets for training a predictor: recorded runs with CKA to a finished reference model."""


def main() -> None:
    """The command `smartfrz-build`, or what to install for it."""
    try:
        from smartfrz.dataset_builder.cli import main as command
    except ImportError as error:
        raise SystemExit(
            f'smartfrz-build needs {error.name}, which is not installed. Type: pip install "smartfrz[build,cpu]"'
        ) from error
    command()

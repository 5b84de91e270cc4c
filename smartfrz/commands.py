"""What both programs, `smartfrz` and `smartfrz-build`, share on the command line."""

from collections.abc import Sequence
from typing import Any

import click

from smartfrz.errors import SmartFRZError, not_installed


class Group(click.Group):
    """A group of commands that prints our errors as messages and exits with 1.

    Args:
        *arguments: Arguments of `click.Group`.
        extra: The extra of this package to install if one of `packages` is missing, for example `"build"`.
        packages: Modules that `extra` installs.
        **options: Options of `click.Group`.
    """

    def __init__(self, *arguments: Any, extra: str = "", packages: Sequence[str] = (), **options: Any):
        super().__init__(*arguments, **options)
        self._extra, self._packages = extra, frozenset(packages)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            package = str(error.name).partition(".")[0]
            if package not in self._packages:
                raise  # missing in the user's own code
            raise click.ClickException(str(not_installed(ctx.command_path, package, self._extra))) from error
        except SmartFRZError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            raise click.ClickException(f"{error}. Nothing half-written was left behind.") from error

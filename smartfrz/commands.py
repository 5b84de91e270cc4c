"""What both programs, `smartfrz` and `smartfrz-build`, share of their command lines."""

from typing import Any

import click

from smartfrz.errors import SmartFRZError


class Group(click.Group):
    """Shows our errors as a message and exits with 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except SmartFRZError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            raise click.ClickException(f"{error}. Nothing half-written was left behind.") from error

"""Names of predictors, completed by the shell."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from smartfrz.commands import ParamType

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


class PredictorName(ParamType[str]):
    """A name in the zoo, the path of a file, or an address.

    The shell completes names of registries that are on this machine: the one in this package, local ones, and copies of
    others in the cache. It never asks the network.
    """

    name = "predictor"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Take the text as it is."""
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        """Return names that begin with a text, or have the shell complete a path."""
        from click.shell_completion import CompletionItem

        more = ctx.params.get("registries") or ()
        names = [name for name in dict.fromkeys(_names(more)) if name.startswith(incomplete)]
        if "@" not in incomplete:
            names = [name for name in names if "@" not in name]
        return [CompletionItem(name) for name in names] or [CompletionItem(incomplete, type="file")]


PREDICTOR = PredictorName()


def _names(more: Any) -> Iterator[str]:
    from smartfrz.zoo import registry, settings

    with settings.choosing("SMARTFRZ_OFFLINE", "1"):
        for location in (None, *registry.locations(more)):
            # A registry that cannot be read is no reason to print an error into the middle of a command line.
            with contextlib.suppress(Exception):
                for entry in registry.embedded() if location is None else registry.entries_of(location):
                    yield entry.name
                    yield str(entry)

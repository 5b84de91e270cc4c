"""What both programs, `smartfrz` and `smartfrz-build`, share on the command line.

Every command takes `--json`, `--quiet`, `--verbose` and `-h`, shows an example, and ends in the same way: 0 done, 1 failed,
2 wrong usage, 130 after Ctrl-C, 141 when nobody reads its output any more.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import select
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from smartfrz.errors import SmartFRZError, not_installed

_QUIET, _VERBOSE, _JSON, _STREAM = (f"{__name__}.{name}" for name in ("quiet", "verbose", "json", "stream"))
_COMMON = ("as_json", "quiet", "verbose", "version")
INTERRUPTED, BROKEN_PIPE = 130, 141

if TYPE_CHECKING:
    from click import ParamType as ParamType
else:

    class ParamType(click.ParamType):
        """A type of an argument, `ParamType[str]`: in click 8.2 it takes no type of its own."""

        def __class_getitem__(cls, _: type) -> type:
            """Return the class itself."""
            return cls


def quiet() -> bool:
    """Return whether the current command shall print results and errors only."""
    return bool(_meta().get(_QUIET))


def verbose() -> bool:
    """Return whether the current command shall say more than usual."""
    return bool(_meta().get(_VERBOSE))


def note(text: str) -> None:
    """Print a remark on standard error, unless `--quiet` is given."""
    if not quiet():
        click.echo(text, err=True)


def show(text: str) -> None:
    """Print a part of the result as soon as it is known. With `--json` it is left to `answer`."""
    if _meta().get(_STREAM) is None:
        click.echo(text)


def answer(document: Any, text: str = "") -> None:
    """Print the result of a command: the text, or the document as JSON if `--json` is given.

    Args:
        document: What `json` can write, and dataclasses, paths, tuples, and NaN, which becomes null.
        text: The same for a person. Empty if `show` has printed it.
    """
    stream = _meta().get(_STREAM)
    if stream is not None:
        stream.write(json.dumps(_plain(document), allow_nan=False) + "\n")
        stream.flush()
    elif text:
        show(text)


def device_option(text: str) -> Callable[[Any], Any]:
    """Return the option `--device`."""
    return click.option(
        "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help=text
    )


class Command(click.Command):
    """A command with the options that all commands have.

    Args:
        *arguments: Arguments of `click.Command`.
        example: A command line that works, shown at the end of its help.
        if_stopped: What to say after Ctrl-C.
        **options: Options of `click.Command`.
    """

    def __init__(self, *arguments: Any, example: str = "", if_stopped: str = "", **options: Any):
        super().__init__(*arguments, **options)
        self.example, self._if_stopped = example, if_stopped
        self.params += [
            _flag("--json", "as_json", _JSON, "Print one JSON document to standard output, and nothing else there."),
            *_volume(),
        ]

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            with _at_volume(), _answers_only() if ctx.meta.get(_JSON) else contextlib.nullcontext():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo(f"\nStopped. {self._if_stopped}".rstrip(), err=True)
            ctx.exit(INTERRUPTED)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command's own options, and those that all commands have."""
        _write_options(self, ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example."""
        if self.example:
            with formatter.section("Example"):
                for line in self.example.splitlines():
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")


class Group(click.Group):
    """A group of commands that prints our errors as messages and exits with 1.

    Args:
        *arguments: Arguments of `click.Group`.
        extra: The extra of this package to install if one of `packages` is missing, for example `"build"`.
        packages: Modules that `extra` installs.
        sections: Headings of the help, and the names of the commands under each.
        **options: Options of `click.Group`.
    """

    command_class = Command
    group_class = type

    def __init__(
        self,
        *arguments: Any,
        extra: str = "",
        packages: Sequence[str] = (),
        sections: Mapping[str, Sequence[str]] | None = None,
        **options: Any,
    ):
        options.setdefault("context_settings", {"help_option_names": ["-h", "--help"]})
        super().__init__(*arguments, **options)
        self._extra, self._packages, self._sections = extra, frozenset(packages), dict(sections or {})
        self.params += _volume()

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        """Read the command line."""
        with _broken_pipes():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            with _broken_pipes():
                return super().invoke(ctx)
        except ModuleNotFoundError as error:
            package = str(error.name).partition(".")[0]
            if package not in self._packages:
                raise  # missing in the user's own code
            raise click.ClickException(str(not_installed(ctx.command_path, package, self._extra))) from error
        except SmartFRZError as error:
            _trace(ctx)
            raise click.ClickException(str(error)) from error
        except OSError as error:
            _trace(ctx)
            raise click.ClickException(f"{error}. Nothing half-written was left behind.") from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, in the order of the help."""
        listed = [name for names in self._sections.values() for name in names]
        return listed + [name for name in super().list_commands(ctx) if name not in listed]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands under their headings, and the options."""
        sections = self._sections or {"Commands": self.list_commands(ctx)}
        width = max((len(name) for names in sections.values() for name in names), default=0)
        for heading, names in sections.items():
            with formatter.section(heading):
                rows = [(name.ljust(width), self.commands[name].get_short_help_str(100)) for name in names]
                formatter.write_dl(rows)
        _write_options(self, ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Say how to learn more."""
        formatter.write_paragraph()
        formatter.write_text(f"'{ctx.command_path} COMMAND -h' explains a command.")


def _meta() -> dict[str, Any]:
    context = click.get_current_context(silent=True)
    return {} if context is None else context.meta


def _flag(name: str, parameter: str, key: str, text: str, *more: str) -> click.Option:
    """Make an option that the current command and the groups around it share."""

    def choose(context: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            context.meta[key] = True
        if context.meta.get(_QUIET) and context.meta.get(_VERBOSE):
            raise click.UsageError("--quiet and --verbose exclude each other. Leave one of them out.", context)

    return click.Option([*more, name, parameter], is_flag=True, expose_value=False, callback=choose, help=text)


def _volume() -> list[click.Parameter]:
    return [
        _flag("--quiet", "quiet", _QUIET, "Print results and errors only.", "-q"),
        _flag(
            "--verbose",
            "verbose",
            _VERBOSE,
            "Say more: progress every ten seconds, log messages, tracebacks of errors.",
            "-v",
        ),
    ]


def _write_options(command: click.Command, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    own: list[tuple[str, str]] = []
    common: list[tuple[str, str]] = []
    for option in command.get_params(ctx):
        record = option.get_help_record(ctx) if isinstance(option, click.Option) else None
        if record is not None:
            shared = option.name in _COMMON or option is command.get_help_option(ctx)
            (common if shared else own).append(record)
    for heading, records in (("Options", own), ("Options that all commands have" if own else "Options", common)):
        if records:
            with formatter.section(heading):
                formatter.write_dl(records)


@contextlib.contextmanager
def _at_volume() -> Iterator[None]:
    """Show log messages and warnings as `--quiet` or `--verbose` asks for."""
    logger, handler = logging.getLogger("smartfrz"), logging.StreamHandler(sys.stderr)
    level, propagate = logger.level, logger.propagate
    with warnings.catch_warnings():
        if quiet():
            warnings.simplefilter("ignore")
            logger.setLevel(logging.ERROR)
        elif verbose():
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
            logger.addHandler(handler)
            logger.propagate = False
            logger.setLevel(logging.DEBUG)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


@contextlib.contextmanager
def _answers_only() -> Iterator[None]:
    """Let nothing but `answer` write to standard output: not a user's model, native code or a process that is started."""
    meta, given = _meta(), sys.stdout
    with contextlib.ExitStack() as stack:
        stream: TextIO = given
        with contextlib.suppress(OSError, ValueError, AttributeError):  # in a test or a notebook it is no file
            if given.fileno() == 1:
                given.flush()
                stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
                os.dup2(2, 1)
                stack.callback(_give_back, stream)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        meta[_STREAM] = stream
        stack.callback(meta.pop, _STREAM)
        yield


def _give_back(stream: TextIO) -> None:
    os.dup2(stream.fileno(), 1)
    with contextlib.suppress(BrokenPipeError):
        stream.close()


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(inner) for inner in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "tolist"):  # numbers of NumPy
        return _plain(value.tolist())
    return str(value) if isinstance(value, Path) else value


@contextlib.contextmanager
def _broken_pipes() -> Iterator[None]:
    """End without a word if nobody reads standard output any more, as in `smartfrz zoo list | head -1`."""
    try:
        yield
    except BrokenPipeError:
        if not _is_unread():
            raise  # it was another pipe
        # Python flushes standard output once more when it ends, and would print that this fails.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise click.exceptions.Exit(BROKEN_PIPE) from None


def _is_unread() -> bool:
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    for handle in (1, 2):
        poll.register(handle, 0)  # errors are reported even so
    return any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0))


def _trace(ctx: click.Context) -> None:
    if ctx.meta.get(_VERBOSE):
        click.echo(traceback.format_exc(), err=True, nl=False)

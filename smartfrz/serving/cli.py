"""The command `smartfrz serve`."""

import contextlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import click

from smartfrz import commands, zoo
from smartfrz.commands import Command, device_option
from smartfrz.completing import PREDICTOR
from smartfrz.errors import not_installed
from smartfrz.predictor.runtime import Predictor
from smartfrz.progress import Tell, progress
from smartfrz.serving.options import ServeOptions


@click.command(
    cls=Command,
    short_help="Serve decisions over HTTP and gRPC.",
    example="smartfrz serve smartfrz-base --port 9000",
)
@click.argument("names", nargs=-1, required=True, metavar="[AS=]NAME...", type=PREDICTOR)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="Port of REST; 0 for any.")
@click.option(
    "--grpc-port", default=8081, show_default=True, type=click.IntRange(0, 65535), help="Port of gRPC; 0 for any."
)
@click.option(
    "--max-batch",
    default=256,
    show_default=True,
    type=click.IntRange(1, 65536),
    help="Maximum number of layers in a run, and in a request.",
)
@click.option(
    "--max-delay-ms",
    default=2.0,
    show_default=True,
    type=click.FloatRange(0, 1000),
    help="How long a request waits for others to run with.",
)
@click.option(
    "--max-request-bytes",
    default=32 * 2**20,
    show_default=True,
    type=click.IntRange(1024, 2**30),
    help="Larger requests are refused before they are read.",
)
@click.option(
    "--max-json-bytes",
    default=4 * 2**20,
    show_default=True,
    type=click.IntRange(1024, 2**30),
    help="The same for JSON, whose numbers cost far more than binary data.",
)
@click.option(
    "--max-connections",
    default=1000,
    show_default=True,
    type=click.IntRange(1, 65536),
    help="Of more connections, those that have been idle for longest are closed.",
)
@click.option(
    "--max-connections-per-peer",
    default=500,
    show_default=True,
    type=click.IntRange(1, 65536),
    help="The same for each address; behind a proxy, as many as in all.",
)
@click.option(
    "--header-seconds",
    default=10.0,
    show_default=True,
    type=click.FloatRange(0.1, 3600),
    help="How long the headers of a request may take.",
)
@click.option(
    "--stall-seconds",
    default=10.0,
    show_default=True,
    type=click.FloatRange(0.1, 3600),
    help="How long the body of a request may stop.",
)
@click.option(
    "--min-rate",
    default=64 * 2**10,
    show_default=True,
    type=click.IntRange(1, 2**30),
    help="Bytes a second at which a body has to arrive.",
)
@click.option(
    "--body-seconds",
    default=60.0,
    show_default=True,
    type=click.FloatRange(0.1, 3600),
    help="How long a body may take in all.",
)
@device_option("Where ONNX Runtime runs.")
@click.option(
    "--threads",
    default=os.cpu_count() or 1,
    show_default="CPUs",
    type=click.IntRange(1, 256),
    help="Batches that run at the same time.",
)
@click.option(
    "--grace-seconds",
    default=30,
    show_default=True,
    type=click.IntRange(0, 3600),
    help="How long requests in flight may take after SIGTERM.",
)
@click.option("--example", is_flag=True, help="Start nothing; print a request for curl to a server with these options.")
def serve(names: tuple[str, ...], example: bool, **options: Any) -> None:
    """Serve decisions over the Open Inference Protocol, REST and gRPC, until Ctrl-C or SIGTERM.

    NAME is a name in the zoo, the path of a file, or an address; the predictor is served under the name in its file, or
    as AS. There is no encryption and no authentication: use a proxy where others can reach the server.

    With --json, one document with the addresses is printed when the server is ready.
    """
    if example:
        _print_examples(names, ServeOptions(**options))
        return
    if importlib.util.find_spec("kserve") is None:
        raise not_installed("Serving", "kserve", "serve")
    import asyncio  # --help does without it

    chosen = ServeOptions(**options)
    with progress("starting") as tell:
        predictors = _load_predictors(names, chosen, tell)
        tell(0.9, "the server")
        with _hide_arguments():
            from smartfrz.serving.server import serve as run

    def announce(port: int, grpc_port: int) -> None:
        host = _in_url(chosen.host)
        rest, grpc = f"http://{host}:{port}", f"{host}:{grpc_port}"
        addresses = {name: f"{rest}/{name}" for name in predictors}
        lines = [f'{predictor}: predictor="{addresses[name]}"' for name, predictor in predictors.items()]
        commands.answer(
            {"predictors": addresses, "rest": rest, "metrics": f"{rest}/metrics", "grpc": grpc},
            "\n".join([*lines, f"REST and /metrics: {rest}", f"gRPC: {grpc}"]),
        )

    try:
        asyncio.run(run(predictors, chosen, announce))
    except OSError as error:
        raise click.ClickException(f"{error}.") from error


def _print_examples(names: tuple[str, ...], options: ServeOptions) -> None:
    """Print for each predictor a command that asks a running server about two made-up layers."""
    from smartfrz.serving.example import curl_command

    if not options.port:
        raise click.UsageError("--port is 0, so the address is not known. Pass the port that the server printed.")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)
    address = f"http://{_in_url(host)}:{options.port}/v2/models"
    with progress("reading") as tell:
        predictors = _load_predictors(names, options, tell)
    made = {name: curl_command(loaded.info, f"{address}/{name}/infer") for name, loaded in predictors.items()}
    commands.answer({"commands": made}, "\n\n".join(made.values()))
    commands.note(
        "This asks about two made-up layers: the first one stands still, the second one moves. The answer holds for each "
        "of them two confidences: keep training, freeze."
    )


@contextlib.contextmanager
def _hide_arguments() -> Iterator[None]:
    """Hide the command line from kserve, which parses it for its own options when it is imported."""
    given, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = given


def _load_predictors(names: tuple[str, ...], options: ServeOptions, tell: Tell) -> dict[str, Predictor]:
    predictors: dict[str, Predictor] = {}
    for number, text in enumerate(names):
        tell(0.9 * number / len(names), text)
        alias, _, name = text.partition("=") if re.match(r"[\w.-]+=", text) else ("", "", text)
        predictor = zoo.load(name, device=options.device)
        if not isinstance(predictor, Predictor):
            raise click.BadParameter(f"{name!r} is a server; expected a predictor. Pass its file.", param_hint="NAME")
        served = alias or predictor.info.name
        if not re.fullmatch(r"[\w.-]+", served):
            raise click.BadParameter(
                f"{served!r} cannot be part of an address; expected letters, digits, '.', '_' and '-'. Type AS={name}.",
                param_hint="NAME",
            )
        if served in predictors:
            raise click.BadParameter(
                f"two predictors are called {served!r}; expected different names. Type another-name={name}.",
                param_hint="NAME",
            )
        predictors[served] = predictor
    return predictors


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host

"""The command `smartfrz serve`."""

import asyncio
import contextlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import click

from smartfrz import zoo
from smartfrz.errors import not_installed
from smartfrz.predictor.runtime import Predictor
from smartfrz.serving.options import ServeOptions


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="[AS=]NAME...")
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
@click.option(
    "--provider",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="Where ONNX Runtime runs.",
)
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
def serve(names: tuple[str, ...], **options: Any) -> None:
    """Serve decisions over the Open Inference Protocol, REST and gRPC.

    NAME is a name in the zoo, the path of a file, or an address; the predictor is served under the name in its file, or
    as AS. There is no encryption and no authentication: use a proxy where others can reach the server.
    """
    if importlib.util.find_spec("kserve") is None:
        raise not_installed("Serving", "kserve", "serve")
    chosen = ServeOptions(**options)
    predictors = _load_predictors(names, chosen)
    with _hide_arguments():
        from smartfrz.serving.server import serve as run

    def announce(port: int, grpc_port: int) -> None:
        for name, predictor in predictors.items():
            click.echo(f'{predictor}: predictor="http://{_in_url(chosen.host)}:{port}/{name}"')
        click.echo(f"REST and /metrics: http://{_in_url(chosen.host)}:{port}")
        click.echo(f"gRPC: {_in_url(chosen.host)}:{grpc_port}")

    try:
        asyncio.run(run(predictors, chosen, announce))
    except OSError as error:
        raise click.ClickException(f"{error}.") from error


@contextlib.contextmanager
def _hide_arguments() -> Iterator[None]:
    """Hide the command line from kserve, which parses it for its own options when it is imported."""
    given, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = given


def _load_predictors(names: tuple[str, ...], options: ServeOptions) -> dict[str, Predictor]:
    predictors: dict[str, Predictor] = {}
    for text in names:
        alias, _, name = text.partition("=") if re.match(r"[\w.-]+=", text) else ("", "", text)
        predictor = zoo.load(name, device=options.provider)
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

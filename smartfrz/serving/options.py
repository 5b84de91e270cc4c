"""The options of `smartfrz serve`."""

from dataclasses import dataclass

from smartfrz.predictor.runtime import Device


@dataclass(frozen=True)
class ServeOptions:
    """How to serve; the defaults are those of the command line.

    Attributes:
        host: Address to listen on.
        port: Port of REST and metrics; 0 for any free one.
        grpc_port: Port of gRPC; 0 for any free one.
        max_batch: Maximum number of layers in a run, and in a request.
        max_delay_ms: How long a request waits for others to run with.
        max_request_bytes: Maximum size of a request's body, or of a gRPC message.
        provider: Where ONNX Runtime runs.
        threads: Number of batches that run at the same time, each on one thread.
        grace_seconds: How long requests in flight may take after SIGTERM.
    """

    host: str
    port: int
    grpc_port: int
    max_batch: int
    max_delay_ms: float
    max_request_bytes: int
    provider: Device
    threads: int
    grace_seconds: int

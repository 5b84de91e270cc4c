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
        max_json_bytes: Maximum size of what is not binary data: of JSON, and of a gRPC message without its raw tensors.
        max_connections: Maximum number of connections to REST, and to gRPC.
        max_connections_per_peer: Maximum number of connections to REST from one address.
        header_seconds: How long the headers of a request may take, from the connection or the last answer.
        stall_seconds: How long a body may stop.
        min_rate: Bytes a second at which a body has to arrive on average, after `stall_seconds`.
        body_seconds: How long a body may take, or a gRPC message.
        device: Where ONNX Runtime runs.
        threads: Number of batches that run at the same time, each on one thread.
        grace_seconds: How long requests in flight may take after SIGTERM.
    """

    host: str
    port: int
    grpc_port: int
    max_batch: int
    max_delay_ms: float
    max_request_bytes: int
    max_json_bytes: int
    max_connections: int
    max_connections_per_peer: int
    header_seconds: float
    stall_seconds: float
    min_rate: int
    body_seconds: float
    device: Device
    threads: int
    grace_seconds: int

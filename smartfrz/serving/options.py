"""What `smartfrz serve` can be told."""

import os
from dataclasses import dataclass

from smartfrz.predictor.runtime import Device


@dataclass(frozen=True)
class ServeOptions:
    """How to serve.

    Attributes:
        host: Address to listen at.
        port: Of REST and metrics; 0 for any that is free.
        grpc_port: Of gRPC; 0 for any that is free.
        max_batch: Layers that are run together, and that one request may ask about.
        max_delay_ms: How long a request waits for others to be run with.
        max_request_bytes: Size of a request's body, or of a gRPC message.
        provider: Where ONNX Runtime runs.
        threads: Batches that are run at once, each on one thread.
        grace_seconds: How long requests in flight may take after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    grpc_port: int = 8081
    max_batch: int = 256
    max_delay_ms: float = 2.0
    max_request_bytes: int = 32 * 2**20
    provider: Device = "auto"
    threads: int = os.cpu_count() or 1
    grace_seconds: int = 30

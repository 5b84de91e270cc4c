"""What Prometheus is told at /metrics, beside what kserve and the Python client tell."""

from prometheus_client import Counter, Gauge, Histogram

REQUESTS = Counter("smartfrz_requests", "Requests for decisions, answered or refused", ["model", "protocol", "status"])
LAYERS = Counter("smartfrz_layers", "Layers that were decided on", ["model"])
REJECTED = Counter("smartfrz_rejected", "Requests that were not answered", ["reason"])
SECONDS = Histogram(
    "smartfrz_request_seconds",
    "From the whole request to its answer",
    ["model", "protocol"],
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
)
BATCH_REQUESTS = Histogram(
    "smartfrz_batch_requests", "Requests that were run together", ["model"], buckets=(1, 2, 3, 4, 6, 8, 16, 32, 64)
)
BATCH_LAYERS = Histogram(
    "smartfrz_batch_layers", "Layers that were run together", ["model"], buckets=(1, 8, 32, 64, 128, 256, 512, 1024)
)
WAITING = Gauge("smartfrz_waiting_requests", "Requests that no run has taken yet", ["model"])
REASONS = {"InvalidInput": "invalid", "ModelNotFound": "unknown_model", "Overloaded": "overloaded"}  # of errors

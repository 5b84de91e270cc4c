"""Metrics that /metrics reports in addition to those of kserve and the Prometheus client."""

from prometheus_client import Counter, Gauge, Histogram

REQUESTS = Counter("smartfrz_requests", "Requests for decisions, answered or refused", ["model", "protocol", "status"])
LAYERS = Counter("smartfrz_layers", "Layers that were decided on", ["model"])
REJECTED = Counter("smartfrz_rejected", "Requests that were not answered", ["reason"])
SECONDS = Histogram(
    "smartfrz_request_seconds",
    "Time from the complete request to its answer",
    ["model", "protocol"],
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
)
BATCH_REQUESTS = Histogram(
    "smartfrz_batch_requests", "Requests in a run", ["model"], buckets=(1, 2, 3, 4, 6, 8, 16, 32, 64)
)
BATCH_LAYERS = Histogram(
    "smartfrz_batch_layers", "Layers in a run", ["model"], buckets=(1, 8, 32, 64, 128, 256, 512, 1024)
)
WAITING = Gauge("smartfrz_waiting_requests", "Requests that wait for a run", ["model"])

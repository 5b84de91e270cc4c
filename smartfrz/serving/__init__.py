"""Predictors served over the network with the Open Inference Protocol, REST and gRPC (docs/serving.md).

Only `smartfrz serve` imports it. kserve implements the protocol; `smartfrz.predictor.remote` is the client.
"""

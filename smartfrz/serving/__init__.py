"""Decisions over the network: predictors on the Open Inference Protocol, REST and gRPC (docs/serving.md).

Imported by `smartfrz serve` only. kserve gives the protocol; asking is `smartfrz.predictor.runtime`.
"""

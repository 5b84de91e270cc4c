"""Ask `smartfrz serve` over gRPC with Triton's client: python client_grpc.py 127.0.0.1:8081 smartfrz-base request.json.

Once: pip install "tritonclient[grpc]". Request and answer are those of client_rest.py, without the threshold,
for which the protocol has no place over gRPC. It is in the answer to `GET /v2/models/NAME`, and in `smartfrz zoo show NAME`.
"""

import json
import sys

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput

client, name = InferenceServerClient(sys.argv[1]), sys.argv[2]
inputs = {tensor.name: tensor for tensor in client.get_model_metadata(name).inputs}

if len(sys.argv) > 3:
    with open(sys.argv[3]) as file:
        request = json.load(file)
else:
    rng, shape = np.random.default_rng(0), (2, 8, inputs["history"].shape[-1])
    steps = rng.normal(0, 0.03, shape) * np.array([0, 1]).reshape(2, 1, 1)
    history = rng.normal(0, 0.3, (2, 1, shape[2])) + steps.cumsum(axis=1)
    request = {"layers": ["still", "moving"], "history": history, "lengths": [8, 8], "position": [0, 1]}
    request["loss"] = np.tile(1 + 1 / np.arange(1, 9), (2, 1))

tensors = []
for key, tensor in inputs.items():
    if key in request:
        array = np.asarray(request[key], {"FP32": np.float32, "INT64": np.int64}[tensor.datatype])
        tensors.append(InferInput(key, array.shape, tensor.datatype))
        tensors[-1].set_data_from_numpy(array)
answer = client.infer(name, tensors, outputs=[InferRequestedOutput("confidence")], client_timeout=30)
client.close()

confidence = answer.as_numpy("confidence")  # [layers, 2]: keep training, freeze
for layer, freeze in zip(request["layers"], confidence[:, 1].tolist(), strict=True):
    print(json.dumps({"layer": layer, "confidence": freeze}))

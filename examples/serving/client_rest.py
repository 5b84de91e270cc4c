"""Ask `smartfrz serve` over HTTP with NumPy alone: python client_rest.py http://127.0.0.1:8080 smartfrz-base request.json.

The request is that of plain_onnxruntime.py: {"layers": [names], "history": [layers][records][tailored_size], oldest first,
"lengths": [records a layer], "position": [0 for the first layer to 1 for the last], "loss": [layers][records], the mean
training loss since the record before, 0 where it is not known}. What the predictor does not read is not sent. Without a
file, the request is about two made-up layers: the first one stands still, the second one moves.
"""

import json
import sys
from urllib.request import Request, urlopen

import numpy as np

address, name = f"{sys.argv[1]}/v2/models/{sys.argv[2]}", sys.argv[2]
with urlopen(address) as answer:
    model = json.load(answer)
inputs, facts = {tensor["name"]: tensor for tensor in model["inputs"]}, model["properties"]

if len(sys.argv) > 3:
    with open(sys.argv[3]) as file:
        request = json.load(file)
else:
    rng, shape = np.random.default_rng(0), (2, 8, inputs["history"]["shape"][-1])
    steps = rng.normal(0, 0.03, shape) * np.array([0, 1]).reshape(2, 1, 1)
    history = rng.normal(0, 0.3, (2, 1, shape[2])) + steps.cumsum(axis=1)
    request = {"layers": ["still", "moving"], "history": history, "lengths": [8, 8], "position": [0, 1]}
    request["loss"] = np.tile(1 + 1 / np.arange(1, 9), (2, 1))

types = {"FP32": "<f4", "INT64": "<i8"}
arrays = {key: np.asarray(request[key], types[inputs[key]["datatype"]]) for key in inputs if key in request}
header = {
    "inputs": [
        {
            "name": key,
            "datatype": inputs[key]["datatype"],
            "shape": array.shape,
            "parameters": {"binary_data_size": array.nbytes},
        }
        for key, array in arrays.items()
    ],
    "outputs": [{"name": "confidence"}],
}
text = json.dumps(header).encode()
body = text + b"".join(array.tobytes() for array in arrays.values())
headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(text))}
with urlopen(Request(f"{address}/infer", body, headers), timeout=30) as answer:
    (confidence,) = json.load(answer)["outputs"]  # for each layer two: keep training, freeze

threshold = float(facts["smartfrz.threshold"])
print(json.dumps({"predictor": facts["smartfrz.name"], "threshold": threshold}))
for layer, freeze in zip(request["layers"], confidence["data"][1::2], strict=True):
    print(json.dumps({"layer": layer, "confidence": freeze, "freeze": freeze >= threshold}))

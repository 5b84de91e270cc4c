"""Ask a predictor with nothing but onnxruntime: python plain_onnxruntime.py smartfrz-base.onnx request.json.

The request: {"layers": [names], "history": [layers][records][tailored_size], oldest first, "lengths": [records a layer]},
and for predictors that take them "position": [0 for the first layer to 1 for the last] and "loss": [layers][records], the
mean training loss since the record before, 0 where it is not known.
"""

import json
import os
import sys

import numpy as np

os.environ.setdefault(
    "ORT_DISABLE_TELEMETRY", "1"
)  # ONNX Runtime reports to its makers unless this is set before the import
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
facts = session.get_modelmeta().custom_metadata_map
with open(sys.argv[2]) as file:
    request = json.load(file)
feed = {"history": np.array(request["history"], np.float32), "lengths": np.array(request["lengths"], np.int64)}
for optional in ("position", "loss"):
    if optional in request:
        feed[optional] = np.array(request[optional], np.float32)
(answer,) = session.run(["confidence"], feed)  # [layers, 2]: keep training, freeze
print(json.dumps({"predictor": facts["smartfrz.name"], "threshold": float(facts["smartfrz.threshold"])}))
for name, freeze in zip(request["layers"], answer[:, 1].tolist(), strict=True):
    print(json.dumps({"layer": name, "confidence": freeze, "freeze": freeze >= float(facts["smartfrz.threshold"])}))

"""`smartfrz.demo.keras` on one backend, in a process of its own; `test_demo_keras.py` looks at what it prints.

python keras_demo_worker.py predictor.onnx output-folder
"""

import functools
import json
import sys
from pathlib import Path

import keras
import numpy as np
import torch

from smartfrz.adapters.keras import SmartFRZ
from smartfrz.comparing import keras as comparing
from smartfrz.comparing.keras import KerasRun
from smartfrz.demo.data import DemoOptions
from smartfrz.demo.keras import keras_network, notes, run_demo
from smartfrz.demo.printing import save, table
from smartfrz.demo.pytorch import pretrained_network

# Four steps an epoch, eleven in all: more than a turn.
SMALL = {"data": "digits", "epochs": 2.75, "num_train": 64, "num_test": 60, "image_size": 32, "batch_size": 16}
to_numpy = keras.ops.convert_to_numpy


def same_network(size):
    """Largest differences to the PyTorch network, for pictures of this size."""
    torch.manual_seed(0)
    network = pretrained_network(10)
    model = keras_network({name: tensor.numpy() for name, tensor in network.state_dict().items()}, size)
    pictures = np.random.default_rng(0).normal(size=(4, 3, size, size)).astype(np.float32)
    channels_last = np.ascontiguousarray(pictures.transpose(0, 2, 3, 1))
    with torch.no_grad():
        expected = network.eval()(torch.from_numpy(pictures)).numpy()
        logits = to_numpy(model(channels_last))
        network.train()(torch.from_numpy(pictures))
        model(channels_last, training=True)
    norm, statistics = network._bn0, model.get_layer("stem_norm")
    places = 4 * (size // 2) ** 2
    return {
        "logits": float(np.abs(logits - expected).max()),
        "largest_logit": float(np.abs(expected).max()),
        "mean": float(np.abs(to_numpy(statistics.moving_mean) - norm.running_mean.numpy()).max()),
        # PyTorch divides by one less than the number of values.
        "variance": float(np.abs(to_numpy(statistics.moving_variance) / norm.running_var.numpy() - 1).max()),
        "variance_tolerance": 1.01 / (places - 1),
        "moved": float(np.abs(norm.running_mean.numpy() - pretrained_network(10)._bn0.running_mean.numpy()).max()),
        "parameters": [
            model.count_params(),
            sum(t.numel() for n, t in network.state_dict().items() if "num_" not in n),
        ],
        "layers": [layer.name for layer in model.layers if layer.count_params()],
        "followers": [
            after.name
            for layer, after in zip(model.layers, model.layers[1:], strict=False)
            if layer.name.endswith("_conv")
        ],
    }


def small_demo(predictor, output):
    """The figures of a run, and the losses after each epoch, which the figures do not hold."""
    shown, losses = [], {"full training": [], "SmartFRZ": []}
    noting = KerasRun.on_epoch_end

    def spy(self, epoch, logs=None):
        losses[self.result.method].append(float(logs["val_loss"]))
        noting(self, epoch, logs)

    KerasRun.on_epoch_end = spy
    # In eleven steps no freezing pays for compiling anew.
    comparing.SmartFRZ = functools.partial(SmartFRZ, recompile_steps=0)
    options = DemoOptions(**SMALL, predictor=predictor)
    runs = run_demo(options, lambda done, text: shown.append((done, text)))
    files = [path.name for path in save(runs, options, Path(output))]
    return {"table": table(runs), "notes": notes(runs), "progress": shown, "losses": losses, "files": files}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(small_demo(*sys.argv[1:]) | {"networks": [same_network(size) for size in (64, 33)]}))

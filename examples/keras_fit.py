"""Fine-tune a network of keras.applications while SmartFRZ freezes what has converged.

pip install "smartfrz[tensorflow,cpu]" scikit-learn      # or [keras,torch,cpu], with KERAS_BACKEND=torch
python examples/keras_fit.py                        # handwritten digits, from scratch
python examples/keras_fit.py --network resnet50 --weights imagenet --pictures FOLDER --pixels 160 --rate 1e-4

FOLDER has the folders train and test, and these a folder of pictures for each class.
"""

import argparse

import keras
import numpy as np
from sklearn.datasets import load_digits

from smartfrz.adapters.keras import SmartFRZ

NETWORKS = {
    "mobilenetv2": (keras.applications.MobileNetV2, keras.applications.mobilenet_v2.preprocess_input),
    "resnet50": (keras.applications.ResNet50, keras.applications.resnet50.preprocess_input),
    "vgg16": (keras.applications.VGG16, keras.applications.vgg16.preprocess_input),
}


def digits(pixels):
    """Training and test data: handwritten digits of 8 by 8 pixels, made larger, in colours from 0 to 255."""
    data = load_digits()
    pictures = data.images.repeat(pixels // 8, 1).repeat(pixels // 8, 2)[..., None] * np.full(3, 16, "float32")
    return (pictures[:1472], data.target[:1472]), (pictures[1472:], data.target[1472:])


def folder(path, pixels):
    """The same of a folder of pictures."""
    parts = []
    for part in ("train", "test"):
        batches = keras.utils.image_dataset_from_directory(f"{path}/{part}", image_size=(pixels, pixels))
        parts.append([np.concatenate(arrays) for arrays in zip(*batches.as_numpy_iterator(), strict=True)])
    return parts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="mobilenetv2")
    parser.add_argument("--weights", choices=["imagenet", "none"], default="none")
    parser.add_argument("--width", type=float, default=1.0, help="of MobileNetV2")
    parser.add_argument("--pictures", help="a folder; without it the digits")
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rate", type=float, default=2e-3)
    options = parser.parse_args()
    keras.utils.set_random_seed(0)
    build, preprocess = NETWORKS[options.network]
    (x, y), (test_x, test_y) = folder(options.pictures, options.pixels) if options.pictures else digits(options.pixels)
    width = {"alpha": options.width} if options.network == "mobilenetv2" else {}
    weights = None if options.weights == "none" else options.weights
    shape = (options.pixels, options.pixels, 3)
    backbone = build(include_top=False, weights=weights, input_shape=shape, pooling="avg", **width)
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.9  # that of MobileNetV2, 0.999, remembers more steps than a short run has
    model = keras.Sequential([backbone, keras.layers.Dense(int(y.max()) + 1, name="head")])
    rate = keras.optimizers.schedules.CosineDecay(options.rate, options.epochs * -(-len(x) // 32))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(rate, weight_decay=1e-4), loss, metrics=["accuracy"])
    freezer = SmartFRZ(verbose=False)  # the only line that SmartFRZ needs
    model.fit(preprocess(x), y, 32, options.epochs, verbose=2, callbacks=[freezer])
    _, accuracy = model.evaluate(preprocess(test_x), test_y, verbose=0)
    print(f"test accuracy {accuracy:.1%}")
    print(freezer.report())


if __name__ == "__main__":
    main()

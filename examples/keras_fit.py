"""Train a small convolutional network with Keras while SmartFRZ freezes what has converged.

pip install "smartfrz[keras,cpu]" scikit-learn
python examples/keras_fit.py --epochs 10        # KERAS_BACKEND=jax or torch for another backend
"""

import argparse

import keras
from sklearn.datasets import load_digits

from smartfrz.adapters.keras import SmartFRZ


def digits():
    """Reads handwritten digits of 8 by 8 pixels."""
    layers = [keras.Input((8, 8, 1))]
    for filters in (16, 32, 64):
        layers += [
            keras.layers.Conv2D(filters, 3, padding="same", use_bias=False, name=f"conv{filters}"),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
        ]
    return keras.Sequential([*layers, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10, name="head")])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    keras.utils.set_random_seed(0)
    data = load_digits()
    pictures = data.images[..., None].astype("float32") / 16
    model = digits()
    rate = keras.optimizers.schedules.CosineDecay(0.1, options.epochs * 46)
    optimizer = keras.optimizers.SGD(rate, momentum=0.9, weight_decay=1e-4)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    freezer = SmartFRZ("smartfrz-base")  # the only line that SmartFRZ needs
    model.fit(pictures[:1472], data.target[:1472], 32, options.epochs, verbose=2, callbacks=[freezer])
    _, accuracy = model.evaluate(pictures[1472:], data.target[1472:], verbose=0)
    print(f"test accuracy {accuracy:.1%}")
    print(freezer.report())


if __name__ == "__main__":
    main()

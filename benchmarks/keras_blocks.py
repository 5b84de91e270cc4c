"""One case of `benchmarks.keras_step`, in a process of its own: blocks of steps in one `fit`, live and frozen in turns."""

import time

import keras
import numpy as np

from smartfrz.adapters.keras import KerasAdapter, trace_layers

FRACTIONS = (1 / 4, 1 / 2, 3 / 4)
BATCH = 32


def make_resnet14(pixels):
    """Three stages of two residual blocks, of 16, 32 and 64 channels."""
    inputs = x = keras.Input((pixels, pixels, 3))
    conv = {"padding": "same", "use_bias": False}
    x = keras.layers.BatchNormalization()(keras.layers.Conv2D(16, 3, **conv)(x))
    for channels in (16, 32, 64):
        for stride in (1 if channels == 16 else 2, 1):
            shortcut = x
            x = keras.layers.ReLU()(
                keras.layers.BatchNormalization()(keras.layers.Conv2D(channels, 3, stride, **conv)(x))
            )
            x = keras.layers.BatchNormalization()(keras.layers.Conv2D(channels, 3, **conv)(x))
            if stride == 2:
                shortcut = keras.layers.Conv2D(channels, 1, 2, **conv)(shortcut)
            x = keras.layers.ReLU()(keras.layers.Add()([x, shortcut]))
    return keras.Model(inputs, keras.layers.Dense(10)(keras.layers.GlobalAveragePooling2D()(x)))


def make_model(network, pixels, jit):
    """The compiled network, with the same random weights at each call."""
    keras.utils.set_random_seed(0)
    if network == "mobilenetv2":
        shape = (pixels, pixels, 3)
        model = keras.applications.MobileNetV2(shape, weights=None, classes=10, classifier_activation=None)
    else:
        model = make_resnet14(pixels)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-3, momentum=0.9), loss, jit_compile=jit)
    return model


class SameBatch(keras.utils.PyDataset):
    """One batch, repeated for all blocks of steps."""

    def __init__(self, pixels, length):
        super().__init__()
        rng = np.random.default_rng(0)
        self.batch = rng.normal(size=(BATCH, pixels, pixels, 3)).astype(np.float32), rng.integers(0, 10, BATCH)
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.batch


class Blocks(keras.callbacks.Callback):
    """Freezes or thaws after every block of steps, and reads the clock after every step."""

    def __init__(self, adapter, steps):
        super().__init__()
        self.adapter, self.steps_per_block, self.last = adapter, steps, None
        self.steps, self.changes = [], []

    def on_train_batch_end(self, batch, logs=None):
        """Read the clock; at the end of a block, change what is frozen."""
        self.adapter.sync()
        keras.ops.convert_to_numpy(self.model.optimizer.iterations.value)  # JAX goes ahead otherwise
        now = read_clock()
        if self.steps:
            self.steps[-1].append(now - self.last)
        else:
            self.steps.append([])  # the first step has all of the loading in it
        block, rest = divmod(batch + 1, self.steps_per_block)
        if not rest and block <= 2 * len(FRACTIONS):
            self.change(block)
            self.changes.append(read_clock() - now)
            self.steps.append([])
        self.last = read_clock()

    def change(self, block):
        """Freeze a prefix before odd blocks, and thaw everything before even ones."""
        names = self.adapter.layers()
        if block % 2:
            self.adapter.freeze(names[: round(len(names) * FRACTIONS[block // 2])])
        else:
            self.adapter.unfreeze(names)


def read_clock():
    """Seconds, and processor seconds of this process."""
    return np.array([time.perf_counter(), time.process_time()])


def measure(network, jit, steps):
    """One row for nothing frozen, and one for each of `FRACTIONS`."""
    pixels = 96 if network == "mobilenetv2" and not jit else 32
    model = make_model(network, pixels, jit)
    adapter = KerasAdapter(model, trace_layers(model))
    blocks = Blocks(adapter, steps)
    data = SameBatch(pixels, steps * (2 * len(FRACTIONS) + 1))
    model.fit(data, epochs=1, verbose=0, shuffle=False, callbacks=[blocks])
    facts = {"network": network, "pixels": pixels, "batch": BATCH, "steps": steps - 1}
    facts |= {"num_layers": len(adapter.layers()), "keras": keras.__version__}
    return [facts | row for row in make_rows(blocks)]


def make_rows(blocks):
    """Rows of the medians of each block; a frozen block is compared with its two live neighbours."""
    medians = np.array([np.median(block[1:], axis=0) for block in blocks.steps])
    live = np.median(medians[::2], axis=0)
    yield make_row(0.0, live, live)
    for block, fraction in zip(range(1, len(medians), 2), FRACTIONS, strict=True):
        changed = {
            "change_cpu_ms": 1e3 * blocks.changes[block - 1][1],
            "first_step_cpu_ms": 1e3 * (blocks.steps[block][0] - medians[block])[1],
        }
        yield make_row(fraction, medians[block], (medians[block - 1] + medians[block + 1]) / 2) | changed


def make_row(frozen, step, live):
    """Times of a step in ms, and their ratios to those of a live step."""
    times = {"frozen": frozen, "step_ms": 1e3 * step[0], "cpu_ms": 1e3 * step[1]}
    return times | {"ratio": step[0] / live[0], "cpu_ratio": step[1] / live[1]}

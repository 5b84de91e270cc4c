"""The samples about Keras in README.md and docs/ run."""

import numpy as np
import pytest
from keras_runs import WARNINGS, keras
from pages import PAGES, name_of, samples

PAGES = [page for page in PAGES if any(kind == "keras" for kind, _ in samples(page))]
pytestmark = [*WARNINGS, pytest.mark.skipif(not PAGES, reason="the documentation is not here")]


def surroundings():
    """What a sample takes for granted: a model, and data."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(2)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = np.random.default_rng(0).random((64, 4), np.float32)
    return {"keras": keras, "model": model, "x": x, "y": np.arange(64) % 2, "steps_per_epoch": 2}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_samples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = surroundings()
    for kind, block in samples(page):
        if kind == "keras":
            exec(compile(block.code, block.place, "exec"), names)

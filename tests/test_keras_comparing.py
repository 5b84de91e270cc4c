"""`smartfrz compare` on a Keras task, through the command itself; `test_keras_backends.py` runs it on each backend."""

import json

import numpy as np
import pytest
from builder_fixtures import invoke
from keras_runs import BACKEND, WARNINGS, keras

from smartfrz.cli import main
from smartfrz.comparing.engine import FULL, Method
from smartfrz.comparing.keras import Task
from smartfrz.comparing.lines import read_lines
from smartfrz.comparing.own_task import Part
from smartfrz.errors import RecipeError

pytestmark = WARNINGS
TASK = """
import keras
import numpy as np
from smartfrz.comparing.keras import Task

def network(seed, steps):
    layers = [keras.layers.Dense(8, activation="relu") for _ in range(3)]
    model = keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dropout(0.2), keras.layers.Dense(2)])
    rate = keras.optimizers.schedules.CosineDecay(0.1, steps)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(rate, momentum=0.9), loss, metrics=["accuracy"])
    return model

def build():
    x = np.random.default_rng(0).normal(size=(120, 6)).astype("float32")
    x[:, 0] *= 4.0  # learned within 36 steps on every backend
    y = (x[:, 0] > 0).astype("int64")
    test = x[80:], y[80:]
    return Task(network, (x[:80], y[:80]), test, test, steps=36, batch_size=8)
"""


def make_task(**changes):
    names = {}
    exec(TASK, names)
    fields = names["build"]().__dict__ | changes
    return Task(**fields)


def run(task, method=FULL, seed=0):
    run = task.start(seed)(method)
    assert run.advance(1) is False
    return run


def test_the_command_on_a_keras_task(tmp_path, eager_predictor):
    (tmp_path / "mine.py").write_text(TASK)
    given = ["compare", f"{tmp_path}/mine.py:build", "--output", tmp_path / "out", "--predictor", eager_predictor]
    result = invoke(main, *given, "--fewer-steps", "50")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("With one seed, SmartFRZ with eager.onnx") or "froze nothing here" in result.stdout
    assert f"Keras on {BACKEND}: runs come one after the other" in result.stdout
    full, freezing, half = read_lines(tmp_path / "out" / "runs.jsonl")
    assert [line["steps"] for line in (full, freezing, half)] == [36, 36, 18]
    assert [point[0] for point in half["curve"]] == [10, 18]
    assert full["first_step_seconds"] > 0 < full["train_seconds"]
    assert full["curve"][-1][3] == full["accuracy"] > 0.7
    # a new method is compared with the full training that is there, which is not trained again
    again = invoke(main, *given, "--fewer-steps", "70", "--json")
    assert len(json.loads(again.stdout)["runs"]) == 3
    assert read_lines(tmp_path / "out" / "runs.jsonl")[-1]["pace"] == full["pace"]


def test_runs_of_a_seed_are_the_same_run():
    full, other = (run(make_task(), method) for method in (FULL, Method("same")))
    assert [point.accuracy for point in full.result.curve] == [point.accuracy for point in other.result.curve]
    assert full.result.last_loss == pytest.approx(other.result.last_loss, rel=1e-6)
    assert run(make_task(), seed=1).result.last_loss != full.result.last_loss


def test_a_metric_of_ones_own_and_a_number_of_evaluations():
    seen = []

    def judge(model, data):
        seen.append(len(data[0]))
        return -float(np.abs(model.predict(data[0], verbose=0)).mean()), {"samples": len(data[0])}

    task = make_task(judge=judge, metric="small answers", evaluations=2, test=(np.ones((7, 6), "float32"), np.ones(7)))
    result = run(task).finish()
    assert seen == [40, 40, 7]
    assert [point.step for point in result.curve] == [20, 36]
    assert result.accuracy < 0
    assert result.details == {"samples": 7}


def test_a_budget_cuts_data_and_steps():
    task = make_task()
    cut = Part(0.5, 1).of(task)
    assert (cut.num_samples("train"), cut.steps, cut.evaluations) == (
        40,
        36,
        1,
    )  # 100 steps are the fewest that are cut to
    cost = task.measure(2)
    assert cost.steps_per_epoch == 10
    assert min(cost.step, cost.evaluation) > 0
    assert task.device_type() == "cpu"


WRONG = {
    "a generator": ({"train": iter(())}, "`train` of type .*; expected a pair of inputs and targets"),
    "a triple": ({"test": (1, 2, 3)}, "`test` of type tuple of 3"),
    "no arrays": ({"test": (1, 2)}, "`test` with int in it"),
    "lengths": ({"test": (np.ones((3, 6)), np.ones(2))}, r"arrays of \[2, 3\] samples"),
    "empty": ({"validation": (np.ones((0, 6)), np.ones(0))}, "no samples in `validation`"),
    "no batch": ({"batch_size": 81}, "has 80 training samples; expected at least 81"),
    "no steps": ({"steps": 0}, "has steps=0"),
    "fails": ({"model": lambda seed, steps: 1 / 0}, "`model` of the task mine failed: ZeroDivisionError"),
    "one argument": ({"model": lambda seed: 1}, "`model` of the task mine failed: TypeError"),
    "not compiled": ({"model": lambda seed, steps: keras.Sequential()}, "returns a model that is not compiled"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_trained_is_explained(case):
    changes, message = WRONG[case]
    with pytest.raises(RecipeError, match=message):
        make_task(**changes).check("mine")


def test_a_metric_that_was_not_compiled_is_named():
    with pytest.raises(RecipeError, match=r"without the metric 'auc'; it has \['accuracy', 'loss'\]"):
        run(make_task(metric="auc"))


def test_a_metric_that_is_no_number_is_named():
    with pytest.raises(RecipeError, match="The metric of full training is nan after 10 steps"):
        run(make_task(judge=lambda model, data: float("nan")))

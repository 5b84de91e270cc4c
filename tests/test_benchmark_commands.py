"""What commands of the benchmarks say of arguments that they cannot use; other tests measure."""

import dataclasses
import os
import subprocess
import sys

import pytest
from benchmark_source import ROOT
from builder_fixtures import recorded_run, write_runs

from benchmarks import explain, keras_step, predictor_tables, rates, serving
from smartfrz.dataset_builder.labelling import labelled_runs, rule_of
from smartfrz.predictor.runtime import Predictor
from smartfrz.predictor.training.judging import score
from smartfrz.predictor.training.runs import TrainingOptions

# Command, arguments, message; {runs} holds recorded runs in which nothing freezes, {empty} nothing
REFUSED = {
    "explain without runs": (explain, ["--runs", "{empty}"], "Found no recorded run (*.parquet)"),
    "explain an unknown run": (
        explain,
        ["--runs", "{runs}", "--run", "resnet"],
        "No recorded run 'resnet' in '{runs}'; expected one of cnn-a, cnn-b, vit-a, vit-b.",
    ),
    "explain an unknown layer": (
        explain,
        ["--runs", "{runs}", "--layer", "layer99"],
        "would freeze layer99 at no moment in cnn-a; expected a layer that it freezes.",
    ),
    "explain with an unknown predictor": (
        explain,
        ["--runs", "{runs}", "--predictor", "smartfrz-bse"],
        "Did you mean 'smartfrz-base'?",
    ),
    "tables without runs": (predictor_tables, ["run", "--runs", "{empty}"], "Found no recorded run (*.parquet)"),
    "rates without results": (
        rates,
        ["table", "--results", "{empty}/gone.jsonl"],
        "{empty}/gone.jsonl has no results of the tier 'cpu' with these settings. Measure them with: ",
    ),
    "load with an unknown predictor": (serving, ["--predictor", "smartfrz-bse"], "Did you mean 'smartfrz-base'?"),
}
WRONG_USAGE = {
    "unknown case": (
        keras_step,
        ["--cases", "nope"],
        "unknown: nope. Known: tensorflow/plain, tensorflow/jit, jax/plain",
    ),
    "unknown mode": (keras_step, ["--cases", "jax/fast"], "unknown: jax/fast. Known: "),
    "unknown network": (keras_step, ["--networks", "vgg"], "unknown: vgg. Known: mobilenetv2, resnet14."),
    "too few steps for a median": (keras_step, ["--steps", "2"], "argument --steps: 2; expected 3 or more"),
    "no job": (serving, ["--jobs", "0"], "argument --jobs: 0; expected 1 or more"),
    "no question": (serving, ["--rounds", "0"], "argument --rounds: 0; expected 1 or more"),
    "no layer": (serving, ["--layers", "0"], "argument --layers: 0; expected 1 or more"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    made = {name: tmp_path_factory.mktemp(name) for name in ("runs", "empty")}
    write_runs(made["runs"], pool=1024)
    return {name: str(folder) for name, folder in made.items()}


@pytest.mark.parametrize("case", REFUSED)
def test_an_error_is_one_message_and_a_failure(case, places):
    command, arguments, message = REFUSED[case]
    with pytest.raises(SystemExit) as stopped:
        command.main([argument.format(**places) for argument in arguments])
    assert message.format(**places) in stopped.value.code  # Python prints a text, and exits with 1


@pytest.mark.parametrize("case", WRONG_USAGE)
def test_wrong_usage(case, capsys):
    command, arguments, message = WRONG_USAGE[case]
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_without_any_backend_nothing_was_measured(monkeypatch, capsys):
    monkeypatch.setattr(keras_step.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="Nothing was measured: no backend of these cases is installed"):
        keras_step.main(["--cases", "torch/plain", "--networks", "resnet14"])
    printed = capsys.readouterr()
    assert "torch/plain is left out: torch is not installed" in printed.err
    assert printed.out == ""


def test_the_load_generator_loads_no_framework():
    code = "import sys, benchmarks.serving; print({'torch', 'keras', 'pandas'} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout == "set()\n"


def test_a_decision_is_explained_with_the_losses_that_it_was_made_with(loss_predictor_file):
    predictor, recorded = Predictor(loss_predictor_file, device="cpu"), recorded_run(pool=64)
    predictor.info = dataclasses.replace(predictor.info, threshold=0.01, record_fraction=1 / 30)
    decision = explain.decide(predictor, recorded)
    layer, now = recorded.layers.index(decision.layer), recorded.progress.tolist().index(decision.progress[-1])
    info = predictor.info
    options = TrainingOptions(window=info.window, tailored_size=info.tailored_size, min_records=info.min_records)
    (scores,) = score(predictor, labelled_runs([recorded], rule_of(info, [recorded]), 30), options)
    assert decision.confidence == pytest.approx(scores[layer, now], abs=1e-6)

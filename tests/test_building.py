import dataclasses
import hashlib
import json
from collections import Counter

import numpy as np
import pytest
import torch
from builder_fixtures import PLAN, RULE, SMALL, labelled, recorded_runs

from smartfrz.dataset_builder.building import Material, Plan, build_predictor, evaluate_predictor
from smartfrz.dataset_builder.cards import few_recordings, mean_quality
from smartfrz.dataset_builder.labelling import dataset_of
from smartfrz.predictor.runtime import Predictor
from smartfrz.predictor.training.baselines import Regression, score_weight_change
from smartfrz.predictor.training.judging import Quality, score

METHODS = ["predictor", "weight change", "weight change calibrated", "schedule", "logistic regression"]
DIGEST = hashlib.sha256(b"the recordings").hexdigest()
QUICK = dataclasses.replace(SMALL, epochs=1)


def build(path, recorded, options=QUICK, progress=lambda done, text: None, **changes):
    material = Material(recorded, labelled(recorded), DIGEST)
    return build_predictor(material, Plan(path.stem, RULE, options, **changes), path, progress)


@pytest.fixture(scope="module")
def recorded():
    return recorded_runs()


@pytest.fixture(scope="module")
def built(tmp_path_factory, recorded):
    """A predictor file, its card, and the progress that was reported."""
    path, seen = tmp_path_factory.mktemp("built") / "mine.onnx", []
    card = build(path, recorded, SMALL, progress=lambda done, text: seen.append((done, text)))
    return path, card, seen


def rows(table, first):
    """Rows of the first Markdown table whose header starts with `first`, header included."""
    lines = table.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[start], *lines[start + 2 : end])]


def test_the_file_says_how_it_was_made(built):
    info = Predictor(built[0]).info
    assert (info.name, info.window, info.tailored_size, info.representation) == ("mine", 8, 32, "trajectory+loss")
    assert info.record_fraction == pytest.approx(1 / 30)
    assert info.dataset_sha256 == DIGEST
    assert info.min_records == SMALL.min_records
    assert 0 < info.threshold < 1
    metrics = info.metrics
    assert metrics["label_rule"] == {"kind": "forward", "tolerance": 0.02, "records": 10}
    assert sorted(metrics["trained_on"] + metrics["validated_on"]) == sorted(PLAN)
    assert not set(metrics["trained_on"]) & set(metrics["validated_on"])
    assert sorted(metrics["leave_one_architecture_out"]) == ["cnn", "transformer"]
    json.dumps(metrics, allow_nan=False)


def test_the_file_answers_well_on_new_runs(built, recorded):
    new = labelled(recorded_runs({"new": "mlp"}, layers=9))
    (confidence,) = score(Predictor(built[0]), new, SMALL)
    known = np.isfinite(confidence)
    right = (confidence[known] >= 0.5) == new[0].labels[known]
    assert right.mean() > 0.85


def test_the_card_lies_beside_the_file(built):
    path, card, _ = built
    assert path.with_suffix(".md").read_text() == card
    assert sorted(p.name for p in path.parent.iterdir()) == ["mine.md", "mine.onnx"]
    assert "nan" not in card
    assert DIGEST in card


def test_the_card_shows_the_baseline_beside_the_predictor(built):
    header, *body = rows(built[1], "held out")
    assert header[1:3] == ["judged by", "AUC"]
    assert [row[:2] for row in body] == [
        [held_out, method] for held_out in ("cnn", "transformer", "mean") for method in METHODS
    ]
    for column in range(2, len(header)):
        for method in range(len(METHODS)):
            values = [float(row[column]) for row in body[method :: len(METHODS)]]
            assert values[2] == pytest.approx((values[0] + values[1]) / 2, abs=2e-3)
    _, *validated = rows(built[1], "runs")
    assert [row[1] for row in validated] == METHODS


def test_the_card_tells_of_data_sets_that_were_held_out(built):
    path, card, _ = built
    section = card[card.index("## A data set that it never saw") :]
    _, *body = rows(section, "held out")
    assert [row[0] for row in body] == [name for name in ("data_a", "data_b", "mean") for _ in METHODS]
    assert list(Predictor(path).info.metrics["leave_one_dataset_out"]) == ["data_a", "data_b"]


def test_the_card_shows_how_sure_to_be_of_a_confidence(built):
    path, card, _ = built
    errors = Predictor(path).info.metrics["calibration_error"]
    assert list(errors) == ["architecture", "dataset"]
    for group, title in (("architecture", "## An architecture"), ("dataset", "## A data set")):
        header, *body = rows(card[card.index(title) :], "confidence")
        assert header[1:] == METHODS
        assert [row[0] for row in body] == [f"{k / 10:.1f} to {(k + 1) / 10:.1f}" for k in range(10)] + [
            "expected calibration error"
        ]
        assert [float(cell) for cell in body[-1][1:]] == pytest.approx(
            [errors[group][method.replace(" ", "_")] for method in METHODS], abs=1e-3
        )
        for column in range(1, 5):
            counts = [int(row[column].split("(")[1].strip(")").replace(",", "")) for row in body[:-1] if row[column]]
            # the windows of all runs, of three seeds
            assert sum(counts) == 3 * sum((run.labels >= 0)[:, 3:].sum() for run in labelled(recorded_runs()))


def test_the_card_lists_the_recordings(built):
    metrics = Predictor(built[0]).info.metrics
    _, *body = rows(built[1], "run")
    assert [row[:5] for row in body] == [[name, kind, "6", "30", "0.900, 0.890"] for name, kind in PLAN.items()]
    assert {row[0] for row in body if row[5] == "training"} == set(metrics["trained_on"])
    assert {row[0] for row in body if row[5] == "validation"} == set(metrics["validated_on"])


def test_the_threshold_keeps_its_promise_on_the_validation_runs(built):
    assert Predictor(built[0]).info.metrics["validation"]["predictor"]["precision"] >= 0.85


def test_progress_rises_to_one(built):
    done = [fraction for fraction, _ in built[2]]
    assert done == sorted(done)
    assert done[-1] == pytest.approx(1.0)
    phases = [text.split(":")[0] for _, text in built[2]]
    assert list(Counter(phases)) == ["without cnn", "without transformer", "without data_a", "without data_b", "final"]


def test_the_same_seed_gives_the_same_file(tmp_path, recorded):
    first, second = tmp_path / "a" / "p.onnx", tmp_path / "b" / "p.onnx"
    card = build(first, recorded, cross_validate=False)
    torch.manual_seed(99)  # whatever came before
    build(second, recorded, cross_validate=False)
    assert first.read_bytes() == second.read_bytes()
    assert card == first.with_suffix(".md").read_text() == second.with_suffix(".md").read_text()
    # and without cross-validation neither promises anything about it
    assert "never saw" not in card
    assert Predictor(first).info.metrics["leave_one_architecture_out"] == {}


def test_runs_of_one_architecture_cannot_be_cross_validated(tmp_path):
    runs = recorded_runs({"a": "cnn", "b": "cnn"})
    with pytest.raises(ValueError, match="Holding out an architecture needs at least two"):
        build(tmp_path / "p.onnx", runs)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("architectures", "few"),
    [
        (["cnn"] * 2, "2 of cnn"),
        (["cnn"] * 4, "4 of cnn"),  # a family
        (["cnn", "cnn", "cnn", "transformer"], "4 of cnn, transformer"),
        (["cnn", "mlp", "transformer"], "3 of cnn, mlp, transformer"),
        (["cnn", "cnn", "transformer", "transformer"], ""),
    ],
)
def test_few_recordings_are_told(architectures, few):
    told = few_recordings(architectures)
    assert f"was made from few recordings: {few}. " in told if few else told == ""


def test_a_predictor_of_few_recordings_says_so_in_its_card(tmp_path, built):
    plan = {"cnn-a": "cnn", "cnn-b": "cnn"}
    card = build(tmp_path / "few.onnx", recorded_runs(plan), cross_validate=False)
    assert f"**{few_recordings(['cnn', 'cnn'])}**" in card.splitlines()
    assert "few recordings" not in built[1]


def test_labels_of_one_kind_are_refused_before_anything_is_trained(tmp_path, recorded):
    seen = []
    material = Material(recorded, labelled(recorded), DIGEST)
    same = [dataclasses.replace(run, labels=np.zeros_like(run.labels)) for run in material.runs]
    # The data set b cannot be held out: without it the runs of one label remain.
    some = [run if run.dataset == "data_b" else other for run, other in zip(material.runs, same, strict=True)]
    for runs, message in ((same, "No validation run has both labels"), (some, "Nothing can be trained without the ")):
        with pytest.raises(ValueError, match=message):
            build_predictor(
                dataclasses.replace(material, runs=runs),
                Plan("mine", RULE, QUICK),
                tmp_path / "mine.onnx",
                lambda done, text: seen.append(text),
            )
    assert seen == []
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_keeps_the_file_that_was_there(tmp_path, recorded, monkeypatch):
    from smartfrz.predictor.training import export

    path = tmp_path / "p.onnx"
    path.write_bytes(b"the older predictor")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "serialise", lambda model, info: b"the newer predictor")
    monkeypatch.setattr(export, "seal", full_disk)
    with pytest.raises(OSError, match="No space left"):
        build(path, recorded, dataclasses.replace(QUICK, steps_per_epoch=2), cross_validate=False)
    assert [p.name for p in tmp_path.iterdir()] == ["p.onnx"]
    assert path.read_bytes() == b"the older predictor"


def test_evaluation_marks_the_runs_that_the_predictor_knows(built, recorded):
    predictor = Predictor(built[0])
    metrics = predictor.info.metrics
    _, *body = rows(evaluate_predictor(predictor, labelled([*recorded, *recorded_runs({"new": "mlp"})])), "run")
    marks = {row[0].split(" ")[0]: row[0].partition(" ")[2] for row in body}
    assert marks == (
        {name: "(trained on)" for name in metrics["trained_on"]}
        | {name: "(validated on)" for name in metrics["validated_on"]}
        | {"new": "(held out)"}
    )
    assert [row[1] for row in body] == ["predictor", "weight change", "logistic regression"] * 5


def test_evaluation_uses_the_stored_thresholds(built):
    predictor, runs = Predictor(built[0]), labelled(recorded_runs({"new": "mlp"}))
    table = evaluate_predictor(predictor, runs)
    header, model, baseline, regression = rows(table, "run")
    assert "of the 1 runs that are held out" in table
    assert rows(table, "confidence")[0][1:] == ["predictor", "weight change", "logistic regression"]
    known, fitted = runs[0].labels >= 0, predictor.info.metrics["logistic_regression"]
    for row, values, threshold in (
        (model, score(predictor, runs, SMALL)[0], predictor.info.threshold),
        (baseline, score_weight_change(runs, SMALL)[0], predictor.info.metrics["weight_change_threshold"]),
        (regression, Regression.from_dict(fitted).score(runs, SMALL)[0], fitted["threshold"]),
    ):
        decided = known & np.isfinite(values)
        accuracy = ((values >= threshold) == runs[0].labels)[decided].mean()
        assert float(row[header.index("accuracy")]) == pytest.approx(accuracy, abs=1e-3)


def test_means_leave_out_what_is_undefined():
    nan = float("nan")
    one = Quality(0.5, 0.5, 0.6, nan, 0.4, 0.3, nan, 0.1)
    other = Quality(0.7, 0.9, 0.8, 0.9, 0.6, 0.5, nan, 0.3)
    mean = mean_quality([one, other])
    assert dataclasses.astuple(mean) == pytest.approx((0.6, 0.7, 0.7, 0.9, 0.5, 0.4, nan, 0.2), nan_ok=True)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"source": "recipe_data:cifar10", "arguments": {"num_train": 5}}, "cifar10"),
        ({"source": "mine:photos", "arguments": {"name": "clothing"}}, "photos clothing"),
        ({"folder": "pictures/birds", "source": "", "arguments": {}}, "pictures/birds"),
        ({}, "unknown"),
    ],
)
def test_the_data_set_of_a_recording(data, name):
    assert dataset_of({"recipe": {"data": data}}) == name

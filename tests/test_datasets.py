import dataclasses
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builder_fixtures import PLAN, RULE, SMALL, invoke, recorded_run, recorded_runs, write_runs

from smartfrz import zoo
from smartfrz.dataset_builder.cli import main
from smartfrz.dataset_builder.datasets import (
    PathOptions,
    is_dataset,
    read_dataset,
    read_together,
    with_paths,
    write_dataset,
)
from smartfrz.dataset_builder.labelling import labelled_runs
from smartfrz.dataset_builder.storage import write_run
from smartfrz.errors import DatasetFormatError
from smartfrz.predictor.runtime import Predictor
from smartfrz.predictor.training.baselines import compute_statistics, score_weight_change
from smartfrz.predictor.training.fit import fit
from smartfrz.predictor.training.judging import score
from smartfrz.predictor.training.model import FIGURES, describe_path, real_rows, trajectory
from smartfrz.predictor.training.paths import make_paths, spread_samples

OPTIONS = PathOptions(records=30, tailored_size=32, draws=2)
SIZES = ("--tailored-size", 32, "--window", 8, "--epochs", 1)


def walk(layers=3, records=12, pool=48, seed=0):
    """Weights whose steps span five decades, with a layer that stands still and one that never moves at first."""
    rng = np.random.default_rng(seed)
    sizes = np.logspace(0, -5, records)[None, :, None]
    weights = rng.normal(size=(layers, 1, pool)) + (rng.normal(size=(layers, records, pool)) * sizes).cumsum(1)
    weights[1] = weights[1, :1]
    weights[2, :4] = weights[2, :1]
    return weights.astype(np.float32)


def figures_of_both(weights, paths, now, window, tailored_size=32):
    """`FIGURES` from weights and from paths, of the same draw and window."""
    rows = slice(max(0, now + 1 - window), now + 1)
    chosen = np.ascontiguousarray(weights[:, rows][:, :, spread_samples(weights.shape[2], tailored_size)])
    history = torch.from_numpy(chosen)
    real = real_rows(history, torch.full((len(weights),), history.shape[1]))
    moved, evenness = (
        torch.from_numpy(np.ascontiguousarray(x)) for x in (paths.moved[0, :, rows], paths.evenness[0, :, now, rows])
    )
    return trajectory(history, real), describe_path(torch.from_numpy(paths.start[0]), moved, evenness, real)


@pytest.mark.parametrize("window", [4, 12])
@pytest.mark.parametrize("now", [3, 7, 11])
def test_paths_give_the_figures_that_the_graph_computes(now, window):
    weights = walk()
    graph, paths = figures_of_both(weights, make_paths(weights, 32, 2, seed=0).unpack(), now, window)
    # Angles of steps so small that weights in float32 hardly show them are the least exact.
    for place, name in enumerate(FIGURES):
        torch.testing.assert_close(
            paths[..., place], graph[..., place], rtol=0, atol=5e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_fewer_records_of_a_path_are_the_path_of_fewer_records():
    weights = walk()
    thinned = make_paths(weights, 32, 1, seed=0).unpack().thinned(3)
    graph, paths = figures_of_both(weights[:, 2::3], thinned, 3, 4)
    torch.testing.assert_close(paths, graph, rtol=0, atol=5e-3)


@pytest.fixture
def both():
    """The same runs with weights and with paths; the pool is one draw."""
    runs = recorded_runs(pool=32)
    return labelled_runs(runs, RULE, 30), labelled_runs([with_paths(run, OPTIONS) for run in runs], RULE, 30)


def test_training_on_paths_is_training_on_weights(both):
    options = dataclasses.replace(SMALL, steps_per_epoch=8, epochs=2)
    said, networks = [], []
    for runs in both:
        told = []
        networks.append(fit(runs[1:], runs[:1], options, lambda done, text, told=told: told.append(text)))
        said.append([float(text.split()[1].strip(",")) for text in told])
    again = fit(both[1][1:], both[1][:1], options).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in networks[1].state_dict().items())
    assert len(said[0]) == 16
    assert said[0][-1] < said[0][0]
    np.testing.assert_allclose(said[1], said[0], rtol=0, atol=2e-3)
    weights, paths = (score(network, runs, options)[0] for network, runs in zip(networks, both, strict=True))
    np.testing.assert_allclose(paths, weights, rtol=0, atol=5e-3)


def test_baselines_see_the_same_changes(both):
    weights, paths = (score_weight_change(runs, SMALL)[2] for runs in both)
    np.testing.assert_allclose(paths, weights, rtol=0, atol=1e-3)
    weights, paths = (compute_statistics(runs[2], 8) for runs in both)
    np.testing.assert_allclose(paths, weights, rtol=0, atol=2e-3)


def test_a_representation_that_reads_weights_is_refused(both):
    with pytest.raises(
        DatasetFormatError, match=r"Of run 'cnn-b' .* paths only, but the representation 'raw' reads the we"
    ):
        fit(both[1][1:], both[1][:1], dataclasses.replace(SMALL, representation="raw"))


def test_paths_of_another_size_are_refused(both):
    with pytest.raises(DatasetFormatError, match=r"'cnn-b' are of 32 weights; expected 16, .* Use the recordings"):
        fit(both[1][1:], both[1][:1], dataclasses.replace(SMALL, tailored_size=16))


def test_weights_and_paths_are_not_mixed(both):
    with pytest.raises(ValueError, match=r"weights of run 'cnn-a' and paths of run 'vit-b'; expected the same"):
        fit(both[1][1:], both[0][:1], SMALL)


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "small.parquet"
    write_dataset(path, [with_paths(run, OPTIONS) for run in recorded_runs(layers=3)], OPTIONS)
    return path


def test_a_dataset_survives_a_round_trip(written):
    runs, options = read_dataset(written)
    assert options == OPTIONS
    assert is_dataset(written)
    for run, original in zip(runs, recorded_runs(layers=3), strict=True):
        expected = with_paths(original, OPTIONS)
        assert run.name == original.name
        assert run.layers == original.layers
        assert run.facts["recipe"] == original.facts["recipe"]
        for name in ("step", "progress", "loss", "learning_rate", "cka"):
            np.testing.assert_array_equal(getattr(run, name), getattr(original, name), strict=True)
        for name in ("scale", "steps", "evenness"):
            ours, wanted = getattr(run.require_paths(), name), getattr(expected.require_paths(), name)
            np.testing.assert_array_equal(ours, wanted, strict=True)


def test_the_same_recordings_give_the_same_bytes(written, tmp_path):
    other = tmp_path / "other.parquet"
    write_dataset(other, [with_paths(run, OPTIONS) for run in reversed(recorded_runs(layers=3))], OPTIONS)
    assert other.read_bytes() == written.read_bytes()


def rewrite(path, change=lambda table: table, facts=None):
    """The file again, with other columns or facts; the checksum stays."""
    table, metadata = pq.read_table(path), pq.ParquetFile(path).metadata.metadata
    said = json.loads(metadata[b"smartfrz.dataset"]) | (facts or {})
    with pq.ParquetWriter(path, change(table).schema, store_schema=False) as writer:
        writer.write_table(change(table))
        writer.add_key_value_metadata(
            {b"smartfrz.dataset": json.dumps(said), b"smartfrz.sha256": metadata[b"smartfrz.sha256"]}
        )


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused(written, version):
    rewrite(written, facts={"format_version": version})
    with pytest.raises(DatasetFormatError, match=rf"format_version {version!r}; this version reads 1\. Make it again"):
        read_dataset(written)


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.99])
def test_a_dataset_cut_short_is_refused(written, keep):
    content = written.read_bytes()
    written.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(DatasetFormatError, match=r"not a complete Parquet file .*Make it again"):
        read_dataset(written)


def test_a_changed_value_is_refused(written):
    rewrite(written)
    read_dataset(written)
    rewrite(
        written,
        lambda table: table.set_column(
            table.schema.get_field_index("loss"), "loss", pa.array(table["loss"].to_numpy() + 1)
        ),
    )
    with pytest.raises(DatasetFormatError, match="was changed after it was made"):
        read_dataset(written)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"draws": 0}, "its draws is 0; expected an integer from 1"),
        ({"records": True}, "its records is True"),
        ({"runs": []}, r"its runs are \[\]; expected a list of tables"),
        ({"runs": [{"name": "../up"}]}, r"in run 0, its name is '\.\./up'; expected text that a file can be called by"),
        ({"seed": 5}, "was changed after it was made"),
    ],
)
def test_changed_facts_are_refused(written, facts, message):
    rewrite(written, facts=facts)
    with pytest.raises(DatasetFormatError, match=message):
        read_dataset(written)


def test_a_small_file_that_would_need_much_memory_is_refused(written):
    schema, metadata = pq.read_schema(written), pq.ParquetFile(written).metadata.metadata
    empty = pa.table({field.name: pa.nulls(4_000_000, field.type) for field in schema})
    with pq.ParquetWriter(written, schema, store_schema=False) as writer:
        writer.write_table(empty)
        writer.add_key_value_metadata(metadata)
    assert written.stat().st_size < 2**20
    with pytest.raises(DatasetFormatError, match=r"it would take .* bytes, and the file has"):
        read_dataset(written)


def test_a_recording_is_no_dataset_and_a_dataset_no_recording(written, tmp_path):
    from smartfrz.dataset_builder.storage import read_run

    write_runs(tmp_path / "runs", {"a": "cnn"})
    recording = tmp_path / "runs" / "a.parquet"
    assert not is_dataset(recording)
    with pytest.raises(DatasetFormatError, match="is a Parquet file, but no dataset"):
        read_dataset(recording)
    with pytest.raises(DatasetFormatError, match="no recorded run: it lacks"):
        read_run(written)


# The commands


def make(folder, *arguments, plan=PLAN, **options):
    """A dataset by command, of made-up recordings."""
    runs = write_runs(folder / "runs", plan, **options)
    result = invoke(main, "dataset", runs, "-o", folder / "made.parquet", "--tailored-size", 32, *arguments)
    return result, folder / "made.parquet"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    (folder / "runs").mkdir()
    notes = folder / "notes.md"
    notes.write_text("## Licences\n\nMade up.\n")
    result, path = make(folder, "--notes", notes)
    assert result.exit_code == 0, result.output
    return path, result


def train(output, *sources, options=SIZES):
    return invoke(main, "train", *sources, "-o", output, "--no-cross-validate", *options)


def test_the_command_tells_which_recordings_have_no_costs(made):
    assert "4 of them have no costs of freezing: cnn-a, cnn-b, vit-a, vit-b." in " ".join(made[1].output.split())


def test_the_card_of_a_dataset_tells_what_it_holds(made):
    card = made[0].with_suffix(".md").read_text()
    assert card.startswith("# made.parquet\n\n4 recorded training runs, 24 layers together")
    assert "| vit-a | transformer | unknown | data_a | 6 | 30 | 0.900, 0.890 | no |" in card
    assert card.endswith("## Licences\n\nMade up.\n")


def test_the_example_in_the_card_gives_the_distances_of_the_recording(made, monkeypatch):
    path = made[0]
    monkeypatch.chdir(path.parent)
    known = {}
    exec(path.with_suffix(".md").read_text().split("```python")[1].split("```")[0], known)
    weights = recorded_run("cnn-a", "cnn", seed=0).weights[0][:, spread_samples(48, 32)]
    np.testing.assert_allclose(known["distance"], np.sqrt(((weights[-1] - weights) ** 2).mean(1)), rtol=1e-3, atol=1e-6)
    assert (known["run"], known["layer"]) == ("cnn-a", "layer0")
    assert known["costs"] == dict.fromkeys(PLAN)


def test_a_predictor_trained_from_a_dataset_reads_weights(made, tmp_path):
    options = ("--tailored-size", 32, "--window", 8, "--epochs", 2, "--learning-rate", 2e-3)
    result = train(tmp_path / "my.onnx", made[0], options=options)
    assert result.exit_code == 0, result.output
    predictor = Predictor(tmp_path / "my.onnx", device="cpu")
    assert sorted(predictor.info.metrics["trained_on"] + predictor.info.metrics["validated_on"]) == sorted(PLAN)
    held_out = labelled_runs([recorded_run("new", "mlp", seed=100)], RULE, 30)
    (confidence,) = score(predictor, held_out, SMALL)
    known = np.isfinite(confidence)
    assert ((confidence[known] >= 0.5) == held_out[0].labels[known]).mean() > 0.8
    shown = invoke(main, "evaluate", predictor.path, made[0])
    assert shown.exit_code == 0, shown.output
    weights, paths = (
        score(predictor, labelled_runs(runs, RULE, 30), SMALL)[0]
        for runs in (recorded_runs(), read_dataset(made[0])[0])
    )
    np.testing.assert_allclose(paths, weights, rtol=0, atol=2e-3)


def test_own_recordings_are_added_to_a_dataset(made, tmp_path):
    write_run(tmp_path / "mlp-a.parquet", recorded_run("mlp-a", "mlp", seed=9))
    runs = read_together([made[0], tmp_path / "mlp-a.parquet"])
    assert [run.name for run in runs] == [*PLAN, "mlp-a"]
    assert {(run.require_paths().tailored_size, run.require_paths().scale.shape) for run in runs} == {(32, (3, 6, 30))}
    (alone,) = read_together([tmp_path / "mlp-a.parquet"])
    assert alone.paths is None


def test_a_recording_that_the_dataset_has_is_refused(made, tmp_path):
    result = train(tmp_path / "my.onnx", made[0], made[0].parent / "runs")
    assert "Two recordings are called 'cnn-a'; expected different names" in " ".join(result.output.split())
    (tmp_path / "own").mkdir()
    (run,) = recorded_runs({"cnn-a": "cnn"})
    run.facts["name"] = "renamed"
    write_run(tmp_path / "own" / "renamed.parquet", run)
    result = train(tmp_path / "my.onnx", made[0], tmp_path / "own")
    assert "The recordings 'cnn-a' and 'renamed' have the same values" in " ".join(result.output.split())
    assert not (tmp_path / "my.onnx").exists()


def test_recordings_that_are_there_twice_are_refused_without_a_dataset_too(tmp_path):
    runs, copies = write_runs(tmp_path / "runs"), tmp_path / "copies"
    copies.mkdir()
    shutil.copy(runs / "cnn-a.parquet", copies / "another-name.parquet")
    for command, *more in ("train", "-o", tmp_path / "my.onnx"), ("evaluate",):
        places = (runs, copies) if command == "train" else (runs,)
        if command == "evaluate":
            shutil.copy(copies / "another-name.parquet", runs)
            places = (zoo.embedded_folder() / "smartfrz-base.onnx", runs)
        result = invoke(main, command, *places, *more)
        assert "Two recordings are called 'cnn-a'; expected different names" in " ".join(result.output.split())
        assert result.exit_code == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((*SIZES, "--representation", "raw"), "the representation 'raw' reads the weights. Use the recordings"),
        (("--window", 8), "are of 32 weights; expected 1024, the tailored size"),
    ],
)
def test_what_a_dataset_cannot_train_is_refused(made, tmp_path, options, message):
    result = train(tmp_path / "my.onnx", made[0], options=options)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_more_records_than_a_dataset_has_are_refused(tmp_path):
    (tmp_path / "runs").mkdir()
    _, path = make(tmp_path, "--records", 10)
    assert labelled_runs(read_dataset(path)[0], RULE, 5)[0].paths.moved.shape[2] == 5
    result = train(tmp_path / "my.onnx", path)
    assert (
        "keeps one in 3 of the 30 timestamps of 'cnn-a', but 30 records a run need one in 1. Choose other --records"
        in " ".join(result.output.split())
    )


def test_a_dataset_is_not_written_among_the_recordings(tmp_path):
    runs = write_runs(tmp_path, {"a": "cnn"})
    result = invoke(main, "dataset", runs, "-o", runs / "made.parquet", "--tailored-size", 32)
    assert "lies among the recordings" in " ".join(result.output.split())
    assert [path.name for path in runs.iterdir()] == ["a.parquet"]


def test_recordings_with_too_small_a_pool_are_refused(tmp_path):
    (tmp_path / "runs").mkdir()
    result, path = make(tmp_path, plan={"a": "cnn"}, pool=20)
    assert "'a' cannot be used: The pool has 20 weights a layer, which is less than tailored_size=32" in " ".join(
        result.output.split()
    )
    assert not path.exists()

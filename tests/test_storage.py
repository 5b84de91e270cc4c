import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builder_fixtures import recorded_run

from smartfrz.dataset_builder.storage import RecordedRun, read_run, run_files, write_run
from smartfrz.errors import DatasetFormatError

ARRAYS = ("step", "progress", "loss", "learning_rate", "cka", "weights")
# float32 values that a detour over text, float16 or a fixed precision would lose
AWKWARD = np.array([0.1, 1e-45, -3.4e38, 1.0000001, -0.0, np.pi, 6e-8, np.nan, np.inf], np.float32)


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "cnn-a.parquet"
    write_run(path, recorded_run())
    return path


def rewrite(path, change):
    """The file again, with other columns or metadata."""
    pq.write_table(change(pq.read_table(path)), path)


def with_facts(**facts):
    def change(table):
        saved = json.loads(table.schema.metadata[b"smartfrz.run"])
        return table.replace_schema_metadata({b"smartfrz.run": json.dumps(saved | facts).encode()})

    return change


def test_a_run_survives_a_round_trip(written):
    before, after = recorded_run(), read_run(written)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name), err_msg=name, strict=True)
    assert after.layers == before.layers
    assert (after.name, after.architecture) == ("cnn-a", "cnn")
    assert before.facts.items() <= after.facts.items()
    assert after.facts["format_version"] == 1


def test_weights_and_cka_are_exact_to_the_bit(tmp_path):
    weights = np.tile(AWKWARD, (2, 4, 1))
    cka = np.array([[0.1, np.nan, 1 / 3, 1.0], [np.nan] * 4])
    run = dataclasses.replace(
        recorded_run(layers=2, timestamps=14), weights=weights, cka=cka, **{name: np.arange(4.0) for name in ARRAYS[:4]}
    )
    write_run(tmp_path / "run.parquet", run)
    after = read_run(tmp_path / "run.parquet")
    assert after.weights.tobytes() == weights.tobytes()
    np.testing.assert_array_equal(after.cka, cka, strict=True)


def test_layers_keep_their_execution_order(tmp_path):
    run = dataclasses.replace(recorded_run(), layers=["stem", "b.10", "b.9", "a", "head", "b.9.x"])
    write_run(tmp_path / "run.parquet", run)
    after = read_run(tmp_path / "run.parquet")
    assert after.layers == run.layers
    np.testing.assert_array_equal(after.weights, run.weights)


def test_a_row_says_which_layer_and_timestamp_it_is(written):
    run, row = recorded_run(), pq.read_table(written).to_pylist()[30 + 3]
    assert (row["layer"], row["timestamp"], row["step"]) == ("layer1", 3, 40)
    assert row["cka"] == run.cka[1, 3]
    assert row["weights"] == run.weights[1, 3].tolist()


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.99])
def test_a_file_cut_short_is_refused(written, keep):
    content = written.read_bytes()
    written.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(
        DatasetFormatError, match=r"cnn-a\.parquet' is not a complete Parquet file .*Record the run again"
    ):
        read_run(written)


def test_a_file_overwritten_in_the_middle_is_refused(written):
    content = bytearray(written.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = bytes(2000)
    written.write_bytes(content)
    with pytest.raises(DatasetFormatError, match="Record the run again"):
        read_run(written)


def test_a_foreign_parquet_file_is_refused(tmp_path):
    path = tmp_path / "prices.parquet"
    pq.write_table(pa.table({"price": [1.0, 2.0], "step": [1, 2]}), path)
    with pytest.raises(
        DatasetFormatError, match=r"no recorded run: it lacks \['layer', .*Pass files that smartfrz-build"
    ):
        read_run(path)


def test_columns_without_the_run_facts_are_refused(written):
    rewrite(written, lambda table: table.replace_schema_metadata(None))
    with pytest.raises(DatasetFormatError, match="no recorded run: it lacks the run facts"):
        read_run(written)


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    path = tmp_path / "notes.parquet"
    path.write_text("not a table")
    with pytest.raises(DatasetFormatError, match="not a complete Parquet file"):
        read_run(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        DatasetFormatError, match=r"No recorded run at .*gone\.parquet'\. Make one with: smartfrz-build rec"
    ):
        read_run(tmp_path / "gone.parquet")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_is_refused(written, version):
    rewrite(written, with_facts(format_version=version))
    with pytest.raises(
        DatasetFormatError, match=rf"format_version {version!r}; this version reads 1\. Record the run ag"
    ):
        read_run(written)


def test_missing_rows_are_noticed(written):
    rewrite(written, lambda table: table.slice(0, table.num_rows - 1))
    with pytest.raises(DatasetFormatError, match=r"has 179 rows for 6 layers\. Record the run again"):
        read_run(written)


def test_no_rows_are_noticed(written):
    rewrite(written, lambda table: table.slice(0, 0))
    with pytest.raises(DatasetFormatError, match=r"has 0 rows for 6 layers"):
        read_run(written)


def test_run_files_are_sorted_and_leave_out_temporaries(written):
    for name in (".cnn-b-x1y2.parquet", "cnn-b.reference.safetensors", "notes.txt"):
        (written.parent / name).write_bytes(b"half-writ")
    other = written.parent / "a-first.parquet"
    write_run(other, recorded_run("a-first"))
    assert run_files(written.parent) == [other, written]


@pytest.mark.parametrize("folder", ["empty", "missing"])
def test_a_folder_without_runs_is_refused(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DatasetFormatError, match=r"Found no recorded run \(\*\.parquet\) in .* smartfrz-build record REC"
    ):
        run_files(tmp_path / folder)


@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_write_leaves_everything_as_it_was(tmp_path, monkeypatch, existing):
    path = tmp_path / "cnn-a.parquet"
    if existing:
        write_run(path, recorded_run())
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full_disk(table, where, **options):
        where.write_bytes(b"PAR1 and no more")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_run(path, recorded_run(seed=1))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_the_folder_is_made(tmp_path):
    write_run(tmp_path / "new" / "folder" / "run.parquet", recorded_run())
    assert isinstance(read_run(tmp_path / "new" / "folder" / "run.parquet"), RecordedRun)


def test_writing_leaves_the_run_as_it_is(tmp_path):
    run = recorded_run()
    facts = json.dumps(run.facts)
    write_run(tmp_path / "run.parquet", run)
    assert json.dumps(run.facts) == facts

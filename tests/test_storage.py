import dataclasses
import json
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builder_fixtures import recorded_run
from hypothesis import given, settings
from hypothesis import strategies as st

from smartfrz.dataset_builder.labelling import labelled_runs
from smartfrz.dataset_builder.labels import LabelRule
from smartfrz.dataset_builder.storage import RecordedRun, read_run, run_files, write_run
from smartfrz.errors import DatasetFormatError

ARRAYS = ("step", "progress", "loss", "learning_rate", "cka", "weights")
# float32 values that a detour over text, float16 or a fixed precision would lose
AWKWARD = np.array([0.1, 1e-45, -3.4e38, 1.0000001, -0.0, np.pi, 6e-8], np.float32)

_LEAVES = st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=4)
JSON = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["records", "source", "folder", "arguments", "name"]), inner, max_size=3)
    ),
    max_leaves=4,
)


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
    series = {name: np.arange(1, 5) / 4 for name in ARRAYS[1:4]}
    run = dataclasses.replace(
        recorded_run(layers=2, timestamps=14), weights=weights, cka=cka, step=np.arange(1, 5), **series
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


@pytest.mark.parametrize("order", ["reversed", "by timestamp", "shuffled"])
def test_rows_in_another_order_give_the_same_run(written, order):
    before = read_run(written)
    timestamps = pq.read_table(written)["timestamp"].to_numpy()
    rows = {
        "reversed": np.arange(len(timestamps))[::-1],
        "by timestamp": np.argsort(timestamps, kind="stable"),
        "shuffled": np.random.default_rng(0).permutation(len(timestamps)),
    }
    rewrite(written, lambda table: table.take(rows[order]))
    after = read_run(written)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name), err_msg=name, strict=True)
    assert (after.layers, after.facts) == (before.layers, before.facts)


# what is changed, how the table changes, part of the message
CHANGED_ROWS = {
    "all twice": (
        lambda t: pa.concat_tables([t, t]),
        r"rows of layer 'layer0' are not one for each timestamp from 0 to 59",
    ),
    "one lost, another twice": (
        lambda t: t.take([0, *range(t.num_rows - 1)]),
        r"rows of layer 'layer\d' are not one for each timestamp from 0 to 29",
    ),
    "one layer's name": (
        lambda t: with_column(t, "layer", ["other", *t["layer"].to_pylist()[1:]]),
        r"rows of layer 'other', which is none of its layers",
    ),
    "a negative timestamp": (
        lambda t: with_column(t, "timestamp", [-1, *t["timestamp"].to_pylist()[1:]]),
        r"rows of layer 'layer0' are not one for each timestamp",
    ),
    "a step of one layer": (
        lambda t: with_column(t, "step", [*t["step"].to_pylist()[:-1], 301]),
        r"its layers differ in step at the same timestamp",
    ),
    "a value": (lambda t: with_column(t, "cka", [0.5, *t["cka"].to_pylist()[1:]]), r"changed after it was recorded"),
    "values as text": (
        lambda t: t.set_column(t.column_names.index("cka"), "cka", t["cka"].cast(pa.string())),
        r"its column cka is string; expected double",
    ),
    "whole numbers as fractions": (
        lambda t: t.set_column(t.column_names.index("step"), "step", t["step"].cast(pa.float64())),
        r"its column step is double; expected int64",
    ),
    "lists of any size": (
        lambda t: t.set_column(t.column_names.index("weights"), "weights", t["weights"].cast(pa.list_(pa.float32()))),
        r"its column weights is list<.*; expected a list of float32 of one size",
    ),
    "a missing value": (
        lambda t: with_column(t, "loss", [None, *t["loss"].to_pylist()[1:]]),
        r"its column loss has missing values",
    ),
    "two columns of one name": (
        lambda t: t.append_column("loss", t["loss"]),
        r"several columns are named loss",
    ),
}


def with_column(table, name, values):
    index = table.column_names.index(name)
    kind = pa.string() if name == "layer" else table.schema.field(name).type
    return table.set_column(index, name, pa.array(values, kind))


@pytest.mark.parametrize("case", CHANGED_ROWS)
def test_changed_rows_are_refused(written, case):
    change, message = CHANGED_ROWS[case]
    rewrite(written, lambda table: change(table).replace_schema_metadata(table.schema.metadata))
    with pytest.raises(DatasetFormatError, match=rf"{message}.*Record the run again"):
        read_run(written)


def with_one(value):
    weights = recorded_run().weights
    weights[2, 3, 4] = value
    return weights


# what is written, what of the run changes, part of the message
WRONG_RUNS = {
    "steps that go back": ({"step": np.arange(30)[::-1] + 1}, "steps do not increase"),
    "step 0": ({"step": np.arange(30)}, "steps do not increase from 1"),
    "progress beyond the end": ({"progress": np.linspace(0.1, 1.1, 30)}, r"progress does not increase within \(0, 1\]"),
    "progress that is no number": ({"progress": np.full(30, np.nan)}, "progress does not increase"),
    "loss without a value": ({"loss": np.full(30, np.inf)}, "losses are not finite"),
    "negative learning rates": ({"learning_rate": np.full(30, -0.1)}, "learning rates are not numbers from 0 on"),
    "CKA above 1": ({"cka": np.full((6, 30), 1.5)}, r"CKA is not within \[0, 1\]"),
    "weights that are no numbers": (
        {"weights": with_one(np.nan)},
        r"weights are not finite: weights\[2, 3, 4\] is nan",
    ),
    "weights without bounds": ({"weights": with_one(-np.inf)}, r"weights are not finite: weights\[2, 3, 4\] is -inf"),
    "CKA below 0": ({"cka": np.full((6, 30), -1e-9)}, r"CKA is not within \[0, 1\]: cka\[0, 0\] is -1e-09"),
    "losses that are no numbers": ({"loss": np.full(30, np.nan)}, r"losses are not finite: loss\[0\] is nan"),
    "learning rates without bounds": ({"learning_rate": np.full(30, np.inf)}, r"learning_rate\[0\] is inf"),
    "steps beyond any run": (
        {"step": 2**62 + np.arange(30)},
        r"progress does not fit its steps: it ends with 1\.0 at step 4611686018427387933",
    ),
    "steps that wrap around": ({"step": np.array([1, *range(-(2**63), -(2**63) + 29)])}, "steps do not increase"),
    "steps that are not even": (
        {"step": np.array([5, *range(20, 310, 10)]), "progress": np.array([5, *range(20, 310, 10)]) / 300},
        "30 timestamps from step 5 to 300 of 300; expected 30, one each 10 steps, as its recipe asks for 30 records",
    ),
    "fractions of other steps": ({"progress": np.linspace(0.5, 1, 30)}, "progress does not fit its steps"),
    "hardly any progress": ({"progress": np.arange(1, 31) * 5e-324}, "progress does not fit its steps"),
    "a part of a run": ({"progress": np.arange(1, 31) / 40}, "30 timestamps from step 10 to 300 of 400; expected 30, "),
    "two layers of one name": ({"layers": ["a"] * 6}, "two of its layers have the same name"),
}


@pytest.mark.parametrize("case", WRONG_RUNS)
def test_values_that_no_training_gives_are_refused(tmp_path, case):
    values, message = WRONG_RUNS[case]
    write_run(tmp_path / "run.parquet", dataclasses.replace(recorded_run(), **values))
    with pytest.raises(DatasetFormatError, match=rf"is no recorded run: .*({message}).*Record the run again"):
        read_run(tmp_path / "run.parquet")


# fact, its value, part of the message
WRONG_FACTS = {
    "no name": ({"name": None}, "its name is None; expected text"),
    "a number for the architecture": ({"architecture": 5}, "its architecture is 5; expected text"),
    "no recipe": ({"recipe": None}, r"recipe\.recording\.records is None; expected a positive integer"),
    "records that are true": (
        {"recipe": {"recording": {"records": True}, "data": {}}},
        r"recipe\.recording\.records is True",
    ),
    "no records": ({"recipe": {"recording": {"records": 0}, "data": {}}}, r"recipe\.recording\.records is 0"),
    "data of another kind": ({"recipe": {"recording": {"records": 9}, "data": []}}, r"recipe\.data is \[\]"),
    "a path for a name": (
        {"name": "../../x"},
        r"its name is '\.\./\.\./x'; expected text that a file can be called by",
    ),
    "a name with a control character": ({"name": "a\x1b[2J"}, r"its name is 'a\\x1b\[2J'; expected text"),
    "a name that is half a character": ({"name": "a\ud800"}, r"its name is 'a\\ud800'; expected text"),
    "an architecture of two lines": ({"architecture": "a\nb"}, r"its architecture is 'a\\nb'; expected text, one line"),
    "a data set with a control character": (
        {"recipe": {"recording": {"records": 30}, "data": {"source": "a:b\x07"}}},
        r"recipe\.data names 'a:b\\x07'; expected one line",
    ),
    "a table with a control character": (
        {"recipe": {"recording": {"records": 30}, "data": {"arguments": {"name": "b\x07"}}}},
        r"recipe\.data names 'b\\x07'; expected one line",
    ),
    "more records than a float holds": (
        {"recipe": {"recording": {"records": 10**400}, "data": {}}},
        r"recipe\.recording\.records is 10{99}; expected a positive integer up to 10000000",
    ),
    "other records than the run has": (
        {"recipe": {"recording": {"records": 100}, "data": {}}},
        "it has 30 timestamps from step 10 to 300 of 300; expected 100, one each 3 steps, as its recipe asks for",
    ),
    "no accuracies": ({"accuracies": {}}, r"accuracies\.reference is None; expected a number in \[0, 1\]"),
    "an accuracy that is no number": (
        {"accuracies": {"reference": 0.5, "recorded": float("nan")}},
        r"accuracies\.recorded is nan",
    ),
}


@pytest.mark.parametrize("case", WRONG_FACTS)
def test_facts_of_other_kinds_are_refused(tmp_path, case):
    facts, message = WRONG_FACTS[case]
    run = recorded_run()
    write_run(tmp_path / "run.parquet", dataclasses.replace(run, facts=run.facts | facts))
    with pytest.raises(DatasetFormatError, match=rf"is no recorded run: {message}.*Record the run again"):
        read_run(tmp_path / "run.parquet")


@pytest.mark.parametrize("layers", ["layer0", [], [1, 2], None])
def test_layers_that_are_no_list_of_names_are_refused(written, layers):
    rewrite(written, with_facts(layers=layers))
    with pytest.raises(DatasetFormatError, match=r"its layers are .*; expected a list of names"):
        read_run(written)


@pytest.mark.parametrize("layer", ["", "a\nb", "\x1b]0;x", " a"])
def test_a_layer_with_what_nobody_sees_in_its_name_is_refused(tmp_path, layer):
    write_run(tmp_path / "run.parquet", dataclasses.replace(recorded_run(), layers=[layer, *"abcde"]))
    with pytest.raises(DatasetFormatError, match=r"one of its layers is .*; expected one line of visible characters"):
        read_run(tmp_path / "run.parquet")


@pytest.mark.parametrize("text", [b"", b"[1]", b"{", b"\xff", b"[" * 100_000])
def test_facts_that_are_no_json_object_are_refused(written, text):
    rewrite(written, lambda table: table.replace_schema_metadata({b"smartfrz.run": text}))
    with pytest.raises(DatasetFormatError, match="format_version None; this version reads 1"):
        read_run(written)


def test_changed_facts_are_noticed(written):
    def change(table):
        metadata = table.schema.metadata
        changed = metadata[b"smartfrz.run"].replace(b"0.89", b"0.88")
        assert changed != metadata[b"smartfrz.run"]
        return table.replace_schema_metadata(metadata | {b"smartfrz.run": changed})

    rewrite(written, change)
    with pytest.raises(
        DatasetFormatError, match=r"changed after it was recorded: expected facts and values whose SHA-256"
    ):
        read_run(written)


def test_a_recording_without_a_checksum_is_refused(written):
    rewrite(written, with_facts())
    with pytest.raises(DatasetFormatError, match=r"has no checksum: .*Record the run again"):
        read_run(written)


def write_repeated(path, groups, pool, layer="layer0", **options):
    """Write a file whose row groups of one row each hold the same values again and again, which takes a few bytes."""
    rows = [pa.array([layer])]
    rows += [pa.array([1], pa.int64())] * 2 + [pa.array([1.0])] * 4
    rows += [pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(pool, np.float32)), pool)]
    names = ["layer", "timestamp", "step", "progress", "loss", "learning_rate", "cka", "weights"]
    facts = recorded_run().facts | {"format_version": 1, "layers": [layer]}
    table = pa.table(rows, names, metadata={b"smartfrz.run": json.dumps(facts).encode()})
    with pq.ParquetWriter(path, table.schema, compression="zstd", **options) as file:
        for _ in range(groups):
            file.write_table(table)


def test_a_small_file_of_many_values_is_refused_before_they_are_read(tmp_path, monkeypatch):
    path = tmp_path / "small.parquet"
    write_repeated(path, groups=24, pool=3_000_000)
    assert path.stat().st_size < 60_000
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_: pytest.fail("the values were read"))
    with pytest.raises(
        DatasetFormatError,
        match=r"24 rows of 3000000 weights, which would take 288001536 bytes, and the file has \d+; expected at most 26\d+ ",
    ):
        read_run(path)


def test_texts_that_are_stored_as_differences_are_refused_before_they_are_read(tmp_path):
    path = tmp_path / "small.parquet"
    write_repeated(path, 2, 4, use_dictionary=False, column_encoding={"layer": "DELTA_BYTE_ARRAY"})
    with pytest.raises(DatasetFormatError, match=r"layer is stored as \(.*DELTA_BYTE_ARRAY.*; expected \['PLAIN', "):
        read_run(path)


def test_a_name_that_is_repeated_without_end_is_one_text_in_memory(tmp_path):
    path = tmp_path / "small.parquet"
    write_repeated(path, 200, 4, "x" * 100_000)
    tracemalloc.start()
    with pytest.raises(DatasetFormatError, match=r"rows of layer 'x{99} are not one for each"):
        read_run(path)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_a_list_that_is_missing_is_noticed_by_the_number_of_values(written):
    weights = pq.read_table(written)["weights"].to_pylist()
    rewrite(written, lambda table: with_column(table, "weights", [None, *weights[1:]]))
    with pytest.raises(DatasetFormatError, match="weights has 8593 values in 180 rows; expected 8640"):
        read_run(written)


@pytest.fixture(scope="module")
def small_recording(tmp_path_factory):
    """A file of a few KiB, most of whose bytes describe its columns, and its contents."""
    path = tmp_path_factory.mktemp("recorded") / "small.parquet"
    run = recorded_run(layers=2, timestamps=12, pool=4)
    write_run(path, run)
    return path.read_bytes(), read_run(path)


@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_a_mutated_file_is_refused_or_reads_the_same(small_recording, data):
    content, before = small_recording
    mutated = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        # Most bytes at the end: no page checksum covers the description of the columns.
        position = len(content) - 1 - data.draw(st.integers(0, len(content) - 1))
        mutated[position] ^= 1 << data.draw(st.integers(0, 7))
    with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
        file.write(mutated)
        file.flush()
        try:
            after = read_run(file.name)
        except DatasetFormatError:
            return
    assert (after.layers, after.facts) == (before.layers, before.facts)
    for name in ARRAYS:
        assert getattr(after, name).tobytes() == getattr(before, name).tobytes(), name


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_facts_changed_as_json_are_refused_or_usable(small_recording, data):
    """A text whose checksum fits, but whose meaning is another: what is accepted has the types that training reads."""
    _, before = small_recording
    facts = json.loads(json.dumps(before.facts))
    key = data.draw(st.sampled_from(["name", "architecture", "recipe", "accuracies"]))
    if isinstance(facts[key], dict) and data.draw(st.booleans()):
        facts[key][data.draw(st.sampled_from(sorted(facts[key])))] = data.draw(JSON)
    else:
        facts[key] = data.draw(JSON)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.parquet"
        write_run(path, dataclasses.replace(before, facts=facts))
        try:
            after = read_run(path)
        except DatasetFormatError:
            return
    assert len(labelled_runs([after], LabelRule(), 6)) == 1
    assert 0 <= after.facts["accuracies"]["recorded"] <= 1


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

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy_adapter import make_info

from smartfrz.errors import PredictorFileError
from smartfrz.predictor.contract import (
    FORMAT_VERSION,
    POSITIONAL,
    READS_LOSS,
    REPRESENTATIONS,
    PredictorInfo,
    check_loss,
    check_seal,
    seal,
)

REGISTRY = Path(__file__).parents[1] / "registry"
PROPERTY = b"smartfrz.sha256\x12\x40"
RAW_ANSWERS = [0.5606612, 0.5610872, 0.5609463, 0.5612079, 0.5610342, 0.5614534, 0.5610076]
OUT_OF_RANGE = [
    {"tailored_size": "0"},
    {"window": "1"},
    {"threshold": "0.0"},
    {"threshold": "1.0"},
    {"threshold": "nan"},
    {"record_fraction": "0.0"},
    {"record_fraction": "1e-300"},  # records at every step
    {"record_fraction": "1.5"},
    {"min_records": "0"},
    {"min_records": "11"},  # of a window of 10: it would never decide
    {"window": "1048577"},  # times tailored_size, more memory than a decision may take
]
UNREADABLE = [{"window": "ten"}, {"threshold": ""}, {"metrics": "{"}, {"metrics": "[]"}, {"metrics": "[" * 10**5}]
UNREADABLE += [{"metrics": '{"a":' + "[" * depth + "]" * depth + "}"} for depth in (60, 600, 900)]
NEEDED = [
    "name",
    "tailored_size",
    "window",
    "representation",
    "threshold",
    "record_fraction",
    "dataset_sha256",
    "metrics",
    "license",
]


def metadata(**changes):
    return make_info().to_metadata() | {f"smartfrz.{key}": value for key, value in changes.items()}


printable = st.characters(exclude_categories=["C", "Z"])  # what a terminal obeys is refused
infos = st.builds(
    PredictorInfo,
    name=st.text(printable, max_size=200),
    tailored_size=st.integers(1, 1000),
    window=st.integers(4, 1000),
    representation=st.sampled_from(REPRESENTATIONS),
    threshold=st.floats(0, 1, exclude_min=True, exclude_max=True),
    record_fraction=st.floats(1e-4, 1),
    dataset_sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
    license=st.sampled_from(["Apache-2.0", "MIT"]),
    metrics=st.dictionaries(
        st.text(printable), st.one_of(st.floats(allow_nan=False), st.text(printable), st.booleans())
    ),
    min_records=st.integers(1, 4),
)


def test_a_name_without_end():
    with pytest.raises(PredictorFileError, match=r"out of range: name='x{80}',.*a name of at most 200 characters"):
        PredictorInfo.from_metadata(metadata(name="x" * 201), "f.onnx")


@given(infos)
def test_metadata_round_trip(info):
    properties = info.to_metadata()
    assert all(isinstance(value, str) and key.startswith("smartfrz.") for key, value in properties.items())
    assert PredictorInfo.from_metadata(properties, "f.onnx") == info


def test_the_properties_that_the_design_lists_are_there():
    assert {f"smartfrz.{key}" for key in [*NEEDED, "format_version"]} <= set(metadata())
    assert metadata()["smartfrz.format_version"] == "1" == str(FORMAT_VERSION)
    assert json.loads(metadata()["smartfrz.metrics"]) == {}


@pytest.mark.parametrize("key", NEEDED)
def test_a_missing_property(key):
    properties = metadata()
    del properties[f"smartfrz.{key}"]
    with pytest.raises(PredictorFileError, match=rf"'f.onnx' .*smartfrz\.{key}.*Export it again"):
        PredictorInfo.from_metadata(properties, "f.onnx")


@pytest.mark.parametrize("change", UNREADABLE)
def test_an_unreadable_property(change):
    with pytest.raises(PredictorFileError, match=r"'f.onnx' has a missing or unreadable metadata property .*Export"):
        PredictorInfo.from_metadata(metadata(**change), "f.onnx")


@pytest.mark.parametrize("change", OUT_OF_RANGE)
def test_a_property_out_of_range(change):
    ((key, value),) = change.items()
    with pytest.raises(PredictorFileError, match=rf"out of range: .*{key}={value}.*Export it again"):
        PredictorInfo.from_metadata(metadata(**change), "f.onnx")


@pytest.mark.parametrize("version", ["0", "2", "1.0", ""])
def test_another_format_version(version):
    with pytest.raises(PredictorFileError, match=f"has format_version {version}; .* reads 1.*pip install --upgrade"):
        PredictorInfo.from_metadata(metadata(format_version=version), "f.onnx")


def test_a_representation_that_reads_losses_reads_positions_too():
    assert set(READS_LOSS) < set(POSITIONAL) < set(REPRESENTATIONS)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((3, 4), np.float32, r"loss is float32 \(3, 4\); expected float32 \(3, 5\), one value for each row"),
        ((3,), np.float32, r"loss is float32 \(3,\); expected"),
        ((3, 5, 1), np.float32, r"loss is float32 \(3, 5, 1\); expected"),
        ((3, 5), np.float64, r"loss is float64 \(3, 5\); expected float32"),
    ],
)
def test_losses_that_do_not_fit(shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        check_loss(np.ones(shape, dtype), (3, 5, 64), make_info(representation="trajectory+loss"))


def test_any_value_may_be_a_loss_of_a_predictor_that_reads_it():
    loss = np.array([[0, -1, np.nan, np.inf, -np.inf, 1e-30, 1e30]], np.float32)
    check_loss(loss, (1, 7, 64), make_info(representation="trajectory+loss"))
    for other in set(REPRESENTATIONS) - set(READS_LOSS):
        with pytest.raises(ValueError, match=rf"reads no loss: its representation is '{other}'\. Leave `loss` out"):
            check_loss(loss, (1, 7, 64), make_info(representation=other))


def test_an_onnx_file_of_somebody_else():
    with pytest.raises(PredictorFileError, match=r"no SmartFRZ predictor.*smartfrz-build train"):
        PredictorInfo.from_metadata({"author": "me"}, "f.onnx")


def test_a_seal_is_found_again_and_sealing_twice_changes_nothing():
    sealed = seal(b"before" + PROPERTY + b"0" * 64 + b"after")
    assert sealed.startswith(b"before" + PROPERTY)
    assert sealed.endswith(b"after")
    assert check_seal(sealed, "f.onnx").encode() in sealed
    assert seal(sealed) == sealed


@given(st.data())
def test_any_altered_byte_breaks_the_seal(data):
    sealed = seal(b"before" + PROPERTY + b"0" * 64 + b"after")
    position = data.draw(st.integers(0, len(sealed) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda v: v != sealed[position]))
    with pytest.raises(PredictorFileError, match=r"damaged or was altered|is not a SmartFRZ predictor, or is cut"):
        check_seal(sealed[:position] + bytes([value]) + sealed[position + 1 :], "f.onnx")


@pytest.mark.parametrize("content", [b"", b"nothing", (PROPERTY + b"0" * 64) * 2])
def test_no_seal_or_two(content):
    with pytest.raises(ValueError, match=r"expected one property 'smartfrz\.sha256'"):
        seal(content)
    with pytest.raises(PredictorFileError, match=rf"\({len(content)} bytes\) is not a SmartFRZ predictor, or is cut"):
        check_seal(content, "f.onnx")


def test_the_registry_of_the_repository_holds_the_papers_predictor():
    pytest.importorskip("onnxruntime")
    from smartfrz import zoo

    predictor = zoo.load("smartfrz-raw", registries=[str(REGISTRY)], device="cpu")
    assert (predictor.info.representation, predictor.positional) == ("raw", False)
    rng = np.random.default_rng(0)
    history = (rng.normal(size=(7, 1, 1024)) * 0.05 + rng.normal(size=(7, 17, 1024)).cumsum(1) * 0.002).astype(
        np.float32
    )
    confidence, attention = predictor.predict(history, np.array([17, 4, 17, 14, 17, 4, 17]))
    # answers of the file before its optional inputs were removed
    np.testing.assert_allclose(confidence[:, 1], RAW_ANSWERS, atol=1e-6)
    assert (attention[1, :13] == 0).all()


@pytest.mark.parametrize(
    "change",
    [
        {"license": "MIT\x1b[2J"},
        {"name": "a\x07b"},
        {"name": "a\u202eb"},
        {"name": "a\ud800b"},
        pytest.param({"dataset_sha256": "a" * 10**7}, id="a long checksum"),
        {"license": "x" * 201},
        {"metrics": '{"note": ["\\u001b[31m"]}'},
        {"metrics": '{"\\ud800": 1}'},
    ],
    ids=ascii,
)
def test_texts_that_a_terminal_would_obey_or_that_have_no_end(change):
    with pytest.raises(PredictorFileError, match=r"metadata property '(name|license|dataset_sha256|metrics)'") as error:
        PredictorInfo.from_metadata(metadata(**change), "x.onnx")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400

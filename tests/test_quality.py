import json
from dataclasses import replace

import pytest
from numpy_adapter import ScriptedPredictor, make_info

from smartfrz.baselines import LinearFreezing
from smartfrz.control.learned import policy_of
from smartfrz.control.options import FreezeOptions
from smartfrz.control.quality import Calibration
from smartfrz.errors import PredictorFileError
from smartfrz.predictor.contract import PREFIX, PredictorInfo

SAME = Calibration(threshold=0.9, points=-0.1, spread=0.2, computation=0.8, runs=7)
FAST = Calibration(threshold=0.4, points=-1.4, spread=0.9, computation=0.5, runs=7)


def calibrated(**qualities):
    predictor = ScriptedPredictor()
    predictor.info = replace(predictor.info, qualities=qualities)
    return policy_of(predictor)


def test_a_quality_stands_for_the_predictors_threshold():
    policy = calibrated(same=SAME, fast=FAST)
    assert FreezeOptions(record_every=1, quality="same").schedule(policy).threshold == 0.9
    assert FreezeOptions(record_every=1, quality="fast").schedule(policy).threshold == 0.4
    assert FreezeOptions(record_every=1).schedule(policy).threshold == policy.threshold


def test_a_run_goes_on_at_the_quality_that_is_passed_now():
    policy = calibrated(same=SAME, fast=FAST)
    saved = FreezeOptions(record_every=1, quality="fast").schedule(policy)._asdict()
    assert FreezeOptions(record_every=1).continuing(policy, saved, 10)[0].threshold == 0.4
    assert FreezeOptions(record_every=1, quality="same").continuing(policy, saved, 10)[0].threshold == 0.9


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (policy_of(ScriptedPredictor()), "was never measured. Pass `threshold`"),
        (LinearFreezing(), "was never measured. Pass `threshold`"),
        (calibrated(same=SAME), "calibrated for 'same'"),
    ],
)
def test_a_policy_that_was_not_calibrated_for_it_refuses_a_quality(policy, message):
    with pytest.raises(ValueError, match=message):
        FreezeOptions(record_every=1, total_steps=100, quality="fast").schedule(policy)


def test_bad_options():
    with pytest.raises(ValueError, match=r"'best'; expected one of 'same', 'balanced', 'fast'"):
        FreezeOptions(quality="best")
    with pytest.raises(ValueError, match="both `quality`"):
        FreezeOptions(quality="same", threshold=0.5)


def test_the_file_keeps_the_qualities():
    info = make_info(qualities={"same": SAME})
    metadata = info.to_metadata()
    assert PredictorInfo.from_metadata(metadata, "x.onnx") == info
    metadata[PREFIX + "qualities"] = json.dumps({"same": SAME.to_dict() | {"new": 1}, "later": {}})
    assert PredictorInfo.from_metadata(metadata, "x.onnx") == info


@pytest.mark.parametrize(
    "value",
    [
        [],
        {"same": 0.9},
        {"same": {"threshold": 0.9}},
        {"same": SAME.to_dict() | {"threshold": 0.0}},
        {"same": SAME.to_dict() | {"threshold": "0.5"}},
        {"same": SAME.to_dict() | {"points": float("nan")}},
        {"same": SAME.to_dict() | {"runs": 0}},
        {"same": SAME.to_dict() | {"runs": 10**400}},  # no float is as large
        {"same": SAME.to_dict() | {"computation": True}},
    ],
)
def test_damaged_qualities(value):
    metadata = make_info().to_metadata() | {PREFIX + "qualities": json.dumps(value)}
    with pytest.raises(PredictorFileError, match="missing or unreadable metadata"):
        PredictorInfo.from_metadata(metadata, "x.onnx")


@pytest.mark.parametrize("key", ["metrics", "qualities"])
def test_doubled_keys(key):
    metadata = make_info().to_metadata() | {PREFIX + key: '{"same": {}, "same": {}}'}
    with pytest.raises(PredictorFileError, match="a key twice"):
        PredictorInfo.from_metadata(metadata, "x.onnx")

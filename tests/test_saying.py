"""What a run says by itself, and why nothing froze."""

import logging

import pytest
from numpy_adapter import ScriptedPredictor
from torch_runs import NET, Net, attach, train

torch = pytest.importorskip("torch")

from smartfrz.adapters.torch import SmartFRZ  # noqa: E402
from smartfrz.control.decision import FreezeDecision  # noqa: E402
from smartfrz.control.saying import explain_nothing_frozen  # noqa: E402

STAGES = [(), {"conv1"}]


def run(*stages, steps=8, **options):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = attach(model, optimizer, NET, *stages, total_steps=20, **options)
    train(model, optimizer, freezer, 0, steps)
    return freezer


def test_one_line_at_each_stage_is_visible_in_a_plain_script(capsys):
    run(*STAGES)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 4
    assert lines[1] == "SmartFRZ, step 4 of 20: froze conv1; 1 of 3 layers frozen."
    assert lines[2].startswith(
        "SmartFRZ, step 6 of 20: nothing new, conv2 is closest: 0.000, 0.500 below its threshold"
    )


def test_where_logging_shows_it_the_lines_go_there(capsys, caplog):
    with caplog.at_level(logging.INFO, "smartfrz"):
        run(*STAGES)
    assert sum("SmartFRZ, step" in record.message for record in caplog.records) == 4
    assert "SmartFRZ, step" not in capsys.readouterr().out


def test_a_line_does_not_run_into_a_progress_bar(capsys):
    with pytest.importorskip("tqdm").tqdm(total=10, ascii=True, mininterval=0) as bar:
        bar.update(3)
        run(*STAGES)
    lines = [line for line in capsys.readouterr().err.split("\n") if "SmartFRZ, step" in line]
    assert len(lines) == 4
    for line in lines:
        assert line.rpartition("\r")[2].startswith("SmartFRZ, step")


def test_verbose_false_is_silent(capsys):
    run(*STAGES, verbose=False).say_report()
    assert capsys.readouterr() == ("", "")


def test_the_report_says_why_nothing_froze():
    predictor = ScriptedPredictor(
        [{"conv1": 0.1, "conv2": 0.4, "head": 0.2}, {"conv1": 0.3, "conv2": 0.1, "head": 0.2}] * 2
    )
    report = run(predictor=predictor).report()
    assert "froze 0 of 3 layers" in str(report)
    (line,) = report.why_nothing
    assert line.startswith(
        "conv1, conv2, head: below the threshold (conv2 is closest: 0.400, 0.100 below its threshold"
    )
    assert line in str(report)
    assert report.to_dict()["why_nothing"] == [line]


def test_a_run_without_a_stage_and_one_with_a_frozen_layer():
    assert "no freezing stage yet" in str(run(steps=1).report())
    assert run(*STAGES).report().why_nothing == []


@pytest.mark.parametrize(
    ("model", "name"),
    [(torch.nn.Sequential(torch.nn.Linear(3, 3)), "0"), (torch.nn.Linear(3, 3), "the model itself")],
)
def test_one_layer_alone_is_named_as_the_reason(model, name):
    freezer = SmartFRZ(model, torch.optim.SGD(model.parameters(), 0.1), record_every=1, total_steps=20)
    for _ in range(8):
        model(torch.ones(2, 3)).sum().backward()
        freezer._optimizers[0].step()
        freezer.step()
    assert freezer.report().why_nothing == [f"{name}: the only layer that is trained, which is always kept"]


def event(layer, reason, confidence=0.9, step=1):
    return FreezeDecision(step, 0, layer, confidence, "keep", reason, 0.5)


def test_a_layer_counts_for_the_reason_closest_to_freezing():
    events = [
        event("a", "history_too_short", float("nan")),
        event("a", "grouped"),
        event("a", "below_threshold", 0.2),
        event("b", "below_threshold", 0.45, step=2),
        event("c", "last_active_layer"),
        event("d", "grouped", step=7),
        event("e", "something_new"),
    ]
    lines = explain_nothing_frozen(events, {7})
    assert [line.partition(":")[0] for line in lines] == ["d", "a", "c", "b", "e"]
    assert "does not pay" in lines[0]
    assert "0.050 below its threshold, at step 2" in lines[3]
    assert lines[4] == "e: something new"

"""A predictor that is slow at each of many freezing stages does not hold a run up for days."""

import logging

import pytest
from numpy_adapter import SlowPredictor, make_info

from smartfrz.control import budget

torch = pytest.importorskip("torch")

from smartfrz.adapters.torch import SmartFRZ  # noqa: E402


def train(predictor, steps, seconds):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = SmartFRZ(
        model, optimizer, predictor=predictor, total_steps=steps, record_every=1, decide_every=1, verbose=False
    )
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().mean().backward()
        optimizer.step()
        freezer.step()
        predictor.now += seconds
    freezer.close()
    return freezer


def test_a_slow_predictor_is_asked_less_often(monkeypatch, caplog):
    predictor = SlowPredictor(monkeypatch, sure_from=3)
    freezer = train(predictor, 300, seconds=10.0)
    asked = predictor.asked_at
    spent = len(asked) * predictor.seconds
    total = predictor.now - 1000.0
    assert 5 <= len(asked) < 10
    assert spent <= budget.SHARE * total + budget.ALLOWANCE + predictor.seconds
    assert asked[-1] - asked[-2] > 300.0  # 5 % of it is one question
    assert freezer.frozen_layers[:1] == freezer.layers[:1]  # patience counts on from question to question
    said = [record.getMessage() for record in caplog.records if "asking the predictor took" in record.getMessage()]
    assert len(said) == 1
    assert "took 75 s of the 1" in said[0]
    assert "at fewer freezing stages" in said[0]


def test_a_predictor_within_its_budget_is_asked_at_every_stage(monkeypatch, caplog):
    predictor = SlowPredictor(monkeypatch, sure_from=10**9, seconds=2.0)
    with caplog.at_level(logging.WARNING):
        train(predictor, 30, seconds=0.1)
    assert len(predictor.asked_at) == 30 - (make_info().min_records - 1)
    assert "asking the predictor took" not in caplog.text


def test_a_share_of_a_long_run_is_granted(monkeypatch):
    now = 0.0
    monkeypatch.setattr(budget, "clock", lambda: now)
    granted = budget.AskingBudget()
    for _ in range(100):
        assert granted.allows()
        with granted:
            now += 4.0
        now += 100.0
    with granted:
        now += 1000.0
    assert not granted.allows()
    now += 1000.0 / budget.SHARE
    assert granted.allows()


def test_once_it_was_exceeded_stages_at_which_nothing_freezes_are_left_out(monkeypatch):
    now = 0.0
    monkeypatch.setattr(budget, "clock", lambda: now)
    granted = budget.AskingBudget()
    assert granted.allows(freezes=False)
    with granted:
        now += 100.0
    assert not granted.allows()
    now += 100.0 / budget.SHARE
    assert not granted.allows(freezes=False)
    assert granted.allows()

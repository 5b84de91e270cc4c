"""How requests of several jobs become runs; the predictor here is a formula."""

import asyncio
import threading

import numpy as np
import pytest
from serving_process import histories

from smartfrz.predictor.runtime import Prediction
from smartfrz.serving import batching
from smartfrz.serving.batching import Batcher, Overloaded


class Formula:
    """Answers from the real rows of each layer alone; keeps the shapes that it was asked about.

    The first run waits for `go`, so that a test can have requests gather behind it.
    """

    def __init__(self):
        self.shapes, self.losses = [], []
        self.go = threading.Event()

    def predict(self, history, lengths, position=None, loss=None):
        self.shapes.append(history.shape[:2])
        self.losses.append(loss)
        self.go.wait(10)
        if history.max() > 1e6:
            raise RuntimeError("the formula fails")
        attention = np.zeros(history.shape[:2], np.float32)
        for row, length in zip(attention, lengths, strict=True):
            row[len(row) - length :] = 1 / length
        sums = np.array([rows[-length:].sum() for rows, length in zip(history, lengths, strict=True)], np.float32)
        return Prediction(np.stack([sums, -sums], axis=1), attention)


def gathered(questions, **options):
    """The formula, and its answers, where the first question is run while the others arrive."""
    formula = Formula()

    async def ask():
        batcher = Batcher(formula, **{"max_batch": 20, "max_delay": 0.0, "threads": 1} | options)
        asked = [asyncio.create_task(batcher.ask(*question)) for question in questions[:1]]
        while not formula.shapes:
            await asyncio.sleep(0.001)
        asked += [asyncio.create_task(batcher.ask(*question)) for question in questions[1:]]
        while batcher.num_waiting < len(questions) - 1:
            await asyncio.sleep(0.001)
        formula.go.set()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        await batcher.close()
        return answers

    answers = asyncio.run(ask())
    return formula, answers


def alone(history, lengths):
    formula = Formula()
    formula.go.set()
    return formula.predict(history, lengths)


def test_what_waits_at_the_same_time_is_run_together_and_answered_apart():
    questions = [histories(layers, window, 8, seed=layers) for layers, window in ((1, 3), (2, 4), (3, 6), (4, 5))]
    formula, answers = gathered(questions)
    assert formula.shapes == [(1, 3), (9, 6)]
    for question, answer in zip(questions, answers, strict=True):
        expected = alone(*question)
        assert answer.attention.shape == question[0].shape[:2]
        np.testing.assert_array_equal(answer.confidence, expected.confidence)
        np.testing.assert_array_equal(answer.attention, expected.attention)


def test_losses_stand_with_their_records_and_are_unknown_for_those_who_told_none():
    one, two, three = (histories(layers, window, 8) for layers, window in ((1, 3), (2, 3), (3, 4)))
    told = np.array([[3, 2, 1], [6, 5, 4]], np.float32)
    formula, _ = gathered([one, (*two, None, told), three, (*one, None, told[:1])])
    alone, together = formula.losses
    assert alone is None
    assert together.dtype == np.float32
    assert together.tolist() == [[0, 3, 2, 1], [0, 6, 5, 4], *[[0, 0, 0, 0]] * 3, [0, 3, 2, 1]]


def test_a_request_that_is_run_alone_keeps_its_losses():
    told = np.array([[3, 2, 1]], np.float32)
    formula, _ = gathered([(*histories(1, 3, 8), None, told)])
    assert formula.losses[0] is told


def test_windows_that_differ_much_are_run_apart():
    formula, _ = gathered([histories(1, window, 8) for window in (1, 10, 4, 9, 3, 5)])
    assert formula.shapes == [(1, 1), (3, 10), (2, 4)]


def test_the_largest_batch_and_a_request_beyond_it():
    formula, _ = gathered([histories(layers, 4, 8) for layers in (1, 15, 6, 5, 30, 2)])
    assert formula.shapes == [(1, 4), (20, 4), (8, 4), (30, 4)]


def test_nobody_is_overtaken_for_ever():
    formula, _ = gathered([histories(layers, 4, 8) for layers in (1, 19, 19, 1, 1, 1)])
    assert formula.shapes == [(1, 4), (20, 4), (20, 4), (1, 4)]


def test_a_request_waits_a_little_for_others():
    formula = Formula()
    formula.go.set()

    async def ask():
        batcher = Batcher(formula, max_batch=20, max_delay=0.3, threads=2)
        first = asyncio.create_task(batcher.ask(*histories(1, 4, 8)))
        await asyncio.sleep(0.02)
        await asyncio.gather(first, batcher.ask(*histories(2, 4, 8)))
        await batcher.close()

    asyncio.run(ask())
    assert formula.shapes == [(3, 4)]


def test_a_failure_is_told_to_those_who_asked_and_to_nobody_else():
    bad = histories(1, 4, 8)[0] + np.float32(1e7), np.array([4])
    formula, answers = gathered([histories(2, 4, 8), bad, histories(1, 9, 8)])
    assert len(formula.shapes) == 3
    assert isinstance(answers[1], RuntimeError)
    assert answers[0].confidence.shape == (2, 2)
    assert answers[2].confidence.shape == (1, 2)


def test_mock_clock_what_waited_for_too_long_is_not_run(monkeypatch):
    monkeypatch.setattr(batching, "MAX_WAIT_SECONDS", -1.0)
    formula = Formula()

    async def ask():
        batcher = Batcher(formula, max_batch=20, max_delay=0.0, threads=1)
        with pytest.raises(Overloaded):
            await batcher.ask(*histories(1, 4, 8))
        await batcher.close()

    asyncio.run(ask())
    assert formula.shapes == []


def test_who_has_gone_is_not_run():
    formula = Formula()

    async def ask():
        batcher = Batcher(formula, max_batch=20, max_delay=0.0, threads=1)
        first = asyncio.create_task(batcher.ask(*histories(1, 4, 8)))
        while not formula.shapes:
            await asyncio.sleep(0.001)
        gone = asyncio.create_task(batcher.ask(*histories(7, 4, 8)))
        other = asyncio.create_task(batcher.ask(*histories(2, 4, 8)))
        while batcher.num_waiting < 2:
            await asyncio.sleep(0.001)
        gone.cancel()
        formula.go.set()
        await asyncio.gather(first, other)
        await batcher.close()

    asyncio.run(ask())
    assert formula.shapes == [(1, 4), (2, 4)]

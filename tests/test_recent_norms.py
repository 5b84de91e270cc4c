"""Judging a trained network with the batch norm statistics of its last batches."""

import pytest

torch = pytest.importorskip("torch")

from numpy_adapter import ScriptedPredictor, script  # noqa: E402
from torch.utils.data import TensorDataset  # noqa: E402
from torch_runs import NET, Net, batch, seeded  # noqa: E402

from smartfrz.adapters.torch.norms import RecentNorms  # noqa: E402
from smartfrz.comparing.engine import FULL, Method  # noqa: E402
from smartfrz.comparing.pytorch import Task, TorchRun  # noqa: E402

LAG = 0.01  # momentum of a norm that lags


def lagging(seed=0):
    model = seeded(Net, seed=seed)
    model.norm1.momentum = model.norm2.momentum = LAG
    return model


def test_the_statistics_are_those_of_the_batches_since_the_note():
    norm = torch.nn.BatchNorm2d(2, momentum=LAG)
    recent, inputs = RecentNorms(norm), [batch(step)[0] + step for step in range(6)]
    for step, x in enumerate(inputs):
        if step == 4:
            recent.note()
        norm(x)
    recent.correct()
    weights = torch.tensor([1 - LAG, 1.0])
    means = torch.stack([x.mean((0, 2, 3)) for x in inputs[4:]])
    torch.testing.assert_close(
        norm.running_mean, (weights[:, None] * means).sum(0) / weights.sum(), rtol=1e-4, atol=1e-4
    )


def task(norm_batches, seen):
    """A task whose judge notes the statistics that it finds."""
    data = TensorDataset(*batch(0, 48, 2, 7, 7))

    def judge(model, data):
        seen.append([x.clone() for norm in (model.norm1, model.norm2) for x in (norm.running_mean, norm.running_var)])
        return 0.5

    return Task(
        model=lagging,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.05),
        train=data,
        validation=data,
        test=data,
        steps=24,
        batch_size=8,
        judge=judge,
        evaluations=1,
        norm_batches=norm_batches,
    )


def finished(norm_batches, method=FULL):
    seen = []
    run = TorchRun(task(norm_batches, seen), method, seed=0)
    while run.advance(10):
        pass
    assert list(run.finish().frozen) == ([] if method is FULL else ["conv1"])
    return run.model, seen[-1]


def test_plain_training_is_judged_with_statistics_that_do_not_lag():
    model, running = finished(0)
    same, recent = finished(6)
    for one, other in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        inputs = model.conv1(batch(0, 48, 2, 7, 7)[0])
    true = inputs.mean((0, 2, 3))
    assert (recent[0] - true).abs().max() < 0.1 * (running[0] - true).abs().max()


def test_what_a_freezer_corrected_is_not_corrected_again():
    decided = {"record_every": 4, "decide_every": 2, "patience": 1, "device": "cpu"}
    method = Method("scripted", lambda run: ScriptedPredictor(script(NET, set(), {"conv1"})), decided)
    _, running = finished(0, method)
    _, recent = finished(10, method)  # noted at step 14, and the layer froze at step 16
    assert torch.equal(running[0], recent[0])
    assert torch.equal(running[1], recent[1])
    assert not torch.equal(running[2], recent[2])


def test_a_run_that_is_shorter_than_the_batches_is_judged_with_all_of_them():
    _, recent = finished(100)
    _, running = finished(0)
    assert recent[1].lt(running[1]).any()  # a variance of 1, with which norms begin, has no part in it

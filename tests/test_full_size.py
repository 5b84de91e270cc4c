"""The benchmark of networks at their real size, with toy networks on a CPU: all of it but CUDA's events and streams."""

import pytest
from benchmark_source import torch

from benchmarks import full_size, tables
from benchmarks.methods import methods_of
from smartfrz import zoo
from smartfrz.comparing.lines import read_lines

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def one_thread():
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


def test_a_pair_is_trained_in_turns_and_written_once(tmp_path, capsys):
    results = tmp_path / "toy.jsonl"
    command = ["--toy", "--networks", "deit", "--device", "cpu", "--results", str(results)]
    full_size.main(["pair", *command, "--methods", "full", "smartfrz"])
    lines = {line["method"]: line for line in read_lines(results)}
    assert list(lines) == ["full", "smartfrz"]
    for line in lines.values():
        assert line["steps"] == line["full_steps"] == 2 * (128 // 16)
        assert list(line["split"]) == list(full_size.PARTS)
        assert sum(line["split"].values()) == pytest.approx(line["train_seconds"], abs=1e-3)
        assert min(line["split"].values()) > 0
        assert 0 <= line["accuracy"] <= 1
    assert lines["smartfrz"]["split"]["deciding"] > lines["full"]["split"]["deciding"]
    assert lines["smartfrz"]["layers"]

    # what was cut off goes on: only what is missing is trained
    kept = results.read_text("utf-8").splitlines(keepends=True)[0]
    results.write_text(kept, "utf-8")
    full_size.main(["pair", *command, "--methods", "full", "smartfrz"])
    again = read_lines(results)
    assert [line["method"] for line in again] == ["full", "smartfrz"]
    assert again[1]["events"] == lines["smartfrz"]["events"]
    capsys.readouterr()
    full_size.main(["table", *command])
    assert "| deit (toy) | full | 100.0 |" in capsys.readouterr().out


def test_each_network_sees_the_same_batches_and_dropout_whatever_the_method():
    size, setting = full_size.TOYS["bert"], full_size.Setting(zoo.load("smartfrz-base"), "cpu")
    data = size.data()
    runs = [full_size.SizedRun(size, data, methods_of(setting)[name], 0) for name in ("full", "linear")]
    for run in runs:
        run.advance(1)
    first, second = (run._losses[0] for run in runs)
    assert torch.equal(first, second)
    assert torch.isfinite(first)


def test_an_epoch_has_each_sample_at_most_once_and_pictures_have_their_channels_last():
    inputs = torch.arange(10.0).reshape(10, 1, 1, 1).expand(10, 3, 2, 2)
    batches = full_size.Batches(full_size.on_device(inputs, "cpu"), torch.arange(10), 4, seed=0)
    taken = [batches.take() for _ in range(4)]
    for begin in (0, 2):
        assert len({int(label) for _, labels in taken[begin : begin + 2] for label in labels}) == 8
    for pictures, labels in taken:
        assert torch.equal(pictures[:, 0, 0, 0].long(), labels)
        assert pictures.is_contiguous(memory_format=torch.channels_last)


def test_a_step_is_split_at_its_marks(monkeypatch):
    split, clock = full_size.Split(cuda=False), iter([0, 1, 3, 6, 10, 15, 20, 20, 21, 21, 21, 22])
    monkeypatch.setattr(full_size.time, "perf_counter", lambda: next(clock))
    for _ in range(12):
        split.mark()
    split.collect()
    split.collect()
    assert split.seconds == {"data": 1, "forward": 3, "backward": 3, "optimizer": 4, "deciding": 6}


def test_a_cpu_is_refused_and_toys_are_no_results(tmp_path, capsys):
    with pytest.raises(SystemExit):
        full_size.main(["run", "--device", "cpu", "--results", str(tmp_path / "r.jsonl")])
    assert "a CPU would take days. Try it out with --toy --results FILE" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        full_size.main(["run", "--toy"])
    assert "--toy needs --results FILE" in capsys.readouterr().err
    assert tables.full_size([]) == tables.NOT_RUN

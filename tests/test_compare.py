"""`smartfrz compare` on real tasks: the one of docs/compare.md with fewer epochs, and broken ones."""

import html
import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from builder_fixtures import invoke

from smartfrz import progress
from smartfrz.cli import main
from smartfrz.comparing import command, study
from smartfrz.comparing.engine import FULL, Result
from smartfrz.comparing.lines import read_lines
from smartfrz.comparing.own_task import FEWEST_STEPS, Part, build_task, find_task, fit_budget
from smartfrz.comparing.page import save_page
from smartfrz.comparing.recipe_tasks import recipe_source
from smartfrz.comparing.variants import fewer_steps, variant
from smartfrz.comparing.verdict import judge
from smartfrz.errors import RecipeError

PAGE = Path(__file__).parent.parent / "docs" / "compare.md"
METHODS = ["full training", "SmartFRZ", "SmartFRZ threshold=0.5", "50 % of the steps"]
MINE = re.compile(
    r" with eager\.onnx [0-9a-f]{6}"
)  # a predictor that is a file has its name and digest in those of methods


def write_task(folder, epochs=2, **changes):
    """The task of docs/compare.md, with pieces of its text replaced."""
    code = re.search(r"```python\n(# digits\.py.*?)```", PAGE.read_text("utf-8"), re.DOTALL)[1]
    for old, new in {
        "EPOCHS = 20": f"EPOCHS = {epochs}",
        "range(5)": "range(2)",
        **changes.get("replaced", {}),
    }.items():
        assert old in code
        code = code.replace(old, new)
    (folder / "digits.py").write_text(code)
    return f"{folder / 'digits.py'}:build"


def call(task, output, predictor, *arguments):
    given = ["--output", output, "--predictor", predictor, "--fewer-steps", "50", *arguments]
    return invoke(main, "compare", task, *given)


@pytest.fixture(scope="module")
def done(tmp_path_factory, eager_predictor):
    """The command with two seeds, once."""
    folder = tmp_path_factory.mktemp("compare")
    task = write_task(folder)
    result = call(task, folder / "out", eager_predictor, "--seeds", 2, "--threshold", "0.5")
    assert result.exit_code == 0, result.output
    return folder, task, result


def test_the_verdict_the_table_and_the_files(done):
    folder, _, result = done
    sentence, _, header, *rows = result.stdout.splitlines()
    assert sentence.startswith("SmartFRZ ")
    assert "training 50 % of the steps" in sentence
    assert header.split()[0] == "steps"
    assert [MINE.sub("", row.split("  ")[0]) for row in rows[:4]] == METHODS
    assert "- Behind ± stands the standard deviation over 2 seeds." in result.stdout
    assert "Traceback" not in result.output
    assert sorted(path.name for path in (folder / "out").iterdir() if not path.name.startswith(".")) == [
        "compare.json",
        "compare.png",
        "report.html",
        "runs.jsonl",
    ]
    figures = json.loads((folder / "out" / "compare.json").read_text())
    assert figures["sentence"] == sentence
    assert [MINE.sub("", one["method"]) for one in figures["figures"]] == METHODS


def test_each_run_is_a_line_and_a_fair_one(done):
    lines = read_lines(done[0] / "out" / "runs.jsonl")
    found = sorted((line["seed"], MINE.sub("", line["method"])) for line in lines)
    assert found == sorted((seed, method) for seed in (0, 1) for method in METHODS)
    for line in lines:
        assert line["full_steps"] == 62
        assert line["steps"] == (31 if line["kind"] == "fewer" else 62)
        assert 0 <= line["accuracy"] <= 1
        assert bool(line["frozen"]) == (line["kind"] == "freezing")
        assert line["pace"]["cpu_seconds"] > 0
        if line["kind"] == "full":
            assert line["pace"]["cpu_seconds"] * 62 == pytest.approx(line["cpu_seconds"])


def test_a_second_start_trains_nothing_and_says_the_same(done, eager_predictor, monkeypatch):
    folder, task, first = done
    before = (folder / "out" / "runs.jsonl").read_bytes()
    monkeypatch.setattr(
        study, "_train", lambda start, methods, *others: iter(pytest.fail(str(methods)) if methods else [])
    )
    again = call(task, folder / "out", eager_predictor, "--seeds", 2, "--threshold", "0.5")
    assert again.stdout == first.stdout
    assert (folder / "out" / "runs.jsonl").read_bytes() == before
    # fewer seeds are a part of it
    assert "With one seed" in call(task, folder / "out", eager_predictor, "--threshold", "0.5").stdout


def test_json_is_all_that_is_printed(done, eager_predictor):
    folder, task, _ = done
    result = call(task, folder / "out", eager_predictor, "--seeds", 2, "--threshold", "0.5", "--json")
    printed = json.loads(result.stdout)
    assert len(printed["runs"]) == 8
    assert printed == json.loads((folder / "out" / "compare.json").read_text())


def test_a_new_method_trains_alone_beside_a_pacemaker(done, eager_predictor):
    folder, task, _ = done
    before = read_lines(folder / "out" / "runs.jsonl")
    result = call(task, folder / "out", eager_predictor, "--variant", "threshold=0.6,patience=1")
    assert result.exit_code == 0, result.output
    (new,) = read_lines(folder / "out" / "runs.jsonl")[len(before) :]
    assert (MINE.sub("", new["method"]), new["seed"]) == ("SmartFRZ threshold=0.6,patience=1", 0)
    assert 0 < new["pace"]["cpu_seconds"] < 100 * before[0]["pace"]["cpu_seconds"]


def test_a_task_that_was_changed_is_trained_anew(tmp_path, eager_predictor):
    call(write_task(tmp_path, epochs=1), tmp_path / "out", eager_predictor)
    del sys.modules["digits"]  # a second start is another process
    result = call(
        write_task(tmp_path, replaced={"EPOCHS = 20": "EPOCHS = 2  # more"}), tmp_path / "out", eager_predictor
    )
    assert "- Full training has 62 steps. In fewer than about 100 SmartFRZ sees too little" in result.stdout
    assert "3 runs in" in result.stderr
    assert "are left out" in result.stderr
    assert {line["full_steps"] for line in read_lines(tmp_path / "out" / "runs.jsonl")} == {31, 62}
    assert {run["full_steps"] for run in json.loads((tmp_path / "out" / "compare.json").read_text())["runs"]} == {62}


def test_a_killed_comparison_goes_on(tmp_path, eager_predictor):
    task, out = write_task(tmp_path, epochs=6), tmp_path / "out"
    code = "import sys; from smartfrz.cli import main; main(sys.argv[1:])"
    given = ["compare", task, "--output", out, "--predictor", eager_predictor, "--fewer-steps", "10"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, given)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    for _ in range(1200):
        if (out / "runs.jsonl").exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    kept = read_lines(out / "runs.jsonl")
    assert [line["method"] for line in kept] == ["10 % of the steps"]  # killed long before the others were finished
    result = invoke(main, *given)
    assert result.exit_code == 0, result.output
    lines = read_lines(out / "runs.jsonl")
    assert lines[: len(kept)] == kept
    assert sorted(MINE.sub("", line["method"]) for line in lines) == ["10 % of the steps", "SmartFRZ", "full training"]


def test_without_a_terminal_there_is_a_line_a_minute(done, eager_predictor, monkeypatch):
    folder, task, _ = done
    given = (folder / "out", eager_predictor, "--fewer-steps", "40")
    monkeypatch.setattr(progress, "MINUTE", 0.0)
    result = call(task, *given)
    assert re.search(r"\d+% done, about \d+ min left   seed 0 \(1 of 1\)   40 % of the steps [\d.]+", result.stderr)


def test_without_matplotlib_there_is_no_picture_and_all_the_rest(done, eager_predictor, monkeypatch):
    folder, task, first = done
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "smartfrz.comparing.fronts", raising=False)
    result = call(task, folder / "out", eager_predictor, "--seeds", 2, "--threshold", "0.5")
    assert result.exit_code == 0
    assert result.stdout == first.stdout
    assert "No picture was made: matplotlib" in result.stderr
    assert "compare.png" not in result.stderr


def test_the_page_has_the_verdict_both_fronts_and_what_was_run(done):
    folder, task, result = done
    text = (folder / "out" / "report.html").read_text("utf-8")
    figures = json.loads((folder / "out" / "compare.json").read_text())
    shown = html.unescape(text).replace("\N{NO-BREAK SPACE}", " ")
    assert f"<h1>{figures['sentence']}</h1>" in shown
    assert all(f"<li>{note}</li>" in shown for note in figures["notes"])
    rows = [row.strip() for row in result.stdout.splitlines()[3:7]]
    cells = re.findall(r"<tr>(<td><svg.*)</tr>", shown)
    assert [re.sub(r"<[^>]*>", "", row).replace(" ", "") for row in cells] == [row.replace(" ", "") for row in rows]
    for size in ("wide", "narrow"):
        front = re.search(rf'<svg class="front {size}".*?</svg>', text, re.DOTALL)[0]
        assert len(re.findall(r'class="dot (?:full|fewer|freezing)"', front)) == 4
        assert front.count('class="between fewer"') == front.count('class="between freezing"') == 1
    assert f"<th>Task</th><td>{task}, version " in shown
    assert "<th>Seeds</th><td>0, 1</td>" in shown
    assert "<th>Full training</th><td>62 steps of 32 samples</td>" in shown
    assert f"torch {torch.__version__}" in shown
    assert "onnxruntime" in figures["ran"]["Versions"]


def test_the_page_loads_nothing_and_names_do_no_harm(done, tmp_path):
    evil = "</title><script>alert(1)</script><img src=https://example.com/x.png onerror=alert(2)>"
    lines = read_lines(done[0] / "out" / "runs.jsonl")
    hostile = [
        {**line, "method": f"{line['method']}{evil}" if line["kind"] == "freezing" else line["method"]}
        for line in lines
    ]
    save_page(judge(hostile, metric=evil), {evil: evil}, evil, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert evil not in text
    parser, tags, names = HTMLParser(), set(), set()
    parser.handle_starttag = lambda tag, attrs: (tags.add(tag), names.update(name for name, _ in attrs))
    parser.feed(text)
    assert {"html", "svg", "table"} <= tags
    assert {"script", "img", "link", "iframe", "object", "a"}.isdisjoint(tags)
    assert [name for name in names if name in ("src", "href") or name.startswith("on")] == []
    assert "default-src 'none'; style-src 'unsafe-inline'\"" in text
    assert "url(" not in text


def test_without_jinja2_there_is_no_page_and_all_the_rest(done, eager_predictor, monkeypatch):
    folder, task, first = done
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = call(task, folder / "out", eager_predictor, "--seeds", 2, "--threshold", "0.5")
    assert result.exit_code == 0
    assert result.stdout == first.stdout
    assert 'No page was made: jinja2 is not installed. Type: pip install "smartfrz[plots,cpu]"' in result.stderr
    assert "report.html" not in result.stderr


def test_names_of_points_that_lie_together_do_not_cover_each_other(done, tmp_path):
    lines = read_lines(done[0] / "out" / "runs.jsonl")
    near = [
        {**line, "method": f"SmartFRZ threshold=0.{index}", "accuracy": line["accuracy"] - index / 500}
        for line in lines
        if MINE.sub("", line["method"]) == "SmartFRZ"
        for index in range(6)
    ]
    verdict = judge([line for line in lines if line["kind"] != "freezing"] + near)
    save_page(verdict, {}, "near", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    for front in re.findall(r'<svg class="front.*?</svg>', text, re.DOTALL):
        names = re.findall(r'<text class="f\w+" x="(.*?)" y="(.*?)" text-anchor="(\w+)">(.*?)</text>', front)
        assert len(names) == len(verdict.figures) > 8
        places = [
            (float(x) - (6 * len(name) if side == "end" else 0), float(y), 6 * len(name)) for x, y, side, name in names
        ]
        for index, (x, y, width) in enumerate(places):
            for other_x, other_y, other_width in places[:index]:
                assert abs(y - other_y) > 9 or x + width < other_x or other_x + other_width < x, names


def test_ctrl_c_ends_quietly(tmp_path, eager_predictor, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "_check_loss", stop)
    result = call(write_task(tmp_path), tmp_path / "out", eager_predictor)
    assert result.exit_code == 130
    assert "the same command goes on from there" in result.stderr


def test_with_a_budget_a_part_is_trained_and_it_is_said_how_far_to_believe_it(tmp_path, eager_predictor, monkeypatch):
    task = write_task(tmp_path, epochs=100)
    monkeypatch.setattr("smartfrz.comparing.command.fit_budget", lambda *arguments: Part(0.05, 2))
    result = call(task, tmp_path / "out", eager_predictor, "--budget", "10s")
    assert result.exit_code == 0, result.output
    assert "50 of 1000 training samples and 155 of 3100 steps (5%)" in " ".join(result.stdout.split())
    assert "Take no decision from its accuracies" in result.stdout
    lines = read_lines(tmp_path / "out" / "runs.jsonl")
    assert {(line["full_steps"], len(line["curve"])) for line in lines} == {(155, 2)}
    # a second start takes the same part, though the machine may be faster now
    monkeypatch.setattr("smartfrz.comparing.command.fit_budget", lambda *arguments: pytest.fail("measured again"))
    assert call(task, tmp_path / "out", eager_predictor, "--budget", "10s").stdout == result.stdout


def test_the_budget_decides_how_large_the_part_is(tmp_path):
    task = build_task(find_task(write_task(tmp_path, epochs=100), tmp_path))
    assert fit_budget(task, [FULL], 1, 1e6) == Part()
    with pytest.raises(RecipeError, match="is too short for 1 runs"):
        fit_budget(task, [FULL], 1, 1e-3)
    part = Part(0.1, 2)
    cut = part.of(task)
    assert (len(cut.train), cut.steps, cut.evaluations) == (100, 310, 2)
    assert Part(0.01, 1).of(task).steps == FEWEST_STEPS
    assert len(Part(0.01, 1).of(task).train) == task.batch_size
    assert "much the same" in Part(0.6, 1).trust(60, task)
    assert "which way a difference goes" in Part(0.3, 1).trust(60, task)
    assert "nothing was cut" in Part().trust(60, task)


@pytest.mark.parametrize("file", ["compare_digits.toml"])
def test_the_example_of_names_alone(file, tmp_path, eager_predictor):
    folder = Path(__file__).parent.parent / "examples"
    if not folder.exists():
        pytest.skip("the examples are not here")
    text = (folder / file).read_text("utf-8").replace("epochs = 20", "epochs = 1").replace("width = 32", "width = 4")
    (tmp_path / file).write_text(text)
    (tmp_path / "compare_digits.py").write_text((folder / "compare_digits.py").read_text("utf-8"))
    result = call(tmp_path / file, tmp_path / "out", eager_predictor)
    assert result.exit_code == 0, result.output
    lines = read_lines(tmp_path / "out" / "runs.jsonl")
    assert {(line["task"], line["full_steps"]) for line in lines} == {(str(tmp_path / file), 31)}
    # an option of the recipe counts, and so does the module beside it
    (tmp_path / file).write_text(text.replace('"SGD"', '"Rprop"'))
    assert "training.optimizer is 'Rprop'; expected one of" in call(tmp_path / file, tmp_path, eager_predictor).stderr
    assert recipe_source(folder / file).version != lines[0]["version"]


BROKEN = {
    "no recipe": ("gone.toml", "", "Cannot read recipe"),
    "an entry that is unknown": ("task.toml", "model = 3", "lacks section [model]"),
    "no file": ("gone.py:build", "", "which does not exist"),
    "no module": ("gone:build", "", "cannot be imported (No module named 'gone')"),
    "no function": ("task.py:biuld", "def build(): pass", "Did you mean 'build'?"),
    "no name at all": ("task", "", "expected module:callable or file.py:callable"),
    "no python": ("task.py:build", "def build(:", "SyntaxError"),
    "fails on import": ("task.py:build", "1 / 0", "ZeroDivisionError: division by zero"),
    "fails": ("task.py:build", "def build():\n    return [][1]", "task.py, line 2"),
    "returns something else": ("task.py:build", "def build(): return 3", "returns int; expected a smartfrz.comparing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_task_is_explained(case, tmp_path, monkeypatch):
    task, code, message = BROKEN[case]
    (tmp_path / ("task.toml" if task == "task.toml" else "task.py")).write_text(code)
    monkeypatch.chdir(tmp_path)
    result = call(task, tmp_path / "out", "smartfrz-base")
    assert message in " ".join(result.stderr.split())
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


UNTRAINABLE = {
    "empty data": ({"pictures[:1000], labels[:1000]": "pictures[:0], labels[:0]"}, "no samples in `train`"),
    "less than a batch": ({"[:1000], labels[:1000]": "[:9], labels[:9]", "len(train) // 32": "2"}, "has 9 training samples"),
    "no steps": ({"EPOCHS * (len(train) // 32)": "0"}, "has steps=0; expected an integer of at least 1"),
    "a stream": ({"train=train": "train=iter(train)"}, "without a length"),
    "a loader": ({"train=train": "train=torch.utils.data.DataLoader(train, 32)"}, "not a loader of batches"),
    "an iterator": ({"train=train": "train=iter(torch.utils.data.DataLoader(train, 32))"}, "Give the loader's `dataset`"),
    "triples": ({"train=train": "train=TensorDataset(labels, labels, labels)"}, "have 3 parts; expected pairs"),
    "a loss of each sample": ({"batch_size=32": "loss=lambda model, x, y: model(x)"}, "returns shape [32, 10]; expected"),
    "a loss that fails": ({"batch_size=32": "loss=lambda model, x, y: model(x[:, :, 0])"}, "`loss` of the task"),
    "a judge that fails": ({"batch_size=32": "judge=lambda model, data: data.nothing"}, "digits.py, line"),
    "a model for its function": ({"model=network": "model=lambda seed: 3"}, "`model` of the task"),
    "an optimizer that fails": ({"0.05, momentum": "-1, momentum"}, "Invalid learning rate"),
    "no optimizer": ({"optimizer=lambda model: ": "optimizer=lambda model: str or "}, "returns type; expected a function"),
    "metric NaN": ({"batch_size=32": "judge=lambda model, data: float('nan')"}, "The metric of full training is nan after"),
    "metric None": ({"batch_size=32": "judge=lambda model, data: None"}, "The metric of full training is NoneType after 31"),
    "loss NaN": ({"0.05, momentum": "1e30, momentum"}, "The loss of full training is nan after 10 steps"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNTRAINABLE)
def test_what_cannot_be_trained_is_explained(case, tmp_path, eager_predictor):
    replaced, message = UNTRAINABLE[case]
    result = call(write_task(tmp_path, replaced=replaced), tmp_path / "out", eager_predictor)
    assert message in " ".join(result.stderr.split())
    assert result.exit_code == 1
    assert "Traceback" not in result.output


WRONG_USAGE = {
    "no task": ([], "Expected one of: MODULE:CALLABLE or FILE.py:CALLABLE, --pictures FOLDER, --texts"),
    "two tasks": (["x:y", "--pictures", "."], "Expected one of: MODULE:CALLABLE"),
    "epochs of a function": (["x:y", "--epochs", "3"], "--epochs belong to --pictures and --texts"),
    "no network": (["--pictures", "."], "--pictures needs --network NAME"),
    "budget": (["x:y", "--budget", "20"], "expected a number and a unit, as in 90s, 20m or 1.5h"),
    "variant": (["x:y", "--variant", "warp=9"], "'warp=9' is no variant; expected 'default', or OPTION=VALUE"),
    "value": (["x:y", "--variant", "patience=many"], "`patience` is 'many'"),
    "type": (["x:y", "--variant", "threshold=high"], "`threshold` is 'high'; expected a confid"),
    "share": (["x:y", "--fewer-steps", "150"], "'150' is no share of the steps"),
    "threshold": (["x:y", "--threshold", "0"], "0.0 is not in the range"),
    "quality": (["x:y", "--quality", "best"], "'best' is not one of 'same', 'balanced', 'fast'"),
}


def test_qualities_and_thresholds_of_the_command_are_variants(monkeypatch):
    found = []
    monkeypatch.setattr("smartfrz.comparing.cli._source", lambda task, ready: None)
    monkeypatch.setattr(command, "run_compare", lambda source, chosen, tell: found.extend(chosen.variants))
    invoke(main, "compare", "x:y", "--quality", "fast", "--quality", "same", "--threshold", "0.5")
    assert found == ["default", "threshold=0.5", "quality=fast", "quality=same"]


def test_the_demo_takes_a_threshold_or_a_quality():
    result = invoke(main, "demo", "--threshold", "0.5", "--quality", "same")
    assert result.exit_code == 2
    assert "Pass one of them" in result.stderr


@pytest.mark.parametrize("case", WRONG_USAGE)
def test_wrong_usage(case):
    arguments, message = WRONG_USAGE[case]
    result = invoke(main, "compare", *arguments)
    assert message in " ".join(result.stderr.split())
    assert result.exit_code == 2


def test_a_damaged_file_of_results_is_named_before_anything_is_trained(tmp_path, eager_predictor):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "runs.jsonl").write_text("{}\n{")
    result = call(write_task(tmp_path), tmp_path / "out", eager_predictor)
    assert "line 2 is damaged" in result.stderr
    assert result.exit_code == 1


def test_a_predictor_of_ones_own_is_told_apart_by_its_content(tmp_path):
    assert variant("default", "smartfrz-base").name == "SmartFRZ"
    assert variant("threshold=0.9,predictor=smartfrz-base", "other").name == "SmartFRZ threshold=0.9"
    assert variant("predictor=other@2", "smartfrz-base").name == "SmartFRZ with other@2"
    file = tmp_path / "mine.onnx"
    names = []
    for content in (b"1", b"2"):
        file.write_bytes(content)
        names.append(variant("threshold=0.9", str(file)).name)
    assert names[0] != names[1]
    assert all(re.fullmatch(r"SmartFRZ with mine\.onnx [0-9a-f]{6} threshold=0\.9", name) for name in names)


def test_variants_and_shares():
    assert variant("default", "mine").policy(None) == "mine"
    made = variant("threshold=0.9,freeze_order=prefix,predictor=other.onnx", "mine")
    assert (made.policy(None), made.options) == ("other.onnx", {"threshold": 0.9, "freeze_order": "prefix"})
    assert [(method.name, method.share) for method in fewer_steps("50, 33.5")] == [
        ("50 % of the steps", 0.5),
        ("33.5 % of the steps", 0.335),
    ]
    assert fewer_steps("") == []


class MockRun:
    """A run in a world of known speed: a step takes what `speed` says at that moment of the world."""

    def __init__(self, method, world, factor):
        self.result, self.total_steps = Result(method.name, full_steps=100), method.steps(100)
        self.world, self.factor = world, factor

    def advance(self, steps):
        for _ in range(min(steps, self.total_steps - self.result.steps)):
            self.result.steps += 1
            seconds = self.factor * self.world["slow"]
            self.result.cpu_seconds += seconds
            self.result.train_seconds += seconds
        return self.result.steps < self.total_steps

    def finish(self):
        return self.result


def test_a_machine_that_was_slower_at_the_second_start_changes_no_share(tmp_path):
    world = {"slow": 1.0}
    freezing = variant("default", "mine")

    def start(seed):
        return lambda method: MockRun(method, world, 0.7 if method.policy else 1.0)

    study.run_study(start, [FULL], [0], {}, tmp_path / "r.jsonl")
    world["slow"] = 3.0
    full, line = study.run_study(start, [FULL, freezing], [0], {}, tmp_path / "r.jsonl")
    assert full["cpu_seconds"] == pytest.approx(100)
    assert line["cpu_seconds"] == pytest.approx(210)
    assert line["cpu_seconds"] / (100 * line["pace"]["cpu_seconds"]) == pytest.approx(0.7)

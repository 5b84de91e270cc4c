"""The page of a report: what it says, that it loads nothing, and that names do no harm."""

import builtins
import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("jinja2")

from smartfrz.control.curves import Curves, chosen_from
from smartfrz.control.decision import FreezeDecision
from smartfrz.control.pace import Interval, measure_saving
from smartfrz.control.report import Report
from smartfrz.errors import MissingDependencyError
from smartfrz.report_page import shorten

EVIL = "</script><script>alert(1)</script><img src=https://example.com/x.png onerror=alert(2)>"
VIT = [
    f"vit.encoder.layer.{i}.{part}"
    for i in range(12)
    for part in ("attention.attention.query", "attention.attention.key", "attention.output.dense", "output.dense")
]


class Page(HTMLParser):
    """The tags, the texts and the JSON of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.data, self._inside = [], [], None, None
        self.feed(text)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = (tag, dict(attrs))

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        tag, attrs = self._inside or ("", {})
        if attrs.get("type") == "application/json":
            self.data = json.loads(data)
        elif tag not in ("script", "style"):
            self.texts.append(data)

    def rows(self):
        return [attrs["title"] for _, attrs in self.tags if "data-row" in attrs]


def report(names=("a", "b", "c", "d"), **fields):
    layers = [SimpleNamespace(name=name, forward_flops=100) for name in names]
    decisions = [FreezeDecision(5, 0, layer, 0.25, "keep", "below_threshold", 0.9) for layer in names]
    decisions += [FreezeDecision(10, 1, names[0], 0.95, "freeze", "confident", 0.9)]
    decisions += [FreezeDecision(30, 5, names[0], math.nan, "thaw", "by_hand")]
    given = {
        "user_frozen": {names[1]},
        "changes": [(10, "freeze", names[0]), (30, "thaw", names[0])],
        "decisions": decisions,
        "num_steps": 40,
        "seconds": 4.0,
        "curves": {"loss": [(1, 2.0), (20, math.nan), (40, 0.5)], "val_loss": [(40, 0.75)], "accuracy": [(40, 0.875)]},
        "intervals": [
            Interval(step, 5, 0.1 if step <= 10 else 0.04, 0 if step <= 10 else 1) for step in range(5, 31, 5)
        ],
    }
    return Report(layers, **(given | fields))


def saved(tmp_path, it):
    it.save(tmp_path / "run.html")
    return Page((tmp_path / "run.html").read_text("utf-8"))


def test_the_page_tells_who_froze_what_when_and_what_it_saved(tmp_path):
    page = saved(tmp_path, report())
    assert page.rows() == [
        "a: frozen by SmartFRZ from step 10 to 30; confidence 0.950 at step 10",
        "b: frozen by the training script from step 0; confidence 0.250 at step 5",
        "c: trained all the time; confidence 0.250 at step 5",
        "d: trained all the time; confidence 0.250 at step 5",
    ]
    assert "SmartFRZ froze 1 of 4 layers in 40 steps" in page.text
    assert "Time saved, measured about 1.2 s" in page.text
    assert "A step took 0.1 s before layers froze and 40 ms at the end." in page.text
    assert "30 a thawed: thaw() was called" in page.text
    headings = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg" and "aria-label" in attrs]
    assert headings == [f"{name} over training steps" for name in ("loss", "accuracy", "seconds per step")]
    assert page.data["confidence"][0] == [0.25, 0.95]
    assert [[line["name"] for line in each["lines"]] for each in page.data["curves"]] == [
        ["loss", "val_loss"],
        ["accuracy"],
        ["seconds per step"],
    ]


def test_the_page_loads_nothing_and_names_do_no_harm(tmp_path):
    page = saved(tmp_path, report((EVIL, "b", "c", "d"), curves={EVIL: [(1, 2.0)]}, why_nothing=[EVIL]))
    assert [tag for tag, _ in page.tags if tag in ("img", "link", "iframe", "object", "a", "base")] == []
    assert [name for _, attrs in page.tags for name in attrs if name in ("src", "href") or name.startswith("on")] == []
    assert [attrs for tag, attrs in page.tags if tag == "script"] == [
        {"type": "application/json", "id": "smartfrz-data"},
        {},
    ]
    assert page.data["layers"][0] == EVIL
    assert page.rows()[0].startswith(EVIL)
    text = (tmp_path / "run.html").read_text("utf-8")
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert "url(" not in text
    assert EVIL not in text


def test_a_name_with_half_of_a_surrogate_pair_is_saved(tmp_path):
    made = report(("a\ud800", "b", "c", "d"))
    for name in ("run.html", "run.json"):
        made.save(tmp_path / name)
        assert "d800" in (tmp_path / name).read_text("utf-8")


def test_where_nothing_froze_it_says_why(tmp_path):
    reason = "a, b: below the threshold (a is closest: 0.400, 0.100 below its threshold, at step 20)"
    page = saved(tmp_path, report(changes=[], decisions=[], user_frozen=set(), intervals=[], why_nothing=[reason]))
    assert f"Why nothing froze {reason}" in page.text
    assert "Time saved, measured none Nothing was frozen." in page.text


def test_a_dry_run_and_a_run_without_a_step_have_pages_too(tmp_path):
    dry = report(changes=[(10, "would_freeze", "a")], dry_run=True, decisions=[])
    page = saved(tmp_path, dry)
    assert "would have frozen 1 of 4 layers" in page.text
    assert "This was a dry run: nothing was really frozen." in page.text
    assert page.rows()[0] == "a: would have been frozen from step 10"
    assert "SmartFRZ: no step yet" in saved(tmp_path, Report()).text


@pytest.mark.parametrize(
    ("values", "cut"),
    [
        ([2.06, 1.17, 0.77], ""),
        ([0.1117, 0.0521, 0.01, 0.005, 0.002, 0.002], ""),
        ([90.0, *[1.0] * 20], "highest value 90, cut off"),
    ],
    ids=["three logs", "a little higher", "far out"],
)
def test_only_a_peak_that_would_flatten_all_the_rest_is_cut_off(tmp_path, values, cut):
    text = saved(tmp_path, report(curves={"loss": list(enumerate(values))})).text
    assert cut in text
    assert ("cut off" in text) == bool(cut)


def test_a_notebook_shows_the_same_without_a_script():
    page = Page(report()._repr_html_())
    assert len(page.rows()) == 4
    assert not {"script", "html", "head", "body"} & {tag for tag, _ in page.tags}
    assert repr(report()) == "Report(froze 1 of 4 layers in 40 steps)"
    assert repr(Report()) == "Report(no step yet)"


def test_json_holds_what_to_dict_returns(tmp_path):
    it = report()
    it.save(tmp_path / "run.json")
    text = (tmp_path / "run.json").read_text("utf-8")
    assert json.loads(text) == it.to_dict()
    assert "NaN" not in text
    assert it.to_dict()["spans"] == {"a": [[10, 30, "smartfrz"]], "b": [[0, 40, "user"]]}
    assert it.to_dict()["acts"][-1]["reason"] == "by_hand"
    with pytest.raises(ValueError, match=r"run.pdf'; expected a name that ends in \.html"):
        it.save("run.pdf")


def test_without_jinja2_the_error_names_the_extra_and_a_notebook_shows_the_text(monkeypatch, tmp_path):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "jinja2":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependencyError, match=r'pip install "smartfrz\[plots[,\]]'):
        report().save(tmp_path / "run.html")
    assert list(tmp_path.iterdir()) == []
    assert report()._repr_html_() is None
    report().save(tmp_path / "run.json")


def test_jinja2_is_loaded_only_when_a_page_is_written():
    code = "import smartfrz.adapters.base, sys; print('jinja2' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_long_run_of_many_layers_makes_a_small_file(tmp_path):
    names = [f"encoder.layer.{i}.attention.self.query" for i in range(200)]
    decisions = [
        FreezeDecision(step, step, name, 0.123456, "keep", "below_threshold", 0.9)
        for step in range(2, 10_001, 20)
        for name in names
    ]
    curve = [(step, 1.0 / (step + 1)) for step in range(4000)]
    it = report(names, decisions=decisions, num_steps=10_000, curves={f"c{i}": curve for i in range(5)}, changes=[])
    for name in "run.html", "run.json":
        it.save(tmp_path / name)
        assert (tmp_path / name).stat().st_size < 8_000_000
    assert len(it.to_dict()["stages"]["steps"]) == 300
    assert len(it.to_dict()["curves"]["c0"]) == 500


@pytest.mark.parametrize("most", [15, 17, 20, 30])
def test_short_names_fit_and_tell_the_layers_of_a_vit_apart(most):
    short = [shorten(name, most) for name in VIT]
    assert max(map(len, short)) <= most
    assert len(set(short)) == len(VIT)
    assert len(shorten(EVIL, most)) <= most
    assert shorten("conv1", most) == "conv1"


def intervals(*runs):
    found = [(steps, seconds, frozen) for count, steps, seconds, frozen in runs for _ in range(count)]
    return [Interval(10 * (i + 1), *interval) for i, interval in enumerate(found)]


def test_the_saving_is_measured_in_the_runs_own_steps():
    saving = measure_saving(intervals((4, 10, 0.1, 0), (5, 10, 0.06, 3), (3, 10, 0.04, 5)), overhead=0.5)
    assert saving == pytest.approx((0.1, 0.04, 50 * 0.04 + 30 * 0.06 - 0.5))


def test_an_evaluation_is_no_cost_of_freezing():
    calm = intervals((4, 10, 0.1, 0), (5, 10, 0.05, 3))
    with_evaluation = [x._replace(seconds=3.0) if x.step in (20, 60) else x for x in calm]
    assert measure_saving(with_evaluation, 0.0) == measure_saving(calm, 0.0)
    one = [*calm[:4], calm[4]._replace(seconds=3.0)]
    assert measure_saving(one, 0.0).seconds == 0.0


def test_nothing_is_claimed_that_was_not_measured():
    assert measure_saving([], 0.0) is None
    assert measure_saving(intervals((9, 10, 0.1, 0)), 0.0) is None
    assert measure_saving(intervals((1, 10, 0.1, 0), (9, 10, 0.1, 2)), 0.0) is None


@pytest.mark.parametrize("values", [(5e-324, 5e-324), (0.0, 5e-324), (-1e308, 1e308), (1.7e308, 1.0), (1e308, 1e308)])
def test_numbers_at_the_limits_of_floats_have_a_page(values, tmp_path):
    page = saved(tmp_path, report(curves={"loss": list(enumerate(values))}))
    assert page.data["steps"]


def test_curves_are_noted_and_thinned():
    curves = Curves()
    for step in range(20_000):
        curves.note(step, {"loss": np.float32(step)})
    points = curves.copy()["loss"]
    assert len(points) <= 4000
    assert (points[0], points[-1]) == ((0, 0.0), (19_999, 19_999.0))
    curves.note(20_000, {"accuracy": 0.5})
    curves.note(20_001, {"accuracy": 0.5}, only_new=True)
    assert curves.copy()["accuracy"] == [(20_000, 0.5)]
    with pytest.raises(TypeError, match="The value of 'loss' is str 'low'; expected a number"):
        curves.note(1, {"loss": "low"})
    logs = {"loss": 1.0, "epoch": 1.0, "learning_rate": 0.1, "eval_runtime": 3.0, "note": "x", "f1": np.float64(0.5)}
    assert set(chosen_from(logs)) == {"loss", "f1"}

import itertools
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib")

from smartfrz.control.report import Report
from smartfrz.plots import ACTIVE, FROZEN, plot_report

LAYERS = [SimpleNamespace(name=name, forward_flops=100) for name in "abcd"]


def bars(figure):
    """Of each layer, from which step to which it is shown as frozen."""
    from matplotlib.colors import to_hex

    frozen, trained = {}, set()
    for collection in figure.axes[0].collections:
        colour = to_hex(collection.get_facecolor()[0])
        for path in collection.get_paths():
            (left, bottom), (right, _) = path.get_extents().min, path.get_extents().max
            if colour == FROZEN:
                frozen.setdefault(int(bottom), []).append((left, right))
            else:
                assert colour == ACTIVE
                trained.add(int(bottom))
    assert trained == set(range(len(LAYERS)))
    return frozen


def test_the_picture_of_a_report_shows_when_each_layer_was_frozen():
    changes = [(10, "freeze", "a"), (20, "freeze", "c"), (30, "thaw", "c"), (35, "freeze", "c")]
    report = Report(LAYERS, {"a": 10, "c": 35}, {"b"}, changes, num_steps=40)
    figure = plot_report(report)
    assert bars(figure) == {0: [(10, 40)], 1: [(0, 40)], 2: [(20, 30), (35, 40)]}
    assert "SmartFRZ froze 2 of 4 layers" in figure.axes[0].get_title(loc="left")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list("abcd")


def test_of_a_dry_run_it_says_so():
    report = Report(LAYERS, {"a": 10}, set(), [(10, "would_freeze", "a")], num_steps=40, dry_run=True)
    assert "SmartFRZ would have frozen 1 of 4" in plot_report(report).axes[0].get_title(loc="left")
    assert report.scalars()["smartfrz/frozen_layers"] == 0.0


def test_a_run_without_a_step_has_no_picture():
    with pytest.raises(ValueError, match="a run without a step; expected one with at least one"):
        plot_report(Report())


def test_long_names_fit_the_legend_covers_nothing_and_the_backend_stays():
    names = [f"vit.encoder.layer.{i}.attention.attention.query.with.a.long.name" for i in range(74)]
    layers = [SimpleNamespace(name=name, forward_flops=100) for name in names]
    figure = plot_report(Report(layers, {names[0]: 10}, set(), [(10, "freeze", names[0])], num_steps=40))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    (legend,) = figure.legends
    assert not legend.get_window_extent().overlaps(axes.get_tightbbox())
    labels = axes.get_yticklabels()
    assert max(len(label.get_text()) for label in labels) <= 32
    boxes = [label.get_window_extent() for label in labels]
    assert all(not one.overlaps(other) for one, other in itertools.pairwise(boxes))
    code = "import matplotlib; matplotlib.use('svg'); import smartfrz.plots; print(matplotlib.get_backend())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.lower() == "svg\n"

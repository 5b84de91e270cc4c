"""What is said about made-up results, of which is known what would be true."""

import sys

import pytest

from smartfrz.comparing.verdict import Spread, judge, text_table


def line(method, kind, seed, accuracy, seconds, *, frozen=0, pace=1.0, wall=None, share=1.0):
    layers = [f"layer{i}" for i in range(10)] if kind == "freezing" else []
    return {
        "method": method,
        "kind": kind,
        "seed": seed,
        "accuracy": accuracy,
        "steps": round(100 * share),
        "full_steps": 100,
        "cpu_seconds": seconds,
        "train_seconds": seconds if wall is None else wall,
        "pace": {"cpu_seconds": pace, "train_seconds": pace},
        "layers": layers,
        "frozen": {name: 5 for name in layers[:frozen]},
    }


def runs(freezing, fewer=(0.85, 0.86, 0.84), seeds=3, time=70.0):
    """Full training reaches 90 %; SmartFRZ takes about 70 % of the time, and fewer steps half of it."""
    made = []
    for seed in range(seeds):
        made.append(line("full training", "full", seed, 0.9 + 0.001 * seed, 100.0))
        made.append(line("SmartFRZ", "freezing", seed, freezing[seed] + 0.001 * seed, time + seed, frozen=6))
        made.append(line("50 % of the steps", "fewer", seed, fewer[seed], 50.0, share=0.5))
    return made


def test_what_is_confirmed_is_said_in_one_sentence():
    verdict = judge(runs([0.901, 0.9, 0.9]))
    assert verdict.sentence == (
        "SmartFRZ reaches full training's accuracy in 71 ± 1 % of its time (+0.0 ± 0.1 points); training 50 % of the steps "
        "loses 5.1 ± 1.1 points."
    )
    assert verdict.sentence.count(". ") == 0
    assert "standard deviation over 3 seeds" in verdict.notes[0]


def test_a_loss_is_said_as_a_loss():
    sentence = judge(runs([0.88, 0.881, 0.879])).sentence
    assert sentence.startswith("SmartFRZ loses 2.0 ± 0.1 points in 71 ± 1 % of full training's time;")


def test_what_scatters_too_much_is_not_confirmed():
    sentence = judge(runs([0.92, 0.88, 0.9])).sentence
    assert "3 seeds are too few to tell whether it stays within 0.5 points" in sentence
    assert "reaches" not in sentence
    # nor is it with a small loss of which it is open whether it is within the tolerance
    assert "too few to tell" in judge(runs([0.90, 0.89, 0.897])).sentence


def test_one_seed_confirms_nothing():
    verdict = judge(runs([0.9], seeds=1))
    assert verdict.sentence.startswith(
        "With one seed, SmartFRZ took 70 % of full training's time and ended at the same"
    )
    assert "±" not in verdict.sentence
    assert "reaches" not in verdict.sentence
    assert "One seed: how much of a difference is chance is not known" in verdict.notes[0]
    assert "--seeds 3" in verdict.notes[0]


def test_the_spread_of_one_seed_is_said_to_be_unknown():
    assert judge(runs([0.9], seeds=1)).sentence.endswith("loses 5.0 points; the spread over seeds is unknown.")
    assert "unknown" not in judge(runs([0.9, 0.9, 0.9])).sentence


def test_full_training_that_learned_nothing_is_no_measure():
    sentence = judge(runs([0.9, 0.9, 0.9]), chance=0.95).sentence
    assert sentence.startswith(
        "Full training learned nothing: it reaches 90.1 ± 0.1 %, and a model that always gives the"
    )
    assert "learned nothing" not in judge(runs([0.9, 0.9, 0.9]), chance=0.5).sentence


def test_what_diverged_is_said_to_and_not_chosen():
    lines = runs([0.9, 0.9, 0.9])
    for one in lines:
        one["diverged"] = one["kind"] == "freezing" and one["seed"] == 1
    assert judge(lines).sentence.startswith(
        "SmartFRZ diverged in 1 of 3 runs, whose loss was no finite number; training 50"
    )
    lines += [line("SmartFRZ threshold=0.7", "freezing", seed, 0.8, 90.0, frozen=8) for seed in range(3)]
    assert judge(lines).sentence.startswith("SmartFRZ threshold=0.7 loses 10.1 ± 0.1 points")


def test_fewer_steps_that_do_as_well_are_said_to():
    sentence = judge(runs([0.9, 0.9, 0.9], fewer=(0.91, 0.91, 0.91))).sentence
    assert sentence.endswith("training 50 % of the steps did at least as well in 50 ± 0 % of the time.")


def test_of_several_ways_the_fastest_that_keeps_the_accuracy_is_named():
    lines = runs([0.9, 0.9, 0.9])
    for seed in range(3):
        lines.append(line("SmartFRZ threshold=0.7", "freezing", seed, 0.9 + 0.001 * seed, 60.0, frozen=8))
        lines.append(line("SmartFRZ threshold=0.5", "freezing", seed, 0.7, 40.0, frozen=9))
    assert judge(lines).sentence.startswith("SmartFRZ threshold=0.7 reaches full training's accuracy in 60 ± 0 %")
    # if none keeps it, the one that loses least
    assert judge([one for one in lines if one["method"] != "SmartFRZ threshold=0.7"], tolerance=0).sentence.startswith(
        "SmartFRZ reaches"
    )


def test_what_froze_nothing_or_saves_nothing_is_said():
    lines = runs([0.9, 0.9, 0.9], time=103)
    assert "in 104 ± 1 % of its time (+0.0 ± 0.0 points), so it saves no time" in judge(lines).sentence
    for one in lines:
        one["frozen"] = {}
    assert "SmartFRZ froze nothing here and took 104 ± 1 % of full training's time" in judge(lines).sentence


def test_time_is_compared_with_full_training_at_the_same_time():
    lines = runs([0.9], seeds=1)
    lines[1] |= {"cpu_seconds": 140.0, "train_seconds": 140.0, "pace": {"cpu_seconds": 2.0, "train_seconds": 2.0}}
    assert judge(lines).figures[1].time == Spread(0.7, None, 1)


def test_clocks_that_disagree_are_named():
    lines = runs([0.9], seeds=1)
    lines[1]["train_seconds"] = 90.0
    (note,) = [note for note in judge(lines).notes if "by the clock" in note]
    assert "SmartFRZ took 70 % by processor time, but 90 % by the clock" in note
    assert judge(lines, clock="train_seconds").figures[1].time.mean == 0.9


def test_a_metric_that_is_no_share_has_no_percent():
    lines = runs([0.9, 0.9, 0.9])
    for one in lines:
        one["accuracy"] = -20 * (1 - one["accuracy"])
    verdict = judge(lines, "negative error")
    assert "reaches full training's negative error" in verdict.sentence
    assert "loses 1.02 ± 0.21 of negative error" in verdict.sentence
    assert "points" not in verdict.sentence
    assert verdict.tolerance == pytest.approx(0.0198)
    assert verdict.table()[1][2] == "-1.98 ± 0.02"


def test_the_tolerance_is_in_points():
    assert judge(runs([0.89, 0.89, 0.89]), tolerance=2).sentence.startswith("SmartFRZ reaches")
    assert judge(runs([0.89, 0.89, 0.89]), tolerance=0.5).sentence.startswith("SmartFRZ loses 1.0 ± 0.0 points")


def test_without_freezing_only_the_fewer_steps_are_told():
    lines = [one for one in runs([0.9, 0.9, 0.9]) if one["kind"] != "freezing"]
    assert judge(lines).sentence == "training 50 % of the steps loses 5.1 ± 1.1 points; SmartFRZ was not tried."


def test_seeds_without_full_training_are_left_out():
    lines = [one for one in runs([0.9, 0.9, 0.5]) if (one["kind"], one["seed"]) != ("full", 2)]
    assert {one.metric.seeds for one in judge(lines).figures} == {2}
    with pytest.raises(ValueError, match="expected full training and another method"):
        judge(lines[:1])


def test_the_margin_is_that_of_students_t():
    assert Spread.over([1.0, 2.0, 3.0]).margin == pytest.approx(2.92 / 3**0.5)
    assert Spread.over([1.0]).margin == float("inf")
    many = Spread.over([0.0, 1.0] * 50)
    assert many.margin == pytest.approx(1.64 * many.deviation / 10)


def test_the_table_is_aligned():
    text = text_table(judge(runs([0.9, 0.9, 0.9])).table())
    header, *rows = text.splitlines()
    assert header.split("  ")[-1].strip() == "layers frozen, %"
    assert rows[1].startswith("SmartFRZ ")
    assert rows[1].endswith("60 ± 0")


def test_the_picture_names_every_method_and_switches_no_backend(monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setattr(matplotlib, "use", lambda *arguments, **options: pytest.fail("switched"))
    sys.modules.pop("smartfrz.comparing.fronts", None)
    from smartfrz.comparing.fronts import draw_fronts

    for seeds in (1, 3):
        verdict = judge(runs([0.9, 0.89, 0.9], seeds=seeds))
        axes = draw_fronts(verdict, "mine").axes[0]
        assert [text.get_text() for text in axes.texts] == ["full training", "50 %", "SmartFRZ"]
        assert axes.texts[1].xy == pytest.approx((50, -5 if seeds == 1 else -5.1))
        assert axes.get_title(loc="left").startswith(f"mine, {seeds} seed")

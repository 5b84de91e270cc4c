"""Puts what was measured into benchmarks/README.md: `python -m benchmarks.tables [--check]`.

Each part of that file between `<!-- begin NAME -->` and `<!-- end NAME -->` is written anew from the JSON lines in
`benchmarks/results/`; parts of which nothing was measured yet say so. `--check` changes nothing, and fails if the
file is not what the lines say.
"""

import argparse
import re
import statistics
import sys
from pathlib import Path

from benchmarks import predictor_tables, rates, sweeps, tradeoff
from benchmarks.compare_results import (
    METHODS,
    NOTES,
    against_early,
    cell,
    frozen_at,
    paired,
    share_of_full,
    stops_early,
    summary,
    task_table,
    tasks_of,
)
from benchmarks.lines import read_lines
from smartfrz.files import replacing

FOLDER = Path(__file__).parent
NOTHING = "Not measured yet."
LANGUAGE = ("minilm-agnews", "minilm-mrpc", "minilm-cola", "bert-mrpc", "bert-cola")
SCRATCH = ("resnet20-scratch",)
SHOWN = {  # the paper's methods, by our names; others of ours follow
    "full": "Full Training",
    "linear": "Linear Freezing",
    "autofreeze": "AutoFreeze",
    "smartfrz": "SmartFRZ",
}
# Accuracy in %, time, computation, as printed in the paper, in the order of SHOWN.
TABLE_2 = {
    "ResNet50, CIFAR-10": ((96.10, 2594, 12360), (96.05, 1980, 8247), (96.24, 2424, 8716), (96.12, 1955, 8122)),
    "ResNet50, CIFAR-100": ((81.68, 2500, 12360), (81.48, 1844, 7085), (81.30, 1963, 7716), (81.73, 1787, 6398)),
    "VGG11, CIFAR-10": ((93.36, 2698, 22950), (92.35, 1587, 10291), (93.08, 1895, 13350), (93.58, 1554, 10059)),
    "VGG11, CIFAR-100": ((74.95, 2703, 22950), (73.26, 1846, 12307), (74.74, 2027, 13946), (74.66, 1831, 12121)),
    "MobileNetV2, CIFAR-10": ((94.15, 1369, 960), (94.19, 977, 567), (94.26, 1245, 678), (94.03, 972, 561)),
    "MobileNetV2, CIFAR-100": ((76.52, 1371, 960), (75.59, 1000, 540), (76.43, 1248, 652), (76.73, 986, 532)),
    "DeiT-T, CIFAR-10": ((97.48, 14603, 32400), (97.06, 8760, 16290), (97.35, 10368, 17786), (97.65, 8662, 15529)),
    "DeiT-T, CIFAR-100": ((85.03, 14628, 32400), (83.89, 9956, 17542), (84.59, 11154, 18710), (84.82, 9599, 16636)),
}
TABLE_3 = {
    "ResNet50, CIFAR-100": ((77.48, 711), (74.99, 615), (72.82, 630), (77.64, 538)),
    "ResNet50, ImageNet": ((76.89, 780), (75.45, 626), (74.06, 682), (76.80, 621)),
}
TABLE_6 = {
    "BERT-base, MRPC": ((86.51, 316), (85.80, 221), (86.02, 266), (86.76, 215)),
    "BERT-base, CoLA": ((56.65, 723), (55.90, 429), (56.05, 431), (56.66, 423)),
}
TABLE_1 = {"ResNet50, CIFAR-100": ((81.68, 12360), (81.75, 6454)), "VGG11, CIFAR-100": ((74.95, 22950), (74.89, 12811))}


def of_paper(table):
    """Markdown: differences to full training, times and computation as shares of it, from the paper's own figures."""
    rows = ["| paper | method | accuracy, % | difference | time | computation |", "|---" * 6 + "|"]
    for task, entries in table.items():
        full = entries[0]
        for method, entry in zip(SHOWN.values(), entries, strict=True):
            shares = [f"{100 * mine / theirs:.1f} %" for mine, theirs in zip(entry[1:], full[1:], strict=True)]
            difference = f"{entry[0] - full[0]:+.2f}" if entry is not full else ""
            cells = [task, method, f"{entry[0]:.2f}", difference, *shares, *[""] * (3 - len(entry))]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def ours(groups, methods=METHODS):
    """Markdown in the same form, of these groups of lines, with what stopping early reaches at equal time."""
    rows = [
        "| ours | method | accuracy, % | difference | time | computation | to stopping early at equal time |",
        "|---" * 7 + "|",
    ]
    for task, lines in groups.items():
        full = {line["seed"]: line for line in lines if line["method"] == "full"}
        for method in methods:
            found = [line for line in lines if line["method"] == method]
            if not found:
                continue
            work = [
                100 * line["total_flops"] / full[line["seed"]]["total_flops"]
                for line in found
                if line["total_flops"] and line["seed"] in full
            ]
            cells = [task, method, cell([100 * line["accuracy"] for line in found], ".1f")]
            cells.append(
                cell(paired(lines, method, lambda line: 100 * line["accuracy"]), "+.1f") if method != "full" else ""
            )
            cells.append(cell([100 * share_of_full(line) for line in found], ".1f", " %"))
            cells.append(f"{statistics.mean(work):.1f} %" if work else "")
            judged = method != "full" and not stops_early(method)
            cells.append(cell(against_early(lines, method), "+.1f") if judged else "")
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def chosen(lines, keep):
    """Groups of the lines whose task is one of those."""
    return tasks_of([line for line in lines if keep(line["task"])])


def beside(groups, table, methods=METHODS):
    """Ours, and then the paper's."""
    return "\n\n".join([ours(groups, methods) if groups else NOTHING, of_paper(table)])


def similarity(lines):
    """Table 1: freezing by similarity to a finished reference."""
    groups = tasks_of(lines)
    groups = {name: found for name, found in groups.items() if any(x["method"] == "similarity-guided" for x in found)}
    rows = ["| paper | accuracy, full | accuracy, similarity-guided | computation |", "|---" * 4 + "|"]
    for task, (full, guided) in TABLE_1.items():
        rows.append(f"| {task} | {full[0]:.2f} % | {guided[0]:.2f} % | {100 * guided[1] / full[1]:.1f} % |")
    shown = ours(groups, ("full", "similarity-guided")) if groups else NOTHING
    return "\n\n".join([shown, "\n".join(rows)])


def memory(lines):
    """Fig. 5(a) in figures: memory at the end of the run, of full training's peak."""
    methods = [method for method in METHODS if method != "full" and not stops_early(method)]
    rows = [f"| memory at the end, % of full training | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|"]
    for task, found in tasks_of(lines).items():
        full = {line["seed"]: line["peak_memory_bytes"] for line in found if line["method"] == "full"}
        cells = []
        for method in methods:
            ends = [
                100 * line["memory"][-1][1] / full[line["seed"]]
                for line in found
                if line["method"] == method and line["seed"] in full
            ]
            cells.append(f"{statistics.mean(ends):.0f}" if ends else "")
        rows.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(rows) if lines else NOTHING


def shares_by_clock(lines):
    """What is saved in FLOPs and what in time, and what deciding takes: means over seeds, of full training."""
    rows = ["| ours | method | backward FLOPs | all FLOPs | time | deciding, of the run's time |", "|---" * 6 + "|"]
    for task, found in tasks_of(lines).items():
        full = {line["seed"]: line for line in found if line["method"] == "full"}
        for method in METHODS:
            chosen = [line for line in found if line["method"] == method and line["seed"] in full]
            if method == "full" or stops_early(method) or not chosen:
                continue
            cells = [task, method]
            for key in ("backward_flops", "total_flops"):
                shares = [100 * line[key] / full[line["seed"]][key] for line in chosen if line[key]]
                cells.append(f"{statistics.mean(shares):.0f} %" if shares else "")
            cells.append(f"{100 * statistics.mean(map(share_of_full, chosen)):.0f} %")
            cells.append(f"{100 * statistics.mean(x['decision_seconds'] / x['train_seconds'] for x in chosen):.1f} %")
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def other_predictors(lines, known):
    """SmartFRZ with other predictors, beside `smartfrz-base` and the full runs of the same tasks and seeds."""
    rows = [
        "| ours | predictor | accuracy, % | difference | computation | half of the layers frozen at |",
        "|---" * 6 + "|",
    ]
    for task in dict.fromkeys((line["tier"], line["task"]) for line in lines):
        of_task = [line for line in known + lines if (line["tier"], line["task"]) == task]
        full = {line["seed"]: line for line in of_task if line["method"] == "full"}
        ran = [line for line in of_task if line["method"] == "smartfrz" and line["seed"] in full]
        for name in dict.fromkeys(line["predictor"]["name"] for line in ran):
            found = [line for line in ran if line["predictor"]["name"] == name]
            pairs = [(line, full[line["seed"]]) for line in found]
            work = [100 * line["total_flops"] / whole["total_flops"] for line, whole in pairs]
            halfway = [100 * statistics.median(frozen_at(line).values()) for line in found]
            cells = [" ".join(task), name, cell([100 * line["accuracy"] for line in found], ".1f")]
            cells.append(cell([100 * (line["accuracy"] - whole["accuracy"]) for line, whole in pairs], "+.1f"))
            cells += [cell(work, ".1f", " %"), f"{statistics.mean(halfway):.0f} % of the run"]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) if lines else NOTHING


def moments(lines):
    """Fig. 5(b) in figures: when the layers of the front and of the back half freeze."""
    rows = ["| frozen at, % of the run | method | layers | front half | back half | never |", "|---" * 6 + "|"]
    for task, found in tasks_of(lines).items():
        for method in METHODS:
            chosen = [line for line in found if line["method"] == method and line.get("layers") and line["events"]]
            if not chosen:
                continue
            halves, never = ([], []), []
            for line in chosen:
                frozen, names = frozen_at(line), line["layers"]
                for half, part in zip(halves, (names[: len(names) // 2], names[len(names) // 2 :]), strict=True):
                    half += [100 * frozen[name] for name in part if name in frozen]
                never.append(len(names) - len(frozen))
            cells = [task, method, str(len(chosen[0]["layers"]))]
            cells += [f"{statistics.mean(half):.0f}" if half else "" for half in halves]
            rows.append(f"| {' | '.join([*cells, f'{statistics.mean(never):.1f}'])} |")
    return "\n".join(rows) if len(rows) > 2 else NOTHING


def picture(folder, name, text):
    """A picture of the folder, if it was drawn."""
    return f"![{text}](pictures/{name}.png)" if (folder / "pictures" / f"{name}.png").exists() else NOTHING


def sections(folder=FOLDER):
    """Name to text of all parts that are made from results."""
    results = folder / "results"
    lines, longer, on_gpu = (read_lines(results / f"{tier}.jsonl") for tier in ("cpu", "long", "gpu"))
    settings = read_lines(results / "tradeoff.jsonl")
    predictor, swept = read_lines(results / "predictor_tables.jsonl"), read_lines(results / "sweeps.jsonl")
    tried = read_lines(results / "rates.jsonl")
    language = chosen(lines + longer, lambda task: task in LANGUAGE)
    scratch = chosen(lines, lambda task: task in SCRATCH)
    tuned = chosen(lines, lambda task: task not in (*LANGUAGE, *SCRATCH))
    machines = sorted({line["machine"] for line in lines + longer + on_gpu})
    made = {
        "summary": "\n\n".join([summary(tasks_of(lines)), NOTES]) if lines else NOTHING,
        "equal-time": picture(folder, "accuracy_against_time", "Accuracy against time saved"),
        "tradeoff": tradeoff.table([x for x in settings if x["tier"] == "cpu"] + lines),
        "tradeoff-picture": picture(folder, "tradeoff", "Accuracy against training time"),
        "longer": ours(tasks_of(longer)) if longer else NOTHING,
        "predictors": other_predictors(read_lines(results / "predictors.jsonl"), lines + longer),
        "gpu": "\n\n".join([ours(tasks_of(on_gpu)), shares_by_clock(on_gpu)]) if on_gpu else NOTHING,
        "rates": rates.table(tried, "cpu", {}) or NOTHING,
        "rates-longer": rates.table(tried, "long", {}) or NOTHING,
        "table-1": similarity(lines),
        "table-2": beside(tuned, TABLE_2),
        "table-3": beside(scratch, TABLE_3),
        "table-4": predictor_tables.setting_table(predictor, "window") or NOTHING,
        "table-5": predictor_tables.setting_table(predictor, "size") or NOTHING,
        "table-6": beside(language, TABLE_6),
        "tables-8-9": sweeps.tables(swept) if swept else NOTHING,
        "representation": predictor_tables.representation_table(predictor) or NOTHING,
        "figure-3": predictor_tables.gradient_table(predictor) or NOTHING,
        "figure-3-picture": picture(folder, "gradient_distribution", "Gradients of a layer and of a subset of it"),
        "figure-4": picture(folder, "cka", "CKA of each layer to the end of training"),
        "figure-5a": memory(lines),
        "figure-5b": moments(lines),
        "appendix-c": predictor_tables.cost_table(predictor) or NOTHING,
        "all": "\n\n".join(task_table(name, group) for name, group in tasks_of(lines).items()) or NOTHING,
        "machines": f"Machines: {'; '.join(machines)}." if machines else NOTHING,
    }
    return made


def filled(text, made):
    """The text with each marked part replaced.

    Raises:
        ValueError: If it has a mark that nothing is made for, or lacks one.
    """
    names = re.findall(r"<!-- begin (\S+) -->", text)
    if sorted(names) != sorted(made):
        raise ValueError(
            f"The marks are {sorted(names)}; expected each of {sorted(made)} once. Add or remove `<!-- begin NAME -->` and "
            "`<!-- end NAME -->`."
        )
    for name, part in made.items():
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        text, number = re.subn(pattern, lambda m, part=part: f"{m[1]}{part}\n{m[2]}", text, flags=re.DOTALL)
        if number != 1:
            raise ValueError(f"`<!-- begin {name} -->` has no `<!-- end {name} -->` after it; expected one. Add it.")
    return text


def main(given=None):
    """Write the parts, or see whether they are right."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="Change nothing; exit with 1 if something would change.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="Of README.md, results/ and pictures/.")
    options = parser.parse_args(given)
    readme = options.folder / "README.md"
    if not readme.exists():
        parser.error(f"{readme} does not exist; expected the file whose marked parts are to be written. See --folder.")
    before = readme.read_text("utf-8")
    after = filled(before, sections(options.folder))
    if options.check:
        if after != before:
            sys.exit(f"{readme} is not what the results say; run: python -m benchmarks.tables")
    elif after != before:
        with replacing(readme) as temporary:
            temporary.write_text(after, "utf-8")


if __name__ == "__main__":
    main()

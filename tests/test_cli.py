"""Both commands in-process: exit code 0 done, 1 failed, 2 wrong usage."""

import re
import subprocess
import sys

import pytest
from builder_fixtures import TINY_PARTS, environment_without, invoke, labelled_runs, write_recipe, write_runs

from smartfrz import zoo
from smartfrz.cli import main as smartfrz
from smartfrz.dataset_builder import building
from smartfrz.dataset_builder.cli import main as build
from smartfrz.dataset_builder.labels import LabelRule
from smartfrz.dataset_builder.storage import read_run, run_files
from smartfrz.predictor.contract import REPRESENTATIONS
from smartfrz.predictor.runtime import Predictor
from smartfrz.predictor.training.runs import TrainingOptions

PNG = b"\x89PNG\r\n\x1a\n"
HELP = {
    "smartfrz": (smartfrz, [], "Train to the same accuracy in less time"),
    "smartfrz demo": (smartfrz, ["demo"], "--num-train"),
    "smartfrz compare": (smartfrz, ["compare"], "FILE.py:CALLABLE"),
    "smartfrz zoo": (smartfrz, ["zoo"], "Find, fetch, check and publish predictors"),
    "smartfrz zoo download": (smartfrz, ["zoo", "download"], "--registry"),
    "smartfrz-build": (build, [], "Build a freeze predictor"),
    "record": (build, ["record"], "RECIPES..."),
    "label": (build, ["label"], "--tolerance"),
    "train": (build, ["train"], "--representation"),
    "evaluate": (build, ["evaluate"], "PREDICTOR RUNS"),
    "new": (build, ["new"], "torchvision:NAME"),
    "check": (build, ["check"], "Take two training steps"),
    "run": (build, ["run"], "in one go"),
}

BASE = ["train", "{runs}", "-o", "x.onnx", "--base", "smartfrz-base"]
# Arguments; {runs} holds recorded runs, {cut} one that is cut in half, {empty} nothing, {text} is a text file
WRONG_USAGE = {
    "no such command": (build, ["retrain"], "No such command 'retrain'"),
    "no such demo command": (smartfrz, ["demonstrate"], "No such command 'demonstrate'"),
    "no recipe": (build, ["record"], "Missing argument 'RECIPES...'"),
    "no worker": (build, ["record", "{text}", "--workers", "0"], "'--workers': 0 is not in the range x>=1"),
    "no thread": (build, ["record", "{text}", "--threads", "0"], "'--threads': 0 is not in the range x>=1"),
    "record to a file": (build, ["record", "{recipe}", "-o", "{text}"], "'{text}' is a file. Pass a folder."),
    "record below a file": (build, ["record", "{recipe}", "-o", "{text}/runs"], "'{text}' is a file. Pass a folder."),
    "record to a file on Ray": (
        build,
        ["record", "{recipe}", "-o", "{text}", "--engine", "ray"],
        "'{text}' is a file.",
    ),
    "no runs to label": (build, ["label"], "Missing argument 'RUNS'"),
    "a file for a folder": (build, ["label", "{text}"], "is a file"),
    "unknown rule": (build, ["label", "{runs}", "--rule", "up"], "'up' is not one of 'forward', 'backward'"),
    "tolerance": (build, ["label", "{runs}", "--tolerance", "5"], "tolerance=5.0, records=10; expected 'forward' or"),
    "rule records": (build, ["train", "{runs}", "-o", "x.onnx", "--rule-records", "1"], "and at least 2 records"),
    "no output": (build, ["train", "{runs}"], "Missing option '--output'"),
    "a folder for a file": (build, ["train", "{runs}", "-o", "{empty}"], "is a directory"),
    "representation": (build, ["train", "{runs}", "-o", "x.onnx", "--representation", "cooked"], "is not one of 'raw'"),
    "no runs to evaluate on": (build, ["evaluate", "{text}"], "Missing argument 'RUNS'"),
    "base runs without a base": (build, ["train", "{runs}", "-o", "x.onnx", "--pull", "1"], "--pull need --base"),
    "window of the base": (
        build,
        [*BASE, "--window", "20"],
        "--window is 20, but the base 'smartfrz-base' has 30; expected the same",
    ),
    "tailored size of the base": (build, [*BASE, "--tailored-size", "512"], "--tailored-size is 512, but the base"),
    "representation of the base": (
        build,
        [*BASE, "--representation", "raw"],
        "--representation is 'raw', but the base",
    ),
    "records of the base": (build, [*BASE, "--records", "60"], "--records is 60, but the base"),
    "base and cross-validation": (build, [*BASE, "--cross-validate"], "which has seen the architectures"),
    "no epochs": (smartfrz, ["demo", "--epochs", "0"], "0 is not in the range x>=1"),
    "threshold": (smartfrz, ["demo", "--threshold", "2"], "2.0 is not in the range 0<x<=1"),
}
FAILURES = {
    "missing recipe": (build, ["record", "{empty}/gone.toml"], "No such file or directory. Pass the path of a TOML"),
    "recipe that is no TOML": (build, ["record", "{text}"], "is not valid TOML"),
    "two recipes of one name": (build, ["record", "{recipe}", "{recipe}"], "Several recipes are named 'tiny'"),
    "recipe that waits for itself": (build, ["record", "{circle}"], "starts from the reference model of 'circle'"),
    "label an empty folder": (build, ["label", "{empty}"], "Found no recorded run (*.parquet)"),
    "label a missing folder": (build, ["label", "{empty}/gone"], "Make some with: smartfrz-build record RECIPE"),
    "label a damaged run": (build, ["label", "{cut}"], "is not a complete Parquet file"),
    "train on an empty folder": (build, ["train", "{empty}", "-o", "{empty}/x.onnx"], "Found no recorded run"),
    "train on a damaged run": (build, ["train", "{cut}", "-o", "{empty}/x.onnx"], "is not a complete Parquet file"),
    "train on too small a pool": (build, ["train", "{runs}", "-o", "{empty}/x.onnx"], "recorded with pool_size=48"),
    "train where all labels are the same": (
        build,
        ["train", "{runs}", "-o", "{empty}/x.onnx", "--tailored-size", "16", "--tolerance", "0.95"],
        "No validation run has both labels: received ['cnn-b', 'vit-b']",
    ),
    "unknown base": (
        build,
        ["train", "{runs}", "-o", "{empty}/x.onnx", "--base", "smartfrz-bse"],
        "Did you mean 'smartfrz-base'?",
    ),
    "base without its recordings": (
        build,
        ["train", "{runs}", "-o", "{empty}/x.onnx", "--base", "smartfrz-base", "--base-runs", "{runs}"],
        "holds none of the recordings of 'smartfrz-base'; expected some of efficientnet-imagenet-to-cifar10,",
    ),
    "new over an old recipe": (build, ["new", "tiny_parts:network", "-o", "{recipe}"], "exists, and is left as it is"),
    "new from a folder that holds no model": (build, ["new", "transformers:{empty}"], "has no config.json"),
    "check a missing recipe": (build, ["check", "{empty}/gone.toml"], "Pass the path of a TOML"),
    "evaluate no predictor": (build, ["evaluate", "{empty}/x.onnx", "{runs}"], "Cannot read predictor"),
    "evaluate a foreign file": (build, ["evaluate", "{text}", "{runs}"], "is not a SmartFRZ predictor, or is cut"),
    "unknown data": (smartfrz, ["demo", "--data", "nonsense"], "no folder and none of mnist, digits, fashion-mnist"),
    "data without classes": (smartfrz, ["demo", "--data", "{empty}"], "holds pictures of 0 classes"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    made = {name: root / name for name in ("runs", "cut", "empty", "recipes")}
    for folder in made.values():
        folder.mkdir()
    write_runs(made["runs"])
    whole = (made["runs"] / "cnn-a.parquet").read_bytes()
    (made["cut"] / "cnn-a.parquet").write_bytes(whole[: len(whole) // 2])
    made["text"] = root / "notes.txt"
    made["text"].write_text("some notes\n")
    made["recipe"] = write_recipe(made["recipes"])
    made["circle"] = write_recipe(made["recipes"], "circle", model='init = "circle"')
    return {name: str(path) for name, path in made.items()}


def tree(folder):
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", HELP)
def test_help(name):
    command, arguments, text = HELP[name]
    result = invoke(command, *arguments, "--help")
    assert result.exit_code == 0
    assert text in result.stdout


@pytest.mark.parametrize("command", [smartfrz, build])
def test_version(command):
    from smartfrz import __version__

    result = invoke(command, "--version")
    assert result.exit_code == 0
    assert __version__ in result.stdout


@pytest.mark.parametrize("case", WRONG_USAGE)
def test_wrong_usage(case, places):
    command, arguments, message = WRONG_USAGE[case]
    result = invoke(command, *(argument.format(**places) for argument in arguments))
    assert message.format(**places) in result.stderr
    assert "Usage: " in result.stderr
    assert result.exit_code == 2


@pytest.mark.parametrize("case", FAILURES)
def test_failures(case, places, tmp_path_factory):
    command, arguments, message = FAILURES[case]
    before = tree(tmp_path_factory.getbasetemp())
    result = invoke(command, *(argument.format(**places) for argument in arguments))
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert "-:--:--" not in result.stderr  # no progress bar of what has not begun
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert tree(tmp_path_factory.getbasetemp()) == before


def test_a_full_disk_is_reported(places, tmp_path, monkeypatch):
    def full_disk(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(building, "build_predictor", full_disk)
    result = invoke(build, "train", places["runs"], "-o", tmp_path / "x.onnx")
    assert result.exit_code == 1
    assert "No space left on device. Nothing half-written was left behind." in result.stderr
    assert tree(tmp_path) == []


def test_label_shows_shares(places):
    result = invoke(build, "label", places["runs"])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) == 4 * 7
    for run in labelled_runs():
        share = (run.labels == 1).mean()
        start = lines.index(f"{run.name}: {share:.0%} of the labels say freeze")
        first = (run.labels[0] == 1).mean()
        assert re.fullmatch(rf"  layer0 +{first:.0%}", lines[start + 1])


def test_label_follows_the_rule(places):
    shares = [
        float(re.search(r"cnn-a: (\d+)%", invoke(build, "label", places["runs"], *rule).stdout).group(1))
        for rule in ([], ["--tolerance", "0.3"], ["--rule", "backward", "--rule-records", "15"])
    ]
    assert shares[2] < shares[0] < shares[1]


def test_train_passes_its_options_on(places, tmp_path, monkeypatch):
    seen = {}

    def spy(material, plan, output, progress):
        seen.update(vars(plan), digest=material.sha256)
        return "the card"

    monkeypatch.setattr(building, "build_predictor", spy)
    result = invoke(
        build, "train", places["runs"], "-o", tmp_path / "my.onnx", "--rule", "backward", "--tolerance", "0.03",
        "--window", "12", "--tailored-size", "16", "--optimizer", "sgd", "--seed", "4", "--representation", "raw",
        "--precision", "0.8", "--epochs", "3", "--learning-rate", "0.1", "--records", "20", "--no-cross-validate",
    )  # fmt: skip
    assert result.exit_code == 0
    assert "the card" in result.stdout
    assert (seen["rule"].kind, seen["rule"].tolerance) == ("backward", 0.03)
    used = seen["options"]
    assert (used.window, used.tailored_size, used.optimizer, used.seed) == (12, 16, "sgd", 4)
    assert (used.representation, used.precision, used.epochs, used.learning_rate) == ("raw", 0.8, 3, 0.1)
    assert (seen["name"], seen["records"], seen["cross_validate"]) == ("my", 20, False)
    first = seen["digest"]
    invoke(build, "train", places["runs"], "-o", tmp_path / "my.onnx")
    assert seen["digest"] == first
    assert seen["cross_validate"] is True
    assert len(first) == 64


@pytest.mark.parametrize("base", [None, "predictor_file", "smartfrz-base"])
def test_what_the_network_sees_is_what_its_base_sees(places, tmp_path, monkeypatch, request, base):
    seen = []
    monkeypatch.setattr(building, "build_predictor", lambda material, plan, *_: seen.append(plan.options) or "the card")
    given, expected = (), "trajectory+loss"
    if base is not None:
        file = request.getfixturevalue(base) if base == "predictor_file" else base
        given, expected = ("--base", file), zoo.load(file, device="cpu").info.representation
    result = invoke(build, "train", places["runs"], "-o", tmp_path / "my.onnx", *given)
    assert result.exit_code == 0, result.output
    assert [options.representation for options in seen] == [expected]


@pytest.mark.parametrize("package", ["torch", "pyarrow", "rich"])
def test_missing_packages_are_named(places, tmp_path, package):
    # In a process of its own, in which nothing is imported yet.
    environment = environment_without(package, tmp_path / "without")

    def call(*arguments):
        command = [sys.executable, "-c", "from smartfrz.dataset_builder.cli import main; main()", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    assert call("--help").returncode == call("record", "--help").returncode == 0
    for arguments in (
        ("train", places["runs"], "-o", tmp_path / "x.onnx", "--tailored-size", 16),
        ("record", places["recipe"], "-o", tmp_path / "new", "--threads", 1),  # its workers import
    ):
        result = call(*arguments)
        assert result.returncode == 1
        assert f'needs {package}, which is not installed. Type: pip install "smartfrz[build,cpu]"' in result.stderr
        assert "Traceback" not in result.stderr


def test_a_package_that_the_users_own_code_lacks_is_not_taken_for_one_of_ours(tmp_path):
    path = write_recipe(tmp_path)
    (tmp_path / "tiny_parts.py").write_text("def network():\n    import a_package_that_is_missing\n")
    path.write_text(path.read_text().replace("tiny_parts:pictures", "tiny_data:pictures"))
    (tmp_path / "tiny_data.py").write_text(TINY_PARTS)
    result = invoke(build, "check", path)
    assert isinstance(result.exception, ModuleNotFoundError)
    assert "smartfrz[build" not in result.output


def test_help_takes_half_a_second_at_most_and_loads_nothing_heavy():
    code = """if True:
        import sys, time
        from smartfrz.dataset_builder.cli import main
        for arguments in (["--help"], ["train", "--help"]):
            main(arguments, standalone_mode=False)
        heavy = {"numpy", "torch", "pyarrow", "rich", "onnxruntime"} & set(sys.modules)
        print(heavy or "nothing", time.process_time())
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, seconds = result.stdout.split()[-2:]
    assert heavy == "nothing"
    assert float(seconds) <= 0.5


def test_defaults_of_the_options_are_those_of_the_library():
    options = {parameter.name: parameter for parameter in build.commands["train"].params}
    rule, training = LabelRule(), TrainingOptions()
    assert (options["rule"].default, options["tolerance"].default) == (rule.kind, rule.tolerance)
    assert options["rule_records"].default == rule.records
    for name in (
        "window",
        "tailored_size",
        "representation",
        "optimizer",
        "learning_rate",
        "epochs",
        "precision",
        "seed",
    ):
        assert options[name].default == getattr(training, name), name
    assert tuple(options["representation"].type.choices) == REPRESENTATIONS


def test_the_demo_names_missing_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.table", None)
    result = invoke(smartfrz, "demo")
    assert result.exit_code == 1
    assert 'Type: pip install "smartfrz[demo,cpu]"' in result.stderr


@pytest.mark.slow
def test_from_recipes_to_an_evaluated_predictor(tmp_path):
    parts = tmp_path / "recipes"
    parts.mkdir()
    # Given first, recorded second: it starts from what the other one makes.
    second = write_recipe(parts, "second", "mlp", model='init = "first"', learning_rate=0.01, records=16)
    first = write_recipe(parts, "first", "cnn", records=16)
    runs, predictor = tmp_path / "runs", tmp_path / "out" / "my.onnx"

    result = invoke(build, "record", second, first, "-o", runs, "--threads", 1)
    assert result.exit_code == 0, result.output
    assert [line.rpartition("/")[2] for line in result.stdout.split()] == ["first.parquet", "second.parquet"]
    assert [path.name for path in run_files(runs)] == ["first.parquet", "second.parquet"]
    assert read_run(runs / "second.parquet").architecture == "mlp"

    # Once more with a recipe that cannot be run: what is finished stays, the other one is named.
    broken = write_recipe(parts, "broken")
    broken.write_text(broken.read_text().replace("tiny_parts:network", "gone_module:network"))
    before = {path: path.stat().st_mtime_ns for path in run_files(runs)}
    result = invoke(build, "record", broken, first, "-o", runs, "--threads", 1)
    assert result.exit_code == 1
    assert "Not recorded:\nbroken: " in result.stderr
    assert "Put gone_module.py into '" in result.stderr
    assert result.stdout.split() == [str(runs / "first.parquet")]
    assert {path: path.stat().st_mtime_ns for path in run_files(runs)} == before

    result = invoke(build, "label", runs, "--plots", tmp_path / "plots")
    assert result.exit_code == 0, result.output
    assert re.search(r"^first: \d+% of the labels say freeze$", result.stdout, re.MULTILINE)
    for name in ("first", "second"):
        content = (tmp_path / "plots" / f"{name}.png").read_bytes()
        assert content.startswith(PNG)
        assert len(content) > 10_000

    result = invoke(
        build,
        "train",
        runs,
        "-o",
        predictor,
        "--window",
        8,
        "--tailored-size",
        32,
        "--epochs",
        1,
        "--records",
        16,
        "--tolerance",
        0.0003,  # the tiny runs hardly move: both labels have to occur
        "--no-cross-validate",
    )
    assert result.exit_code == 0, result.output
    assert predictor.with_suffix(".md").read_text() in result.stdout
    info = Predictor(predictor).info
    assert (info.name, info.window, info.record_fraction) == ("my", 8, 1 / 16)
    assert info.metrics["trained_on"] == ["first"]

    result = invoke(build, "evaluate", predictor, runs)
    assert result.exit_code == 0, result.output
    assert "| first (trained on) | predictor |" in result.stdout
    assert "| second (validated on) | weight change |" in result.stdout

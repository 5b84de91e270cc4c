"""What all commands share: real processes that are interrupted, whose output is read by nobody, or as JSON."""

import dataclasses
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings

import click
import pytest
from builder_fixtures import environment_without, invoke, write_recipe, write_runs
from terminal import run_on_a_terminal

from smartfrz import commands, doctor, progress
from smartfrz.cli import main as smartfrz
from smartfrz.dataset_builder.cli import main as build
from smartfrz.errors import RecipeError
from smartfrz.zoo import registry

PROGRAMS = {"smartfrz": smartfrz, "smartfrz-build": build}
BUILD = [sys.executable, "-c", "from smartfrz.dataset_builder.cli import main; main(prog_name='smartfrz-build')"]
SMARTFRZ = [sys.executable, "-m", "smartfrz"]


def walk(command, context):
    """Every command below one, with its context."""
    yield command, context
    for name in command.list_commands(context) if isinstance(command, click.Group) else ():
        inner = command.get_command(context, name)
        yield from walk(inner, inner.make_context(name, [], context, resilient_parsing=True))


COMMANDS = {
    context.command_path: (command, context)
    for name, program in PROGRAMS.items()
    for command, context in walk(program, program.make_context(name, [], resilient_parsing=True))
}
LEAVES = {path: pair for path, pair in COMMANDS.items() if not isinstance(pair[0], click.Group)}


def names_of(command):
    return {name for parameter in command.params if isinstance(parameter, click.Option) for name in parameter.opts}


def call(command, *arguments, **options):
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, **options)


# Help


@pytest.mark.parametrize("path", COMMANDS)
def test_help_is_whole(path):
    command, _ = COMMANDS[path]
    for word in ("-h", "--help"):
        result = invoke(PROGRAMS[path.split()[0]], *path.split()[1:], word)
        assert (result.exit_code, result.stdout.startswith("Usage: ")) == (0, True)
    assert command.short_help or isinstance(command, click.Group)
    assert "..." not in command.get_short_help_str(100)
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, option.name
    assert {"-q", "--quiet", "-v", "--verbose"} <= names_of(command)


@pytest.mark.parametrize("path", LEAVES)
def test_the_example_names_the_command_and_options_that_it_has(path):
    command, context = LEAVES[path]
    assert "--json" in names_of(command)
    assert "--provider" not in names_of(command)
    assert command.example
    for line in command.example.splitlines():
        words = shlex.split(line)
        assert " ".join(words[: len(path.split())]) == path
        assert {word for word in words if word.startswith("-")} <= names_of(command)
    assert command.example in " ".join(command.get_help(context).split()) or "\n" in command.example


def test_commands_are_in_groups():
    text = invoke(smartfrz, "-h").stdout
    assert re.search(r"^Does it help\?:\n  demo +\S.*\n", text, re.MULTILINE)
    assert text.index("estimate") < text.index("Predictors:") < text.index("zoo") < text.index("doctor")
    for group in (smartfrz, smartfrz.commands["zoo"], build):
        assert sorted(group.list_commands(None)) == sorted(group.commands)
        assert [name for names in group._sections.values() for name in names] == group.list_commands(None)


def test_python_m():
    result = call(SMARTFRZ, "zoo", "path")
    assert result.returncode == 0
    assert result.stdout.count("\n") == 1


# JSON


def test_json_is_the_only_thing_on_standard_output(tmp_path):
    # The model's own print, and that of a process which it starts, go elsewhere.
    (tmp_path / "chatty.py").write_text(
        "import subprocess, torch\ndef build():\n    print('from Python', flush=True)\n"
        "    subprocess.run(['echo', 'from a process'])\n    return torch.nn.Linear(2, 2)\n"
    )
    arguments = ("estimate", "chatty:build", "--input", "4,2", "--rounds", 1, "--device", "cpu", "--json")
    result = call(SMARTFRZ, *arguments, cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["options"]["source"] == "chatty:build"
    assert "from Python" in result.stderr
    assert "from a process" in result.stderr


def test_an_error_leaves_standard_output_empty():
    result = invoke(smartfrz, "zoo", "show", "smartfrz-bse", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Did you mean 'smartfrz-base'?" in result.stderr


def test_json_of_commands(tmp_path):
    base = next(entry for entry in registry.embedded() if entry.name == "smartfrz-base")

    def document(program, *arguments, code=0):
        result = invoke(program, *arguments, "--json")
        assert result.exit_code == code, result.output
        return json.loads(result.stdout)

    listed = document(smartfrz, "zoo", "list")
    assert base.sha256 in {entry["sha256"] for entry in listed}
    shown = document(smartfrz, "zoo", "show", "smartfrz-base")
    assert shown["card"].startswith("#")
    assert document(smartfrz, "zoo", "download", "smartfrz-base", "-o", tmp_path / "b.onnx")["path"].endswith("b.onnx")
    good = document(smartfrz, "zoo", "verify", tmp_path / "b.onnx")
    assert good == [{"what": str(tmp_path / "b.onnx"), "good": True, "found": base.sha256}]
    (tmp_path / "b.onnx").write_bytes(b"damaged")
    assert document(smartfrz, "zoo", "verify", tmp_path / "b.onnx", code=1)[0]["good"] is False
    write_runs(tmp_path / "runs")
    ready = document(build, "label", tmp_path / "runs")["ready"]
    assert 0 < ready["cnn-a"]["layer0"] < 1
    write_recipe(tmp_path)  # and the module that `new` names
    made = document(build, "new", "tiny_parts:network", "-o", tmp_path / "new.toml")
    assert (tmp_path / "new.toml").read_text() == made["text"]


def test_what_json_cannot_hold_is_made_plain(capsys):
    @click.command(cls=commands.Command)
    def odd():
        import numpy as np

        commands.show("for people")
        commands.answer({"nan": float("nan"), 1: np.float32(0.5), "array": np.arange(2)}, "text")

    assert json.loads(invoke(odd, "--json").stdout) == {"nan": None, "1": 0.5, "array": [0, 1]}
    assert invoke(odd).stdout == "for people\ntext\n"


# How much is said


def test_quiet_and_verbose():
    @click.command(cls=commands.Command)
    def speak():
        commands.note("a note")
        warnings.warn("a warning", UserWarning, stacklevel=1)
        logging.getLogger("smartfrz").info("a message")
        raise RecipeError("the error")

    group = click.group(cls=commands.Group)(lambda: None)
    group.add_command(speak)
    for arguments in (["-q", "speak"], ["speak", "--quiet"]):
        result = invoke(group, *arguments)
        assert (result.exit_code, result.stderr) == (1, "Error: the error\n")
    with pytest.warns(UserWarning, match="a warning"):
        result = invoke(group, "speak", "-v")
    assert "a note\n" in result.stderr
    assert "INFO a message" in result.stderr
    assert "Traceback" in result.stderr
    with pytest.warns(UserWarning, match="a warning"):
        assert "a message" not in invoke(group, "speak").stderr
    assert invoke(group, "-v", "speak", "-q").exit_code == 2


def test_without_a_terminal_a_line_is_written_even_if_there_is_no_news(monkeypatch, capsys):
    monkeypatch.setattr(progress, "MINUTE", 0.01)
    with progress.progress("training") as tell:
        tell(0.25, "step 1")
        until = time.monotonic() + 20
        text = ""
        while text.count("\n") < 3 and time.monotonic() < until:
            time.sleep(0.02)
            text += capsys.readouterr().err
    assert len(re.findall(r"^training: 25% done, about 0 min left   step 1$", text, re.MULTILINE)) >= 2


def test_a_recording_without_a_terminal_says_where_it_is(tmp_path):
    recipe = write_recipe(tmp_path)
    code = "import smartfrz.progress as p; p.MINUTE = 0.0; " + BUILD[2]
    given = ("record", recipe, "-o", tmp_path / "runs", "--threads", 1, "--json")
    result = call([sys.executable, "-c", code], *given)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["recordings"] == {"tiny": str(tmp_path / "runs" / "tiny.parquet")}
    assert re.search(r"^recording: \d+% done.*   tiny: ", result.stderr, re.MULTILINE)


def test_quiet_writes_no_progress(monkeypatch):
    monkeypatch.setattr(progress, "MINUTE", 0.0)

    @click.command(cls=commands.Command)
    def work():
        for way in (progress.progress, progress.lines):
            with way("training") as tell:
                tell(0.5, "step 1")

    assert invoke(work).stderr.count("training: 50% done") >= 2
    assert invoke(work, "-q").stderr == ""


# Endings


@pytest.mark.parametrize("arguments", [["zoo", "list"], ["zoo", "list", "--json"], ["zoo", "list", "-h"], ["-h"]])
def test_an_output_that_nobody_reads_ends_the_command_without_a_word(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run([*SMARTFRZ, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (commands.BROKEN_PIPE, "")


def test_another_broken_pipe_is_an_error():
    @click.command(cls=commands.Command)
    def fail():
        raise BrokenPipeError(32, "Broken pipe")

    group = click.group(cls=commands.Group)(lambda: None)
    group.add_command(fail)
    result = invoke(group, "fail")
    assert result.exit_code == 1
    assert "Broken pipe" in result.stderr


def test_ctrl_c_ends_a_recording_and_its_workers_without_a_traceback(tmp_path):
    # One worker has finished and waits, the other one is training.
    recipes = [write_recipe(tmp_path, "short", epochs=1), write_recipe(tmp_path, "long", epochs=100_000)]
    # Where the tests run in the background of a shell, Ctrl-C is ignored from the start.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code = heard + "import smartfrz.progress as p; p.MINUTE = 0.0; " + BUILD[2]
    given = ["record", *map(str, recipes), "-o", str(tmp_path / "runs"), "--threads", "1", "--workers", "2"]
    log, finished = tmp_path / "log", tmp_path / "runs" / "short.parquet"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *given], stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        until = time.monotonic() + 120
        while not (str(finished) in log.read_text() and "long: " in log.read_text()) and time.monotonic() < until:
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(60) == commands.INTERRUPTED
        for _ in range(1000):
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.01)
        else:
            pytest.fail("workers outlive the command")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = log.read_text()
    assert "Traceback" not in text
    assert text.endswith("Stopped. Finished recordings are kept; the same command goes on from there.\n")
    assert [path for path in (tmp_path / "runs").iterdir() if path.suffix == ".parquet"] == [finished]


# Completion


def complete(shell, words, **environment):
    """What the shell is told, for words of which the last one is to be completed."""
    program = words[0]
    # The program takes its name from how it was started, as from an installed script.
    code = "from smartfrz.cli import main; main(prog_name='smartfrz')" if program == "smartfrz" else BUILD[2]
    command = [sys.executable, "-c", code]
    variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
    given = {variable: f"{shell}_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    result = call(command, env=os.environ | given | environment)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


def test_bash_completes_commands_options_and_names_of_local_registries(tmp_path):
    assert complete("bash", ["smartfrz", "zoo", "dow"]) == ["plain,download"]
    assert complete("bash", ["smartfrz", "zoo", "show", "smartfrz-b"]) == ["plain,smartfrz-base"]
    assert complete("bash", ["smartfrz", "demo", "--predictor", "smartfrz-base@"]) == ["plain,smartfrz-base@4"]
    assert complete("bash", ["smartfrz", "serve", "./mine"]) == ["file,./mine"]
    assert "plain,smartfrz-base" in complete("bash", ["smartfrz-build", "train", "runs", "--base", "smart"])
    tiny = next(entry for entry in registry.embedded() if entry.name == "smartfrz-tiny")
    path = tmp_path / "zoo" / "registry.json"
    path.parent.mkdir()
    path.write_bytes(registry.serialise([dataclasses.replace(tiny, name="mine")]))
    # A registry elsewhere is not asked; this one would not answer.
    known = {"SMARTFRZ_ZOO": f"https://127.0.0.1:9/zoo {path.parent}", "SMARTFRZ_CACHE": str(tmp_path / "cache")}
    assert complete("bash", ["smartfrz", "zoo", "path", "mi"], **known) == ["plain,mine"]


def test_zsh_completes_names():
    assert complete("zsh", ["smartfrz", "zoo", "show", "smartfrz-t"])[:2] == ["plain", "smartfrz-tiny"]


def test_real_bash_completes_after_the_line_of_the_documentation(tmp_path):
    program = tmp_path / "smartfrz"
    program.write_text(f"#!{sys.executable}\nfrom smartfrz.cli import main\nmain(prog_name='smartfrz')\n")
    program.chmod(0o755)
    script = """eval "$(_SMARTFRZ_COMPLETE=bash_source smartfrz)"
COMP_WORDS=(smartfrz zoo show smartfrz-b) COMP_CWORD=3; _smartfrz_completion smartfrz; echo "${COMPREPLY[@]}"
"""
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": os.getcwd()}
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment)
    assert result.stdout == "smartfrz-base\n", result.stderr


# Doctor


def test_the_doctor_finds_nothing_here(monkeypatch):
    # Importing TensorFlow as well would take half a minute.
    monkeypatch.setattr(doctor, "_IMPORTS", {name: doctor._IMPORTS[name] for name in ("onnxruntime", "torch")})
    monkeypatch.delenv("SMARTFRZ_ZOO", raising=False)
    result = invoke(smartfrz, "doctor")
    for line in (r"numpy +\d", r"predictor +smartfrz-base@\d+: answers", r"providers .*CPUExecutionProvider"):
        assert re.search(rf"^{line}", result.stdout, re.MULTILINE), result.stdout
    assert ("No problem was found" in result.stdout) == (result.exit_code == 0)
    assert "For a bug report, paste all of this" in result.stdout


def test_the_doctor_in_the_lightest_installation(tmp_path):
    environment = environment_without("onnxruntime", tmp_path / "without")
    # Nothing optional is installed, as far as metadata say, and nothing can be imported.
    (tmp_path / "without" / "sitecustomize.py").write_text("""
import importlib.metadata, sys
LIGHT = {"smartfrz", "numpy", "click", "filelock", "platformdirs"}
real = importlib.metadata.version
def version(name):
    if name not in LIGHT:
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"onnxruntime", "torch", "keras", "rich", "packaging", "fsspec"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
""")
    result = call(SMARTFRZ, "doctor", "--json", env=environment)
    assert result.returncode == 1, result.stderr
    found = json.loads(result.stdout)
    assert found["packages"]["torch"] is None
    (problem,) = found["problems"]
    assert problem["what"].startswith("ONNX Runtime is not installed")
    assert 'pip install "smartfrz[cpu]"' in problem["fix"]


def test_the_doctor_names_what_is_wrong_and_no_secrets(tmp_path, monkeypatch):
    home = tmp_path / "alice"
    (home / "zoo").mkdir(parents=True)
    (home / "zoo" / "registry.json").write_text("{")
    (home / "file").write_text("")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("SMARTFRZ_CACHE", str(home / "file" / "cache"))
    monkeypatch.setenv("SMARTFRZ_CASHE", "x")
    monkeypatch.setenv(
        "SMARTFRZ_ZOO", f"https://bob:hunter2@example.org/zoo?token=s3cret#minisign=RWkey {home / 'zoo'}"
    )
    monkeypatch.setattr(
        doctor, "_IMPORTS", {"torch": "raise OSError('libtorch.so is missing')", "keras": "import os; os.abort()"}
    )
    found = doctor.examine()
    problems = {problem["what"]: problem["fix"] for problem in found["problems"]}
    text = doctor.text(found) + json.dumps(found)
    for word in ("alice", "bob", "hunter2", "s3cret", "RWkey"):
        assert word not in text
    assert "https://...@example.org/zoo?...#minisign=..." in text
    assert problems["import torch fails: OSError: libtorch.so is missing"] == "pip install --force-reinstall torch"
    assert any(what.startswith("import keras fails: ") for what in problems)  # it ended its process
    assert problems["SMARTFRZ_CASHE is set, which SmartFRZ does not know."] == "Set SMARTFRZ_CACHE instead"
    assert any("cannot be written" in what for what in problems)
    assert any("it is no valid JSON" in what for what in problems)


@pytest.mark.parametrize(
    "addresses",
    [
        "https://h.example/a\nhttps://bob:hunter2@h.example/z",
        "https://h.example/a\thttps://bob:hunter2@h.example/z",
        "https://h.example/a\u00a0https://bob:hunter2@h.example/z",
        "https://h.example/a,https://bob:hunter2@h.example/z",
        "https://bob:x/hunter2@h.example/z",
        "https://bob:x#hunter2@h.example/z",
        "https:/bob:hunter2@h.example/z",
        "HTTPS:\\\\bob:hunter2@h.example/z",
        "bob:hunter2@h.example/z",
        "https://h.example/z;token=hunter2",
        "https://h.example/z?a=1#x@hunter2",
        "https://h.example/z#token=hunter2",
        "s3://bob:hunter2@bucket/z",
    ],
)
def test_the_doctor_hides_passwords_wherever_they_are(addresses, monkeypatch):
    monkeypatch.setenv("SMARTFRZ_ZOO", addresses)
    problems = []

    def problem(what, fix):
        problems.append(doctor._without_secrets(str(what)) + fix)

    text = json.dumps([doctor._variables(problem), doctor._registries(problem), problems])
    assert "hunter2" not in text
    assert "h.example" in text or "bucket" in text


def test_the_doctor_knows_every_variable_and_shows_what_is_no_secret(monkeypatch):
    plain = "hf://me/zoo@v1 /zoo/registry.json"
    monkeypatch.setenv("SMARTFRZ_ZOO", plain)
    monkeypatch.setenv("SMARTFRZ_LIGHTNING", "1")
    problems = []
    found = doctor._variables(lambda *said: problems.append(said))
    assert (found["SMARTFRZ_ZOO"], found["SMARTFRZ_LIGHTNING"]) == (plain, "1")
    assert not [said for said in problems if "LIGHTNING" in said[0]]


def test_the_doctor_survives_what_it_looks_at(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("unforeseen")

    for name in ("_imports", "_gpus", "_predictors", "_cache", "_registries", "_variables", "_bounds"):
        monkeypatch.setattr(doctor, name, fail)
    found = doctor.examine()
    assert len(found["problems"]) == 7
    assert "7 problems" in doctor.text(found)


def test_versions_outside_of_what_is_asked_for_are_problems(monkeypatch):
    monkeypatch.setattr(
        doctor.importlib.metadata, "requires", lambda name: ["numpy>=99", 'click>=99; extra == "x"', "click"]
    )
    problems = []
    doctor._bounds(lambda what, fix: problems.append((what.split()[0], fix)))
    assert problems == [("numpy", 'pip install "numpy>=99"')]


def test_a_progress_bar_on_a_terminal():
    program = """if True:
        import sys
        from smartfrz.progress import progress
        with progress("measuring") as tell:
            for part in range(5):
                tell(part / 4, f"part {part}")
    """
    drawn, _, code = run_on_a_terminal([sys.executable, "-c", program])
    assert code == 0
    assert b"measuring" in drawn
    assert b"100%" in drawn
    assert b"part 4" in drawn

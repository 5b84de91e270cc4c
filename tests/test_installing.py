"""What the messages about missing packages tell the user to type, and what pyproject.toml offers."""

import importlib.metadata
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from smartfrz import __version__
from smartfrz.errors import install_command, not_installed

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def only(monkeypatch, *names, module):
    """Pretend that of the builds of ONNX Runtime these distributions are installed, and whether the module is there."""

    def version(name):
        if name not in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if module else None)


def test_the_command_has_the_runtime_that_is_missing(monkeypatch):
    only(monkeypatch, module=False)
    assert install_command("torch") == 'pip install "smartfrz[torch,cpu]"'
    assert install_command("keras", more="jax") == 'pip install "smartfrz[keras,cpu]" jax'
    assert install_command("build", "ray") == 'pip install "smartfrz[build,ray,cpu]"'


def test_mock_the_command_leaves_an_installed_runtime_alone(monkeypatch):
    only(monkeypatch, "onnxruntime", module=True)
    assert install_command("hf") == 'pip install "smartfrz[hf,cpu]"'
    only(monkeypatch, "onnxruntime-gpu", module=True)
    assert install_command("hf") == 'pip install "smartfrz[hf,gpu]"'
    only(monkeypatch, "onnxruntime-openvino", module=True)
    assert install_command("hf") == 'pip install "smartfrz[hf]"'


def test_the_error_says_who_needs_what():
    assert str(not_installed("The demo", "rich", "demo")).startswith(
        'The demo needs rich, which is not installed. Type: pip install "smartfrz[demo,'
    )


def test_no_message_writes_a_command_with_extras_by_itself():
    """The helpers of `smartfrz.errors` do; `runtime.py` names both builds of ONNX Runtime."""
    found = {
        path.relative_to(ROOT / "smartfrz").as_posix()
        for path in (ROOT / "smartfrz").rglob("*.py")
        if re.search(r"smartfrz\[\w", path.read_text("utf-8"))
    }
    assert found == {"errors.py", "predictor/runtime.py"}


@pytest.mark.parametrize("file", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.py")]))
def test_pages_and_examples_name_extras_that_exist_with_a_runtime(file):
    for command in re.findall(r"pip install[^\n`]*?smartfrz\[([\w,]+)\]", file.read_text("utf-8")):
        names = command.split(",")
        assert set(names) <= set(EXTRAS)
        assert len({"cpu", "gpu"} & set(names)) == 1, f"{file.name}: {command} has to name cpu or gpu"


def test_code_names_extras_that_exist():
    for path in (ROOT / "smartfrz").rglob("*.py"):
        text = path.read_text("utf-8")
        for call in re.findall(r'not_installed\([^,]+, [^,]+, ((?:"\w+"(?:, )?)+)\)', text):
            assert set(re.findall(r"\w+", call)) <= set(EXTRAS), path


def test_keras_does_not_bring_a_backend():
    names = {re.split(r"[\[><=]", wanted)[0] for wanted in EXTRAS["keras"]}
    assert names == {"keras"}
    assert any(wanted.startswith("tensorflow>=") for wanted in EXTRAS["tensorflow"])
    assert "smartfrz[keras]" in EXTRAS["tensorflow"]


def yaml_files():
    return sorted([*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"])


@pytest.mark.parametrize("file", yaml_files(), ids=lambda file: file.name)
def test_yaml_files_can_be_read(file):
    yaml = pytest.importorskip("yaml")
    assert isinstance(yaml.safe_load(file.read_text("utf-8")), dict)


def test_the_citation_is_of_this_version_and_of_the_paper():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert (citation["version"], citation["license"]) == (__version__, PROJECT["license"])
    paper = citation["preferred-citation"]
    assert paper["title"].startswith("SmartFRZ")
    assert paper["identifiers"][0]["value"].removeprefix("arXiv:") in (ROOT / "README.md").read_text("utf-8")


def test_the_workflow_runs_what_a_developer_types():
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))["jobs"]
    commands = {step["run"] for job in jobs.values() for step in job["steps"] if "run" in step}
    assert commands == {"bash .ci/run", "make docs", "make oldest"}


def test_a_release_tries_every_extra():
    tried = re.findall(r"^(?:\w+=\w+ )?try ([\w,-]+) ", (ROOT / ".ci/try-wheel").read_text("utf-8"), re.MULTILINE)
    assert {extra for extras in tried for extra in extras.split(",")} == set(EXTRAS) - {"zoo"}
    assert "smartfrz[zoo]" in EXTRAS["hub"]


def test_addresses_are_in_one_place():
    """A maintainer replaces the placeholders in pyproject.toml, and nowhere else."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *yaml_files()]
    assert [file.name for file in files if "example.invalid" in file.read_text("utf-8")] == []
    assert {"Documentation", "Source", "Issues", "Changelog"} <= set(PROJECT["urls"])

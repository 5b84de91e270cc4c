"""README.md and docs/: every sample runs, and every command, option, extra, target and file that they name exists."""

import ast
import inspect
import json
import re
import shlex
import tomllib

import click
import pytest
from pages import BLOCK, PAGES, ROOT, blocks, name_of, samples

pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="not all of the documentation is here")
WITH_SAMPLES = [page for page in PAGES if any(kind != "keras" for kind, _ in samples(page))]


def torch_surroundings(folder):
    """What a sample takes for granted: a model, an optimizer, data."""
    import numpy as np
    import torch
    from builder_fixtures import labelled_runs
    from torch import nn
    from torch.optim.lr_scheduler import CosineAnnealingLR
    from torch.utils.data import DataLoader, TensorDataset

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    dataset = TensorDataset(torch.rand(32, 4), torch.randint(0, 2, (32,)))
    return {
        "torch": torch,
        "DataLoader": DataLoader,
        "CosineAnnealingLR": CosineAnnealingLR,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), 1e-3),
        "criterion": nn.CrossEntropyLoss(),
        "dataset": dataset,
        "loader": DataLoader(dataset, 8),
        "epochs": 2,
        "evaluate": lambda model: (0.5, 0.9),
        "log": lambda values: None,  # a logger's function
        "runs": labelled_runs(),
        "history": np.random.default_rng(0).normal(size=(1, 30, 1024)).astype(np.float32),
    }


def hf_surroundings(folder):
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=3, report_to="none", disable_tqdm=True, dataloader_pin_memory=False, use_cpu=True
    )
    return {
        "Trainer": transformers.Trainer,
        "model": transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=20, **sizes)),
        "args": arguments,
        "data": [{"input_ids": [1, 2, 3], "labels": i % 2} for i in range(16)],
    }


def lightning_surroundings(folder):
    lightning = pytest.importorskip("lightning.pytorch")
    import torch

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = torch_surroundings(folder)["model"]

        def training_step(self, batch):
            inputs, targets = batch
            return torch.nn.functional.cross_entropy(self.network(inputs), targets)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-3)

    return {
        "Trainer": lightning.Trainer,
        "module": Module(),
        "loader": torch_surroundings(folder)["loader"],
    }


SURROUNDINGS = {"torch": torch_surroundings, "hf": hf_surroundings, "lightning": lightning_surroundings}


@pytest.fixture
def freezers(monkeypatch):
    """Closes what the samples leave open."""
    from smartfrz.adapters.base import Freezer

    made = []
    init = Freezer.__init__
    monkeypatch.setattr(Freezer, "__init__", lambda self, *a, **k: (made.append(self), init(self, *a, **k))[1])
    yield made
    for freezer in made:
        freezer.close()


@pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")
@pytest.mark.parametrize("page", WITH_SAMPLES, ids=name_of)
def test_the_samples_run(page, tmp_path, monkeypatch, freezers):
    pytest.importorskip("torch").manual_seed(0)
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    names = {}
    for kind, block in samples(page):
        if kind != "keras":
            if kind not in names:
                names[kind] = SURROUNDINGS[kind](tmp_path) | {"__name__": "sample"}
            exec(compile(block.code, block.place, "exec"), names[kind])


def test_data_in_samples_can_be_read():
    read = {"json": json.loads, "toml": tomllib.loads}
    seen = [read[b.language](b.code) for page in PAGES for b in blocks(page) if b.language in read]
    assert seen


def test_what_is_not_run_says_why():
    reasons = [block.why for page in PAGES for block in blocks(page) if block.why is not None]
    assert all(len(why.split()) > 3 for why in reasons)
    assert sum(page.read_text("utf-8").count("<!-- not run") for page in PAGES) == len(reasons)


def commands():
    """Every command line in a block without a language of its own, or between single backquotes: (place, words)."""
    for page in PAGES:
        text = page.read_text("utf-8")
        lines = [
            (block.place, line.removeprefix("$ "))
            for block in blocks(page)
            if block.language in ("", "bash", "console")
            for line in block.code.replace("\\\n", " ").splitlines()
        ]
        prose = BLOCK.sub("", text)
        lines += [(name_of(page), " ".join(span.split())) for span in re.findall(r"`([^`]+)`", prose)]
        for place, line in lines:
            line = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line)
            if re.match(r"(smartfrz|smartfrz-build|make|pip|python) ", line) and "=" not in line.split()[1]:
                yield place, shlex.split(line, comments=True)


COMMANDS = list(commands())


def options_of(command):
    return {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]} | {
        "--help",
        "-h",
    }


@pytest.mark.parametrize("program", ["smartfrz", "smartfrz-build"])
def test_commands_and_their_options_exist(program):
    pytest.importorskip("torch")
    from smartfrz import cli
    from smartfrz.dataset_builder import cli as builder

    mains = {"smartfrz": cli.main, "smartfrz-build": builder.main}
    checked = 0
    for place, (first, *words) in COMMANDS:
        if first != program:
            continue
        command = mains[program]
        words = [word.strip("[],.") for word in words]
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            found = command.get_command(click.Context(command), words[0])
            if found is None and (words[0] in ("...", "|") or words[0].isupper()):
                break
            assert found, f"{place}: {program} has no command {words[0]!r}"
            command, words = found, words[1:]
        words = words[: words.index("|")] if "|" in words else words
        for word in words:
            option = word.partition("=")[0]
            if option.startswith("-") and len(option) > 1:
                assert option in options_of(command), f"{place}: {program} {command.name} has no option {option}"
        checked += 1
    assert checked > 5


def test_make_targets_benchmarks_and_extras_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
    for place, (first, *words) in COMMANDS:
        if first == "make":
            assert words[0] in targets, f"{place}: no target {words[0]}"
        named = re.findall(r"(?:smartfrz|\.)\[([\w,]+)\]", " ".join(words)) if first == "pip" else []
        for extra in ",".join(named).split(",") if named else []:
            assert extra in extras, f"{place}: no extra {extra}"
        if first == "python" and words[:1] == ["-m"] and words[1].startswith("benchmarks."):
            path = ROOT / f"{words[1].replace('.', '/')}.py"
            assert path.is_file(), f"{place}: no module {words[1]}"
            known = "".join(file.read_text("utf-8") for file in path.parent.glob("*.py"))
            for word in words[2:]:
                if word.startswith("--") and word != "--help":
                    assert f'"{word.partition("=")[0]}"' in known, f"{place}: {words[1]} has no option {word}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_linked_files_exist(page):
    """Anchors are checked by `make docs`; this also reads README.md, which is not on the site."""
    for target in re.findall(r"\]\(([^)#\s]+)", BLOCK.sub("", page.read_text("utf-8"))):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"


def test_linked_pages_outside_of_docs_are_taken_into_the_site():
    hooks = (ROOT / "docs" / "site_hooks.py").read_text("utf-8")
    patterns = sum(map(ast.literal_eval, re.findall(r"^OUTSIDE \+?= (.*)$", hooks, re.M)), ("README.md",))
    taken = {path for pattern in patterns for path in ROOT.glob(pattern)}
    for page in PAGES[1:]:
        for target in re.findall(r"\]\(([^)#\s]+\.md)", BLOCK.sub("", page.read_text("utf-8"))):
            path = (page.parent / target).resolve()
            if "://" not in target and not path.is_relative_to(ROOT / "docs"):
                assert path in taken, f"{name_of(page)} links to {target}, which site_hooks.py leaves out"


def test_pages_named_in_messages_exist():
    for path in ROOT.glob("smartfrz/**/*.py"):
        for name in re.findall(r"docs/[\w/-]+\.md", path.read_text("utf-8")):
            assert (ROOT / name).is_file(), f"{path.relative_to(ROOT)} names {name}"


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.split()) <= 1400
    loop = next(b for b in blocks(ROOT / "README.md") if b.language == "python")
    assert len([line for line in loop.code.splitlines() if line.strip()]) == 10


def test_the_page_of_options_has_them_all():
    pytest.importorskip("torch")
    from smartfrz.adapters.torch import SmartFRZ
    from smartfrz.adapters.torch.callback import FreezingCallback

    rows = re.findall(r"^\| `([a-z_]+)` \| (.*?) \|", (ROOT / "docs/options.md").read_text("utf-8"), re.M)
    known = dict(inspect.signature(SmartFRZ).parameters) | dict(inspect.signature(FreezingCallback).parameters)
    tree = ast.parse((ROOT / "smartfrz/adapters/keras/callback.py").read_text("utf-8"))
    keras = next(
        function
        for part in tree.body
        if isinstance(part, ast.ClassDef) and part.name == "SmartFRZ"
        for function in part.body
        if isinstance(function, ast.FunctionDef) and function.name == "__init__"
    )
    names = known.keys() - {"model", "optimizer"} | {argument.arg for argument in keras.args.kwonlyargs}
    assert sorted(name for name, _ in rows) == sorted(names)
    for name, shown in rows:
        default = known[name].default if name in known else None
        if default is not None:
            assert shown.strip("`").strip('"') == str(default).removesuffix(".0"), name


def test_the_api_page_has_every_public_name():
    pytest.importorskip("torch")
    from smartfrz import baselines, zoo
    from smartfrz.adapters import torch as adapter

    page = (ROOT / "docs/api.md").read_text("utf-8")
    shown = set(re.findall(r"\.(\w+)$", page, re.M)) | set(
        re.findall(r"\w+", page.partition("members: [")[2].partition("]")[0])
    )
    keras = re.search(r"__all__ = (\[.*?\])", (ROOT / "smartfrz/adapters/keras/__init__.py").read_text("utf-8"), re.S)
    public = {*adapter.__all__, *zoo.__all__, *baselines.__all__, *ast.literal_eval(keras[1])} - {"DEFAULT"}
    assert public <= shown

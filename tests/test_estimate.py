"""`smartfrz estimate`. FLOPs and activations are exact; of times only that they are there."""

import json
import re
import sys

import pytest

torch = pytest.importorskip("torch")

from click.testing import CliRunner  # noqa: E402
from torch import nn  # noqa: E402

from smartfrz import estimate as estimating  # noqa: E402
from smartfrz.cli import main  # noqa: E402
from smartfrz.control.ordering import LayerCost  # noqa: E402
from smartfrz.errors import RecipeError  # noqa: E402
from smartfrz.estimate import Estimate, EstimateOptions, InputSpec, Prefix, busy, estimate, load_model  # noqa: E402

MODELS = '''
import torch
from torch import nn


def stack():
    return nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(4)))


def partly_frozen():
    model = stack()
    model[0].requires_grad_(False)
    return model


def frozen():
    return stack().requires_grad_(False)


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = [3, 4, 5, 6]
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
            for a, b in zip(sizes, sizes[1:])
        )
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return {"logits": self.head(x.mean((2, 3))), "count": torch.tensor(3)}


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 4)
        self.head = nn.Linear(4, 20)

    def forward(self, tokens, mask=None):
        return self.head(self.embedding(tokens) * mask[..., None])


class Unused(nn.Module):
    """Runs its last layer for nothing."""

    def __init__(self):
        super().__init__()
        self.head, self.probe = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        y = self.head(x)
        self.probe(x)
        return y


def number():
    return 3


def needs(size):
    return nn.Linear(size, size)


def activation():
    return nn.ReLU()


nothing = None
'''
CNN = ("estimated_models:Cnn", "--input", "2,3,12,12", "--rounds", "1")
STACK = ("estimated_models:stack", "--input", "5,6", "--rounds", "1")
WRONG_USAGE = {
    "no model": ((), "Missing argument 'MODULE:CALLABLE'"),
    "no input": (STACK[:1], "Missing option '--input'"),
    "no shape": ((*STACK[:1], "--input", "many"), "'many' is no input; expected [NAME=]SHAPE[:DTYPE[:HIGH]]"),
    "an empty size": ((*STACK[:1], "--input", "0,6"), "'0,6' is no input"),
    "no dtype": ((*STACK[:1], "--input", "5,6:nn"), "'5,6:nn' is no input"),
    "no numbers": ((*STACK, "--prefix", "one"), "'one'; expected numbers, as in 4,8,12."),
    "no round": ((*STACK[:3], "--rounds", "0"), "0 is not in the range x>=1"),
}
FAILURES = {
    "no colon": (("estimated_models", *STACK[1:]), "does not name a model; expected module:callable"),
    "no module": (("gone_models:stack", *STACK[1:]), "Module 'gone_models' cannot be imported (No module named"),
    "no callable": (("estimated_models:gone", *STACK[1:]), "has no callable named 'gone'"),
    "None": (("estimated_models:nothing", *STACK[1:]), "has no callable named 'nothing'"),
    "no module returned": (("estimated_models:number", *STACK[1:]), "returns int; expected a torch.nn.Module"),
    "needs arguments": (("estimated_models:needs", *STACK[1:]), "It has to build the model when it is called without"),
    "wrong shape": ((STACK[0], "--input", "5,7"), "failed on the inputs (5, 7) torch.float32: RuntimeError: mat1 and"),
    "wrong name": ((STACK[0], "--input", "x=5,6"), "failed on the inputs x=(5, 6) torch.float32: TypeError"),
    "token out of range": (
        ("estimated_models:Tokens", "--input", "2,5:int64", "--input", "mask=2,5"),
        "IndexError: index out of range in self Change --input. Integers are drawn from 0 to HIGH - 1",
    ),
    "no layers": (("estimated_models:activation", "--input", "2,2"), "found no layer to freeze in ReLU"),
    "all frozen": (("estimated_models:frozen", *STACK[1:]), "returns a model that is frozen as a whole"),
    "too long a prefix": ((*STACK, "--prefix", "2,4"), "--prefix has [4], but the model has 4 layers that are trained"),
    "nothing left to train": (
        ("estimated_models:Unused", "--input", "2,4"),
        "A training step failed with the first 1 of 2 layers frozen: ValueError: no output depends on a weight",
    ),
    "unknown device": ((*STACK, "--device", "abacus"), "--device is 'abacus', which PyTorch does not know"),
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The current directory, with the models in it."""
    (tmp_path / "estimated_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "estimated_models", raising=False)
    monkeypatch.setattr(estimating, "TURN_SECONDS", 0.0)  # one step a turn
    yield tmp_path
    sys.modules.pop("estimated_models", None)


def invoke(*arguments):
    return CliRunner().invoke(main, ["estimate", *map(str, arguments)])


def measured(source="estimated_models:stack", *inputs, **options):
    specs = tuple(InputSpec.parse(text) for text in inputs or ["5,6"])
    return estimate(EstimateOptions(source, specs, **{"rounds": 1, "device": "cpu"} | options))


def made_up(*seconds):
    return Estimate("cpu", 1, ["a"], [], [Prefix(0, "", sorted(seconds)[len(seconds) // 2], 1, 2, 3, seconds)])


# Figures


def test_exact_figures_of_a_stack_of_linear_layers():
    result = measured()
    assert result.layers == ["0", "1", "2", "3"]
    once = 2 * 5 * 6 * 6
    for number, prefix in enumerate(result.prefixes):
        live = 4 - number
        assert prefix.num_frozen == number
        assert prefix.last_frozen == (str(number - 1) if number else "")
        assert prefix.forward_flops == 4 * once
        assert prefix.backward_flops == (live + live - 1) * once  # the first live layer's input needs no gradient
        assert prefix.activation_bytes == live * 5 * 6 * 4  # the inputs of live layers
        assert prefix.step_seconds > 0
        assert len(prefix.seconds) == 1


def test_a_cnn_saves_more_with_every_layer():
    result = measured("estimated_models:Cnn", "2,3,12,12", rounds=3)
    assert result.layers == ["parts.0.0", "parts.1.0", "parts.2.0", "head"]
    assert [p.num_frozen for p in result.prefixes] == [0, 1, 2, 3]
    assert [len(p.seconds) for p in result.prefixes] == [3] * 4
    for one, other in zip(result.prefixes, result.prefixes[1:], strict=False):
        assert one.backward_flops > other.backward_flops > 0
        assert one.activation_bytes > other.activation_bytes > 0
        assert one.forward_flops == other.forward_flops


def test_the_model_trains_all_layers_again_in_every_turn(monkeypatch):
    seen = []
    original = estimating._Bench._step

    def spy(bench):
        model = bench._model
        norms = [part[1].training for part in model.parts]
        seen.append(([p.requires_grad for part in model.parts for p in part.parameters()][::3], norms))
        return original(bench)

    monkeypatch.setattr(estimating._Bench, "_step", spy)
    measured("estimated_models:Cnn", "2,3,12,12", rounds=2)
    assert len(seen) == 4 * 2 + 4 * 2
    assert {tuple(live) for live, _ in seen[-4:]} == {
        (True,) * 3,
        (False, True, True),
        (False, False, True),
        (False,) * 3,
    }
    assert all(live == norms for live, norms in seen)


def test_layers_that_came_frozen_do_not_count():
    result = measured("estimated_models:partly_frozen")
    assert result.already_frozen == ["0"]
    assert result.layers == ["1", "2", "3"]
    assert [p.num_frozen for p in result.prefixes] == [0, 1, 2]
    assert result.prefixes[0].backward_flops == 5 * 2 * 5 * 6 * 6


def test_tokens_and_keywords():
    result = measured("estimated_models:Tokens", "2,5:int64:20", "mask=2,5", profile=True)
    assert list(result.costs) == ["embedding", "head"]
    assert result.costs["embedding"].input_gradient == 0
    assert result.costs["head"].input_gradient > 0


def test_random_numbers_go_on_as_if_nothing_had_been():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    measured("estimated_models:Cnn", "2,3,12,12")
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(("layers", "expected"), [(1, [0]), (2, [0, 1]), (5, [0, 1, 2, 3, 4]), (13, list(range(13)))])
def test_small_grids(layers, expected):
    assert estimating._grid((), layers) == expected


def test_the_grid_of_many_layers():
    grid = estimating._grid((), 77)
    assert (grid[0], grid[-1], len(grid)) == (0, 76, 13)
    assert estimating._grid((7, 3, 3), 77) == [0, 3, 7]


def test_inputs():
    assert InputSpec.parse("8,128:int64") == InputSpec((8, 128), "int64", 100)
    assert InputSpec.parse("mask=8,128:bool:2") == InputSpec((8, 128), "bool", 2, "mask")
    cpu = torch.device("cpu")
    tokens = InputSpec.parse("200:int64:7").make(cpu)
    assert (tokens.dtype, int(tokens.min()), int(tokens.max())) == (torch.int64, 0, 6)
    assert set(InputSpec.parse("100:bool").make(cpu).tolist()) == {True, False}
    assert InputSpec.parse("3,4:bfloat16").make(cpu).dtype == torch.bfloat16


def test_scattered_times_are_said():
    assert busy(made_up(1.0, 1.0, 1.01, 1.02)) == ""
    assert busy(made_up(1.0)) == ""
    assert busy(made_up(1.0, 2.0, 3.0)).startswith("The times scatter by 25%: something else keeps the machine busy.")


def test_a_model_is_found_in_the_current_directory(here):
    path = list(sys.path)
    assert isinstance(load_model("estimated_models:stack"), nn.Sequential)
    assert sys.path == path
    with pytest.raises(RecipeError, match=r"Run the command in the folder of gone\.py, or install the package"):
        load_model("gone.part:build")


# The command


def test_the_table(here):
    result = invoke(*CNN, "--layers", "-o", here / "out" / "figures.json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "estimated_models:Cnn on cpu" in result.stdout
    assert re.search(
        r"frozen +up to layer +step GFLOPs +saved +step ms +\+- +saved +activations MiB +saved\n", result.stdout
    )
    assert re.search(r"^0 of 4  - .* 0\.0%$", result.stdout, re.MULTILINE)
    assert re.search(r"^3 of 4  parts\.2\.0 .* \d+\.\d%$", result.stdout, re.MULTILINE)
    assert "saves the gradient of its weights only" in result.stdout
    assert re.search(r"^parts\.0\.0( +[\d.e-]+){3}$", result.stdout, re.MULTILINE)
    assert re.search(r"^all layers( +[\d.e-]+){3}$", result.stdout, re.MULTILINE)
    figures = json.loads((here / "out" / "figures.json").read_text())
    assert figures["options"]["inputs"] == [{"shape": [2, 3, 12, 12], "dtype": "float32", "high": 100, "keyword": ""}]
    assert [p["num_frozen"] for p in figures["prefixes"]] == [0, 1, 2, 3]
    assert set(figures["costs"]) == {"parts.0.0", "parts.1.0", "parts.2.0", "head"}
    assert LayerCost(**figures["costs"]["head"]).forward > 0
    assert figures["estimated"] == {}


def test_chosen_prefixes():
    result = invoke("estimated_models:partly_frozen", *STACK[1:], "--prefix", "2")
    assert result.exit_code == 0, result.output
    assert re.findall(r"^(\d) of 3 ", result.stdout, re.MULTILINE) == ["0", "2"]
    assert "The model came with 1 layers frozen; they stay so and are not counted." in result.stdout
    assert "input gradient ms" not in result.stdout


def test_help():
    result = invoke("--help")
    assert result.exit_code == 0
    assert "MODULE:CALLABLE" in result.stdout


@pytest.mark.parametrize("case", WRONG_USAGE)
def test_wrong_usage(case):
    arguments, message = WRONG_USAGE[case]
    result = invoke(*arguments)
    assert message in result.stderr
    assert result.exit_code == 2


@pytest.mark.parametrize("case", FAILURES)
def test_failures(case, here):
    arguments, message = FAILURES[case]
    before = sorted(here.iterdir())
    result = invoke(*arguments, "-o", "figures.json")
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert result.exit_code == 1
    assert [p for p in sorted(here.iterdir()) if p.name != "__pycache__"] == before


def test_torch_is_named_if_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    result = invoke(*STACK)
    assert result.exit_code == 1
    assert 'needs torch, which is not installed. Type: pip install "smartfrz[torch,cpu]"' in result.stderr

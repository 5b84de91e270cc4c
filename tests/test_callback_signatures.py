"""The callbacks of transformers and Lightning: their signature, copies, and what they say."""

import copy
import inspect
import pickle
import tomllib
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
lightning = pytest.importorskip("lightning.pytorch")
pytest.importorskip("transformers")

from smartfrz.adapters.torch import SmartFRZ  # noqa: E402
from smartfrz.adapters.torch import hf as transformers_callback  # noqa: E402
from smartfrz.adapters.torch import lightning as lightning_callback  # noqa: E402

CALLBACKS = [transformers_callback.SmartFRZCallback, lightning_callback.SmartFRZCallback]


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))

    def training_step(self, batch, index):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(32, 4)), 8)


QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.mark.parametrize("callback", CALLBACKS)
def test_the_signature_spells_out_every_option_of_smartfrz(callback):
    expected = dict(inspect.signature(SmartFRZ).parameters)
    for name in "model", "optimizer", "auto_step":
        del expected[name]
    found = dict(inspect.signature(callback).parameters)
    found.pop("allow_missing_state")
    assert {n: (p.default, p.annotation, p.kind) for n, p in found.items()} == {
        n: (p.default, p.annotation, p.kind) for n, p in expected.items()
    }


@pytest.mark.parametrize("callback", CALLBACKS)
def test_what_is_no_predictor_is_refused_before_training(callback):
    for predictor in None, 3:
        with pytest.raises(TypeError, match=r"`predictor` is .*; expected a name in the zoo"):
            callback(predictor)


@pytest.mark.filterwarnings("ignore")
def test_a_copy_or_a_pickle_has_the_options_and_no_run(capsys):
    callback = lightning_callback.SmartFRZCallback("smartfrz-tiny", threshold=0.8)
    lightning.Trainer(max_epochs=2, callbacks=[callback], **QUIET).fit(Module())
    assert "SmartFRZ froze" in capsys.readouterr().err  # the report
    for twin in copy.deepcopy(callback), pickle.loads(pickle.dumps(callback)):
        assert twin.freezer is None
        assert twin.report().num_steps == 0
        lightning.Trainer(max_epochs=2, callbacks=[twin], **QUIET).fit(Module())
        assert twin.report().num_steps == 8
        assert twin.freezer.schedule.threshold == 0.8
    for callback in (make() for make in CALLBACKS):
        assert copy.deepcopy(callback).report().num_steps == 0


@pytest.mark.filterwarnings("ignore")
def test_verbose_false_says_nothing_in_a_fit(capsys):
    callback = lightning_callback.SmartFRZCallback("smartfrz-tiny", verbose=False)
    lightning.Trainer(max_epochs=2, callbacks=[callback], **QUIET).fit(Module())
    assert "SmartFRZ" not in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_lightning_cli_takes_the_options_without_a_line_of_code():
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    place = "--trainer.callbacks"
    arguments = [
        "fit",
        f"{place}={lightning_callback.__name__}.SmartFRZCallback",
        f"{place}.threshold=0.8",
        f"{place}.freeze_order=prefix",
        f"{place}.predictor=smartfrz-tiny",
        "--trainer.max_epochs=2",
        *(f"--trainer.{name}=false" for name in QUIET),
    ]
    cli = LightningCLI(Module, args=arguments, save_config_callback=None)
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, lightning_callback.SmartFRZCallback)]
    assert callback.freezer.schedule[2:] == (0.8, 2, "prefix")


CONFIG = """
trainer:
  max_epochs: 2
  callbacks:
    - class_path: smartfrz.adapters.torch.lightning.SmartFRZCallback
      init_args:
        predictor: smartfrz-tiny
        threshold: 0.8
        providers: [CPUExecutionProvider]
"""


@pytest.mark.filterwarnings("ignore")
def test_lightning_cli_reads_the_callback_from_a_yaml_file(tmp_path):
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    (tmp_path / "config.yaml").write_text(CONFIG)
    arguments = ["fit", "--config", str(tmp_path / "config.yaml"), *(f"--trainer.{name}=false" for name in QUIET)]
    cli = LightningCLI(Module, args=arguments, save_config_callback=None)
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, lightning_callback.SmartFRZCallback)]
    assert callback.freezer.schedule.threshold == 0.8
    assert callback.freezer.predictor.providers == ["CPUExecutionProvider"]
    assert callback.report().num_steps == 8


@pytest.fixture
def _entry_points(tmp_path, monkeypatch):
    """Have pyproject.toml's entry points installed, whatever version of this package is."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8"))["project"]
    folder = tmp_path / "smartfrz-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: smartfrz\nVersion: 0\n")
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in project["entry-points"].items()
    ]
    (folder / "entry_points.txt").write_text("".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("wanted", "predictors"), [(None, []), ("0", []), ("1", ["smartfrz-base"])])
@pytest.mark.usefixtures("_entry_points")
def test_the_entry_point_makes_a_callback_only_where_it_is_asked_for(monkeypatch, wanted, predictors):
    monkeypatch.delenv("SMARTFRZ_LIGHTNING", raising=False)
    if wanted is not None:
        monkeypatch.setenv("SMARTFRZ_LIGHTNING", wanted)
    trainer = lightning.Trainer(max_epochs=1, **QUIET)
    made = [c for c in trainer.callbacks if isinstance(c, lightning_callback.SmartFRZCallback)]
    assert [callback._predictor for callback in made] == predictors


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_entry_points")
def test_a_callback_of_the_entry_point_freezes(monkeypatch):
    monkeypatch.setenv("SMARTFRZ_LIGHTNING", "smartfrz-tiny")
    trainer = lightning.Trainer(max_epochs=2, **QUIET)
    trainer.fit(Module())
    (callback,) = [c for c in trainer.callbacks if isinstance(c, lightning_callback.SmartFRZCallback)]
    assert callback.report().num_steps == 8
    assert callback.freezer.predictor.info.name == "smartfrz-tiny"


def test_hydra_makes_a_callback():
    hydra = pytest.importorskip("hydra.utils")
    for callback in CALLBACKS:
        made = hydra.instantiate({"_target_": f"{callback.__module__}.SmartFRZCallback", "threshold": 0.8})
        assert isinstance(made, callback)

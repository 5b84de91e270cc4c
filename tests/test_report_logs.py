"""Where the numbers and the picture of a run go: `log=`, and the loggers of the trainers. Keras: test_keras_fit.py."""

import csv
import math
import sys
import types

import pytest
from numpy_adapter import ChangePredictor, ScriptedPredictor

torch = pytest.importorskip("torch")

from torch_runs import NET, Net, attach, train  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
]
CONFIDENCE = "smartfrz/confidence/"


def test_log_gets_a_flat_dict_of_floats_at_each_record():
    seen = []
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = attach(
        model, optimizer, NET, (), {"conv1"}, total_steps=20, log=lambda values, step: seen.append((step, values))
    )
    train(model, optimizer, freezer, 0, 8)
    every = freezer.schedule.record_every
    assert [step for step, _ in seen] == list(range(every, 9, every))
    assert all(type(value) is float and math.isfinite(value) for _, values in seen for value in values.values())
    last = seen[-1][1]
    assert last["smartfrz/frozen_layers"] == 1.0
    assert last["smartfrz/seconds_per_step"] > 0
    judged = [{key.removeprefix(CONFIDENCE) for key in values if key.startswith(CONFIDENCE)} for _, values in seen]
    assert set(NET) in judged  # at the first stage
    assert set(NET) - {"conv1"} in judged
    freezer.close()


def test_log_has_to_be_a_function():
    model = Net()
    with pytest.raises(TypeError, match=r"`log` is 'wandb'; expected a function of a dict of floats and the step"):
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1), NET, total_steps=20, log="wandb")


def test_what_a_plain_loop_notes_is_in_the_report():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = attach(model, optimizer, NET, (), {"conv1"}, total_steps=20)
    train(model, optimizer, freezer, 0, 4)
    freezer.note(loss=torch.tensor(0.5), accuracy=0.75)
    assert freezer.report().curves == {"loss": [(4, 0.5)], "accuracy": [(4, 0.75)]}
    assert freezer.report().to_dict()["stages"]["steps"]
    freezer.close()


@pytest.fixture
def light_tensorboard(monkeypatch):
    """TensorBoard without TensorFlow, which takes ten seconds to load: with this name in place it uses its own files."""
    pytest.importorskip("tensorboard")
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))


def scalars_of(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulator.EventAccumulator(str(folder))
    board.Reload()
    return board


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_of_transformers_sends_confidences_and_the_picture_to_tensorboard_only(
    tmp_path, monkeypatch, light_tensorboard
):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    pytest.importorskip("matplotlib")
    from smartfrz.adapters.torch.hf import SmartFRZCallback

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    callback = SmartFRZCallback(ChangePredictor(), record_every=2, decide_every=1, patience=1, verbose=False)
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=12, logging_steps=4, report_to=["tensorboard"], use_cpu=True, disable_tqdm=True,
        save_strategy="no", eval_strategy="steps", eval_steps=6,
    )  # fmt: skip
    rows = [{"input_ids": torch.arange(6) + i, "labels": i % 2} for i in range(16)]
    trainer = transformers.Trainer(
        transformers.BertForSequenceClassification(config), arguments, train_dataset=rows, eval_dataset=rows,
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    (file,) = (tmp_path / "board").rglob("events*")
    board = scalars_of(file.parent)
    confidences = [tag for tag in board.Tags()["scalars"] if CONFIDENCE in tag]
    assert len(confidences) == len(callback.freezer.layers)
    assert "train/smartfrz/frozen_layers" in board.Tags()["scalars"]
    assert board.Tags()["images"] == ["smartfrz/layers"]
    assert not any(CONFIDENCE in key for entry in trainer.state.log_history for key in entry)
    assert set(callback.report().curves) == {"loss", "eval_loss"}


@pytest.mark.filterwarnings("ignore")
def test_lightnings_loggers_get_confidences_in_the_row_of_the_step_and_the_picture(tmp_path, light_tensorboard):
    lightning = pytest.importorskip("lightning.pytorch")
    pytest.importorskip("matplotlib")
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    from smartfrz.adapters.torch.lightning import SmartFRZCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))

        def training_step(self, batch, index):
            loss = self.net(batch[0]).square().mean()
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(32, 4)), 8)

    callback = SmartFRZCallback(ScriptedPredictor([{"net.0": 0.2, "net.2": 0.1}] * 9), record_every=2, decide_every=1)
    loggers = [CSVLogger(tmp_path, flush_logs_every_n_steps=1), TensorBoardLogger(tmp_path, "board")]
    lightning.Trainer(
        max_epochs=2, callbacks=[callback], logger=loggers, log_every_n_steps=1, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    ).fit(Module())  # fmt: skip
    with open(f"{loggers[0].log_dir}/metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    ours = {row["step"] for row in rows if row[f"{CONFIDENCE}net.0"]}
    assert len(ours) > 1
    assert ours <= {row["step"] for row in rows if row["smartfrz/frozen_layers"]}
    board = scalars_of(loggers[1].log_dir)
    assert f"{CONFIDENCE}net.2" in board.Tags()["scalars"]
    assert board.Tags()["images"] == ["smartfrz/layers"]
    assert len(callback.report().curves["train_loss"]) > 1

import functools
import shutil

import numpy as np
import pytest
from framework_runs import (
    assert_frozen_means_bit_identical,
    assert_same_weights,
    kept,
    kill_this_process,
    run_until_killed,
    without,
)
from numpy_adapter import ChangePredictor, MockLossPredictor

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from smartfrz.adapters.torch import PrefixCache  # noqa: E402
from smartfrz.adapters.torch.hf import STATE_FILE, SmartFRZCallback  # noqa: E402
from smartfrz.baselines import AutoFreeze, GradES, LinearFreezing  # noqa: E402
from smartfrz.errors import StateError, UnknownPredictorError  # noqa: E402

STEPS = 24
# The Trainer of version 4 itself does not train the same after resuming from the middle of an epoch.
RESUMES_EXACTLY = int(transformers.__version__.partition(".")[0]) >= 5
needs_exact_resuming = pytest.mark.skipif(not RESUMES_EXACTLY, reason="transformers 4 does not resume bit-identically")


class Probe(TrainerCallback):
    """Keeps the model after each step; `stop` is called after the step `stop_at`."""

    def __init__(self, stop_at=None, stop=None):
        self.stop_at, self.stop = stop_at, stop
        self.after = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after[state.global_step] = kept(model)

    def on_substep_end(self, args, state, control, **kwargs):
        self.substeps = getattr(self, "substeps", 0) + 1

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.stop_at:
            self.stop()


def tiny_bert(seed=0):
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=8,
        )
    )


def sentences(count=40):
    """Of class 1 if they begin with a small number; 8 steps an epoch, the last of them with fewer."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(40, (count, 6), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row[0] < 20)} for row in words]


def smartfrz(**options):
    options = {"record_every": 2, "decide_every": 2, "patience": 1, "threshold": 0.75} | options
    return SmartFRZCallback(options.pop("predictor", ChangePredictor(scale=5.0)), **options)


def trainer_of(folder, *callbacks, model=None, kind=Trainer, **arguments):
    arguments = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 6,
        "learning_rate": 2e-3,
        "weight_decay": 0.1,
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    } | arguments
    arguments = TrainingArguments(str(folder), **arguments)
    model = model or tiny_bert()
    return kind(model, arguments, train_dataset=sentences(), eval_dataset=sentences(12), callbacks=[*callbacks])


def train(folder, *callbacks, resume=None, **arguments):
    trainer = trainer_of(folder, *callbacks, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def train_and_die(folder):
    train(folder, smartfrz(), Probe(17, kill_this_process), save_strategy="steps", save_steps=5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts, evaluated every third step: its Trainer, callback and probe."""
    callback, probe = smartfrz(), Probe()
    folder = tmp_path_factory.mktemp("whole")
    trainer = train(folder, callback, probe, save_strategy="steps", save_steps=5)
    return trainer, callback, probe


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of the same run, killed before step 18: checkpoints of steps 5, 10 and 15."""
    folder = tmp_path_factory.mktemp("killed")
    run_until_killed(f"import test_hf; test_hf.train_and_die({str(folder)!r})")
    return folder


def test_frozen_layers_are_bit_identical_and_the_others_train(whole):
    _, callback, probe = whole
    report = callback.report()
    assert_frozen_means_bit_identical(probe.after, report)
    assert report.num_steps == STEPS == len(probe.after)
    # otherwise resuming from step 15 would prove little
    assert min(report.frozen.values()) < 15 < max(report.frozen.values())


class CallsParts(Trainer):
    """Its loss never calls the model itself."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        logits = model.classifier(model.dropout(model.bert(**inputs).pooler_output))
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return (loss, {"logits": logits}) if return_outputs else loss


def test_a_loss_that_calls_parts_of_the_model_is_the_same_run(whole, tmp_path):
    callback, probe = smartfrz(), Probe()
    trainer = trainer_of(tmp_path, callback, probe, kind=CallsParts)
    trainer.train()
    assert [layer.to_dict() for layer in callback.report().layers] == [x.to_dict() for x in whole[1].report().layers]
    assert repr(callback.freezer.events) == repr(whole[1].freezer.events)
    assert_same_weights(whole[0].model.state_dict(), trainer.model.state_dict())
    assert_frozen_means_bit_identical(probe.after, callback.report())


def test_when_training_ends_everything_can_be_trained_again(whole):
    trainer, callback, _ = whole
    assert callback.freezer.frozen_layers
    assert all(p.requires_grad for p in trainer.model.parameters())


def test_logs(whole):
    trainer, callback, _ = whole
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    frozen = [entry["smartfrz/frozen_layers"] for entry in logs]
    assert frozen == sorted(frozen)
    assert frozen[-1] == len(callback.freezer.frozen_layers)
    assert 0 == logs[0]["smartfrz/backward_saved"] < logs[-1]["smartfrz/backward_saved"] < 1


def test_the_learning_rate_is_that_of_training_without_smartfrz(whole, tmp_path):
    rates = [
        [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
        for trainer in (whole[0], train(tmp_path))
    ]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 3


@needs_exact_resuming
@pytest.mark.parametrize("how", ["last", "step 10", "moved"])
def test_a_killed_run_goes_on_bit_identical(how, whole, killed, tmp_path):
    folder, resume = {
        "last": (killed, True),
        "step 10": (tmp_path / "new", str(killed / "checkpoint-10")),
        "moved": (tmp_path / "new", str(tmp_path / "elsewhere")),
    }[how]
    if how == "moved":
        shutil.copytree(killed / "checkpoint-15", resume)
    callback, probe = smartfrz(), Probe()
    trainer = train(folder, callback, probe, model=tiny_bert(seed=1), resume=resume)
    assert min(probe.after) == (11 if how == "step 10" else 16)
    assert_same_weights(whole[0].model.state_dict(), trainer.model.state_dict())
    assert repr(callback.freezer.events) == repr(whole[1].freezer.events)
    assert callback.report().frozen == whole[1].report().frozen
    assert_frozen_means_bit_identical(whole[2].after | probe.after, callback.report())


@pytest.mark.parametrize("policy", [LinearFreezing(0.2, scale_lr=True), AutoFreeze(epochs=3), GradES(0.3)])
def test_baselines_go_on_from_a_checkpoint(policy, tmp_path):
    callback, again = SmartFRZCallback(policy), SmartFRZCallback(policy)
    plain = train(tmp_path / "plain")
    first = train(tmp_path / "first", callback, save_strategy="steps", save_steps=5)
    checkpoint = str(tmp_path / "first" / "checkpoint-5")
    second = train(tmp_path / "second", again, model=tiny_bert(seed=1), resume=checkpoint)
    assert callback.report().frozen == again.report().frozen
    assert min(callback.report().frozen.values()) < 20
    assert repr(again.freezer.events) == repr(callback.freezer.events)
    assert_same_weights(first.model.state_dict(), second.model.state_dict())
    rates = [[e["learning_rate"] for e in t.state.log_history if "learning_rate" in e] for t in (plain, first)]
    assert rates[0] == rates[1]


def test_the_trainer_restores_the_callback_itself_if_told_to(tmp_path):
    options = {"predictor": "smartfrz-base", "threshold": 0.001, "record_every": 1, "decide_every": 2}
    train(tmp_path, smartfrz(**options), max_steps=8, save_strategy="steps", save_steps=6)
    callback = smartfrz(**options)
    trainer = trainer_of(tmp_path, callback, max_steps=10, restore_callback_states_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    (made_anew,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, SmartFRZCallback)]
    assert made_anew is not callback
    assert made_anew.report().num_steps == 10
    assert made_anew.report().frozen


def test_a_predictor_that_json_cannot_hold_is_missed_not_replaced(tmp_path):
    train(tmp_path, smartfrz(), max_steps=6, save_strategy="steps", save_steps=6)
    with pytest.raises(StateError, match="Resume with the same predictor"):
        train(tmp_path, smartfrz(), resume=True, restore_callback_states_from_checkpoint=True)


def test_a_checkpoint_without_our_state_is_refused_or_watched_from_there(tmp_path):
    train(tmp_path, max_steps=6, save_strategy="steps", save_steps=6)
    with pytest.raises(StateError, match=r"goes on from step 6, .* no state of SmartFRZCallback.*allow_missing_state"):
        train(tmp_path, smartfrz(), resume=True)
    callback = smartfrz(allow_missing_state=True)
    train(tmp_path, callback, resume=True, save_strategy="steps", save_steps=6)
    assert callback.report().num_steps == STEPS - 6
    again = smartfrz()
    train(tmp_path, again, resume=str(tmp_path / "checkpoint-12"))
    assert again.report().num_steps == STEPS - 6


def test_the_state_is_a_small_file_of_the_checkpoint(killed):
    for step in 5, 10, 15:
        folder = killed / f"checkpoint-{step}"
        assert (folder / STATE_FILE).is_file()
        assert (folder / "trainer_state.json").stat().st_size < 20_000
        with np.load(folder / STATE_FILE, allow_pickle=False) as file:
            assert len(file.files) > 1
        assert not list(folder.glob(".*"))


def test_an_older_state_than_the_checkpoint_is_refused(tmp_path):
    train(tmp_path, smartfrz(), max_steps=6, save_strategy="steps", save_steps=6)
    train(tmp_path, resume=True, max_steps=12, save_strategy="steps", save_steps=6)  # without us
    with pytest.raises(StateError, match=r"is of step 12, but the state of SmartFRZCallback in it of step 6"):
        train(tmp_path, smartfrz(), resume=True)
    callback = smartfrz(allow_missing_state=True)
    train(tmp_path, callback, resume=True)
    assert callback.report().num_steps == STEPS - 12


def test_a_checkpoint_whose_file_is_lost_or_of_another_run_is_refused(killed, tmp_path):
    lost = tmp_path / "lost"
    shutil.copytree(killed / "checkpoint-15", lost)
    shutil.copy(killed / "checkpoint-10" / STATE_FILE, lost / STATE_FILE)
    with pytest.raises(StateError, match=r"smartfrz_state.npz of the checkpoint.*Copy the whole folder"):
        train(tmp_path / "new", smartfrz(), resume=str(lost))


# transformers 4 says so where checkpoints follow each other within a second
@pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning")
def test_only_the_kept_checkpoints_hold_a_state_and_the_best_model_is_loaded(tmp_path):
    callback = smartfrz()
    train(
        tmp_path,
        callback,
        save_strategy="steps",
        save_steps=4,
        eval_strategy="steps",
        eval_steps=4,
        save_total_limit=2,
        load_best_model_at_end=True,
    )
    assert callback.report().frozen
    kept_folders = sorted(tmp_path.glob("checkpoint-*"))
    assert len(kept_folders) <= 2
    assert all((folder / STATE_FILE).is_file() for folder in kept_folders)


@needs_exact_resuming
def test_a_state_that_has_no_folder_is_in_the_json_as_in_a_hyperparameter_search(killed, tmp_path, whole, monkeypatch):
    monkeypatch.setattr("smartfrz.adapters.torch.hf.PREFIX_CHECKPOINT_DIR", "elsewhere")
    train(tmp_path, smartfrz(), max_steps=STEPS, save_strategy="steps", save_steps=10)
    assert not list(tmp_path.glob(f"*/{STATE_FILE}"))
    callback = smartfrz()
    trainer = train(tmp_path / "new", callback, model=tiny_bert(seed=1), resume=str(tmp_path / "checkpoint-10"))
    assert repr(callback.freezer.events) == repr(whole[1].freezer.events)
    assert_same_weights(whole[0].model.state_dict(), trainer.model.state_dict())


@pytest.mark.parametrize("added", ["given", "later"])
def test_tensorboard_gets_the_scalars(added, tmp_path, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    callback, after = smartfrz(), Probe()
    trainer = trainer_of(tmp_path, *([callback] if added == "given" else []), after, report_to=["tensorboard"])
    if added == "later":
        trainer.add_callback(callback)
    trainer.train()
    board = event_accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
    values = [event.value for event in board.Scalars("train/smartfrz/frozen_layers")]
    assert values[-1] == len(callback.freezer.frozen_layers) > 0
    assert len(after.after) == STEPS  # nobody's turn was lost


def test_accumulated_batches_and_evaluation_do_not_count(tmp_path):
    callback, probe = smartfrz(record_every=1), Probe()
    trainer = train(
        tmp_path,
        callback,
        probe,
        max_steps=12,
        gradient_accumulation_steps=3,
        eval_strategy="steps",
        eval_steps=2,
    )
    assert probe.substeps > 12
    assert callback.report().num_steps == 12
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 6
    assert_frozen_means_bit_identical(probe.after, callback.report())


def test_the_length_of_the_run_comes_from_the_trainer(tmp_path):
    callback = smartfrz(record_every=None)
    train(tmp_path, callback, max_steps=-1, num_train_epochs=20)
    assert callback.report().num_steps == 20 * 7
    assert callback.freezer.state_dict()["controller"]["schedule"]["record_every"] == round(0.02 * 20 * 7)


def test_the_length_of_the_run_comes_from_the_trainer_beside_record_every_too(tmp_path):
    callback = SmartFRZCallback(LinearFreezing(0.2), record_every=1)
    train(tmp_path, callback)
    assert callback.freezer.state_dict()["controller"]["total_steps"] == STEPS
    assert callback.report().frozen


def test_a_run_that_is_resumed_for_longer_has_the_new_length_and_says_so(killed, tmp_path, caplog):
    callback = smartfrz(threshold=0.9)
    train(tmp_path, callback, resume=str(killed / "checkpoint-10"), max_steps=3 * STEPS)
    assert callback.freezer.state_dict()["controller"]["total_steps"] == 3 * STEPS
    assert callback.freezer.schedule.threshold == 0.9
    (said,) = [r.message for r in caplog.records if "other options" in r.message]
    assert f"total_steps is now {3 * STEPS} (saved: {STEPS})" in said
    assert "threshold is now 0.9 (saved: 0.75)" in said


def test_a_second_train_starts_anew(tmp_path):
    callback = smartfrz()
    trainer = trainer_of(tmp_path, callback, save_strategy="steps", save_steps=10)
    trainer.train()
    first = callback.freezer
    trainer.train()
    assert callback.freezer is not first
    assert callback.report().num_steps == STEPS
    assert callback.report().user_frozen == set()
    assert callback.report().layers == first.report().layers
    # and going back in the same process thaws what froze after the checkpoint
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert callback.report().user_frozen == set()
    assert callback.report().num_steps == STEPS


def test_after_an_interruption_a_new_trainer_trains_all_layers(tmp_path):
    def stop():
        raise KeyboardInterrupt

    callback, model = smartfrz(), tiny_bert()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, callback, Probe(20, stop), model=model)
    assert not all(p.requires_grad for p in model.parameters())
    trainer = train(tmp_path, callback, model=model)
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters()}
    assert callback.report().user_frozen == set()


def test_a_dry_run_trains_as_without_smartfrz(tmp_path):
    callback = smartfrz(dry_run=True)
    trainers = [train(tmp_path, *callbacks) for callbacks in ([callback], [])]
    assert callback.report().frozen
    assert callback.freezer.frozen_layers == []
    assert_same_weights(*(trainer.model.state_dict() for trainer in trainers))


# peft 0.21 asks for it
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
# peft 0.17 looks for the file of a model that was never saved
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_the_layers_of_a_lora_model_freeze_and_its_base_never_trains(tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny_bert()
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], lora_dropout=0.1)
    model = peft.get_peft_model(base, config)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    callback, probe = smartfrz(), Probe()
    options = {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 9}
    train(tmp_path, callback, probe, model=model, **options)
    report = callback.report()
    assert_frozen_means_bit_identical(probe.after, report)
    assert all("lora_" in name or "classifier" in name for name in report.frozen)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable

    if not RESUMES_EXACTLY:
        return
    again = smartfrz()
    model = peft.get_peft_model(tiny_bert(), config)
    train(tmp_path, again, model=model, resume=str(tmp_path / "checkpoint-18"), **options)
    assert repr(again.freezer.events) == repr(callback.freezer.events)
    assert_same_weights(model.state_dict(), probe.after[STEPS][0])


def test_wrong_arguments():
    with pytest.raises(TypeError, match="treshold"):
        SmartFRZCallback(treshold=0.5)


def test_an_unknown_predictor_is_named_before_the_first_batch(tmp_path):
    probe = Probe()
    with pytest.raises(UnknownPredictorError, match="Did you mean"):
        train(tmp_path, smartfrz(predictor="smartfrz-bse"), probe)
    assert probe.after == {}


def test_torch_alone_does_not_load_transformers_and_its_absence_is_named():
    said = without("smartfrz.adapters.torch.hf", ["transformers"])
    assert said.startswith("[] MissingDependencyError")
    assert 'pip install "smartfrz[hf,cpu]"' in said


def test_a_misspelled_predictor_is_named_before_training():
    with pytest.raises(UnknownPredictorError, match="Did you mean 'smartfrz-base'"):
        SmartFRZCallback("smartfrz-bse")


def test_a_frozen_prefix_is_cached(tmp_path):
    models, logs = [tiny_bert() for _ in range(2)], []
    callbacks = [smartfrz(), smartfrz(cache=PrefixCache(profile=False))]
    for model, callback in zip(models, callbacks, strict=True):
        model.bert.embeddings.requires_grad_(False)
        model.bert.encoder.layer[0].requires_grad_(False)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer = trainer_of(tmp_path, callback, model=model, logging_steps=1)
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    use = callbacks[1].report().cache
    assert use.hits >= 80
    assert logs[0] == pytest.approx(logs[1], abs=1e-4)  # the Trainer rounds them
    assert "forward" not in vars(models[1])


class NotesLosses(Trainer):
    """Notes what each optimizer step was trained on, from before the gradients are accumulated."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses = {}

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses.setdefault(self.state.global_step, []).append(loss.item())
        return loss


def squared(outputs, labels, num_items_in_batch=None):
    return (outputs["logits"][:, 0] - labels).square().mean()


@pytest.mark.parametrize(
    "arguments",
    [{}, {"gradient_accumulation_steps": 2}, {"label_smoothing_factor": 0.1}, {"compute_loss_func": squared}],
    ids=["plain", "accumulated", "smoothed", "own"],
)
def test_a_mock_predictor_is_told_the_losses_that_the_trainer_trains_on(tmp_path, arguments):
    predictor = MockLossPredictor()
    kind = functools.partial(NotesLosses, compute_loss_func=arguments.get("compute_loss_func"))
    arguments = {name: value for name, value in arguments.items() if name != "compute_loss_func"}
    arguments["lr_scheduler_type"] = "constant"  # layers are not asked about after a step with a learning rate of 0
    trainer = train(tmp_path, smartfrz(predictor=predictor, decide_every=1), kind=kind, max_steps=8, **arguments)
    steps = [sum(trainer.losses[step]) for step in range(8)]
    if "gradient_accumulation_steps" in arguments:
        assert {len(losses) for losses in trainer.losses.values()} == {2, 1}  # 7 batches an epoch
    np.testing.assert_allclose(predictor.losses[-1][0], np.reshape(steps, (4, 2)).mean(1), rtol=1e-5)
    assert "training_step" not in vars(trainer)


def test_losses_of_a_mock_predictor_go_on_after_resuming(tmp_path):
    whole, resumed = MockLossPredictor(), MockLossPredictor()
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3}
    train(tmp_path, smartfrz(predictor=whole, decide_every=1), **options)
    train(tmp_path, smartfrz(predictor=resumed, decide_every=1), resume=str(tmp_path / "checkpoint-3"), **options)
    np.testing.assert_array_equal(whole.losses[1][:, 0], resumed.losses[0][:, 0])
    if RESUMES_EXACTLY:
        np.testing.assert_array_equal(whole.losses[-1], resumed.losses[-1])


def test_the_trainer_is_left_alone_where_the_predictor_reads_no_losses(tmp_path):
    class Looks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            self.attributes = set(vars(trainer))

    looks = Looks()
    trainer = trainer_of(tmp_path, smartfrz(), looks, max_steps=2)
    trainer.train()
    assert "training_step" not in looks.attributes


def test_a_trainer_with_a_training_step_of_its_own_keeps_it(tmp_path):
    predictor, seen = MockLossPredictor(), []
    trainer = trainer_of(tmp_path, smartfrz(predictor=predictor, decide_every=1), max_steps=4)
    step = trainer.training_step

    def own(*args, **kwargs):
        seen.append(step(*args, **kwargs))
        return seen[-1]

    trainer.training_step = own
    trainer.train()
    assert trainer.training_step is own
    assert len(seen) == 4
    assert np.isfinite(predictor.losses[-1]).all()

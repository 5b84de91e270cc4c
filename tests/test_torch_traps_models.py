"""Checkpointing, copies, adapters, tied weights and the modules that users have. One test per trap."""

import copy
import pickle
import warnings

import numpy as np
import pytest
from numpy_adapter import ScriptedPredictor, make_info, script

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations  # noqa: E402
from torch.utils.checkpoint import checkpoint, checkpoint_sequential  # noqa: E402
from torch_runs import (  # noqa: E402
    NET,
    Net,
    attach,
    batch,
    loss_of,
    mlp,
    moved,
    num_hooks,
    parts,
    seeded,
    train,
    values,
)

from smartfrz.adapters.torch import SmartFRZ, trace_layers  # noqa: E402
from smartfrz.adapters.torch.compiling import EagerHold  # noqa: E402

INPUTS = (8, 5)


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=0.1)


def fit(model, freezer, optimizers, loss, steps):
    """A loop whose loss is a function of the step."""
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    for step in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss(step).backward()
        for optimizer in optimizers:
            optimizer.step()
        freezer.step()


def names(layers):
    return [layer.name for layer in layers]


# Gradient checkpointing


class Deep(nn.Module):
    """An embedding layer, blocks that may run under checkpointing, and a head."""

    def __init__(self, mode, blocks=3):
        super().__init__()
        self.mode = mode
        self.first = seeded(nn.Linear, 5, 6)
        self.blocks = nn.Sequential(*(mlp(6, 7, 6, seed=index) for index in range(blocks)))
        self.head = seeded(nn.Linear, 6, 3, seed=9)

    def forward(self, x):
        x = self.first(x)
        if self.mode == "sequential":
            x = checkpoint_sequential(self.blocks, 2, x, use_reentrant=True)
        else:
            for block in self.blocks:
                x = block(x) if self.mode == "none" else checkpoint(block, x, use_reentrant=self.mode == "reentrant")
        return self.head(x)


DEEP = ["first", "blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2", "blocks.2.0", "blocks.2.2", "head"]


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant", "sequential"])
@pytest.mark.parametrize("prefix", [1, 2, 3, 5])
def test_live_layers_behind_a_frozen_prefix_get_their_gradients_under_checkpointing(mode, prefix):
    model, plain = Deep(mode), Deep("none")
    freezers = []
    for net in model, plain:
        optimizer = sgd(net)
        freezers.append(attach(net, optimizer, DEEP, set(DEEP[:prefix])))
        train(net, optimizer, freezers[-1], 0, 4, *INPUTS)
        assert freezers[-1].layers == DEEP
        assert freezers[-1].frozen_layers == DEEP[:prefix]
        net.zero_grad()
        loss_of(net, 4, *INPUTS).backward()
    for (name, one), two in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (name.rpartition(".")[0] in DEEP[:prefix])
        assert one.grad is None or torch.equal(one.grad, two.grad)
    assert not moved(values(plain), model)

    for freezer in freezers:
        freezer.thaw()
    assert num_hooks(model) == 0
    train(model, sgd(model), None, 5, 7, *INPUTS)
    train(plain, sgd(plain), None, 5, 7, *INPUTS)
    assert not moved(values(plain), model)


def test_input_gradients_under_reentrant_checkpointing_are_not_called_saved():
    reports = []
    for mode in "reentrant", "not reentrant":
        model = Deep(mode)
        optimizer = sgd(model)
        freezer = attach(model, optimizer, DEEP, set(DEEP[:3]))
        train(model, optimizer, freezer, 0, 6, *INPUTS)
        reports.append(freezer.report())
    first, inner = 2 * 8 * 5 * 6, 2 * 8 * 6 * 7
    assert reports[0].backward_flops == reports[1].backward_flops
    assert reports[0].backward_flops_saved_by_prefix == 0
    assert reports[0].backward_flops_saved_by_interior == 4 * (first + 2 * inner)
    assert reports[1].backward_flops_saved_by_prefix == 4 * (first + 2 * inner + 3 * inner)


class Recurrent(nn.Module):
    """A layer that returns several values, before a reentrant checkpoint; the answer is an object."""

    class Answer:
        def __init__(self, scores):
            self.scores = scores

    def __init__(self):
        super().__init__()
        self.recurrent = seeded(nn.LSTM, 5, 6, batch_first=True)
        self.block = mlp(6, 7, 6)
        self.head = seeded(nn.Linear, 6, 3)

    def forward(self, x):
        x, _ = self.recurrent(x)
        return self.Answer(self.head(checkpoint(self.block, x[:, -1], use_reentrant=True)))


def test_a_frozen_layer_with_several_outputs_lets_gradients_pass():
    model = Recurrent()
    optimizer = sgd(model)
    layers = ["recurrent", "block.0", "block.2", "head"]
    freezer = attach(model, optimizer, layers, {"recurrent"})

    def loss(step):
        inputs, targets = batch(step, 8, 4, 5)
        return nn.functional.cross_entropy(model(inputs).scores, targets)

    fit(model, freezer, optimizer, loss, 3)
    assert freezer.layers == layers
    assert freezer.frozen_layers == ["recurrent"]
    optimizer.zero_grad()
    loss(3).backward()
    assert all((p.grad is None) == n.startswith("recurrent") for n, p in model.named_parameters())


def test_a_pass_without_gradients_in_training_mode_does_not_hide_the_checkpointing():
    model = Deep("reentrant")
    optimizer = sgd(model)
    freezer = attach(model, optimizer, DEEP, {"first"})
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(batch(0, *INPUTS)[0])
    train(model, optimizer, freezer, 0, 3, *INPUTS)
    assert freezer.frozen_layers == ["first"]
    model.zero_grad()
    loss_of(model, 3, *INPUTS).backward()
    assert model.blocks[0][0].weight.grad.any()


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


def tiny_bert(transformers, kind="BertForSequenceClassification"):
    config = transformers.BertConfig(
        vocab_size=31,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        num_labels=3,
        hidden_dropout_prob=0.1,
    )
    return seeded(getattr(transformers, kind), config).train()


def tokens(step, vocabulary=31):
    return torch.randint(vocabulary, (4, 6), generator=torch.Generator().manual_seed(step))


def bert_loss(model, labels=lambda ids: ids[:, 0] % 3):
    def loss(step):
        torch.manual_seed(step)
        ids = tokens(step)
        return model(input_ids=ids, labels=labels(ids)).loss

    return loss


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_transformers(transformers, reentrant):
    embeddings = [f"bert.embeddings.{kind}_embeddings" for kind in ("word", "token_type", "position")]
    runs = []
    for checkpointing in True, False:
        model = tiny_bert(transformers)
        layers = names(trace_layers(copy.deepcopy(model), input_ids=tokens(0)))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        assert layers[:3] == embeddings
        optimizer = sgd(model)
        freezer = attach(model, optimizer, layers, set(layers[:5]))
        fit(model, freezer, optimizer, bert_loss(model), 4)
        assert freezer.layers == layers
        assert freezer.frozen_layers == layers[:5]
        model.zero_grad()
        bert_loss(model)(4).backward()
        runs.append(model)
    for (name, one), two in zip(runs[0].named_parameters(), runs[1].parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-7)


# Copies and averaged weights


@pytest.mark.parametrize("moment", [0, 1, 2, 5])
@pytest.mark.parametrize("order", ["free", "cost_aware"])
def test_a_copy_made_at_any_moment_leaves_training_alone(moment, order):
    holders = EagerHold.holders
    copied, plain = Net(), Net()
    runs = []
    for model in copied, plain:
        optimizer = sgd(model)
        predictor = ScriptedPredictor(script(NET, (), {"conv1"}, {"conv2"}))
        freezer = attach(model, optimizer, NET, predictor=predictor, freeze_order=order, threshold=0.2)
        train(model, optimizer, freezer, 0, moment)
        runs.append((model, optimizer, freezer))
    averaged = torch.optim.swa_utils.AveragedModel(copied, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    twins = averaged.module, copy.deepcopy(copied), pickle.loads(pickle.dumps(copied))
    for twin in twins:
        held = EagerHold.holders
        for _ in range(2):
            loss_of(twin.train(), 99).backward()
        assert EagerHold.holders == held  # the first pass of a copy is not the model's
    del twin, twins
    for run in runs:
        train(*run, moment, 4)
    averaged.update_parameters(copied)
    for run in runs:
        train(*run, 4, 10)
    for _ in range(40):
        averaged.update_parameters(copied)
    assert [run[2].frozen_layers for run in runs] == [["conv1", "conv2"]] * 2
    assert not moved(values(plain), copied)
    for one, two in zip(averaged.module.parameters(), copied.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    assert num_hooks(copied) == 0
    assert EagerHold.holders == holders


def test_an_average_of_frozen_weights_is_those_weights():
    model = Net()
    optimizer = sgd(model)
    freezer = attach(model, optimizer, NET, {"conv1"})
    train(model, optimizer, freezer, 0, 3)
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for step in range(3, 8):
        averaged.update_parameters(model)
        train(model, optimizer, freezer, step, step + 1)
    torch.testing.assert_close(averaged.module.conv1.weight, model.conv1.weight)
    assert torch.equal(averaged.module.norm1.running_mean, model.norm1.running_mean)
    assert not torch.equal(averaged.module.head.weight, model.head.weight)


# LoRA


def with_lora(transformers, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return seeded(lambda: peft.get_peft_model(tiny_bert(transformers), config))


def test_lora_layers_freeze_and_the_base_stays_the_users(transformers, tmp_path):
    model = with_lora(transformers, modules_to_save=["classifier"])
    base = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    optimizer = sgd(model)
    layers = [layer.name for layer in trace_layers(copy.deepcopy(model), input_ids=tokens(0))]
    trainable = [name for name in layers if ".lora_" in name or name.endswith("modules_to_save.default")]
    assert len(trainable) == 2 * 2 * 2 + 1
    freezer = attach(model, optimizer, trainable, set(trainable[:3]))
    fit(model, freezer, optimizer, bert_loss(model), 3)
    assert freezer.layers == trainable
    assert freezer.frozen_layers == trainable[:3]
    before = values(model)
    fit(model, freezer, optimizer, bert_loss(model), 6)
    assert {name.rpartition(".")[0] for name in moved(before, model)} == set(trainable[3:])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    freezer.thaw()
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == base
    model.eval()
    expected = model(input_ids=tokens(1)).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=tokens(1)).logits, expected)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_lora_on_an_embedding_is_judged_by_its_own_weights(transformers):
    # They live in a ParameterDict, next to a large weight that the user froze.
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0", "1"])
    base = nn.Sequential(nn.Embedding(31, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    model = seeded(lambda: peft.get_peft_model(base, config))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    predictor = ScriptedPredictor(info=make_info(tailored_size=32))
    freezer = SmartFRZ(model, optimizer, predictor, record_every=1, decide_every=4)

    def loss(step):
        return nn.functional.cross_entropy(model(tokens(step)).mean(1), tokens(step)[:, 0] % 3)

    fit(model, freezer, optimizer, loss, 4)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = [name for layer in freezer.report().layers for name in layer.parameters]
    assert len(found) == len(set(found))
    assert trained <= set(found)
    history, _ = predictor.calls[0]
    assert all(np.abs(np.diff(rows[1:], axis=0)).any() for rows in history)


# Tied weights, tokens and positions


def test_an_embedding_and_the_head_that_is_tied_to_it_are_one_layer(transformers):
    config = transformers.GPT2Config(
        vocab_size=31, n_embd=8, n_layer=2, n_head=2, n_positions=12, bos_token_id=0, eos_token_id=0
    )
    model = seeded(transformers.GPT2LMHeadModel, config).train()
    assert model.lm_head.weight is model.transformer.wte.weight
    layers = names(trace_layers(copy.deepcopy(model), input_ids=tokens(0)))
    assert layers[:2] == ["transformer.wte", "transformer.wpe"]  # where the backward pass ends
    assert not any("lm_head" in name for name in layers)
    optimizer = sgd(model)
    freezer = attach(model, optimizer, layers, set(layers[:2]), set(layers[2:]))
    loss = bert_loss(model, labels=lambda ids: ids)
    fit(model, freezer, optimizer, loss, 2)
    before = values(model)
    seen = []
    hook = model.transformer.h[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))
    fit(model, freezer, optimizer, loss, 4)
    hook.remove()
    assert seen == [False] * 4  # the prefix is closed, although its weight is used again at the end
    assert freezer.frozen_layers == layers[:-1]
    still = {name for name in before if "wte" in name or "wpe" in name or "lm_head" in name}
    assert still <= set(before) - moved(before, model)
    freezer.thaw(["transformer.wte"])
    assert model.lm_head.weight.requires_grad
    fit(model, freezer, optimizer, loss, 1)
    assert {"transformer.wte.weight", "lm_head.weight"} <= moved(before, model)


def test_weight_and_bias_of_one_module_may_be_tied_to_different_layers(transformers):
    # BERT's decoder has the weight of the embedding, and the bias of the block around it.
    model = tiny_bert(transformers, "BertForMaskedLM")
    layers = trace_layers(copy.deepcopy(model), input_ids=tokens(0))
    found = [name for layer in layers for name in layer.parameters]
    assert sorted(found) == sorted(name for name, _ in model.named_parameters())
    optimizer = sgd(model)
    freezer = attach(model, optimizer, names(layers), {layers[0].name, layers[-2].name})
    loss = bert_loss(model, labels=lambda ids: ids)
    fit(model, freezer, optimizer, loss, 2)
    before = values(model)
    freezer.thaw([layers[0].name])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == set(layers[-2].parameters)
    fit(model, freezer, optimizer, loss, 1)
    assert frozen.isdisjoint(moved(before, model))


def test_class_token_and_positions_freeze_with_the_patches_so_that_the_prefix_closes(transformers):
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    config.num_labels = 3
    model = seeded(transformers.ViTForImageClassification, config).train()
    layers = names(trace_layers(copy.deepcopy(model), batch(0, 4, 3, 8, 8)[0]))
    optimizer = sgd(model)
    freezer = attach(model, optimizer, layers, {layers[0]})

    def loss(step):
        images, targets = batch(step, 4, 3, 8, 8)
        return model(pixel_values=images, labels=targets).loss

    fit(model, freezer, optimizer, loss, 2)
    assert freezer.frozen_layers == [layers[0]]
    assert not any(
        p.requires_grad
        for p in model.vit.embeddings.parameters()
        if p is not getattr(model.vit.embeddings, "mask_token", None)
    )
    seen = []
    hook = model.vit.embeddings.register_forward_hook(lambda module, args, output: seen.append(output))
    loss(2)
    hook.remove()
    assert seen[0].grad_fn is None
    assert not seen[0].requires_grad


# Modules as users have them


class Varied(nn.Module):
    """Dictionaries in and out, keyword arguments, a module list, and a module that is called twice."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(5)
        self.blocks = nn.ModuleList([seeded(nn.Linear, 5, 6), seeded(nn.Linear, 6, 6), seeded(nn.Linear, 6, 6)])
        self.head = seeded(nn.Linear, 6, 3)

    def forward(self, inputs, *, scale=1.0):
        x = self.blocks[0](input=self.norm(inputs["features"]))
        x = self.blocks[1](torch.relu(self.blocks[1](torch.relu(x))))
        return {"scores": self.head(self.blocks[2](x) * scale)}


def test_dictionaries_keyword_arguments_and_a_module_that_runs_twice():
    model = Varied()
    optimizer = sgd(model)
    layers = ["blocks.0", "blocks.1", "blocks.2", "head"]
    freezer = attach(model, optimizer, layers, {"blocks.0"}, {"blocks.1"})

    def loss(step):
        inputs, targets = batch(step, *INPUTS)
        return nn.functional.cross_entropy(model({"features": inputs}, scale=0.5)["scores"], targets)

    fit(model, freezer, optimizer, loss, 4)
    assert freezer.layers == layers
    before = values(model)
    fit(model, freezer, optimizer, loss, 4)
    assert {name.rpartition(".")[0] for name in moved(before, model)} == {"blocks.2", "head"}
    assert not model.norm.weight.requires_grad  # a norm before the first matrix belongs to it


class Sequence(nn.Module):
    def __init__(self, recurrent):
        super().__init__()
        self.first = seeded(nn.Linear, 5, 6)
        self.recurrent = recurrent
        self.attention = seeded(nn.MultiheadAttention, 8, 2, dropout=0.1, batch_first=True)
        self.head = seeded(nn.Linear, 8, 3)

    def forward(self, x):
        x, _ = self.recurrent(self.first(x))
        return self.head(self.attention(x, x, x)[0].mean(1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("which", ["recurrent", "attention"])
def test_recurrent_layers_and_attention(kind, which):
    recurrent = seeded(kind, 6, 4, num_layers=2, bidirectional=True, batch_first=True)
    model = Sequence(recurrent)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    layers = ["first", "recurrent", "attention", "head"]
    freezer = attach(model, optimizer, layers, {which})
    train(model, optimizer, freezer, 0, 2, 8, 4, 5)
    assert freezer.frozen_layers == [which]
    before = values(model)
    train(model, optimizer, freezer, 2, 8, 8, 4, 5, set_to_none=False)
    assert moved(before, model) == {name for name in before if not name.startswith(which)}


def test_an_embedding_with_sparse_gradients():
    model = nn.Sequential(
        seeded(nn.Embedding, 31, 6, sparse=True), nn.Flatten(1), seeded(nn.Linear, 36, 7), seeded(nn.Linear, 7, 3)
    )
    optimizers = [
        torch.optim.SparseAdam(list(model[0].parameters()), lr=0.01),
        torch.optim.Adam([*model[2].parameters(), *model[3].parameters()], lr=0.01),
    ]

    def loss(step):
        return nn.functional.cross_entropy(model(tokens(step)), tokens(step)[:, 0] % 3)

    freezer = attach(model, optimizers, ["0", "2", "3"], {"0", "2"})
    fit(model, freezer, optimizers, loss, 4)
    assert freezer.frozen_layers == ["2"]  # the embedding is all that its optimizer has

    model[0].weight.grad = None
    one = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer.thaw()
    freezer = attach(model, one, ["0", "2", "3"], {"0"})
    fit(model, freezer, one, loss, 2)
    before = values(model)
    fit(model, freezer, one, loss, 4)
    assert freezer.frozen_layers == ["0"]
    assert "0.weight" not in moved(before, model)
    freezer.thaw()
    fit(model, freezer, one, loss, 1)
    assert "0.weight" in moved(before, model)


def old_weight_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(module)


COMPUTED = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight norm, a hook": old_weight_norm,
    "spectral norm, a hook": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_computed_weight_stays_bit_identical(kind):
    model = nn.Sequential(
        seeded(lambda: COMPUTED[kind](nn.Linear(5, 6))), nn.Tanh(), seeded(lambda: COMPUTED[kind](nn.Linear(6, 3)))
    )
    optimizer = sgd(model)
    freezer = attach(model, optimizer, ["0", "2"], {"0"})
    train(model, optimizer, freezer, 0, 2, *INPUTS)
    assert freezer.frozen_layers == ["0"]
    flops = freezer.report().layers[0].forward_flops
    assert flops > 2 * 8 * 5 * 6 if kind == "orthogonal" else flops == 2 * 8 * 5 * 6
    probe = torch.eye(5)
    before, computed = values(model), model[0](probe)
    train(model, optimizer, freezer, 2, 8, *INPUTS)
    assert {name.partition(".")[0] for name in moved(before, model)} == {"2"}
    assert torch.equal(model[0](probe), computed)  # in training mode
    freezer.thaw()
    train(model, optimizer, freezer, 8, 10, *INPUTS)
    assert not torch.equal(model[0](probe), computed)
    assert all(module.training for module in model.modules())


def test_a_lazy_layer_that_the_first_pass_materialises():
    model = nn.Sequential(nn.LazyLinear(6), nn.Tanh(), seeded(nn.Linear, 6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = attach(model, optimizer, ["0", "2"], {"0"})
    train(model, optimizer, freezer, 0, 4, *INPUTS)
    assert freezer.frozen_layers == ["0"]
    assert num_hooks(model) == 0


NORMS = {
    "batch": (lambda: nn.BatchNorm2d(4), True),
    "batch, average of all": (lambda: nn.BatchNorm2d(4, momentum=None), True),
    "batch, not affine": (lambda: nn.BatchNorm2d(4, affine=False), True),
    "batch, without statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), False),
    "instance": (lambda: nn.InstanceNorm2d(4), False),
    "instance, with statistics": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), True),
    "group": (lambda: nn.GroupNorm(2, 4), False),
    "layer": (lambda: nn.LayerNorm((4, 5, 5)), False),
    "synchronised": (lambda: nn.SyncBatchNorm(4), True),
}


def drifts_in_eval_mode(norm):
    """Whether PyTorch itself writes other statistics in eval mode: instance norms average over the batch up to 2.9."""
    inputs = torch.randn(8, 4, 5, 5)
    norm(inputs)
    before = copy.deepcopy(norm.eval().state_dict())
    norm(inputs)
    return any(not torch.equal(before[name], value) for name, value in norm.state_dict().items())


@pytest.mark.parametrize("kind", NORMS)
def test_norms_freeze_with_the_layer_before_them(kind):
    make, statistics = NORMS[kind]
    if kind.startswith("instance") and drifts_in_eval_mode(make()):
        pytest.skip("this PyTorch rounds the statistics of an instance norm at each pass in eval mode")
    model = Net()
    model.norm1 = make()
    if kind == "synchronised" and not torch.cuda.is_available():
        layer = trace_layers(model.eval(), batch(0)[0])[0]  # in training mode it wants a GPU
        assert layer.norms == ("norm1",)
        return
    optimizer = sgd(model)
    freezer = attach(model, optimizer, NET, {"conv1"})
    train(model, optimizer, freezer, 0, 2)
    assert freezer.frozen_layers == ["conv1"]
    assert model.norm1.training is not statistics
    before = values(model)
    train(model, optimizer, freezer, 2, 8)
    assert not parts(moved(before, model), ["conv1"])
    freezer.thaw()
    train(model, optimizer, None, 8, 9)
    assert {name for name in before if name.startswith(("conv1", "norm1"))} - moved(before, model) <= {
        "norm1.num_batches_tracked"
    }


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, of a part that moves to torchao
@pytest.mark.parametrize("ended", [False, True])
def test_scales_of_quantization_aware_training_stand_still_while_a_layer_is_frozen(ended):
    quantization = pytest.importorskip("torch.ao.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(100, 3))
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    model = quantization.prepare_qat(quantization.fuse_modules_qat(model.train(), [["0", "1", "2"]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    freezer = attach(model, optimizer, ["0", "4"], {"0"})

    def steps(number):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for step in range(number):
            model(torch.randn(4, 2, 7, 7) * 2.0**step).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            freezer.step()
        return {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}

    steps(3)
    assert freezer.frozen_layers == ["0"]
    moved = steps(5)
    assert not {name for name in moved if name.startswith("0.")}
    assert "4.weight_fake_quant.scale" in moved
    assert freezer.frozen_layers == ["0"]
    if ended:
        model.apply(quantization.disable_observer)
    freezer.thaw()
    assert [bool(module.observer_enabled[0]) for module in model.modules() if hasattr(module, "observer_enabled")] == [
        not ended
    ] * 4
    assert ("0.weight_fake_quant.scale" in steps(1)) == (not ended)

"""Where real models can be cut, and where they cannot."""

import re
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch_runs import Net, moved, seeded, values  # noqa: E402

from smartfrz.adapters.torch import trace_layers  # noqa: E402
from smartfrz.adapters.torch.cache.cut import CutFinder, pick  # noqa: E402
from smartfrz.adapters.torch.cache.missing import Refusal  # noqa: E402
from smartfrz.adapters.torch.cache.walk import Walk  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
import recipe_models  # noqa: E402


class Basic(nn.Module):
    """The residual block of torchvision: one in-place ReLU, called twice."""

    def __init__(self, inside, outside, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
        self.downsample = None
        if stride != 1 or inside != outside:
            self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride), nn.BatchNorm2d(outside))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Basic(8, 8), Basic(8, 8))
        self.layer2 = nn.Sequential(Basic(8, 16, 2), Basic(16, 16))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)

    def forward(self, x):
        x = self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Dense(nn.Module):
    """A stem, and two dense blocks: each layer reads what all layers of its block computed."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block1 = nn.ModuleList(nn.Conv2d(4 + 2 * i, 2, 3, padding=1) for i in range(3))
        self.transition = nn.Conv2d(10, 4, 1)
        self.block2 = nn.ModuleList(nn.Conv2d(4 + 2 * i, 2, 3, padding=1) for i in range(3))
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.block1:
            x = torch.cat([x, layer(x).relu()], 1)
        x = self.transition(x)
        for layer in self.block2:
            x = torch.cat([x, layer(x).relu()], 1)
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        first = self.down1(x).relu()
        return self.out(torch.cat([first, self.up(self.middle(self.down2(first).relu()))], 1))


def transformer(name, **sizes):
    transformers = pytest.importorskip("transformers")
    from transformers import AutoConfig, AutoModelForSequenceClassification

    transformers.logging.set_verbosity_error()
    config = AutoConfig.for_model(name, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return AutoModelForSequenceClassification.from_config(config)


LAYER = "bert.encoder.layer.2"
BERT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 30,
}
LLAMA = BERT | {"num_key_value_heads": 1, "use_cache": False}
GPT = {"vocab_size": 50, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 30}


def pictures(batch=6, size=16):
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(batch, 3, size, size, generator=generator),), {}


def tokens(batch=6):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 50, (batch, 9), generator=generator)
    mask = torch.ones(batch, 9, dtype=torch.long)
    mask[1, 5:] = mask[4, 7:] = 0
    return (), {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.zeros(batch, dtype=torch.long)}


# model, inputs, the first layer that is trained, and the module before which it is to be cut
MODELS = {
    "ResNet, in a block": (ResNet, pictures, "layer2.1.conv2", "layer2.1"),
    "ResNet, at a stage": (ResNet, pictures, "layer2.0.conv1", "layer2"),
    "ResNet of the recipes": (lambda: recipe_models.resnet(1, 8), pictures, "4.main.0", "4"),
    "MobileNetV2": (lambda: recipe_models.mobilenet_v2(0.25), lambda: pictures(4, 32), "0.9.conv.6", "0.9"),
    "VGG": (lambda: recipe_models.vgg((4, 8, 8, 8)), pictures, "11", "11"),
    "ViT": (lambda: recipe_models.VisionTransformer(16, 4, 24, 3), pictures, "blocks.1.fc1", "blocks.1"),
    "dense block": (Dense, pictures, "block2.1", "transition"),
    "torch encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 24, batch_first=True), 3),
        lambda: ((torch.randn(6, 5, 12, generator=torch.Generator().manual_seed(1)),), {}),
        "layers.1.self_attn",
        "layers.1",
    ),
    "BERT": (lambda: transformer("bert", **BERT), tokens, f"{LAYER}.attention.self.query", LAYER),
    "Llama": (lambda: transformer("llama", **LLAMA), tokens, "model.layers.1.self_attn.v_proj", "model.layers.1"),
    "GPT-2": (lambda: transformer("gpt2", **GPT), tokens, "transformer.h.1.attn.c_attn", "transformer.h.1"),
}
KEPT_TOGETHER = {LAYER: f"{LAYER}.attention"}  # the same place


def frozen_before(model, layer, args, kwargs):
    """The model in training mode, with what runs before this layer frozen; and the FLOPs of its layers."""
    layers = trace_layers(model.eval(), *args, **kwargs)
    model.train()
    names = [one.name for one in layers]
    for one in layers[: names.index(layer)]:
        for name in one.parameters:
            model.get_parameter(name).requires_grad_(False)
        for name in one.norms:
            model.get_submodule(name).eval()
    return {one.name: one.forward_flops for one in layers}


def size_of(args, kwargs):
    return len(args[0]) if args else len(kwargs["input_ids"])


def finder_of(model, flops, args, kwargs):
    return CutFinder(model, model.forward, size_of(args, kwargs), args, kwargs, flops)


@pytest.mark.parametrize("case", MODELS)
def test_the_cut_of_a_model(case):
    make, inputs, live, expected = MODELS[case]
    model, (args, kwargs) = seeded(make), inputs()
    finder = finder_of(model, frozen_before(model, live, args, kwargs), args, kwargs)
    before, random = values(model), torch.get_rng_state()
    cut = finder.find()
    assert cut is not None, finder.reasons
    assert cut.name in (expected, KEPT_TOGETHER.get(expected))
    assert not moved(before, model)
    assert torch.equal(random, torch.get_rng_state())
    assert all("_call_impl" not in module.__dict__ for module in model.modules())
    assert all(module.training for module in model.modules() if not isinstance(module, nn.BatchNorm2d))
    # another batch, of another size, in parts
    model.eval()
    size = size_of(args, kwargs)
    args, kwargs = pick((args, kwargs), size, [5, 0, 2] if size > 5 else [3, 0, 2])
    with torch.no_grad():
        plain = model(*args, **kwargs)
        whole = Walk(3, stop=cut)
        assert whole.run(model.forward, args, kwargs) is None
        ran = []
        handles = [m.register_forward_hook(lambda m, *_: ran.append(m)) for _, m in cut.skipped]
        handles.append(cut.module.register_forward_hook(lambda m, *_: ran.append(m)))
        kept = {index: whole.captured[index] for index in cut.kept} | cut.constants
        output = Walk(3, start=cut, given=kept).run(model.forward, args, kwargs)
        for handle in handles:
            handle.remove()
    assert [m for m in ran if next(m.parameters(), None) is not None] == [cut.module]
    found, expected = (getattr(value, "logits", value) for value in (output, plain))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_cut_of_efficientnet():
    pytest.importorskip("efficientnet_lite_pytorch")
    model, (args, kwargs) = seeded(recipe_models.efficientnet_lite0, pretrained=False), pictures(3, 32)
    finder = finder_of(model, frozen_before(model, "_blocks.8._depthwise_conv", args, kwargs), args, kwargs)
    cut = finder.find()
    assert cut is not None, finder.reasons
    assert cut.name == "_blocks.8"
    assert [leaf.shape[1:] for leaf in cut.leaves] == [(80, 2, 2)]


class Chain(nn.Module):
    """Three linear layers; what happens between them is for subclasses to say."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def between(self, x):
        return x

    def forward(self, x):
        return self.third(self.second(self.between(self.first(x))).tanh())


class AttributeSkip(Chain):
    def forward(self, x):
        return self.third(self.second(self.remembering(x)) + self.first_output)

    def remembering(self, x):
        self.first_output = self.first(x)
        return self.first_output


class Remembers(nn.Linear):
    def forward(self, x):
        self.seen = super().forward(x)
        return self.seen


class HiddenSkip(Chain):
    """What a skipped module left in an attribute, of an earlier batch, would be read."""

    def __init__(self):
        super().__init__()
        self.first = Remembers(5, 6)

    def forward(self, x):
        x = self.second(self.first(x))
        return self.third(x + self.first.seen)


class BatchMean(Chain):
    def between(self, x):
        return x - x.mean(0)


class Noisy(Chain):
    def between(self, x):
        return F.dropout(x, 0.5, training=self.training)


class LiveScale(Chain):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def between(self, x):
        return x * self.scale


class Values(Chain):
    def between(self, x):
        return x if x.sum() > 1e9 else 2 * x


class Buffered(Chain):
    def between(self, x):
        whole = torch.zeros(len(x), 6)
        whole[:, :6] = x
        return whole


class Returns(Chain):
    def forward(self, x):
        first = self.first(x)
        return self.third(self.second(first)), first


class Counting(nn.Linear):
    def __init__(self):
        super().__init__(5, 6)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return super().forward(x) * self.count


class Counts(Chain):
    def __init__(self):
        super().__init__()
        self.first = Counting()


class Checkpointed(Chain):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Odd(Chain):
    """A module before the cut returns what may hold anything."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(5, 6), Boxed())

    def between(self, box):
        return box.value


class Boxed(nn.Module):
    def forward(self, x):
        self.value = x
        return self


REFUSED = {
    UNet: "behind the cut aten.cat.default reads a tensor",
    AttributeSkip: "behind the cut aten.add.Tensor reads a tensor",
    HiddenSkip: "must match|another one without the modules",
    BatchMean: "depends on chance or on the other samples of the batch",
    Noisy: "depends on chance or on the other samples of the batch",
    LiveScale: "a gradient flows through the cut",
    Values: "needs values",
    Buffered: "writes what a skipped module returned into another tensor",
    Returns: "the model returns what a module before the cut computed",
    Counts: "buffers of a module before it change",
    Checkpointed: "gradient checkpointing",
    Odd: "returns a Boxed",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_a_model_that_cannot_be_cut_is_refused_with_the_reason(make):
    model = seeded(make)
    picture = make is UNet
    args = pictures()[0] if picture else (torch.randn(6, 5, generator=torch.Generator().manual_seed(0)),)
    frozen = (model.down1, model.down2) if picture else (model.first,)
    for module in frozen:
        module.requires_grad_(False)
    flops = {name: 1000 for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    finder = CutFinder(model.train(), model.forward, 6, args, {}, flops)
    model(*args)  # leaves this batch in attributes
    before = values(model)
    assert finder.find() is None
    assert re.search(REFUSED[make], "; ".join(finder.reasons)), finder.reasons
    assert not moved(before, model)


def test_a_tensor_of_the_prefix_that_is_used_behind_the_cut_raises():
    model = seeded(Net)
    args = (torch.randn(4, 2, 7, 7, generator=torch.Generator().manual_seed(0)),)
    finder = finder_of(model, frozen_before(model, "conv2", args, {}), args, {})
    cut = finder.find()
    stolen = []
    model.norm1.register_forward_hook(lambda m, a, output: stolen.append(output))
    walk = Walk(4, start=cut, given={index: torch.zeros(4, 4, 5, 5) for index in cut.kept})

    def forward(x):
        hidden = model.norm1(model.conv1(x))
        model.conv2(hidden.relu())
        return hidden.sum()

    with pytest.raises(Refusal, match=r"behind the cut aten\.sum\.default reads a tensor of shape \(4, 4, 5, 5\)"):
        walk.run(forward, args, {})
    assert stolen == []  # its module did not run


def test_a_later_search_finds_a_later_cut_or_keeps_the_one_before():
    model, (args, kwargs) = seeded(ResNet), pictures()
    flops = frozen_before(model, "layer1.1.conv1", args, kwargs)
    early = finder_of(model, flops, args, kwargs).find()
    assert finder_of(model, flops, args, kwargs).find(early) is early
    late = finder_of(model, frozen_before(model, "layer2.1.conv1", args, kwargs), args, kwargs).find(early)
    assert (early.name, late.name) == ("layer1.1", "layer2.1")

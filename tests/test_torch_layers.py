import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils._python_dispatch import _get_current_dispatch_mode  # noqa: E402

from smartfrz.adapters.torch import Layer, trace_layers  # noqa: E402
from smartfrz.adapters.torch.layers import LayerReader, LayerTracer, collect_outputs  # noqa: E402
from smartfrz.errors import StateError, UnsupportedModelError  # noqa: E402

IMAGES = (2, 3, 8, 8)


class Backwards(nn.Module):
    """Registered in the opposite order of execution; `extra` is never run."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.norm2 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(5, 6, 3)
        self.extra = nn.Linear(7, 7)
        self.norm1 = nn.BatchNorm2d(5)
        self.conv1 = nn.Conv2d(3, 5, 3, bias=False)

    def forward(self, x):
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.head(x.mean((2, 3)))


class Patches(nn.Module):
    """A small vision transformer, with parameters that containers own."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(x))[:, 0])


class Tied(nn.Module):
    """A language model whose decoder shares the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.middle = nn.Linear(6, 6)
        self.decoder = nn.Linear(6, 11)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens):
        return self.decoder(self.middle(self.embedding(tokens)))


class PreActivation(nn.Module):
    """Norm before convolution, a norm without weights, a learned slope and a layer scale."""

    def __init__(self):
        super().__init__()
        self.first_norm = nn.BatchNorm2d(3)
        self.conv1 = nn.Conv2d(3, 5, 3)
        self.plain_norm = nn.BatchNorm2d(5, affine=False)
        self.slope = nn.PReLU(5)
        self.scale = nn.Parameter(torch.ones(5, 1, 1))
        self.conv2 = nn.Conv2d(5, 6, 3)

    def forward(self, x):
        x = self.slope(self.plain_norm(self.conv1(self.first_norm(x))))
        return self.conv2(x * self.scale)


class LowRank(nn.Module):
    """Weights in a ParameterList and in the root itself."""

    def __init__(self):
        super().__init__()
        self.factors = nn.ParameterList([nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(2, 4))])

    def forward(self, x):
        return x @ self.factors[0] @ self.factors[1]


def layers_of(model, *example):
    return {layer.name: layer for layer in trace_layers(model, *example)}


def num_hooks(model):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_always_called) for m in model.modules()
    )


def test_execution_order_with_batch_norm_in_its_convolutions_layer():
    layers = layers_of(Backwards(), torch.randn(IMAGES))
    assert list(layers) == ["conv1", "conv2", "head"]  # `extra` is unused
    assert layers["conv1"].parameters == ("conv1.weight", "norm1.weight", "norm1.bias")
    assert layers["conv1"].weights == ("conv1.weight",)
    assert layers["conv1"].norms == ("norm1",)
    assert layers["conv1"].output == "norm1"
    assert layers["conv2"].parameters == ("conv2.weight", "conv2.bias", "norm2.weight", "norm2.bias")
    assert layers["head"].norms == ()
    assert layers["head"].output == "head"


def test_a_lazy_module_that_never_ran_is_unused():
    model = Backwards()
    model.extra = nn.LazyLinear(7)
    assert list(layers_of(model, torch.randn(IMAGES))) == ["conv1", "conv2", "head"]


def test_parameters_of_containers_join_the_layer_next_to_them():
    layers = layers_of(Patches(), torch.randn(IMAGES))
    assert list(layers) == ["patch", "attention", "mlp.0", "mlp.2", "head"]
    assert set(layers["patch"].parameters) == {
        "cls_token",
        "pos_embed",
        "patch.weight",
        "patch.bias",
        "norm.weight",
        "norm.bias",
    }
    # Judged by its own weight, not by the embeddings that joined it.
    assert layers["patch"].weights == ("patch.weight",)


@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention_is_one_layer_with_its_projection(training):
    layers = layers_of(Patches().train(training), torch.randn(IMAGES))
    assert set(layers["attention"].parameters) == {
        "attention.in_proj_weight",
        "attention.in_proj_bias",
        "attention.out_proj.weight",
        "attention.out_proj.bias",
    }
    assert set(layers["attention"].weights) == {"attention.in_proj_weight", "attention.out_proj.weight"}


@pytest.mark.parametrize("training", [True, False])
def test_a_transformer_encoder_layer_of_pytorch(training):
    # In eval mode it takes a fused path that would hide its parts.
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).train(training)
    assert list(layers_of(model, torch.randn(2, 5, 8))) == ["self_attn", "linear1", "linear2"]


@pytest.mark.parametrize("model", [Backwards(), Patches(), PreActivation()], ids=lambda m: type(m).__name__)
def test_every_parameter_that_is_used_is_in_exactly_one_layer(model):
    layers = trace_layers(model, torch.randn(IMAGES))
    found = [n for layer in layers for n in layer.parameters]
    assert sorted(found) == sorted(n for n, _ in model.named_parameters() if not n.startswith("extra"))


def test_tied_weights_are_one_layer():
    layers = layers_of(Tied(), torch.tensor([[1, 2, 3]]))
    assert list(layers) == ["embedding", "middle"]
    assert layers["embedding"].parameters == ("embedding.weight", "decoder.bias")
    assert layers["embedding"].weights == ("embedding.weight",)


def test_vectors_join_the_layer_before_them_or_the_first():
    layers = layers_of(PreActivation(), torch.randn(IMAGES))
    assert list(layers) == ["conv1", "conv2"]
    assert layers["conv1"].norms == ("first_norm", "plain_norm")
    assert layers["conv1"].output == "plain_norm"
    assert "slope.weight" in layers["conv1"].parameters


def test_a_norm_without_running_statistics_is_not_among_the_norms():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.GroupNorm(2, 4))
    (layer,) = trace_layers(model, torch.randn(IMAGES))
    assert layer.norms == ()
    assert set(layer.parameters) == {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"}


def test_a_module_that_runs_twice_is_one_layer():
    shared = nn.Linear(4, 4)
    layers = trace_layers(nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 2)), torch.randn(2, 4))
    assert [layer.name for layer in layers] == ["0", "3"]
    assert layers[0].forward_flops == 2 * (2 * 2 * 4 * 4)


def test_parameter_lists_belong_to_the_module_around_them():
    (layer,) = trace_layers(LowRank(), torch.randn(3, 4))
    assert layer.name == ""
    assert layer.parameters == ("factors.0", "factors.1")


@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU()), nn.Sequential(nn.BatchNorm2d(3)), nn.Identity()])
def test_nothing_to_freeze(model):
    with pytest.raises(UnsupportedModelError, match=rf"no layer to freeze in {type(model).__name__}: .*Pass the model"):
        trace_layers(model, torch.randn(IMAGES))
    assert num_hooks(model) == 0


@pytest.mark.parametrize(
    ("module", "example", "expected"),
    [
        # 2 x multiplications: batch x output positions x kernel x channels
        (nn.Conv2d(3, 5, 3), IMAGES, 2 * 2 * (6 * 6) * (3 * 3) * 3 * 5),
        (nn.Conv2d(4, 8, 3, padding=1, stride=2, groups=2), (2, 4, 8, 8), 2 * 2 * (4 * 4) * (3 * 3) * 2 * 8),
        (nn.Linear(7, 5), (6, 7), 2 * 6 * 7 * 5),
        (nn.Linear(7, 5, bias=False), (2, 3, 7), 2 * (2 * 3) * 7 * 5),
    ],
)
def test_forward_flops_are_the_analytic_ones(module, example, expected):
    (layer,) = trace_layers(nn.Sequential(module), torch.randn(example))
    assert layer.forward_flops == expected


def test_flops_are_counted_for_the_layer_that_ran_them():
    layers = layers_of(Backwards(), torch.randn(IMAGES))
    assert [layer.forward_flops for layer in layers.values()] == [
        2 * 2 * 36 * 27 * 5,
        2 * 2 * 16 * 45 * 6,
        2 * 2 * 6 * 4,
    ]


def test_the_tracer_ignores_eval_mode_and_removes_its_hooks():
    model = Backwards()
    tracer = LayerTracer(model)
    model.eval()(torch.randn(IMAGES))
    assert not tracer.done
    model.train()(torch.randn(IMAGES))
    assert tracer.done
    assert num_hooks(model) == 0
    assert [layer.name for layer in tracer.layers()] == ["conv1", "conv2", "head"]
    assert tracer.total_flops == sum(layer.forward_flops for layer in tracer.layers())


def test_a_forward_pass_that_fails_leaves_nothing_behind_and_the_next_one_counts():
    model = Backwards()
    tracer = LayerTracer(model)
    with pytest.raises(RuntimeError, match="expected input"):
        model(torch.randn(2, 4, 8, 8))
    assert _get_current_dispatch_mode() is None
    assert not tracer.done
    model(torch.randn(IMAGES))
    assert [layer.name for layer in tracer.layers()] == ["conv1", "conv2", "head"]
    assert num_hooks(model) == 0


def test_tracing_changes_neither_answers_nor_mode():
    model = Backwards().eval()
    images = torch.randn(IMAGES)
    before = model(images)
    trace_layers(model, images)
    assert torch.equal(model(images), before)
    assert not any(m.training for m in model.modules())
    assert num_hooks(model) == 0


def test_a_layer_as_plain_data():
    for layer in trace_layers(Patches(), torch.randn(IMAGES)):
        assert Layer.from_dict(json.loads(json.dumps(layer.to_dict()))) == layer


def read(model, layer, indices):
    return LayerReader(model, trace_layers(model, torch.randn(IMAGES))).weights(layer, indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_weights_are_read_in_logical_order_as_float32(dtype, memory_format):
    model = Backwards()
    layers = trace_layers(model, torch.randn(IMAGES))
    model = model.to(dtype=dtype, memory_format=memory_format)
    expected = model.conv2.weight.detach().float().contiguous().flatten().numpy()
    reader = LayerReader(model, layers)
    assert reader.num_weights("conv2") == expected.size
    for indices in np.arange(expected.size), np.array([0, 3, 100, expected.size - 1]):
        weights = reader.weights("conv2", indices)
        assert weights.dtype == np.float32
        np.testing.assert_array_equal(weights, expected[indices])


def test_a_layer_of_several_weights_is_read_as_one():
    model = Patches()
    expected = torch.cat([model.attention.in_proj_weight.flatten(), model.attention.out_proj.weight.flatten()])
    expected = expected.detach().numpy()
    indices = np.array([0, 191, 192, 255])
    np.testing.assert_array_equal(read(model, "attention", indices), expected[indices])
    # None of the second tensor's weights, none of the first's.
    for indices in np.array([5, 6]), np.array([200, 255]):
        np.testing.assert_array_equal(read(model, "attention", indices), expected[indices])


def test_layers_of_another_model():
    layers = trace_layers(Backwards(), torch.randn(IMAGES))
    with pytest.raises(StateError, match=r"parameters that Tied does not have: \['conv1.weight'.*same model"):
        LayerReader(Tied(), layers)


def test_layer_outputs_are_copies_and_its_hooks_go():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 2))
    images = torch.randn(IMAGES)
    layers = trace_layers(model.eval(), images)
    expected = model[1](model[0](images))
    with collect_outputs(model, layers) as outputs:
        answers = model(images)
        assert num_hooks(model) == 2
    assert num_hooks(model) == 0
    assert list(outputs) == ["0", "4"]
    assert torch.equal(outputs["0"], expected)  # before the in-place ReLU
    assert torch.equal(outputs["4"], answers)


def test_a_model_that_calls_itself_is_traced_as_a_whole():
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, again=True):
            if again:
                return self.third(self(self.first(x), again=False))
            return self.second(x)

    assert [layer.name for layer in trace_layers(Recursive(), torch.randn(2, 4))] == ["first", "second", "third"]
    assert not torch.utils._python_dispatch._get_current_dispatch_mode()


class ConvWithNorm(nn.Conv2d):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, x):
        return self.norm(super().forward(x)).relu()


def test_convolutions_that_hold_their_norms_are_layers():
    model = nn.Sequential(ConvWithNorm(3, 4, 3), ConvWithNorm(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    layers = layers_of(model, torch.randn(IMAGES))
    assert list(layers) == ["0", "1", "3"]
    assert layers["0"].parameters == ("0.weight", "0.bias", "0.norm.weight", "0.norm.bias")
    assert layers["0"].weights == ("0.weight",)
    assert layers["0"].norms == ("0.norm",)
    assert layers["0"].output == "0"


@pytest.mark.filterwarnings("ignore")  # PyTorch's own: all of torch.ao is deprecated
def test_layers_of_quantization_aware_training_with_fused_modules():
    quantization = pytest.importorskip("torch.ao.quantization")
    conv_and_norm = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    model = nn.Sequential(*conv_and_norm, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
    model = quantization.fuse_modules_qat(model.train(), [["0", "1", "2"], ["3", "4"]])
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    layers = layers_of(quantization.prepare_qat(model), torch.randn(IMAGES))
    assert list(layers) == ["0", "3", "6"]
    assert layers["0"].weights == ("0.weight",)
    assert layers["0"].norms == ("0.bn",)


class Experts(nn.Module):
    """Expert tensors beside a router, in one module."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.experts = nn.Parameter(torch.randn(3, 6, 6))

    def forward(self, x):
        return torch.einsum("be,eij,bi->bj", self.router(x).softmax(-1), self.experts, x)


def test_experts_are_judged_with_their_router():
    layers = layers_of(nn.Sequential(nn.Linear(4, 6), Experts(), Experts(), nn.Linear(6, 2)), torch.randn(5, 4))
    assert list(layers) == ["0", "1", "2", "3"]
    assert layers["1"].weights == ("1.experts", "1.router.weight")
    assert layers["1"].parameters == ("1.experts", "1.router.weight", "1.router.bias")


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5, dtype=torch.complex64))

    def forward(self, x):
        return torch.view_as_real(x.to(torch.complex64) @ self.weight).sum(-1)


@pytest.mark.parametrize("contiguous", [True, False])
def test_complex_weights_are_read_whole(contiguous):
    model = nn.Sequential(Spectral(), nn.Linear(5, 2))
    layers = trace_layers(model, torch.randn(3, 6))
    if not contiguous:
        model[0].weight = nn.Parameter(torch.randn(5, 6, dtype=torch.complex64).t())
    reader = LayerReader(model, layers)
    weight = model[0].weight.detach().numpy()
    expected = np.stack([weight.real, weight.imag], axis=-1).ravel()
    assert reader.num_weights("0") == 60
    np.testing.assert_array_equal(reader.weights("0", np.arange(60)), expected)
    np.testing.assert_array_equal(reader.weights("0", np.array([1, 30, 59])), expected[[1, 30, 59]])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}])
def test_forward_flops_of_recurrent_layers(training, kind, gates, options):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent = kind(5, 7, batch_first=True, **options)
            self.head = nn.LazyLinear(2)

        def forward(self, x):
            return self.head(self.recurrent(x)[0])

    layers = layers_of(Net().train(training), torch.randn(3, 11, 5))
    weights = {"": 7 * 5 + 7 * 7, "num_layers": 7 * 5 + 3 * 7 * 7, "bidirectional": 2 * (7 * 5 + 7 * 7)}
    assert layers["recurrent"].forward_flops == 2 * 3 * 11 * gates * weights["".join(options)]


class StoresItsLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, x):
        self.loss = self.net(x).sum()


def test_a_forward_pass_that_returns_nothing_is_traced():
    model = StoresItsLoss()
    tracer = LayerTracer(model)
    model(torch.randn(2, 4))
    assert tracer.done
    assert num_hooks(model) == 0
    assert [layer.name for layer in tracer.layers()] == ["net.0", "net.2"]


def test_layers_are_learned_from_parts_that_run_without_the_model():
    model = Backwards()
    model.cls_token = nn.Parameter(torch.zeros(1, 5))
    tracer = LayerTracer(model)
    x = model.norm1(model.conv1(torch.randn(IMAGES)))
    model.eval().extra(torch.randn(2, 7))
    model.train()
    with pytest.raises(RuntimeError):
        model.extra(torch.randn(2, 3))
    model.head(model.norm2(model.conv2(x)).mean((2, 3)))
    assert tracer.done
    layers = tracer.layers()
    assert [layer.name for layer in layers] == ["conv1", "conv2", "head"]
    assert "cls_token" in layers[0].parameters
    assert tracer.total_flops == sum(layer.forward_flops for layer in layers) > 0
    tracer.close()
    assert num_hooks(model) == 0
    assert _get_current_dispatch_mode() is None

"""The tasks of `benchmarks.compare`: which network is trained on what, and how.

Four tiers. `cpu`: small pictures, small networks and a part of the data, so that one core trains fully in 20 to 25 s
(`mobilenetv2-clothing`, which has the paper's 10 epochs, and sentences: about a minute) and all methods and seeds are
measured in a few hours; test sets are whole, but that of `vit-cifar10`: 5,000 of 10,000. The learning rates are those
at which full training is best on validation data: `benchmarks.rates`. `long`: two of these, and MRPC, with so many
steps that training converges (two to eight minutes). `imagenet`: networks with weights of ImageNet, fine-tuned on all
clothing photos for so long that they converge (about five minutes). `gpu`: the five architectures of the paper at
their full size, with its settings: 10 epochs, batches of 32, SGD with momentum and a cosine schedule. Where they
differ from the paper (what was pretrained on what, VGG11's and BERT's heads) the task says so.
`digits` is for trying things out: it needs no data but what scikit-learn brings.

Pretrained weights of ImageNet are those of EfficientNet-Lite0 and MobileNetV2 alone; MiniLM's are its authors'.
What else is pretrained, `python -m benchmarks.compare pretrain` does, from the data sets that `PRETRAINING` names.

Data comes from the folder that SMARTFRZ_DATA names (pictures as `recipes/recipe_data.py` reads them, sentences
in `text/`), weights of CIFAR ResNets from SMARTFRZ_WEIGHTS or, without it, from the data folder's neighbour
`weights`; what `recipes/fetch.py` puts into `recipes/cache` is needed for MobileNetV2 and the sentences. The validation
part, on which accuracy over time is measured, is taken from the training data; the test data is used once, at the end.
"""

import csv
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from smartfrz.demo.data import DemoOptions
from smartfrz.demo.pytorch import load_data, pretrained_network
from smartfrz.hyperparameters import TrainingSpec

RECIPES = Path(__file__).parent.parent / "recipes"
VALIDATION = 0.1  # of the training data
LEAST_VALIDATION, MOST_VALIDATION = 8, 200  # CKA needs a few; it is looked at eight times a run
if str(RECIPES) not in sys.path:
    sys.path.insert(0, str(RECIPES))


class Data(NamedTuple):
    """Samples `(inputs, target)`: to train on, to follow the run with, and to judge it by."""

    train: Dataset
    validation: Dataset
    test: Dataset


class Benchmark(NamedTuple):
    """What is trained on what, and how; or, as a value of `PRETRAINING`, what other benchmarks start from.

    Attributes:
        network: Makes the model for a number of classes, with random weights or those of its authors.
        data: Makes training and test samples, at most a number of each; None for all.
        classes: Number of classes in the data.
        training: Optimizer, schedule and epochs of full training.
        pretrained: Name in `PRETRAINING` whose weights to start from.
        metric: `accuracy`, or `matthews` (two classes).
        repeats: Whether samples come back as they were: only then a cache of activations is of use.
    """

    network: Callable[[int], nn.Module]
    data: Callable[[int | None], tuple[Dataset, Dataset]]
    classes: int
    training: TrainingSpec
    pretrained: str | None = None
    metric: str = "accuracy"
    repeats: bool = True


def data_of(task, most=None):
    """The benchmark's data: at most `most` samples to train on, some of which become validation data, and to test on."""
    train, test = task.data(most)
    number = max(LEAST_VALIDATION, min(MOST_VALIDATION, round(VALIDATION * len(train))))
    order = np.random.default_rng(0).permutation(len(train)).tolist()
    return Data(Subset(train, order[number:]), Subset(_plain(train), order[:number]), test)


def _plain(data):
    """The same samples without augmentation."""
    from recipe_data import Augmented

    return TensorDataset(data.images, data.labels) if isinstance(data, Augmented) else data


# Networks


class CifarResNet(nn.Module):
    """ResNet for CIFAR (He et al. 2016, section 4.2) whose shortcuts have no weights (option A)."""

    def __init__(self, blocks=3, num_classes=10):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        inside = 16
        for stage, width in enumerate((16, 32, 64), start=1):
            made = []
            for block in range(blocks):
                made.append(_BasicBlock(inside, width, 2 if stage > 1 and not block else 1))
                inside = width
            setattr(self, f"layer{stage}", nn.Sequential(*made))
        self.linear = nn.Linear(inside, num_classes)

    def forward(self, x):
        """Logits `[batch, classes]` of pictures `[batch, 3, 32, 32]`."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class _BasicBlock(nn.Module):
    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if x.shape != out.shape:
            new = (out.shape[1] - x.shape[1]) // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, new, new))
        return F.relu(out + x)


def load_except_head(model, weights):
    """Everything but the last layer's weight and bias.

    Raises:
        ValueError: If the weights are not those of such a network.
    """
    own = model.state_dict()
    body = list(own)[:-2]
    wrong = [name for name in body if name not in weights or weights[name].shape != own[name].shape]
    if wrong:
        raise ValueError(
            f"The pretrained weights lack {wrong[:4]} as the network has them; expected those of the same network. "
            "Delete the file, and pretrain again."
        )
    model.load_state_dict({name: weights[name] for name in body}, strict=False)
    return model


def cifar_resnet20(classes):
    """With weights of CIFAR-10, of its originals, not of JPEG copies."""
    folder = os.environ.get("SMARTFRZ_WEIGHTS") or Path(os.environ.get("SMARTFRZ_DATA", ".")).parent / "weights"
    path = Path(folder) / "cifar_resnet" / "resnet20.safetensors"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: set SMARTFRZ_WEIGHTS to the folder that holds cifar_resnet/resnet20.safetensors"
        )
    # the file is in the order of the alphabet, the counters of batches are not in it
    return load_except_head(CifarResNet(3, classes), CifarResNet(3).state_dict() | load_file(path))


def resnet20(classes):
    """The same with random weights."""
    return CifarResNet(3, classes)


def efficientnet_lite0(classes):
    """With weights of ImageNet."""
    return pretrained_network(classes)


def mobilenet_v2(classes):
    """With weights of ImageNet."""
    from recipe_models import mobilenet_v2

    return mobilenet_v2(num_classes=classes, pretrained=True)


def minilm(classes):
    """With its authors' weights."""
    from recipe_models import minilm

    return minilm(classes)


def small_vgg(classes):
    """Like VGG11, narrower and with fewer layers."""
    from recipe_models import vgg

    return vgg(num_classes=classes)


def small_vit(classes):
    """Like DeiT-T, narrower and of half the depth, on pictures of 32 px."""
    from recipe_models import VisionTransformer

    return VisionTransformer(num_classes=classes)


def vgg11_bn(classes):
    """VGG11 with batch norm; an average of what its convolutions put out and a small head replace its last layers."""
    from recipe_models import vgg

    return vgg((64, 128, 256, 256, 512, 512, 512, 512), num_classes=classes)


def full_mobilenet_v2(classes):
    """MobileNetV2 with weights of ImageNet, for pictures of 32 to 64 px: two of its five halvings are left out."""
    from recipe_models import mobilenet_v2

    return mobilenet_v2(num_classes=classes, strides=(1, 1, 1, 2, 2, 1, 2, 1), pretrained=True)


def resnet50(classes):
    """ResNet-50 for pictures of 32 to 64 px: its first convolution and its pooling do not halve them."""
    from transformers import ResNetConfig, ResNetForImageClassification

    model = ResNetForImageClassification(ResNetConfig(num_labels=classes))
    embedder = model.resnet.embedder
    embedder.embedder.convolution.stride, embedder.pooler = (1, 1), nn.Identity()
    return model


def deit_tiny(classes, image_size=32):
    """DeiT-T: 12 blocks of width 192 with 3 heads, patches of 4 px instead of 16."""
    from recipe_models import VisionTransformer

    return VisionTransformer(image_size, patch=4, width=192, depth=12, heads=3, num_classes=classes)


def bert_base(classes):
    """The shape of BERT-base, with the vocabulary of MiniLM, which is BERT's."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(num_labels=classes))


def digits_vgg(classes):
    """For digits of 16 px."""
    from recipe_models import vgg

    return vgg((8, 16, 16), num_classes=classes)


def digits_vit(classes):
    """For digits of 16 px."""
    from recipe_models import VisionTransformer

    return VisionTransformer(16, width=32, depth=2, heads=2, num_classes=classes)


# Data


def pictures(name, splits, size, most, divisor=64.0, classes=None):
    """At most so many pictures of each of these splits, float32 `[n, 3, size, size]` about zero, and labels.

    Of the first so many `classes` only, or of all.
    """
    from recipe_data import _images, archive

    made = []
    for split in splits:
        found, labels = archive(name, split, most if classes is None else None)
        if classes is not None:
            chosen = np.flatnonzero(labels < classes)[:most]
            found, labels = [found[i] for i in chosen], labels[chosen]
        pixels = np.stack([np.asarray(picture.resize((size, size))) for picture in found])
        made.append(
            TensorDataset(_images(pixels, size).mul_(64.0 / divisor), torch.from_numpy(labels.astype(np.int64)))
        )
    return made[0] if len(made) == 1 else ConcatDataset(made)


def clothing(most, size=64, number=None):
    """3,068 photos; tested on the 713 of validation and test."""
    name = "clothing_96px_jpeg"
    return pictures(name, ("train",), size, most or number), pictures(name, ("validation", "test"), size, most)


def imagenette(most, size=64, number=None, divisor=128.0):
    """Ten classes of ImageNet, 3,000 and 1,000 pictures; by default as EfficientNet-Lite reads them."""
    name = "imagenette_224px_subset_3000_1000_jpeg"
    parts = (("train", most or number), ("val", most))
    return tuple(pictures(name, (split,), size, limit, divisor) for split, limit in parts)


def tiny_imagenet(most, size=32, number=None, classes=None):
    """200 classes of ImageNet, 20,000 and 5,000 pictures; or the first so many classes."""
    name = "tiny_imagenet200_100per_25per_jpeg"
    parts = (("train", most or number), ("val", most))
    return tuple(pictures(name, (split,), size, limit, classes=classes) for split, limit in parts)


def cifar10(most, size=32, number=None, number_test=None, augment=False):
    """50,000 and 10,000 pictures, JPEG copies; or fewer."""
    from recipe_data import Augmented

    train = pictures("cifar10_jpeg", ("train",), size, most or number)
    if augment:
        train = Augmented(*train.tensors, size // 8)
    return train, pictures("cifar10_jpeg", ("test",), size, most or number_test)


def digits(most, size=16):
    """1,437 and 360 digits of scikit-learn."""
    number = most or 2000
    return load_data(DemoOptions(data="digits", image_size=size, num_train=number, num_test=number))


def _rows(file):
    folder = Path(os.environ.get("SMARTFRZ_DATA", ".")) / "text"
    with open(folder / file, encoding="utf-8-sig", newline="") as opened:
        return list(csv.reader(opened, delimiter="\t", quoting=csv.QUOTE_NONE))


def _tokens(rows, length, most):
    """Rows of (label, sentence) or (label, sentence, sentence), in a fixed random order."""
    from recipe_data import _Tokens
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(RECIPES / "cache" / "minilm", local_files_only=True)
    chosen = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:most]]
    labels, *sentences = (list(column) for column in zip(*chosen, strict=True))
    encoded = tokenizer(*sentences, truncation=True, max_length=length, padding="max_length", return_tensors="pt")
    return _Tokens(dict(encoded), torch.tensor(labels))


def mrpc(most, length=64, number=None):
    """Whether two sentences say the same: 4,076 and 1,725 pairs."""
    parts = (("mrpc/msr_paraphrase_train.txt", most or number), ("mrpc/msr_paraphrase_test.txt", most))
    return tuple(_tokens([(int(row[0]), *row[3:5]) for row in _rows(file)[1:]], length, limit) for file, limit in parts)


def cola(most, length=24, number=None):
    """Whether a sentence is English: 8,551 sentences; tested on the 1,043 of both development sets."""
    train, *test = (_rows(f"cola/{name}.tsv") for name in ("in_domain_train", "in_domain_dev", "out_of_domain_dev"))
    parts = ((train, most or number), ([*test[0], *test[1]], most))
    return tuple(_tokens([(int(row[1]), row[3]) for row in rows], length, limit) for rows, limit in parts)


def agnews(most, length=40, number=None, number_test=None):
    """News of four topics, 10,001 and 7,600; or fewer."""
    topics = ["Business", "Sci/Tech", "Sports", "World"]
    parts = (("agnews/dev.tsv", most or number), ("agnews/test.tsv", most or number_test))
    return tuple(
        _tokens([(topics.index(row[-1]), "\t".join(row[:-1])) for row in _rows(f)], length, limit) for f, limit in parts
    )


# Tasks

_SGD = TrainingSpec(epochs=5, learning_rate=0.01, weight_decay=1e-4)
_VIT = TrainingSpec(epochs=4, optimizer="AdamW", learning_rate=3e-4, weight_decay=0.05, warmup=0.1)
_BERT = TrainingSpec(epochs=3, optimizer="AdamW", learning_rate=5e-5, weight_decay=0.01, schedule="linear", warmup=0.1)
_SCRATCH = TrainingSpec(epochs=10, batch_size=64, learning_rate=0.1, weight_decay=5e-4)
_PAPER = TrainingSpec(epochs=10, learning_rate=0.01, weight_decay=1e-4)


def _with(spec, **changes):
    return TrainingSpec(**(vars(spec) | changes))


def _part(data, number, **others):
    """Only so many training samples; the test data stays whole."""
    return functools.partial(data, number=number, **others)


CPU = {
    "mobilenetv2-clothing": Benchmark(mobilenet_v2, _part(clothing, 1200), 10, _with(_SGD, epochs=10)),
    "mobilenetv2-imagenette": Benchmark(
        mobilenet_v2,
        _part(imagenette, 1200, divisor=64.0),
        10,
        _with(_SGD, epochs=4, optimizer="AdamW", learning_rate=1e-3, weight_decay=0.01, warmup=0.1),
    ),
    "resnet20-tiny": Benchmark(
        cifar_resnet20, _part(tiny_imagenet, 3000, classes=100), 100, _with(_SGD, epochs=4, learning_rate=0.1)
    ),
    "vgg-cifar10": Benchmark(small_vgg, _part(cifar10, 4000), 10, _with(_SGD, epochs=4), "vgg-tiny"),
    "vit-cifar10": Benchmark(
        small_vit, _part(cifar10, 1500, number_test=5000), 10, _with(_VIT, learning_rate=1e-3), "vit-tiny"
    ),
    "minilm-agnews": Benchmark(
        minilm,
        _part(agnews, 890, length=32, number_test=1900),
        4,
        _with(_BERT, batch_size=16),
    ),
    # full training in the steps of the next two learns nothing at any rate (benchmarks/README.md)
    "minilm-mrpc": Benchmark(minilm, _part(mrpc, 600, length=48), 2, _with(_BERT, batch_size=16)),
    "minilm-cola": Benchmark(minilm, _part(cola, None, length=16), 2, _with(_BERT, epochs=1), metric="matthews"),
    "resnet20-scratch": Benchmark(
        resnet20,
        _part(cifar10, 3000, augment=True),
        10,
        _with(_SCRATCH, epochs=4, batch_size=32, learning_rate=0.01),
        repeats=False,
    ),
}
# whether what short runs lose is lost in longer ones, too: the paper's 10 epochs, of as much data as there is time for
LONG = {
    "vgg-cifar10": CPU["vgg-cifar10"]._replace(
        data=_part(cifar10, 15000), training=_with(_SGD, epochs=10, learning_rate=0.03)
    ),
    "resnet20-tiny": CPU["resnet20-tiny"]._replace(
        data=_part(tiny_imagenet, 5000, classes=100), training=_with(_SGD, epochs=10, learning_rate=0.1)
    ),
    "minilm-mrpc": CPU["minilm-mrpc"]._replace(data=_part(mrpc, None, length=48)),
}
# fine-tuning from good weights, long enough to converge
IMAGENET = {
    f"{name}-clothing": Benchmark(network, clothing, 10, _with(_SGD, epochs=15))
    for name, network in (("mobilenetv2", mobilenet_v2), ("efficientnet", efficientnet_lite0))
}
GPU = {
    f"{name}-{data}": Benchmark(
        network,
        {"cifar10": cifar10, "tiny": tiny_imagenet}[data],
        classes,
        spec,
        None if network is full_mobilenet_v2 else f"{name}-{other}",
    )
    for name, network, spec in (
        ("resnet50", resnet50, _PAPER),
        ("vgg11", vgg11_bn, _PAPER),
        ("mobilenetv2", full_mobilenet_v2, _PAPER),
        ("deit", deit_tiny, _with(_PAPER, optimizer="AdamW", learning_rate=3e-4, weight_decay=0.05, warmup=0.05)),
    )
    for data, other, classes in (("cifar10", "tiny", 10), ("tiny", "cifar10", 200))
} | {
    "bert-mrpc": Benchmark(bert_base, mrpc, 2, _with(_BERT, learning_rate=2e-5), "bert-agnews"),
    "bert-cola": Benchmark(bert_base, cola, 2, _with(_BERT, learning_rate=2e-5), "bert-agnews", "matthews"),
}
DIGITS = {
    "vgg-digits": Benchmark(digits_vgg, digits, 10, TrainingSpec(epochs=6, learning_rate=0.05)),
    "vit-digits": Benchmark(digits_vit, digits, 10, _with(_VIT, epochs=6), "vit-digits"),
}
TIERS = {"cpu": CPU, "long": LONG, "imagenet": IMAGENET, "gpu": GPU, "digits": DIGITS}


_BEGIN = _with(_SCRATCH, learning_rate=0.05, epochs=12)
_BEGIN_VIT = _with(_VIT, epochs=12, batch_size=64, learning_rate=1e-3)
_LARGE = {"epochs": 10, "batch_size": 256}
PRETRAINING = {
    # in five minutes of one core each
    "vgg-tiny": Benchmark(small_vgg, tiny_imagenet, 200, _with(_BEGIN, epochs=10)),
    "vit-tiny": Benchmark(small_vit, tiny_imagenet, 200, _with(_BEGIN_VIT, epochs=4)),
    "bert-agnews": Benchmark(bert_base, agnews, 4, _with(_BERT, learning_rate=1e-4)),
    "vit-digits": Benchmark(digits_vit, digits, 10, _with(_BEGIN_VIT, epochs=1)),
} | {
    f"{name}-{data}": Benchmark(network, source, classes, _with(spec, **_LARGE))
    for name, network, spec in (
        ("resnet50", resnet50, _BEGIN),
        ("vgg11", vgg11_bn, _BEGIN),
        ("deit", deit_tiny, _BEGIN_VIT),
    )
    for data, source, classes in (("tiny", tiny_imagenet, 200), ("cifar10", cifar10, 10))
}

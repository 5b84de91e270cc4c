"""Train a small convolutional network with Lightning while SmartFRZ freezes what has converged.

pip install "smartfrz[lightning,cpu]" scikit-learn
python examples/lightning_fit.py --epochs 10
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from smartfrz.adapters.torch.lightning import SmartFRZCallback


class Digits(LightningModule):
    """Reads handwritten digits of 8 by 8 pixels."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *[nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()],
            *[nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()],
            *[nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()],
        )
        self.head = nn.Linear(64, 10)

    def training_step(self, batch):
        pictures, digits = batch
        return nn.functional.cross_entropy(self.head(self.features(pictures).mean((2, 3))), digits)

    def validation_step(self, batch):
        pictures, digits = batch
        right = self.head(self.features(pictures).mean((2, 3))).argmax(1) == digits
        self.log("accuracy", right.float().mean(), prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--resume", metavar="CHECKPOINT", help="go on from this .ckpt file")
    options = parser.parse_args()
    seed_everything(0, verbose=False)
    data = load_digits()
    pictures = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    train, test = random_split(TensorDataset(pictures, torch.tensor(data.target)), [1500, len(pictures) - 1500])
    callback = SmartFRZCallback(verbose=False)  # the only line that SmartFRZ needs
    trainer = Trainer(
        max_epochs=options.epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    loader = DataLoader(train, 32, shuffle=True, drop_last=True)
    trainer.fit(Digits(), loader, DataLoader(test, 99), ckpt_path=options.resume)  # checkpoints carry its state
    print(f"test accuracy {trainer.callback_metrics['accuracy']:.1%}")
    print(callback.report())


if __name__ == "__main__":
    main()

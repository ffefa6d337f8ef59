"""Small real data sets as tensors, read from a folder; nothing is ever downloaded.

The folder is an argument, or what the environment variable `GRAPHREWRITE_DATA` names. It holds one folder per data
set, with the files named in each loader's docstring. `digits` comes with scikit-learn and needs no folder.

Images are (samples, channels, height, width), float32 in 0 .. 1; labels are int64.
"""

from __future__ import annotations

import gzip
import os
import pathlib
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from graphrewrite.errors import GraphRewriteError

Folder = str | os.PathLike[str] | None

VARIABLE = "GRAPHREWRITE_DATA"


class Split(NamedTuple):
    """Samples `x` and their labels `y`, sample dimension first.

    The loaders here give tensors; `graphrewrite.training` also takes whatever `compiled.loss` takes.
    """

    x: Any
    y: Any


class Dataset(NamedTuple):
    """A training and a test set."""

    train: Split
    test: Split

    def flat(self) -> Dataset:
        """The same samples as vectors."""
        return Dataset(Split(self.train.x.flatten(1), self.train.y), Split(self.test.x.flatten(1), self.test.y))


class Graph(NamedTuple):
    """One graph: dense features (nodes, features), edges (2, edges), a class per node, and the masks of its split."""

    x: torch.Tensor
    edge_index: torch.Tensor
    y: torch.Tensor
    train_mask: torch.Tensor
    val_mask: torch.Tensor
    test_mask: torch.Tensor


class Text(NamedTuple):
    """A text as int64 character numbers: position in `vocabulary`."""

    train: torch.Tensor
    valid: torch.Tensor
    vocabulary: str


class Sentences(NamedTuple):
    """Labelled sentences: x holds word numbers (sentences, length), 0 pads, 1 is any word not in `vocabulary`."""

    train: Split
    valid: Split
    test: Split
    vocabulary: tuple[str, ...]


def digits(test: int = 360, seed: int = 0) -> Dataset:
    """The 1797 handwritten digits of scikit-learn, 8 x 8 pixels, in a fixed random order; the last `test` are held out.

    Args:
        test: Size of the test set.
        seed: Seed of the order.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise GraphRewriteError(
            "the digits data come with scikit-learn, which is not installed",
            remedy="pip install scikit-learn, or name a folder of real data (--data, " + VARIABLE + ")",
        ) from error
    bunch: Any = load_digits()
    x = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16.0
    y = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    return Dataset(Split(x[:-test], y[:-test]), Split(x[-test:], y[-test:]))


def mnist(folder: Folder = None) -> Dataset:
    """MNIST, 60,000 and 10,000 images of 28 x 28, from the four original idx files, gzipped, in `mnist/`."""
    base = data_folder(folder, "mnist")
    return Dataset(
        Split(_idx_images(base / "train-images-idx3-ubyte.gz"), _idx_labels(base / "train-labels-idx1-ubyte.gz")),
        Split(_idx_images(base / "t10k-images-idx3-ubyte.gz"), _idx_labels(base / "t10k-labels-idx1-ubyte.gz")),
    )


def cifar10(folder: Folder = None, batches: int = 5) -> Dataset:
    """CIFAR-10, 3 x 32 x 32, from `cifar10/data_batch_1.npz` to `_5` and `test_batch.npz`.

    Args:
        folder: The data folder.
        batches: How many of the five training batches of 10,000 images to read.
    """
    base = data_folder(folder, "cifar10")
    parts = [_cifar_batch(base / f"data_batch_{i + 1}.npz") for i in range(batches)]
    train = Split(torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts]))
    return Dataset(train, _cifar_batch(base / "test_batch.npz"))


def planetoid(folder: Folder = None, name: str = "cora") -> Graph:
    """A citation graph with its public split, from `planetoid/<name>.npz`: `"cora"` or `"citeseer"`."""
    path = data_folder(folder, "planetoid") / f"{name.lower()}.npz"
    if not path.is_file() and path.parent.is_dir():
        have = ", ".join(sorted(p.stem for p in path.parent.glob("*.npz"))) or "none"
        raise GraphRewriteError(f"no citation graph is named {name!r}", remedy=f"in {path.parent}: {have}")
    held = _npz(path)
    rows, columns = (int(n) for n in held["x_shape"])
    x = torch.zeros(rows, columns)
    row_of = np.repeat(np.arange(rows), np.diff(held["x_indptr"]))
    x[torch.from_numpy(row_of), torch.from_numpy(held["x_indices"]).long()] = torch.from_numpy(held["x_data"]).float()
    rest = {key: torch.from_numpy(held[key]) for key in Graph._fields if key != "x"}
    return Graph(x, **rest)


def tinyshakespeare(folder: Folder = None) -> Text:
    """Tiny Shakespeare by characters, from `tinyshakespeare/input.txt`; the last tenth is the validation text."""
    text = _read(data_folder(folder, "tinyshakespeare") / "input.txt").decode()
    vocabulary = "".join(sorted(set(text)))
    number = {character: i for i, character in enumerate(vocabulary)}
    tokens = torch.tensor([number[character] for character in text], dtype=torch.int64)
    cut = len(tokens) * 9 // 10
    return Text(tokens[:cut], tokens[cut:], vocabulary)


def sst2(folder: Folder = None, length: int = 32, at_least: int = 2) -> Sentences:
    """SST-2, whole sentences, label 1 positive, from `sst2/train.tsv`, `dev.tsv` and `test.tsv`.

    Args:
        folder: The data folder.
        length: Words kept of each sentence.
        at_least: How often a word must occur in the training sentences to be in the vocabulary.
    """
    base = data_folder(folder, "sst2")
    splits = [_sentences(base / f"{name}.tsv") for name in ("train", "dev", "test")]
    counts = Counter(word for words, _ in splits[0] for word in words)
    vocabulary = ("", "<unknown>", *sorted(word for word, n in counts.items() if n >= at_least))
    number = {word: i for i, word in enumerate(vocabulary)}
    train, valid, test = [_encode(split, number, length) for split in splits]
    return Sentences(train, valid, test, vocabulary)


# --- reading -------------------------------------------------------------------------------------------------------


def data_folder(folder: Folder, name: str) -> pathlib.Path:
    """The folder of one data set below `folder`, or below what GRAPHREWRITE_DATA names.

    Raises:
        GraphRewriteError: No folder is named, or it does not exist.
    """
    given = folder if folder is not None else os.environ.get(VARIABLE)
    if not given:
        raise GraphRewriteError(
            f"the {name} data are read from a folder, and none is named",
            remedy=f"pass the folder, or set {VARIABLE} to it",
        )
    base = pathlib.Path(given)
    if not base.is_dir():
        raise GraphRewriteError(f"the data folder {base} does not exist", remedy="name the folder that holds the data")
    if not (base / name).is_dir():
        raise GraphRewriteError(f"the data folder {base} has no folder {name!r}", remedy=f"put the {name} files there")
    return base / name


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise GraphRewriteError(f"cannot read {path}: {error.strerror}", remedy="put the data file there") from error


def _gunzip(path: pathlib.Path) -> bytes:
    try:
        return gzip.decompress(_read(path))
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, "it is no gzip file") from error


def _damaged(path: pathlib.Path, why: str) -> GraphRewriteError:
    return GraphRewriteError(f"{path} cannot be used: {why}", remedy="copy the data file again")


def _idx(path: pathlib.Path, dimensions: int) -> np.ndarray[Any, Any]:
    """An idx file: two zero bytes, the element type (8: unsigned byte), the rank, big-endian sizes, the elements."""
    raw = _gunzip(path)
    header = 4 + 4 * dimensions
    if raw[:4] != bytes([0, 0, 8, dimensions]) or len(raw) < header:
        raise _damaged(path, f"it is no idx file of bytes in {dimensions} dimensions")
    shape = np.frombuffer(raw, ">i4", dimensions, 4)
    if len(raw) - header != int(shape.prod()):
        raise _damaged(path, f"{len(raw) - header} bytes for the sizes {tuple(int(n) for n in shape)}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _idx_images(path: pathlib.Path) -> torch.Tensor:
    return torch.tensor(_idx(path, 3), dtype=torch.float32).unsqueeze(1) / 255.0


def _idx_labels(path: pathlib.Path) -> torch.Tensor:
    return torch.tensor(_idx(path, 1), dtype=torch.int64)


def _npz(path: pathlib.Path) -> dict[str, np.ndarray[Any, Any]]:
    try:
        with np.load(path) as held:
            return {key: held[key] for key in held.files}
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(path, str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def _cifar_batch(path: pathlib.Path) -> Split:
    """Pixels are stored as differences along rows and columns, red and blue as differences to green; all modulo 256."""
    held = _npz(path)
    pixels = held["d"].cumsum(2, dtype=np.uint8).cumsum(3, dtype=np.uint8)
    pixels[0] += pixels[1]
    pixels[2] += pixels[1]
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(1, 0, 2, 3)))
    return Split(images.float() / 255.0, torch.from_numpy(held["labels"]).long())


def _sentences(path: pathlib.Path) -> list[tuple[list[str], int]]:
    found = []
    for number, line in enumerate(_read(path).decode().splitlines(), 1):
        sentence, tab, label = line.rpartition("\t")
        if not tab or label not in ("0", "1"):
            raise _damaged(path, f"line {number} is no sentence and label with a tab between them")
        found.append((sentence.split(), int(label)))
    return found


def _encode(sentences: Sequence[tuple[list[str], int]], number: dict[str, int], length: int) -> Split:
    x = torch.zeros(len(sentences), length, dtype=torch.int64)
    for row, (words, _) in enumerate(sentences):
        ids = [number.get(word, 1) for word in words[:length]]
        x[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return Split(x, torch.tensor([label for _, label in sentences], dtype=torch.int64))

"""Data sets: each format decoded by hand, missing and damaged files, and the loop that trains on them."""

from __future__ import annotations

import gzip
import pathlib
import struct
import sys

import numpy as np
import pytest
import torch
from torch import nn

import graphrewrite as gr
from graphrewrite import datasets, training
from graphrewrite.datasets import Dataset, Split


def _idx(values: np.ndarray) -> bytes:
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(f">{values.ndim}i", *values.shape)
    return gzip.compress(header + values.astype(np.uint8).tobytes())


def _mnist(folder: pathlib.Path) -> np.ndarray:
    base = folder / "mnist"
    base.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28))
    for part, count in (("train", 5), ("t10k", 2)):
        (base / f"{part}-images-idx3-ubyte.gz").write_bytes(_idx(images[:count]))
        (base / f"{part}-labels-idx1-ubyte.gz").write_bytes(_idx(np.arange(count)))
    return images


def test_digits_are_split_without_overlap_and_always_the_same() -> None:
    data = datasets.digits()
    assert data.train.x.shape == (1437, 1, 8, 8)
    assert data.test.x.shape == (360, 1, 8, 8)
    assert data.train.x.min() == 0.0
    assert data.train.x.max() == 1.0
    assert torch.equal(datasets.digits().test.y, data.test.y)
    assert not torch.equal(datasets.digits(seed=1).test.y, data.test.y)
    assert data.flat().test.x.shape == (360, 64)
    counts = data.train.y.bincount() + data.test.y.bincount()
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digits_say_which_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(gr.GraphRewriteError, match="pip install scikit-learn"):
        datasets.digits()


def test_mnist_is_read_from_idx_files(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = _mnist(tmp_path)
    data = datasets.mnist(tmp_path)
    assert torch.equal((data.train.x * 255).round().long(), torch.from_numpy(images).unsqueeze(1))
    assert data.train.y.tolist() == [0, 1, 2, 3, 4]
    assert data.test.x.shape == (2, 1, 28, 28)
    monkeypatch.setenv("GRAPHREWRITE_DATA", str(tmp_path))
    assert torch.equal(datasets.mnist().train.x, data.train.x)


def test_missing_and_damaged_files_are_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAPHREWRITE_DATA", raising=False)
    with pytest.raises(gr.GraphRewriteError, match="set GRAPHREWRITE_DATA"):
        datasets.mnist()
    with pytest.raises(gr.GraphRewriteError, match="does not exist"):
        datasets.mnist(tmp_path / "nowhere")
    with pytest.raises(gr.GraphRewriteError, match="no folder 'mnist'"):
        datasets.mnist(tmp_path)
    _mnist(tmp_path)
    labels = tmp_path / "mnist" / "train-labels-idx1-ubyte.gz"
    whole = labels.read_bytes()
    for damaged in (whole[:-3], b"no gzip", _idx(np.zeros((5, 1))), gzip.compress(gzip.decompress(whole)[:-1])):
        labels.write_bytes(damaged)
        with pytest.raises(gr.GraphRewriteError, match=r"train-labels-idx1-ubyte.gz cannot be used"):
            datasets.mnist(tmp_path)
    labels.unlink()
    with pytest.raises(gr.GraphRewriteError, match=r"cannot read .*train-labels"):
        datasets.mnist(tmp_path)


def test_cifar_residuals_are_undone(tmp_path: pathlib.Path) -> None:
    base = tmp_path / "cifar10"
    base.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 32, 32)).astype(np.uint8)
    coded = pixels.copy()
    coded[0] -= pixels[1]
    coded[2] -= pixels[1]
    coded[:, :, :, 1:] -= coded[:, :, :, :-1].copy()
    coded[:, :, 1:] -= coded[:, :, :-1].copy()
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        np.savez(base / f"{name}.npz", d=coded, labels=np.array([3, 1, 2, 0], np.uint8))
    data = datasets.cifar10(tmp_path, batches=2)
    assert data.train.x.shape == (8, 3, 32, 32)
    want = torch.from_numpy(pixels.transpose(1, 0, 2, 3).copy())
    assert torch.equal((data.test.x * 255).round().to(torch.uint8), want)
    assert data.test.y.tolist() == [3, 1, 2, 0]
    (base / "test_batch.npz").write_bytes(b"nothing")
    with pytest.raises(gr.GraphRewriteError, match=r"test_batch.npz cannot be used"):
        datasets.cifar10(tmp_path, batches=1)


def test_planetoid_features_become_dense(tmp_path: pathlib.Path) -> None:
    (tmp_path / "planetoid").mkdir()
    masks = {f"{name}_mask": np.array([True, False, False]) for name in ("train", "val", "test")}
    np.savez(
        tmp_path / "planetoid" / "cora.npz",
        x_data=np.array([1, 2, 3], np.float32),
        x_indices=np.array([1, 0, 3], np.int32),
        x_indptr=np.array([0, 1, 1, 3], np.int32),
        x_shape=np.array([3, 4]),
        y=np.array([0, 1, 0]),
        edge_index=np.array([[0, 1], [1, 0]]),
        **masks,
    )
    graph = datasets.planetoid(tmp_path, "Cora")
    assert graph.x.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [2, 0, 0, 3]]
    assert graph.edge_index.tolist() == [[0, 1], [1, 0]]
    assert graph.train_mask.tolist() == [True, False, False]
    with pytest.raises(gr.GraphRewriteError, match="cora"):
        datasets.planetoid(tmp_path, "pubmed")


def test_texts_become_numbers(tmp_path: pathlib.Path) -> None:
    for name in ("tinyshakespeare", "sst2"):
        (tmp_path / name).mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("to be or not to be, ")
    text = datasets.tinyshakespeare(tmp_path)
    assert "".join(text.vocabulary[i] for i in [*text.train, *text.valid]) == "to be or not to be, "
    assert len(text.train) == 18
    (tmp_path / "sst2" / "train.tsv").write_text("good good film\t1\nbad film\t0\n")
    for name in ("dev", "test"):
        (tmp_path / "sst2" / f"{name}.tsv").write_text("film good , new\t1\n")
    held = datasets.sst2(tmp_path, length=3)
    assert held.vocabulary == ("", "<unknown>", "film", "good")
    assert held.train.x.tolist() == [[3, 3, 2], [1, 2, 0]]
    assert held.train.y.tolist() == [1, 0]
    assert held.valid.x.tolist() == [[2, 3, 1]]
    (tmp_path / "sst2" / "dev.tsv").write_text("no label\n")
    with pytest.raises(gr.GraphRewriteError, match="line 1"):
        datasets.sst2(tmp_path)


def test_real_data_have_their_published_counts(data_folder: pathlib.Path) -> None:
    mnist = datasets.mnist(data_folder)
    assert mnist.train.y.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert mnist.train.x.mean().item() == pytest.approx(0.1307, abs=1e-4)
    cifar = datasets.cifar10(data_folder, batches=1)
    assert cifar.test.y.bincount().tolist() == [1000] * 10
    cora = datasets.planetoid(data_folder)
    assert (cora.x.shape, cora.edge_index.shape) == ((2708, 1433), (2, 10556))
    assert [int(m.sum()) for m in (cora.train_mask, cora.val_mask, cora.test_mask)] == [140, 500, 1000]
    text = datasets.tinyshakespeare(data_folder)
    assert len(text.train) + len(text.valid) == 1115394
    assert len(text.vocabulary) == 65
    sst2 = datasets.sst2(data_folder)
    assert [len(s.y) for s in sst2[:3]] == [6920, 872, 1821]
    assert [int(s.y.sum()) for s in sst2[:3]] == [3610, 444, 909]


# --- training --------------------------------------------------------------------------------------------------------


def _points(count: int = 64) -> Split:
    y = torch.arange(count) % 2
    return Split(torch.randn(count, 6) + 6.0 * (y.unsqueeze(1) - 0.5), y)


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def test_bp_trains_as_a_plain_loop_does() -> None:
    budget = training.Budget(epochs=2, batch=16, rate=0.01, seed=5)
    model, split = _net(), _points()
    before = {n: p.clone() for n, p in model.named_parameters()}
    (learner,) = training.side_by_side(model, ["bp"], training.take(split, torch.arange(16)), budget)
    training.train([learner], Dataset(split, split), budget)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())

    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(5)
    step = 0
    for _ in range(2):
        for index in torch.randperm(64, generator=generator).split(16):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 8)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(split.x[index]), split.y[index]).backward()
            optimizer.step()
            step += 1
    for name, parameter in learner.compiled.module.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name]), name
    assert len(learner.seconds) == step == training.steps_of(split, budget)
    assert learner.points[-1].accuracy == training.accuracy(learner.compiled, split, batch=7)


def test_learners_start_equal_and_see_the_same_batches() -> None:
    budget = training.Budget(epochs=1, batch=16)
    split = _points()
    learners = training.side_by_side(_net(), ["bp", "bp"], training.take(split, torch.arange(16)), budget)
    training.train(learners, Dataset(split, split), budget)
    first, second = (dict(one.compiled.module.named_parameters()) for one in learners)
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert learners[0].ratio_to(learners[0]) == 1.0


def test_accuracy_does_not_count_what_has_no_label() -> None:
    compiled = gr.compile(nn.Identity(), example_inputs=torch.zeros(2, 3, requires_grad=True))
    scores = torch.eye(3)
    assert training.accuracy(compiled, Split(scores, torch.tensor([0, 1, -100]))) == 1.0
    assert training.accuracy(compiled, Split(scores, torch.tensor([0, 2, -100]))) == 0.5
    assert compiled.training
    with pytest.raises(gr.RuleError, match="integer class"):
        training.accuracy(compiled, Split(scores, scores))


def test_samples_are_what_all_tensors_share() -> None:
    assert training.sample_count(Split((torch.zeros(5, 2), torch.zeros(5)), torch.zeros(5))) == 5
    assert training.sample_count(Split(gr.Inputs(torch.zeros(5, 2), mask=torch.zeros(5)), torch.zeros(5))) == 5
    assert training.sample_count(Split((torch.zeros(5, 2), torch.zeros(2, 9)), torch.zeros(5))) == 0
    taken = training.take(Split(gr.Inputs(torch.arange(5), scale=2), torch.arange(5)), torch.tensor([4, 1]))
    assert taken.x.args[0].tolist() == taken.y.tolist() == [4, 1]
    assert taken.x.kwargs == {"scale": 2}
    assert training.hold_out(_points(64)) is None
    held = training.hold_out(_points(200))
    assert held is not None
    assert (len(held.train.y), len(held.test.y)) == (160, 40)


def test_inputs_that_share_no_size_are_one_batch() -> None:
    split = Split((torch.randn(7, 6), torch.randn(6, 6)), torch.arange(7) % 2)
    budget = training.Budget(epochs=3)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _net()

        def forward(self, x: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
            return self.net(x @ mix)

    (learner,) = training.side_by_side(Two(), ["bp"], split, budget)
    training.train([learner], Dataset(split, split), budget)
    assert len(learner.seconds) == 3

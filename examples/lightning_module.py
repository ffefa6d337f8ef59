"""Train under a rule with PyTorch Lightning (`pip install lightning`).

    python examples/lightning_module.py --rule dfa --epochs 3

A `LightningModule` holds the compiled module; its training step returns the rule's loss, and Lightning does the rest.
The data are scikit-learn's digits.
"""

from __future__ import annotations

import argparse

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import graphrewrite as gr
from graphrewrite.datasets import digits


class Digits(lightning.LightningModule):
    def __init__(self, compiled: nn.Module) -> None:
        super().__init__()
        self.compiled = compiled

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss = self.compiled.loss(*batch)
        self.log("loss", loss.detach())
        return loss

    def test_step(self, batch: list[torch.Tensor], index: int) -> None:
        x, y = batch
        self.log("accuracy", (self.compiled.predict(x).argmax(-1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.compiled.parameters(), lr=2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", default="dfa")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()

    lightning.seed_everything(0)
    train, test = digits().flat()
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    compiled = gr.compile(model, rule=options.rule, example_inputs=train.x[:8], example_targets=train.y[:8])
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Digits(compiled)
    trainer.fit(module, DataLoader(TensorDataset(*train), batch_size=64, shuffle=True))
    (scores,) = trainer.test(module, DataLoader(TensorDataset(*test), batch_size=360), verbose=False)
    print(f"{100 * scores['accuracy']:.1f} % of the test digits")


if __name__ == "__main__":
    main()

"""Train a `transformers` language model under a rule, with Hugging Face's own `Trainer`.

    python examples/hf_trainer.py --rule dfa --steps 20
    python examples/hf_trainer.py --rule mono_forward --steps 20

The model is a small GPT-2 made from a configuration; the text is local (this file, or `--text FILE`), read as bytes.
Rules that only need the output's cotangent train through the model's own loss; every rule trains through
`compiled.loss`, which is what `CausalTrainer.compute_loss` calls.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import graphrewrite as gr


class Chunks(Dataset[dict[str, torch.Tensor]]):
    """Pieces of a file, `length` bytes each."""

    def __init__(self, text: bytes, length: int) -> None:
        self.ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.length = length

    def __len__(self) -> int:
        return (len(self.ids) - 1) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        piece = self.ids[index * self.length : (index + 1) * self.length + 1]
        return {"input_ids": piece[:-1], "labels": piece[1:]}


class CausalTrainer(Trainer):
    """`Trainer` with the rule's loss; everything else (schedules, clipping, logging, checkpoints) is Trainer's."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        loss = model.loss({"input_ids": inputs["input_ids"]}, inputs["labels"])
        return (loss, {}) if return_outputs else loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", default="dfa")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--text", default=__file__)
    options = parser.parse_args()

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    data = Chunks(pathlib.Path(options.text).read_bytes(), 32)
    first = torch.utils.data.default_collate([data[i] for i in range(4)])
    compiled = gr.compile(
        model, rule=options.rule, example_inputs={"input_ids": first["input_ids"]}, example_targets=first["labels"]
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = CausalTrainer(
            model=compiled,
            args=TrainingArguments(
                folder,
                max_steps=options.steps,
                per_device_train_batch_size=4,
                learning_rate=3e-3,
                logging_steps=max(options.steps // 4, 1),
                report_to=[],
                use_cpu=True,
                save_strategy="no",
                remove_unused_columns=False,
                disable_tqdm=True,
            ),
            train_dataset=data,
        )
        result = trainer.train()
    print(f"loss after {result.global_step} steps: {result.training_loss:.3f} on average")


if __name__ == "__main__":
    main()

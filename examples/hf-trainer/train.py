"""transformers' Trainer with ReLoRA: merges happen inside the optimizer the Trainer is given."""

import tempfile

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import effprof


class Rows(torch.utils.data.Dataset):
    """Rows of 32 tokens that count upwards from a random start."""

    def __init__(self, count: int) -> None:
        starts = torch.randint(0, 200, (count, 1), generator=torch.Generator().manual_seed(0))
        self.rows = starts + torch.arange(32)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=256,
    )
    model = AutoModelForCausalLM.from_config(config)

    effprof.apply(model, method="relora", rank=16, restart_every=20, restart_warmup=5)
    optimizer = effprof.optimizer(model, method="relora", lr=3e-3)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=60,
            per_device_train_batch_size=16,
            logging_steps=20,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        # The second of the pair is the schedule; None lets the Trainer make its own.
        trainer = Trainer(model, arguments, train_dataset=Rows(960), optimizers=(optimizer, None))
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print("losses", losses)
    print("updates", optimizer.clock.update, "since the last merge", optimizer.clock.since_restart)


if __name__ == "__main__":
    main()

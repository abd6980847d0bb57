"""A Trainer script as a user has it, for `accelerate launch` and plain python: OUT, batch size."""

import sys
from pathlib import Path

import torch
from peft import get_peft_model
from test_vlm import lora
from test_vlm_training import Samples
from transformers import Trainer, TrainingArguments
from vlm_models import vision_language


def main(out: Path, batch: int) -> None:
    torch.set_num_threads(1)
    model = get_peft_model(vision_language("roberta"), lora("roberta"))
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=4, per_device_train_batch_size=batch, learning_rate=0.1,
        optim="sgd", report_to="none", use_cpu=True, disable_tqdm=True, seed=3, save_steps=2,
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Samples(16))
    trainer.train()
    print(f"{trainer.accelerator.num_processes} processes")
    trainer.accelerator.end_training()  # what ends at exit alone may abort the process


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

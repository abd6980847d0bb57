"""What test_sharded runs in two processes: `torchrun --nproc-per-node 2 sharded_script.py OUT`.

Of a model whose blocks FSDP2 has sharded, the first process writes into OUT: saved/, and loaded/
after it has taken over other/, which was written there before; scores.pt before and after.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from vlm_models import TARGETS, VISUAL_WIDTH, images, texts, vision_language

from fused_route import RoutedConfig, attach
from fused_route.training.experiment.sharded import gathered
from fused_route.training.experiment.tuning import Shared


def tuned_model(seed: int) -> tuple[Any, Shared]:
    """GPT-2 with routed LoRA that is not at its start."""
    model = vision_language("gpt2")
    config = RoutedConfig(r=3, visual_width=VISUAL_WIDTH, route="gram", **TARGETS["gpt2"])
    tuned = Shared(attach(model, config))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.attached.trainable_parameters():
            parameter.normal_(std=0.3)
    return model, tuned


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    model, tuned = tuned_model(seed=1)
    for block in model.language.transformer.h:
        fully_shard(block)
    fully_shard(model)
    first = dist.get_rank() == 0
    with gathered(model):
        if first:
            tuned.save(out / "saved")
    before = model(input_ids=texts(2), pixel_values=images(2)).logits.detach()
    with gathered(model):
        tuned.load(out / "other")
    after = model(input_ids=texts(2), pixel_values=images(2)).logits.detach()
    with gathered(model):
        if first:
            tuned.save(out / "loaded")
    if first:
        torch.save((before, after), out / "scores.pt")
    dist.barrier()  # one that leaves alone was once aborted by gloo's threads
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

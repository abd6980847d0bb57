"""What test_distributed runs in two processes: `torchrun --nproc-per-node 2 two_processes.py OUT`.

Writes into OUT, from the first process: ddp.pt and fsdp.pt, gradients of the joint batch by
adapter and way of putting it in; errors.json, what is said where parts of a layer are sharded.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from test_vlm import lora
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from vlm_models import TARGETS, VISUAL_WIDTH, drawn, images, texts, vision_language

from fused_route import RoutedConfig, attach
from fused_route.peft import RoutedAdapterConfig

BATCH = 4


def with_peft() -> Any:
    return get_peft_model(vision_language("gpt2", visual_tokens="before"), lora("gpt2"))


def with_adapters() -> Any:
    config = RoutedAdapterConfig(r=4, target_modules=["mlp"], visual_width=VISUAL_WIDTH)
    return get_peft_model(vision_language("gpt2"), config)


def with_attach() -> Any:
    model = vision_language("gpt2", features="tokens")
    config = RoutedConfig(r=4, visual_width=VISUAL_WIDTH, route="gram", **TARGETS["gpt2"])
    return attach(model, config).model


WAYS: dict[str, Callable[[], Any]] = {
    "peft": with_peft,
    "adapters": with_adapters,
    "attach": with_attach,
}


def loss(model: Any, rows: slice) -> Tensor:
    """Of these rows of the joint batch; its mean over equal parts is that of the whole."""
    ids, pixels = texts(BATCH)[rows], images(BATCH)[rows]
    out: Tensor = model(input_ids=ids, pixel_values=pixels, labels=ids).loss
    return out


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By name, gathered where they are shards."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is not None:
            found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()
    return found


def mine() -> slice:
    """The rows of this process."""
    rank, part = dist.get_rank(), BATCH // dist.get_world_size()
    return slice(rank * part, (rank + 1) * part)


def ddp(make: Callable[[], Any]) -> dict[str, Tensor]:
    model = drawn(make()).train()
    parallel = DistributedDataParallel(model)
    loss(parallel, mine()).backward()
    return gradients(model)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    return (m for m in model.modules() if type(m).__name__ == "GPT2Block")


def fsdp(make: Callable[[], Any]) -> dict[str, Tensor]:
    model = drawn(make()).train()
    for block in blocks(model):
        fully_shard(block)
    fully_shard(model)
    loss(model, mine()).backward()
    return gradients(model)


def sharded_leaf() -> str:
    """lora_A's own module as a unit: what PEFT's fsdp_auto_wrap_policy does."""
    model = drawn(with_peft())
    layer = next(m for m in model.modules() if hasattr(m, "active_views"))
    fully_shard(layer.lora_A["default"])
    try:
        loss(model, mine())
    except ValueError as error:
        return str(error)
    return "nothing was said"


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    found = {
        "ddp": {name: ddp(make) for name, make in WAYS.items()},
        "fsdp": {name: fsdp(make) for name, make in WAYS.items()},
    }
    said = sharded_leaf()
    if dist.get_rank() == 0:
        for name, values in found.items():
            torch.save(values, out / f"{name}.pt")
        (out / "errors.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    main(Path(sys.argv[1]))

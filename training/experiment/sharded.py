"""Saving and loading where FSDP2 has sharded a model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Trained parameters are whole inside the block, and what is written into them there is kept.

    Every process enters and leaves it. Nothing happens where nothing is sharded.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.reshard()  # after a forward the outermost is whole still
    shards = {name: p for name, p in model.named_parameters() if p.requires_grad and parts}
    for part in parts:
        part.unshard()
    try:
        yield
        whole = dict(model.named_parameters())
        with torch.no_grad():
            for name, shard in shards.items():
                assert isinstance(shard, DTensor)
                mesh, placements = shard.device_mesh, shard.placements
                shard.copy_(distribute_tensor(whole[name].detach(), mesh, placements))
    finally:
        for part in parts:
            part.reshard()

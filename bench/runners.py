"""Language models that generate, adapted in each way, and what images folded into them hold.

All ways of a task have the same base, prompts, images and values of A and B: all are drawn in fp32
from `SEED` on the task's device, then cast.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import Case
from bench.families import MODELS
from bench.memory import VISUAL_WIDTH
from bench.models import SEED, adapt
from bench.operands import DTYPES
from bench.providers import obstacle
from fused_route import RoutingInput, fold
from fused_route.fold import routed_layers

# Random weights as they are drawn soon give one token again and again, whatever the image. With a
# head of its own and embeddings that weigh, the next token depends on the last.
EMBEDDING_SCALE = 10.0


@dataclass(frozen=True)
class Task:
    """What is generated: `new` tokens after each of B prompts of `prompt` tokens, an image each.

    Args:
        model, host, route, r, dtype: as of a `Case`.
    """

    model: str
    host: str
    route: str
    B: int
    dtype: str
    prompt: int = 16
    new: int = 64
    r: int = 64

    @property
    def name(self) -> str:
        return f"{self.model} {self.host} {self.route} B={self.B} {self.dtype}"

    @property
    def case(self) -> Case:
        d = MODELS[self.model].d
        return Case(
            "step", self.host, self.route, d, self.r, self.B, self.prompt,
            dtype=self.dtype, model=self.model,
        )  # fmt: skip

    @property
    def into(self) -> str:
        """Where `fold` puts the images: into the base's weight where there is one of each."""
        return "host" if self.B == 1 and self.host != "adapter" else "bottleneck"


@dataclass
class Runner:
    """A language model that generates one way.

    Args:
        model: with its head, in evaluation mode.
        ids: prompts (B, prompt).
        features: images (B, 1, visual width).
        using: what gives them to a forward pass.
    """

    model: Any
    ids: Tensor
    features: Tensor
    using: Callable[[Tensor], AbstractContextManager[Any]]

    def fold(self, into: str) -> Callable[[], None]:
        """Folds the images in; returns what takes them out again."""
        folded, using = fold(self.model, self.features, into=into), self.using
        self.using = lambda features: nullcontext()

        def unfold() -> None:
            folded.unfold()
            self.using = using

        return unfold

    def generated(self, new: int) -> Tensor:
        """The new tokens (B, new), each the likeliest."""
        with self.using(self.features):
            ids: Tensor = self.model.generate(
                self.ids, attention_mask=torch.ones_like(self.ids), max_new_tokens=new,
                do_sample=False, pad_token_id=0, use_cache=True,
            )  # fmt: skip
        return ids[:, self.ids.shape[1] :]

    @torch.no_grad()
    def called(
        self, ids: Tensor, cache: Any = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Logits of ids (B, T, vocabulary), and the cache that then holds them too.

        Args:
            cache: of the tokens before them.
            mask: (B, 1, T, tokens before and T), as attention takes it; None: the model's own.
        """
        accepted = inspect.signature(self.model.forward).parameters
        name = "cache" if "cache" in accepted else "past_key_values"  # in older transformers
        before = {} if cache is None else {name: cache}
        with self.using(self.features):
            out = self.model(ids, use_cache=True, attention_mask=mask, **before)
        return out.logits, out[name]

    def logits(self) -> dict[str, Tensor]:
        """Of the prompt without its last token, and, by a decoding step, of that."""
        prompt, cache = self.called(self.ids[:, :-1])
        return {"prompt": prompt, "step": self.called(self.ids[:, -1:], cache)[0]}

    def decoding(self, tokens: int) -> Callable[[], Tensor]:
        """One decoding step, to the last token of a text (B, tokens): the same every time.

        The layers of a cache take new tensors for what they hold, and leave the old as they are.
        The mask is given, because transformers makes one while a graph is captured, and none else.
        """
        text = self.ids.repeat(1, -(-tokens // self.ids.shape[1]))[:, :tokens]
        _, cache = self.called(text[:, :-1])
        last = text[:, -1:].clone()
        mask = last.new_ones((len(text), 1, 1, tokens), dtype=torch.bool)

        def step() -> Tensor:
            past = copy.copy(cache)
            past.layers = [copy.copy(layer) for layer in cache.layers]
            return self.called(last, past, mask)[0]

        return step


@contextmanager
def drawing(device: torch.device) -> Iterator[None]:
    """What is made in this block is on the device, and the same each time."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(SEED)
        yield


class Start:
    """What all ways of a task start from: a base in fp32, prompts and images."""

    def __init__(self, task: Task, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        self.task, self.device = task, device
        model = MODELS[task.model]
        config = model.config()
        config.tie_word_embeddings = False
        with drawing(self.device):
            self.base = AutoModelForCausalLM.from_config(config).eval()
            self.base.get_input_embeddings().weight.data.mul_(EMBEDDING_SCALE)
            self.ids = torch.randint(model.vocabulary, (task.B, task.prompt))
            self.features = torch.randn(task.B, 1, VISUAL_WIDTH)

    def runner(self, way: str, dtype: torch.dtype | None = None) -> Runner:
        """A way before any folding, in this dtype (None: the task's), of values the task's has."""
        stored = DTYPES[self.task.dtype]
        dtype = dtype or stored
        model = copy.deepcopy(self.base).to(stored)
        if way == "folded":
            has_kernels = obstacle("fused", self.task.case, self.device) is None
            way = "fused" if has_kernels else "reference"
        with drawing(self.device):
            _, using = adapt(model, self.task.case, way, VISUAL_WIDTH)
        features = self.features.to(stored).to(dtype)
        return Runner(model.to(dtype).eval(), self.ids, features, using)


def held(model: nn.Module) -> int:
    """Bytes of parameters, buffers and folded images, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    for layer in routed_layers(model):
        tensors += _tensors(vars(layer.folded) if layer.folded is not None else {})
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _tensors(fields: dict[str, Any]) -> Iterator[Tensor]:
    for value in fields.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, RoutingInput) and value.operand is not None:
            yield from (value.x_r, *value.operand.tensors)

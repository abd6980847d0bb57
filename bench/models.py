"""Language models with random weights, adapted in each way, and what is timed of them.

Every way of a case has the same base, inputs and targets, and, where it has them at all, the same
initial A and B: all are drawn in fp32 from `SEED` on the case's device, then cast.
"""

import importlib.util
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import vision
from bench.cases import Case
from bench.families import MODELS, Model
from bench.operands import DTYPES
from bench.subject import Subject
from fused_route import RoutedConfig, attach
from fused_route.checks import one_of
from fused_route.testing import roundoff

SEED = 0
ANSWERS = 3129  # that VQA v2 is classified into, as published
WAYS = ("reference", "fused", "compile", "peft", "frozen")
KINDS = ("layer", "step")


def states(body: Any, x: Tensor, decoded: Tensor) -> Tensor:
    """Last states (S, T, d) of embeddings x (S, T, d); a decoder's, of `decoded` (S, T', d)."""
    pair = {"decoder_inputs_embeds": decoded} if body.config.is_encoder_decoder else {}
    return body(inputs_embeds=x, **pair).last_hidden_state


class Step(nn.Module):
    """The loss of one training step of a language model, from text and features (…, visual_width).

    What its checkpoint would lack is trained in every way: "head", from a state to scores of
    answers, and "prefix", from features to text embeddings.
    """

    def __init__(self, model: Model, layers: int, visual_width: int) -> None:
        super().__init__()
        task = model.family.task
        self.body = model.body(layers)
        self.head = nn.Linear(model.d, ANSWERS) if task == "answer" else None
        self.prefix = nn.Linear(visual_width, model.d) if task == "caption" else None

    def forward(self, ids: Tensor, labels: Tensor, features: Tensor) -> Tensor:
        """ids (S, T); labels (S,) answers or (S, T) tokens; features (S, Nv, visual_width)."""
        embedding = self.body.get_input_embeddings()
        x = decoded = embedding(ids)
        if self.prefix is not None:
            x, decoded = torch.cat([self.prefix(features), x], 1), embedding(labels)
        h = states(self.body, x, decoded)
        if self.head is not None:
            return cross_entropy(self.head(h[:, 0]), labels)
        return cross_entropy(F.linear(h[:, :-1], embedding.weight), labels[:, 1:])


def cross_entropy(scores: Tensor, wanted: Tensor) -> Tensor:
    """Mean over all positions, in fp32 or better; scores (…, n), wanted (…)."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return F.cross_entropy(scores.flatten(0, -2), wanted.flatten())


def adapt(
    body: nn.Module, case: Case, way: str, visual_width: int
) -> tuple[dict[str, nn.Parameter], Callable[[Tensor], AbstractContextManager[None]]]:
    """Puts a way's bottlenecks into a model, with values drawn anew, and freezes the rest.

    Returns: the trained parameters by name, and what gives the image to a forward pass.

    Raises:
        ValueError: a host that the model or the way has not, or peft is not installed.
    """
    settings: dict[str, Any] = {"route": case.route, "visual_width": visual_width}
    config = MODELS[case.model].routed(case.host, r=case.r, dropout=case.dropout, **settings)
    if way in ("peft", "frozen"):
        body.requires_grad_(False)
        return _drawn(_peft(body, config) if way == "peft" else {}), lambda features: nullcontext()
    attached = attach(body, config)
    trained: dict[str, nn.Parameter] = {}
    for name, layer in attached.layers.items():
        layer.impl = "triton" if way == "fused" else "reference"
        trained |= {f"{name}.{key}": p for key, p in layer.named_parameters(recurse=False)}
    if attached.projector is not None:
        trained |= {f"projector.{key}": p for key, p in attached.projector.named_parameters()}
    return _drawn(trained), attached.using


def _peft(body: nn.Module, config: RoutedConfig) -> dict[str, nn.Parameter]:
    """Plain LoRA by PEFT on the same modules: A (r, d), B (of·n, r).

    It adapts no segments: all three of a fused projection with one rank r, 4·d·r parameters too.
    """
    if config.host == "adapter":
        raise ValueError("way='peft' takes host linear or qkv, got 'adapter'")
    if importlib.util.find_spec("peft") is None:
        raise ValueError("way='peft': peft is not installed")
    from peft import LoraConfig, inject_adapter_in_model

    lora = LoraConfig(
        r=config.r, lora_alpha=config.r, lora_dropout=config.dropout,
        target_modules=list(config.target_modules),
        fan_in_fan_out=config.of > 1,  # the fused projection is a Conv1D
    )  # fmt: skip
    inject_adapter_in_model(lora, body)
    return {
        f"{name}.{key}": getattr(module, f"lora_{key}")["default"].weight
        for name, module in body.named_modules()
        if hasattr(module, "lora_A")
        for key in ("A", "B")
    }


@torch.no_grad()
def _drawn(trained: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Normal values of variance 1/N for each tensor (…, N): B is not 0, routing matters."""
    torch.manual_seed(SEED + 1)  # whatever was drawn before: ways differ in that
    for tensor in trained.values():
        tensor.copy_(torch.randn(tensor.shape) * tensor.shape[-1] ** -0.5)
    return trained


def _layer(case: Case, way: str, dtype: torch.dtype) -> Subject:
    """The language model alone, from embeddings (to both sides, where it has two) to states."""
    stored = DTYPES[case.dtype]
    body = MODELS[case.model].body(case.layers).to(stored)
    x, dy = (torch.randn(case.S, case.T, case.d).to(stored).to(dtype) for _ in range(2))
    features = torch.randn(case.S, case.Nv, case.d).to(stored).to(dtype)
    trained, using = adapt(body, case, way, case.d)
    body.to(dtype)
    run = _runner(lambda x: states(body, x, x), way)
    x.requires_grad_()

    def forward() -> Tensor:
        with using(features):
            return run(x)

    live = [x, features, dy, *body.parameters(), *body.buffers()]
    return Subject(forward, {"x": x, **trained}, dy, live=live)


def _step(case: Case, way: str, dtype: torch.dtype) -> Subject:
    """Frozen vision model or cached features, language model, loss; AdamW finishes a step."""
    model = MODELS[case.model]
    visual_width = vision.width(model.vision)
    step = Step(model, case.layers, visual_width).to(DTYPES[case.dtype])
    ids, tokens = (torch.randint(model.vocabulary, (case.S, case.T)) for _ in range(2))
    answers = torch.randint(ANSWERS, (case.S,))
    labels = {"token": ids, "answer": answers, "caption": tokens}[model.family.task]
    images = vision.images(case, model.vision, dtype)  # after what is drawn with any of them
    trained, using = adapt(step.body, case, way, visual_width)
    if way == "frozen":
        for name in model.family.first_norms:
            norm = step.body.get_submodule(name).requires_grad_()
            trained |= {f"{name}.{key}": p for key, p in norm.named_parameters()}
    own = {n: p for n, p in step.named_parameters() if n.startswith(("head.", "prefix."))}
    leaves: dict[str, Tensor] = {**trained, **own}
    step.to(dtype)
    run = _runner(step, way)
    optimiser = torch.optim.AdamW(leaves.values(), lr=1e-3, fused=ids.is_cuda)

    def forward() -> Tensor:
        features = images.features()
        with using(features):
            return run(ids, labels, features)

    live = [*images.live, ids, labels, *step.parameters(), *step.buffers()]
    return Subject(forward, leaves, finish=lambda: optimiser.step(), live=live)


def _runner(run: Callable[..., Tensor], way: str) -> Callable[..., Tensor]:
    """The same function, compiled where the way is to; anew for each case, with its sizes."""
    if way != "compile":
        return run
    torch.compiler.reset()  # or, after a few cases, it would run the same code as it is
    return torch.compile(run, dynamic=False)


def check(case: Case, way: str) -> None:
    """ValueError where a case is not of a model, or does not fit it."""
    one_of("way", way, WAYS)
    one_of("kind", case.kind, KINDS)
    one_of("model", case.model, MODELS)
    one_of("dtype", case.dtype, DTYPES)
    model = MODELS[case.model]
    if case.d != model.d:
        raise ValueError(f"d must be {model.d}, the width of {case.model}; got {case.d}")
    before = case.Nv if case.kind == "step" and model.family.task == "caption" else 0
    most = model.positions - before
    if not 2 <= case.T <= most:  # a single token has no next one
        raise ValueError(f"T must be from 2 to {most} for {case.model}, got {case.T}")


def subject(
    case: Case, way: str, device: torch.device, dtype: torch.dtype | None = None
) -> Subject:
    """A layer or a step of a model, computed one way, in this dtype; None: the case's.

    "reference" and "fused" are `attach` with the reference and with the kernels; "compile" is
    torch.compile of the language model with the former; "peft" plain LoRA; "frozen" the base with
    the gradient of x alone, or, in a step, of its `Family.first_norms`.

    Raises:
        ValueError: a case or way that does not exist, does not fit, or lacks a package.
    """
    check(case, way)
    build = _layer if case.kind == "layer" else _step
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(SEED)
        return build(case, way, dtype or DTYPES[case.dtype])


def truth(case: Case, device: torch.device) -> dict[str, Tensor]:
    """y and all gradients of the reference in float64, from the values that the case's dtype has.

    Raises:
        ValueError: as `subject`, or dropout: each way draws masks of its own.
    """
    if case.dropout > 0.0:
        raise ValueError(f"dropout must be 0 for what all ways agree on, got {case.dropout}")
    return subject(case, "reference", device, torch.float64).results()


@torch.no_grad()
def disagreement(
    actual: dict[str, Tensor], reference: dict[str, Tensor], truth: dict[str, Tensor]
) -> float:
    """The largest of ‖actual − truth‖ / (‖reference − truth‖ + ε ‖truth‖) over all tensors.

    Norms are of whole tensors; ε is `roundoff` of the coarsest dtype in `actual`: a loss is fp32,
    but made of what is not. A way that is as good as the reference has at most about 2. Infinite
    where anything is not finite.

    Raises:
        ValueError: names or shapes differ.
    """
    given = [{(name, *t.shape) for name, t in one.items()} for one in (actual, reference, truth)]
    odd = sorted({name for one in given for name, *_ in one ^ given[-1]})
    if odd:
        raise ValueError(f"actual, reference, truth differ in names or shapes: {', '.join(odd)}")
    dtype = max((t.dtype for t in actual.values()), key=lambda dtype: torch.finfo(dtype).eps)
    worst = 0.0
    for name, exact in truth.items():
        errors = actual[name] - exact, reference[name] - exact
        t, a, e = (float(x.norm()) for x in (exact, *errors))
        if not all(map(math.isfinite, (t, a, e))):
            return math.inf
        # Below the smallest normal number the spacing of floats no longer shrinks with them.
        t = max(t, torch.finfo(dtype).smallest_normal * exact.numel() ** 0.5)
        worst = max(worst, a / (e + roundoff(dtype, exact.numel()) * t))
    return worst

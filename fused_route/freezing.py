"""What of a model trains beside the routed layers."""

from collections.abc import Iterator

from torch import Tensor, nn

from .config import RoutedConfig
from .targets import Target, block_of, is_named, refuse_compiled

_UNTIE = "untie them first (transformers: from_pretrained(…, tie_word_embeddings=False))"


def saved(model: nn.Module, config: RoutedConfig, targets: list[Target]) -> dict[str, Tensor]:
    """Copies of everything of the model that trains, by name: modules_to_save and train.

    Raises:
        ValueError: a name or rule that fits nothing, a module with a target in it, or one that is
            compiled.
    """
    copies = modules_to_save(model, config, targets)
    for rule in config.train:
        found = dict(_RULES[rule](model, config, targets))
        if not found:
            raise ValueError(f"train has {rule!r}: {_NOTHING[rule]}")
        copies |= {name: tensor.detach().clone() for name, tensor in found.items()}
    refuse_compiled(copies)
    return copies


def modules_to_save(
    model: nn.Module, config: RoutedConfig, targets: list[Target]
) -> dict[str, Tensor]:
    """Copies of every parameter and buffer in modules_to_save, by name in the model.

    Raises:
        ValueError: a name that no module has, a module with a target in it, or one with a parameter
            that is tied to another module's.
    """
    saved: dict[str, Tensor] = {}
    modules: list[str] = []
    targeted = {name for target in targets for name in target.names}
    missed = set(config.modules_to_save)
    for name, module in model.named_modules():
        matching = {item for item in config.modules_to_save if is_named(name, (item,))}
        if not matching:
            continue
        missed -= matching
        inside = [t for t in targeted if t == name or t.startswith(f"{name}.")]
        if inside:
            raise ValueError(f"modules_to_save has {name}, in which {inside[0]} is a target")
        modules.append(name)
        state = module.state_dict(keep_vars=True)
        saved |= {f"{name}.{key}": value.detach().clone() for key, value in state.items()}
    if missed:
        raise ValueError(f"modules_to_save: no module is called {', '.join(sorted(missed))}")
    _refuse_tied(model, modules)
    return saved


def _refuse_tied(model: nn.Module, modules: list[str]) -> None:
    """ValueError where a parameter of these modules is one of the rest of the model too.

    In place it would train there as well. PEFT trains copies of the modules, so that it would make
    another model of the same file.
    """
    inside: dict[int, str] = {}
    outside: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        is_saved = any(name.startswith(f"{module}.") for module in modules)
        (inside if is_saved else outside).setdefault(id(parameter), name)
    for key, name in inside.items():
        if key in outside:
            raise ValueError(
                f"modules_to_save: {name} is tied to {outside[key]}, which would train too; "
                f"name all modules that share it, or {_UNTIE}"
            )


def _host_bias(
    model: nn.Module, config: RoutedConfig, targets: list[Target]
) -> Iterator[tuple[str, Tensor]]:
    for target in targets:
        bias = getattr(target.module, "bias", None)
        if isinstance(bias, nn.Parameter):
            yield f"{target.names[0]}.bias", bias


def _norms(
    model: nn.Module, config: RoutedConfig, targets: list[Target]
) -> Iterator[tuple[str, Tensor]]:
    """Of every block (a layer index with all that is inside it) that has a target."""
    blocks = {block_of(name, config.layers_pattern) for t in targets for name in t.names}
    for block in sorted(blocks - {None}, key=str):
        assert block is not None
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            if is_norm(module):
                for key, parameter in module.named_parameters(recurse=False):
                    yield f"{name}.{key}", parameter


def is_norm(module: nn.Module) -> bool:
    """Whether it is a layer norm of any kind: torch's, or one that is called so."""
    known = isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    return known or type(module).__name__.endswith(("LayerNorm", "RMSNorm"))


def _pooler(
    model: nn.Module, config: RoutedConfig, targets: list[Target]
) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "pooler":
            yield from module.named_parameters(prefix=name)


def _head(
    model: nn.Module, config: RoutedConfig, targets: list[Target]
) -> Iterator[tuple[str, Tensor]]:
    """Of a Hugging Face model, everything outside of its base model."""
    base = getattr(model, "base_model", None)
    if not isinstance(base, nn.Module):
        return
    heads = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    if base is model:  # no attribute has the prefix: the head is what the model calls so
        get = getattr(model, "get_output_embeddings", lambda: None)
        heads = [name for name, child in model.named_children() if child is get()]
    inside = {
        id(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name.partition(".")[0] not in heads
    }
    places = [name for target in targets for name in target.names]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.partition(".")[0] not in heads:
            continue
        within = [place for place in places if place.partition(".")[0] == name.partition(".")[0]]
        if within:
            raise ValueError(f"train has 'head', in which {within[0]} is a target")
        if id(parameter) in inside:
            raise ValueError(
                f"train has 'head': {name} is tied to a parameter of the base model, which would "
                f"train too; {_UNTIE}"
            )
        yield name, parameter


_NOTHING = {
    "host_bias": "no target has a bias",
    "norms": "no target is in a block with a layer index and norms",
    "pooler": "no module is called pooler",
    "head": "this is no Hugging Face model with a head; name it in modules_to_save",
}
_RULES = {"host_bias": _host_bias, "norms": _norms, "pooler": _pooler, "head": _head}

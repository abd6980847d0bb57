"""Values that the published code trained, into routed layers, by the names it gives its tensors."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from .bottleneck import Bottleneck
from .checkpoint import check_tensors, copy_tensors
from .checks import shown
from .modules import RoutedAdapter, RoutedLinear

# Parameters of our layers by what the published code calls them, behind the path of their module.
TENSORS: dict[type[Bottleneck], dict[str, str]] = {
    RoutedLinear: {"A": "lora_A", "B": "lora_B"},
    RoutedAdapter: {
        "A": "down_sampler.weight",
        "b_A": "down_sampler.bias",
        "B": "up_sampler.weight",
        "b_B": "up_sampler.bias",
    },
}


class HasLayers(Protocol):
    """What `attach` returns, as far as it is needed here: routed layers by name."""

    @property
    def layers(self) -> Mapping[str, Bottleneck]: ...


def load_published(
    into: HasLayers | Mapping[str, Bottleneck],
    tensors: Mapping[str, Tensor],
    names: Mapping[str, str] | None = None,
) -> None:
    """Copies the values of the published code of arXiv 2403.09377 into routed layers: all or none.

    The published files are whole pickled objects. Load them in the published code and save the
    tensors of their state_dict(); only tensors are taken here, and nothing is unpickled.

    What the tensors mean depends on the configuration. The published GPT-2 routes query and value
    jointly and, with several visual tokens, reshapes where the paper transposes: its values belong
    into layers with transpose="eccv24" and segments="joint" (`Routing(route, compat="eccv24")`), of
    the published rank and alpha. Published runs train biases and norms of the language model too,
    under its own names: these are not copied here.

    Args:
        into: what `attach` returned, or routed layers by name.
        tensors: by their published names. For a layer `path`: `path.lora_A` (g·r, d) and
            `path.lora_B` (g·n, r); for an adapter `path.down_sampler.weight` (r, d) and bias
            (r,), `path.up_sampler.weight` (d, r) and bias (d,). A wrapper's prefix (`module.`,
            `gpt.`) may stand before. Names without `lora_…` or `…_sampler` are left out.
        names: published path of layers whose name differs, by our name. Several layers may have
            one: the published GPT-2 has one adapter a block, which it applies twice.

    Raises:
        ValueError: a name in `names` that no layer has; a path that fits several places; missing
            or left-over tensors; other shapes, no floating-point tensors; a layer with parameters
            that the published one has not, such as a split projection, of which lora_A, for text
            and image alike, is no half. No layer is changed then.
    """
    layers = into if isinstance(into, Mapping) else getattr(into, "layers", None)
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(f"into must be what attach returned, or layers by name; got {shown(into)}")
    if not isinstance(tensors, Mapping) or not all(isinstance(key, str) for key in tensors):
        raise ValueError(f"tensors must be tensors by name, got {type(tensors).__name__}")
    paths = _paths(layers, {} if names is None else names)
    published, left_over = _sorted(tensors, set(paths.values()))
    found, expected = dict[str, Any](left_over), dict[str, Tensor]()
    for name, layer in layers.items():
        given = dict(published.get(paths[name], {}))
        for parameter, ending in _endings(name, layer).items():
            called = f"{ending} of {name}"
            expected[called] = layer.get_parameter(parameter)
            if ending in given:
                found[called] = _values(called, given.pop(ending))
        found |= {f"{ending} of {name}": tensor for ending, tensor in given.items()}
    check_tensors(found, expected, "tensors")
    copy_tensors(found, expected)


def _paths(layers: Mapping[str, Bottleneck], names: Mapping[str, str]) -> dict[str, str]:
    """The published path of each layer, without a wrapper's prefix."""
    if not isinstance(names, Mapping):
        raise ValueError(f"names must be published paths by layer, got {type(names).__name__}")
    for name, path in names.items():
        if name not in layers:
            raise ValueError(f"names has {name!r}; the layers are {', '.join(layers)}")
        if not isinstance(path, str) or not path:
            raise ValueError(f"names[{name!r}] must be a path, got {path!r}")
    paths = {name: names.get(name, name) for name in layers}
    first: dict[int, str] = {}
    for name, layer in layers.items():
        other = first.setdefault(id(layer), name)
        if paths[name] != paths[other]:
            raise ValueError(f"{other} and {name} are one layer: give it one path by names")
    return paths


def _endings(name: str, layer: Bottleneck) -> dict[str, str]:
    """Published names of the parameters that a layer has."""
    endings = next((e for kind, e in TENSORS.items() if isinstance(layer, kind)), None)
    if endings is None:
        raise ValueError(f"{name} is a {type(layer).__name__}, which the published code has not")
    own = [key for key, _ in layer.named_parameters(recurse=False)]
    others = ", ".join(key for key in own if key not in endings)
    if others:
        what = "has" if layer.inner_rank is None else "holds a split projection,"
        raise ValueError(f"{name} {what} {others}: the published layers have no such tensors")
    return {parameter: endings[parameter] for parameter in own}


def _values(called: str, tensor: object) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"tensors: {called} must be a tensor, got {shown(tensor)}")
    if tensor.is_meta:
        raise ValueError(f"{called} is on the meta device, which holds no values")
    return tensor


def _sorted(
    tensors: Mapping[str, Tensor], paths: set[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """({path: {ending: tensor}}, tensors of other paths)."""
    published: dict[str, dict[str, Tensor]] = {}
    left_over, places = dict[str, Tensor](), dict[str, str]()
    for key, tensor in tensors.items():
        place, ending = _split(key)
        if not ending:
            continue
        # The longest: with layers "a" and "b.a", "x.b.a" is the second.
        fitting = [path for path in paths if place == path or place.endswith(f".{path}")]
        path = max(fitting, key=len, default=None)
        if path is None:
            left_over[key] = tensor
        elif places.setdefault(path, place) != place:
            raise ValueError(f"{path} could be {places[path]} or {place}: tell by names")
        else:
            published.setdefault(path, {})[ending] = tensor
    return published, left_over


def _split(key: str) -> tuple[str, str]:
    """("h.1.adapter", "down_sampler.bias"); the second is empty for the language model's own."""
    parts = key.split(".")
    for start in (len(parts) - 1, len(parts) - 2):
        if start >= 0 and (parts[start].startswith("lora_") or parts[start].endswith("_sampler")):
            return ".".join(parts[:start]), ".".join(parts[start:])
    return key, ""

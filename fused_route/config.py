"""What `attach` is told, as one value, and how a checkpoint's adapter_config.json spells it."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from .checks import finite, one_of, probability, segments, shown, truth, whole
from .modules import NORMS, POSITIONS
from .reference import ACTIVATIONS
from .routes import ROUTES, Route
from .routing import Routing


@dataclass(frozen=True)
class Host:
    """A way to put a bottleneck into a model, as files spell it.

    Attributes:
        peft_type: of adapter_config.json.
        settings: fields of `RoutedConfig` that mean something for this host alone.
        tensors: parameters of its layer by their names in a checkpoint, as PEFT names its own.
        spelling: fields that adapter_config.json calls otherwise, as PEFT does.
    """

    peft_type: str
    settings: tuple[str, ...]
    tensors: Mapping[str, str]
    spelling: Mapping[str, str] = field(default_factory=dict)


HOSTS = {
    "lora": Host(
        "ROUTED_LORA",
        settings=("alpha", "adapted", "of"),
        tensors={
            "A": "lora_A.weight",
            "U": "lora_U.weight",
            "A_v": "lora_A_v.weight",
            "U_v": "lora_U_v.weight",
            "B": "lora_B.weight",
        },
        spelling={"alpha": "lora_alpha", "dropout": "lora_dropout"},
    ),
    "adapter": Host(
        "ROUTED_ADAPTER",
        settings=("activation", "bias", "residual", "norm", "position", "share"),
        tensors={
            "A": "adapter_A.weight",
            "b_A": "adapter_A.bias",
            "U": "adapter_U.weight",
            "A_v": "adapter_A_v.weight",
            "U_v": "adapter_U_v.weight",
            "B": "adapter_B.weight",
            "b_B": "adapter_B.bias",
            "norm_weight": "adapter_norm.weight",
            "norm_bias": "adapter_norm.bias",
        },
    ),
}
PROJECTORS = ("trainable", "frozen")
ROUTED_BY = ("image", "text", "encoder")
SHARES = ("none", "block")
# What of the model itself may train: see `freezing.trained`.
TRAIN = ("host_bias", "norms", "pooler", "head")

# Settings in which a checkpoint may differ from the model it is loaded into: how it was trained,
# and where layers sit, which the names of their tensors tell.
MAY_DIFFER = (
    "dropout",
    "projector",
    "target_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "train",
)

# Keys of adapter_config.json that describe the file or the base, or that PEFT writes for any LoRA.
DESCRIPTIVE = (
    "peft_type",
    "auto_mapping",
    "base_model_name_or_path",
    "fused_route_version",
    "inference_mode",
    "init_lora_weights",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
)


@dataclass(frozen=True)
class RoutedConfig:
    """Which layers of a model get which bottleneck.

    Args:
        target_modules: a regular expression that the whole name of a module must match, or a
            sequence of names and suffixes ("query" stands for every "….query"); or "all-linear",
            every nn.Linear and Conv1D but the output embedding and what is in modules_to_save.
        host: "lora", a `RoutedLinear` in place of each target; "adapter", a `RoutedAdapter` after
            or before each target.
        r: rank.
        inner_rank: None, one down-projection for text and image; or the inner rank, for each
            adapted segment, of a down-projection of each.
        route, transpose, segments, pool, normalize: as in `Routing`.
        routed_by: "image", the features that the context is given; "text", the mean of each layer's
            own input over valid tokens, refused in decoders, where it would read the future;
            "encoder", the mean of the encoder's states, for layers of the decoder of a Hugging Face
            encoder-decoder model. There both take their masks from the model's own calls; in any
            other model "text" needs `context.using(text_mask=…)` around the call.
        dropout: on the inputs of the down-projection, in training mode.
        layers_to_transform: indices of the layers in which targets count; None: all. The index is
            the first number in a module's name, or the one after `layers_pattern`.
        layers_pattern: name or names before the layer index, such as "layers" or "h".
        modules_to_save: names or suffixes of modules that stay trainable and are saved too.
            A weight that is tied to that of another module (an output embedding's to the input's)
            is refused, unless all modules that share it are named.
        train: what else of the model trains and is saved: "host_bias", the biases of the targets;
            "norms", the layer norms of every block with a target; "pooler" and "head", of a Hugging
            Face model. Everything else is frozen.
        visual_width: width of the features given to the context, where it differs from the
            targets' width: a projector is added. None: features have the targets' width. With route
            "none" no layer reads a projector: it is added only for a context that `attach` was
            given, or a model that has one of its own, which may.
        projector: "trainable" or "frozen".
        alpha, adapted, of: of `RoutedLinear` (host "lora"); alpha None: r, as files have it and
            comparisons see it; with another r (`dataclasses.replace`) it is that one.
        activation, bias, residual, norm: of `RoutedAdapter` (host "adapter").
        position: the adapter stands "after" or "before" its target. Targets that are layer norms
            give the positions before and after a norm.
        share: "none", an adapter for each target; "block", one for all targets of a layer index.

    Raises:
        ValueError: a value that is not accepted, or one that belongs to the other host.
    """

    target_modules: str | Sequence[str]
    host: str = "lora"
    r: int = 8
    inner_rank: int | None = None
    route: str = "mul"
    transpose: str = "exact"
    segments: str = "per_group"
    pool: str = "mean"
    normalize: str = "none"
    routed_by: str = "image"
    dropout: float = 0.0
    layers_to_transform: Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] = ()
    train: Sequence[str] = ()
    visual_width: int | None = None
    projector: str = "trainable"
    alpha: float | None = None
    adapted: tuple[int, ...] = (0,)
    of: int = 1
    activation: str = "gelu"
    bias: bool = True
    residual: bool = True
    norm: str = "none"
    position: str = "after"
    share: str = "none"

    def __post_init__(self) -> None:
        one_of("host", self.host, HOSTS)
        for name in _foreign(self.host):
            if getattr(self, name) != _defaults()[name]:
                raise ValueError(f"{name} has no meaning for host={self.host!r}")
        for name, accept in ACCEPT.items():
            object.__setattr__(self, name, accept(name, getattr(self, name)))
        if not self.target_modules:
            raise ValueError(
                "target_modules is empty: name the modules to adapt, or say 'all-linear'"
            )
        reads_index = self.share == "block" or "norms" in (self.train or ())
        if self.layers_pattern and self.layers_to_transform is None and not reads_index:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} is given without layers_to_transform, "
                "share='block' or train=('norms',), which need the index of a layer"
            )
        for name, accepted in NAMED.items():
            one_of(name, getattr(self, name), accepted)
        for item in self.train:
            one_of("train", item, TRAIN)
        if self.host == "lora":
            segments("adapted", self.adapted, self.of)
        if self.layers_pattern is not None and not self.layers_pattern:
            given = self.layers_pattern
            raise ValueError(f"layers_pattern must be a name or names, got {given!r}")
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        takes = self.routing().route.takes
        if takes == "nothing" and (self.inner_rank is not None or self.routed_by != "image"):
            raise ValueError(f"inner_rank and routed_by have no meaning for route={self.route!r}")
        if self.routed_by != "image" and self.visual_width is not None:
            raise ValueError(f"visual_width has no meaning for routed_by={self.routed_by!r}")

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, RoutedConfig) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return tuple((values | {"alpha": self._alpha()}).values())

    def _alpha(self) -> float | None:
        is_left_out = self.host == "lora" and self.alpha is None
        return float(self.r) if is_left_out else self.alpha

    def routing(self) -> Routing:
        """The route in its modes."""
        return Routing(
            self.route,
            transpose=self.transpose,
            segments=self.segments,
            pool=self.pool,
            normalize=self.normalize,
        )

    def to_json(self) -> dict[str, Any]:
        """Keys and values for adapter_config.json; other hosts' settings are left out."""
        values = {key: getattr(self, name) for key, name in _spelt(self.host).items()}
        if "lora_alpha" in values:
            values["lora_alpha"] = self._alpha()
        listed = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {"peft_type": HOSTS[self.host].peft_type, **listed}

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> "RoutedConfig":
        """The configuration that an adapter_config.json holds.

        Raises:
            ValueError: not a routed adapter, a value that is not accepted, or a setting this
                version does not know and which is not off (null, false, empty or "none").
        """
        if not isinstance(written, Mapping):
            raise ValueError(f"written must be a mapping with a peft_type, got {shown(written)}")
        peft_type = written.get("peft_type")
        hosts = {host.peft_type: name for name, host in HOSTS.items()}
        if not isinstance(peft_type, str) or peft_type not in hosts:
            raise ValueError(
                f"peft_type is {peft_type!r}; a routed adapter has one of {', '.join(hosts)}"
            )
        spelt = _spelt(hosts[peft_type])
        given: dict[str, Any] = {}
        for key, value in written.items():
            if key in spelt:
                given[spelt[key]] = value
            elif key not in DESCRIPTIVE and value not in (None, False, "none", [], {}):
                raise ValueError(f"{key}={value!r} is a setting that this version does not know")
        if "target_modules" not in given:
            raise ValueError("target_modules is missing")
        return cls(host=hosts[peft_type], **given)

    def differences(self, other: "RoutedConfig") -> list[str]:
        """What makes adapters of the other configuration unfit for this one, setting by setting."""
        if not isinstance(other, RoutedConfig):
            raise ValueError(f"other must be a RoutedConfig, got {shown(other)}")
        mine, theirs = self.to_json(), other.to_json()
        may_differ = {HOSTS[self.host].spelling.get(name, name) for name in MAY_DIFFER}
        if self.share == "block":  # one name stands for all places of a shared layer
            may_differ -= {"target_modules", "layers_to_transform", "layers_pattern"}
        return [
            f"{key} is {theirs[key]!r} there, {mine[key]!r} here"
            for key in mine
            if key in theirs and key not in may_differ and mine[key] != theirs[key]
        ]


def identity_of(written: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of an adapter_config.json that say which function its tensors belong to."""
    exempt = {h.spelling.get(name, name) for h in HOSTS.values() for name in MAY_DIFFER}
    return {k: v for k, v in written.items() if k not in exempt and k not in DESCRIPTIVE}


def _names(name: str, value: Any) -> tuple[str, ...]:
    items = () if value is None else value
    if isinstance(items, (str, Mapping)) or not isinstance(items, Iterable):
        raise ValueError(f"{name} must be a sequence of names, got {value!r}")
    items = tuple(sorted(items) if isinstance(items, (set, frozenset)) else items)
    if not all(isinstance(item, str) and item for item in items):
        raise ValueError(f"{name} must be a sequence of names, got {value!r}")
    return items


def _pattern(name: str, value: Any) -> str | tuple[str, ...] | None:
    return value if value is None or isinstance(value, str) else _names(name, value)


def _indices(name: str, value: Any) -> tuple[int, ...]:
    items = value if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    return tuple(whole(name, item, least=0) for item in items)


def _route(name: str, value: Any) -> str:
    if isinstance(value, Route):
        if ROUTES.get(value.name) is not value:
            raise ValueError(f"{name}: register {value.name!r} first, so that files can name it")
        return value.name
    one_of(name, value, ROUTES)
    return str(value)


NAMED: dict[str, Collection[str]] = {
    "projector": PROJECTORS,
    "activation": ACTIVATIONS,
    "norm": NORMS,
    "position": POSITIONS,
    "share": SHARES,
    "routed_by": ROUTED_BY,
}

ACCEPT: dict[str, Any] = {
    "target_modules": _pattern,
    "r": whole,
    "inner_rank": lambda n, value: None if value is None else whole(n, value),
    "route": _route,
    "dropout": probability,
    "layers_to_transform": lambda n, value: None if value is None else _indices(n, value),
    "layers_pattern": _pattern,
    "modules_to_save": _names,
    "train": _names,
    "visual_width": lambda n, value: None if value is None else whole(n, value),
    "alpha": lambda n, value: None if value is None else finite(n, value),
    "adapted": _indices,
    "of": whole,
    "bias": truth,
    "residual": truth,
}


def _foreign(host: str) -> tuple[str, ...]:
    """Settings of other hosts."""
    return tuple(s for name, other in HOSTS.items() if name != host for s in other.settings)


def _spelt(host: str) -> dict[str, str]:
    """Settings of a host by their keys in adapter_config.json."""
    names = [name for name in _defaults() if name not in ("host", *_foreign(host))]
    return {HOSTS[host].spelling.get(name, name): name for name in names}


def _defaults() -> dict[str, Any]:
    return {f.name: None if f.default is MISSING else f.default for f in fields(RoutedConfig)}

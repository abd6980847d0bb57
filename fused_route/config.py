"""What `attach` is told, as one value, and how a checkpoint's adapter_config.json spells it."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from .reference import ACTIVATIONS
from .routes import one_of
from .routing import Routing

PEFT_TYPES = {"lora": "ROUTED_LORA", "adapter": "ROUTED_ADAPTER"}
PROJECTORS = ("trainable", "frozen")

# Settings that mean something for one host only.
HOST_FIELDS = {"lora": ("alpha", "adapted", "of"), "adapter": ("activation", "bias", "residual")}

# adapter_config.json spells these as PEFT's LoRA does.
PEFT_NAMES = {"alpha": "lora_alpha", "dropout": "lora_dropout"}

# Keys of adapter_config.json that describe the file or the base, not the function.
DESCRIPTIVE = (
    "peft_type",
    "auto_mapping",
    "base_model_name_or_path",
    "fused_route_version",
    "inference_mode",
    "peft_version",
    "revision",
    "task_type",
)


@dataclass(frozen=True)
class RoutedConfig:
    """Which layers of a model get which bottleneck.

    Args:
        target_modules: a regular expression that the whole name of a module must match, or a
            sequence of names and suffixes ("query" stands for every "….query").
        host: "lora", a `RoutedLinear` in place of each target; "adapter", a `RoutedAdapter` after
            each target.
        r: rank.
        route, transpose, segments, pool, normalize: as in `Routing`.
        dropout: on the inputs of the down-projection, in training mode.
        layers_to_transform: indices of the layers in which targets count; None: all. The index is
            the first number in a module's name, or the one after `layers_pattern`.
        layers_pattern: name before the layer index, such as "layers" or "h".
        modules_to_save: names or suffixes of modules that stay trainable and are saved too.
        visual_width: width of the features given to the context, where it differs from the
            targets' width: a projector is added. None: features have the targets' width.
        projector: "trainable" or "frozen".
        alpha, adapted, of: of `RoutedLinear` (host "lora"); alpha None: r.
        activation, bias, residual: of `RoutedAdapter` (host "adapter").

    Raises:
        ValueError: a value that is not accepted, or one that belongs to the other host.
    """

    target_modules: str | Sequence[str]
    host: str = "lora"
    r: int = 8
    route: str = "mul"
    transpose: str = "exact"
    segments: str = "per_group"
    pool: str = "mean"
    normalize: str = "none"
    dropout: float = 0.0
    layers_to_transform: Sequence[int] | None = None
    layers_pattern: str | None = None
    modules_to_save: Sequence[str] = ()
    visual_width: int | None = None
    projector: str = "trainable"
    alpha: float | None = None
    adapted: tuple[int, ...] = (0,)
    of: int = 1
    activation: str = "gelu"
    bias: bool = True
    residual: bool = True

    def __post_init__(self) -> None:
        for name in ("target_modules", "layers_to_transform", "modules_to_save", "adapted"):
            value = getattr(self, name)
            if isinstance(value, (list, set)):
                value = tuple(sorted(value) if isinstance(value, set) else value)
                object.__setattr__(self, name, value)
        if not self.target_modules:
            raise ValueError("target_modules is empty: name the modules to adapt")
        one_of("host", self.host, PEFT_TYPES)
        one_of("projector", self.projector, PROJECTORS)
        one_of("activation", self.activation, ACTIVATIONS)
        if self.r < 1:
            raise ValueError(f"r must be at least 1, got {self.r}")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern is given without layers_to_transform")
        self.routing()
        for name in _foreign(self.host):
            if getattr(self, name) != _defaults()[name]:
                raise ValueError(f"{name} has no meaning for host={self.host!r}")

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
        spelling = _spelling(self.host)
        values = {key: _listed(getattr(self, name)) for key, name in spelling.items()}
        return {"peft_type": PEFT_TYPES[self.host], **values}

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> "RoutedConfig":
        """The configuration that an adapter_config.json holds.

        Raises:
            ValueError: not a routed adapter, or a setting this version does not know and which is
                not off (null, false, empty or "none").
        """
        peft_type = written.get("peft_type")
        hosts = {spelt: host for host, spelt in PEFT_TYPES.items()}
        if peft_type not in hosts:
            raise ValueError(
                f"peft_type is {peft_type!r}; a routed adapter has one of {', '.join(hosts)}"
            )
        host = hosts[peft_type]
        known = _spelling(host)
        given: dict[str, Any] = {"host": host}
        for key, value in written.items():
            if key in known:
                given[known[key]] = tuple(value) if isinstance(value, list) else value
            elif key not in DESCRIPTIVE and value not in (None, False, "none", [], {}):
                raise ValueError(f"{key}={value!r} is a setting that this version does not know")
        if "target_modules" not in given:
            raise ValueError("target_modules is missing")
        if given.get("modules_to_save") is None:
            given.pop("modules_to_save", None)
        return cls(**given)


def _defaults() -> dict[str, Any]:
    return {f.name: None if f.default is MISSING else f.default for f in fields(RoutedConfig)}


def _foreign(host: str) -> tuple[str, ...]:
    """Settings of the other host."""
    return HOST_FIELDS["adapter" if host == "lora" else "lora"]


def _spelling(host: str) -> dict[str, str]:
    """Settings of a host by their keys in adapter_config.json."""
    names = [name for name in _defaults() if name not in ("host", *_foreign(host))]
    return {(PEFT_NAMES.get(name, name) if host == "lora" else name): name for name in names}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

"""The configurations that PEFT's users write: `RoutedConfig` under PEFT's names."""

from dataclasses import MISSING, dataclass, field, fields
from functools import wraps
from typing import Any, ClassVar

from peft import LoraConfig, PeftConfig

from ..card import write_card
from ..checks import shown
from ..config import HOSTS, RoutedConfig
from .register import member

# What arguments of peft.LoraConfig that routed LoRA has no use for may say all the same, whatever
# the version's defaults are; others that it has may say what they do by default.
OF_LORA: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "alpha_pattern": (None, {}),
    "arrow_config": (None,),
    "bias": ("none",),
    "corda_config": (None,),
    "eva_config": (None,),
    "exclude_modules": (None,),
    "fan_in_fan_out": (False, True),  # a Conv1D is known by its class
    "init_lora_weights": (True,),
    "layer_replication": (None,),
    "loftq_config": (None, {}),
    "lora_bias": (False,),
    "rank_pattern": (None, {}),
    "target_parameters": (None,),
    "trainable_token_indices": (None,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "use_rslora": (False,),
}


def of_lora(own: set[str]) -> dict[str, tuple[Any, ...]]:
    """What each argument of peft.LoraConfig may say that is not among a configuration's own."""
    defaults = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in fields(LoraConfig)
        if f.name not in own
    }
    return {name: (default,) for name, default in defaults.items()} | OF_LORA


def in_place_of_lora(config: type) -> type:
    """Lets a configuration be called as peft.LoraConfig is, and refuses the variants of LoRA."""
    plain = config.__init__  # type: ignore[misc]
    others = of_lora({f.name for f in fields(config)})

    @wraps(plain)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in others.keys() & kwargs.keys():
            value = kwargs.pop(name)
            if value not in others[name]:
                accepted = " or ".join(map(repr, others[name]))
                raise ValueError(
                    f"{name}={shown(value)}: routed LoRA has no such variant, only {accepted}"
                )
        plain(self, *args, **kwargs)

    config.__init__ = init  # type: ignore[misc]
    return config


@dataclass
class _Routed(PeftConfig):
    """What both configurations share; see `RoutedConfig` for every field."""

    host: ClassVar[str]

    target_modules: Any = None
    r: int = 8
    inner_rank: int | None = None
    route: str = "mul"
    transpose: str = "exact"
    segments: str = "per_group"
    pool: str = "mean"
    normalize: str = "none"
    routed_by: str = "image"
    layers_to_transform: Any = None
    layers_pattern: Any = None
    modules_to_save: Any = None
    train: Any = ()
    visual_width: int | None = None
    projector: str = "trainable"
    fused_route_version: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = member(HOSTS[self.host].peft_type)
        routed = self.routed()
        for key, value in routed.to_json().items():
            if key != "peft_type":
                setattr(self, key, value)
        if routed.train:
            raise ValueError(
                f"train={routed.train!r}: PEFT trains what modules_to_save names; `attach` has it"
            )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's, and writes a section of the model card: see `Attached.save`."""
        super().save_pretrained(save_directory, **kwargs)
        write_card(save_directory, self.routed().to_json())

    def routed(self) -> RoutedConfig:
        """The same as `attach` is told it.

        Raises:
            ValueError: a value that is not accepted.
        """
        own = {f.name for f in fields(PeftConfig)} | {"fused_route_version"}
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}
        given = {key: list(v) if isinstance(v, set) else v for key, v in given.items()}
        return RoutedConfig.from_json({"peft_type": HOSTS[self.host].peft_type, **given})


@in_place_of_lora
@dataclass
class RoutedLoraConfig(_Routed):
    """Routed LoRA for `peft.get_peft_model`: `RoutedConfig` with host "lora", as PEFT spells it.

        model = get_peft_model(model, RoutedLoraConfig(r=64, route="mul", target_modules=["query"]))

    Args:
        target_modules: as in `RoutedConfig`. It must be given: PEFT's defaults by kind of model are
            not taken.
        r, layers_to_transform, layers_pattern, modules_to_save: as in `peft.LoraConfig`.
        lora_alpha: s = lora_alpha / r; None: r.
        lora_dropout: on the inputs of A.
        bias, use_dora and others of `peft.LoraConfig`: at their defaults only.
        route, transpose, segments, pool, normalize, routed_by, inner_rank: as in `RoutedConfig`.
        visual_width, projector, adapted, of: as in `RoutedConfig`.
        train: empty; PEFT trains what modules_to_save names.

    Raises:
        ValueError: a value that is not accepted.
    """

    host: ClassVar[str] = "lora"

    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    adapted: Any = (0,)
    of: int = 1


@dataclass
class RoutedAdapterConfig(_Routed):
    """Routed adapters for `peft.get_peft_model`: `RoutedConfig` with host "adapter".

    Args:
        dropout, activation, bias, residual, norm, position: as in `RoutedConfig`.
        Others as in `RoutedLoraConfig`.

    Raises:
        ValueError: a value that is not accepted; share="block", which `attach` has.
    """

    host: ClassVar[str] = "adapter"

    dropout: float = 0.0
    activation: str = "gelu"
    bias: bool = True
    residual: bool = True
    norm: str = "none"
    position: str = "after"
    share: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share != "none":
            raise ValueError(f"share={self.share!r}: adapters are shared with `attach` only")

"""Routed LoRA and routed adapters as methods of PEFT: get_peft_model, save_pretrained and so on."""

from .configs import RoutedAdapterConfig as RoutedAdapterConfig
from .configs import RoutedLoraConfig as RoutedLoraConfig
from .register import register
from .tuners import RoutedAdapterModel as RoutedAdapterModel
from .tuners import RoutedLoraModel as RoutedLoraModel
from .tuners import checkpoint_activations as checkpoint_activations
from .tuners import context_of as context_of

register("routed_lora", RoutedLoraConfig, RoutedLoraModel)
register("routed_adapter", RoutedAdapterConfig, RoutedAdapterModel)

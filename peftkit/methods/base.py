"""Method: one finetuning idea as a frozen config with three verbs, each with a do-nothing default."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from peftkit.config import Config
from peftkit.layers import ADAPTER
from peftkit.quant import Quantization

Group = dict[str, Any]  # an optimizer group: adapter, role, params, lr, weight_decay


class Method(Config):
    """One finetuning idea. Its fields are its YAML keys; methods compose as a list.

    The verbs stand along the flow: `quantize()` before the model is loaded, `attach(model)` after, `param_groups(groups)`
    at the optimizer.
    """

    swaps_layers: ClassVar[bool] = False
    """Whether `attach` puts adapter layers in; of those there can be one in a list."""
    paged_optimizer: ClassVar[bool] = False
    """Whether a paged 8-bit optimizer is wanted where there is a GPU."""

    def quantize(self) -> Quantization | None:
        """How the base is to be stored, or None for no wish."""
        return None

    def attach(self, model: nn.Module, adapter: str = ADAPTER) -> Handle | None:
        """Changes the model in place, layers under the name `adapter`; returns what undoes it, where restoring modules does not."""
        return None

    def peft_config(self, targets: list[str], model: nn.Module, adapter: str = ADAPTER) -> Any:
        """peft's config for the adapter `adapter` of this method on the modules `targets`; None where it puts in no layers."""
        return None

    def param_groups(self, groups: list[Group]) -> list[Group]:
        """The optimizer's groups as this method wants them."""
        return groups


class Handle(ABC):
    """What a method left on a model besides adapter layers: removable, with a state that checkpoints keep."""

    enabled: bool = True
    """Whether it acts; `adapters_disabled` switches it off."""

    @abstractmethod
    def remove(self) -> None:
        """Takes it off the model again."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if it had not stopped."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`."""

    @abstractmethod
    def on_process(self, index: int) -> None:
        """Told before training by several processes which of them this is: what is drawn at random must differ between them."""


@dataclass
class Attachment:
    """What `attach` left on a model: the methods of every adapter, their handles, and what trained before."""

    by_adapter: dict[str, list[Method]] = field(default_factory=dict)
    handles: dict[str, Handle] = field(default_factory=dict)
    """By the name of the method: one of a kind acts on a model, whichever adapter is active."""
    trained_before: list[str] = field(default_factory=list)

    @property
    def methods(self) -> list[Method]:
        """The methods of all adapters."""
        return [method for methods in self.by_adapter.values() for method in methods]

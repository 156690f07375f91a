"""peftkit: parameter-efficient finetuning of Hugging Face models.

The public names are imported on first use, so that `import peftkit` stays instant.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "load": "peftkit.model",
    "attach": "peftkit.methods",
    "detach": "peftkit.methods",
    "describe": "peftkit.methods",
    "set_adapter": "peftkit.methods",
    "delete_adapter": "peftkit.methods",
    "active_adapters": "peftkit.methods",
    "adapters_disabled": "peftkit.methods",
    "LoRA": "peftkit.methods",
    "DoRA": "peftkit.methods",
    "QLoRA": "peftkit.methods",
    "LoRAPlus": "peftkit.methods",
    "NEFTune": "peftkit.methods",
    "merge": "peftkit.merge",
    "adopt": "peftkit.adopt",
    "release": "peftkit.adopt",
    "save_adapter": "peftkit.checkpoint",
    "load_adapter": "peftkit.checkpoint",
    "build_optimizer": "peftkit.optim",
    "run": "peftkit.run",
}

if TYPE_CHECKING:
    from peftkit.adopt import adopt as adopt
    from peftkit.adopt import release as release
    from peftkit.checkpoint import load_adapter as load_adapter
    from peftkit.checkpoint import save_adapter as save_adapter
    from peftkit.merge import merge as merge
    from peftkit.methods import DoRA as DoRA
    from peftkit.methods import LoRA as LoRA
    from peftkit.methods import LoRAPlus as LoRAPlus
    from peftkit.methods import NEFTune as NEFTune
    from peftkit.methods import QLoRA as QLoRA
    from peftkit.methods import active_adapters as active_adapters
    from peftkit.methods import adapters_disabled as adapters_disabled
    from peftkit.methods import attach as attach
    from peftkit.methods import delete_adapter as delete_adapter
    from peftkit.methods import describe as describe
    from peftkit.methods import detach as detach
    from peftkit.methods import set_adapter as set_adapter
    from peftkit.model import load as load
    from peftkit.optim import build_optimizer as build_optimizer
    from peftkit.run import run as run

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'peftkit' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_WHERE]


class _Package(ModuleType):
    """Keeps `peftkit.run` and `peftkit.merge` the functions: importing the submodules of these names would rebind them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

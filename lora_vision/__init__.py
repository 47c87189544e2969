"""LoRA for diffusers and vision transformers: right, fast, and small enough to read.

Importing this package imports neither torch nor diffusers; each name below is fetched on first use.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Adapter": "adapter",
    "AdapterError": "errors",
    "Base": "base",
    "BaseModelError": "errors",
    "Blend": "blend",
    "DataError": "errors",
    "LoraConfig": "config",
    "LoraVisionError": "errors",
    "attach": "inject",
    "collect": "inject",
    "detach": "inject",
    "inject": "inject",
    "load_adapter": "files",
    "load_base": "base",
    "save_adapter": "files",
}

if TYPE_CHECKING:
    from lora_vision.adapter import Adapter as Adapter
    from lora_vision.base import Base as Base
    from lora_vision.base import load_base as load_base
    from lora_vision.blend import Blend as Blend
    from lora_vision.config import LoraConfig as LoraConfig
    from lora_vision.errors import AdapterError as AdapterError
    from lora_vision.errors import BaseModelError as BaseModelError
    from lora_vision.errors import DataError as DataError
    from lora_vision.errors import LoraVisionError as LoraVisionError
    from lora_vision.files import load_adapter as load_adapter
    from lora_vision.files import save_adapter as save_adapter
    from lora_vision.inject import attach as attach
    from lora_vision.inject import collect as collect
    from lora_vision.inject import detach as detach
    from lora_vision.inject import inject as inject

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """The package, in which importing the module ``inject`` does not hide the function of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

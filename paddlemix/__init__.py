"""LLaVA on PaddlePaddle. The public names are imported when they are first used; until then this module is light."""

import importlib
from typing import Any, List

__version__ = "0.1.0"

_PUBLIC = {
    "LlavaConfig": "paddlemix.models.llava.configuration",
    "LlavaLlamaForCausalLM": "paddlemix.models.llava.modeling",
    "LlavaProcessor": "paddlemix.processors.llava",
    "LlavaChat": "paddlemix.models.llava.chat",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> List[str]:
    return sorted({*globals(), *_PUBLIC})

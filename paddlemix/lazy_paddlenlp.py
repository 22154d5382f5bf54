"""PaddleNLP a part at a time: its models' base classes at once, the rest when it is asked for.

``import paddlenlp`` imports all that it has, its task flows, server and data sets with scikit-learn, pandas, datasets and
FastAPI, and takes four times as long as what a model needs. Nothing is left out: the first use of any other part of
``paddlenlp`` runs its own start-up, just later.
"""

import importlib
import importlib.util
import sys
from importlib.metadata import version
from types import ModuleType
from typing import Any

__all__ = ["GenerationConfig", "PretrainedConfig", "PretrainedModel"]

# What paddlenlp.data and paddlenlp.transformers, in this order, import of their own package.
_PARTS = {"data", "generation", "layers", "ops", "quantization", "transformers", "utils"}


def _import_transformers() -> None:
    """Imports ``paddlenlp.transformers``, and of the rest of PaddleNLP only what that needs."""
    if "paddlenlp" in sys.modules:
        return
    spec = importlib.util.find_spec("paddlenlp")
    if spec is None:
        raise ModuleNotFoundError("No module named 'paddlenlp'", name="paddlenlp")
    package = importlib.util.module_from_spec(spec)
    package.__version__ = version("paddlenlp")  # the parts ask for it
    rest = _Rest(package)
    package.__getattr__ = rest.attribute
    sys.modules["paddlenlp"] = package
    sys.meta_path.insert(0, rest)
    try:
        importlib.import_module("paddlenlp.data")  # first, as in paddlenlp's own start-up: the two import each other
        importlib.import_module("paddlenlp.transformers")
    except BaseException:
        rest.forget()
        for name in [name for name in sys.modules if name.split(".")[0] == "paddlenlp"]:
            del sys.modules[name]
        raise
    import paddle

    paddle.disable_signal_handler()  # as paddlenlp does; Python's own handlers stay in charge


class _Rest:
    """A finder that runs the package's own ``__init__`` before any other part of it is imported."""

    def __init__(self, package: ModuleType):
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        top, _, part = name.partition(".")
        part = part.split(".")[0]
        if top == "paddlenlp" and part not in _PARTS and not part.startswith("__"):
            self.complete()

    def attribute(self, name: str) -> Any:
        """The package's ``__getattr__``."""
        if name in _PARTS:  # still being imported
            return importlib.import_module(f"paddlenlp.{name}")
        if name.startswith("__"):
            raise AttributeError(f"module 'paddlenlp' has no attribute {name!r}")
        self.complete()
        return getattr(self.package, name)

    def complete(self) -> None:
        if self in sys.meta_path:
            self.forget()
            self.package.__spec__.loader.exec_module(self.package)

    def forget(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            del self.package.__getattr__


_import_transformers()

from paddlenlp.generation import GenerationConfig  # noqa: E402
from paddlenlp.transformers import PretrainedConfig, PretrainedModel  # noqa: E402

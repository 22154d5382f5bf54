"""Image features that are kept with the model: a picture that any of its chats has shown isn't encoded again."""

import json
from collections import OrderedDict
from typing import Any, Callable, Tuple
from weakref import WeakKeyDictionary

import paddle

from paddlemix.models.llava.lean import host_view

__all__ = ["PictureFeatures"]

_stores: "WeakKeyDictionary[Any, PictureFeatures]" = WeakKeyDictionary()


class PictureFeatures:
    """Features [K, D] by a picture's content and by how it was prepared; those of the last ``KEPT`` pictures.

    They hold for the weights they were made with: when a chat begins, or begins anew, a sample of the model's numbers is
    compared (some milliseconds), and after a training or a load all are forgotten.

    Attributes:
        weights (bytes): that sample, for what else was computed with the weights.
    """

    KEPT = 64  # pictures
    SAMPLE = 8  # numbers of each parameter

    def __init__(self):
        self._held: OrderedDict[Tuple[str, str], paddle.Tensor] = OrderedDict()
        self.weights = b""

    @classmethod
    def of(cls, model: Any) -> "PictureFeatures":
        """The model's store, emptied if its weights have changed; it goes when the model goes."""
        store = _stores.setdefault(model, cls())
        weights = _sample(model, cls.SAMPLE)
        if weights != store.weights:
            store.clear()
            store.weights = weights
        return store

    def get(self, digest: str, image_processor: Any, encode: Callable[[], paddle.Tensor]) -> paddle.Tensor:
        """Features of the picture with this digest; ``encode()`` gives them where they aren't held."""
        key = digest, json.dumps(vars(image_processor), default=str, sort_keys=True)
        features = self._held.pop(key, None)  # another thread's chat may have taken it meanwhile
        if features is None:
            features = encode()
        self._held[key] = features  # the last one used is the last to go
        if len(self._held) > self.KEPT:
            self._held.popitem(last=False)
        return features

    def clear(self) -> None:
        self._held.clear()


@paddle.no_grad()
def _sample(model: Any, count: int) -> bytes:
    """Every so many numbers of each parameter."""
    chosen, moved = [], []
    for parameter in model.parameters():
        every = -(-parameter.size // count)
        if parameter.place.is_cpu_place() and parameter.dtype in (paddle.float32, paddle.bfloat16):
            chosen.append(host_view(parameter).reshape(-1)[::every].tobytes())  # Paddle would copy all of it first
        else:
            moved.append(parameter.flatten()[::every].astype("float32"))
    return b"".join(chosen) + (paddle.concat(moved).numpy().tobytes() if moved else b"")

"""Image features that are kept with the model: a picture that any of its chats has shown isn't encoded again."""

import json
from collections import OrderedDict
from typing import Any, Callable, Tuple
from weakref import WeakKeyDictionary

import paddle

__all__ = ["PictureFeatures"]

_stores: "WeakKeyDictionary[Any, PictureFeatures]" = WeakKeyDictionary()


class PictureFeatures:
    """Features [K, D] by a picture's content and by how it was prepared; those of the last ``KEPT`` pictures.

    They hold for the weights they were made with: when a chat begins, a sample of the tower's and the projector's numbers
    is compared (some milliseconds), and after a training or a load all are forgotten.
    """

    KEPT = 64  # pictures
    SAMPLE = 64  # numbers of each parameter

    def __init__(self):
        self._held: OrderedDict[Tuple[str, str], paddle.Tensor] = OrderedDict()
        self._weights: Tuple = ()

    @classmethod
    def of(cls, model: Any) -> "PictureFeatures":
        """The model's store, emptied if its weights have changed; it goes when the model goes."""
        store = _stores.setdefault(model, cls())
        weights = _sample(model, cls.SAMPLE)
        if weights != store._weights:
            store.clear()
            store._weights = weights
        return store

    def get(self, digest: str, image_processor: Any, encode: Callable[[], paddle.Tensor]) -> paddle.Tensor:
        """Features of the picture with this digest; ``encode()`` gives them where they aren't held."""
        key = digest, json.dumps(vars(image_processor), default=str, sort_keys=True)
        features = self._held.pop(key) if key in self._held else encode()
        self._held[key] = features  # the last one used is the last to go
        if len(self._held) > self.KEPT:
            self._held.popitem(last=False)
        return features

    def clear(self) -> None:
        self._held.clear()


@paddle.no_grad()
def _sample(model: Any, count: int) -> Tuple:
    """Every so many numbers of each parameter that a picture goes through."""
    parts = ("vision_tower", "mm_projector", "image_newline")
    chosen = [
        parameter.flatten()[:: -(-parameter.size // count)].astype("float32")
        for name, parameter in model.named_parameters()
        if any(part in name for part in parts)
    ]
    return tuple(paddle.concat(chosen).tolist()) if chosen else ()

"""Auto*MIX: one table from the ``model_type`` in config.json to a model's classes, which are imported when asked for."""

import importlib
import inspect
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Union

from paddlemix.errors import UserError

__all__ = ["AutoConfigMIX", "AutoModelMIX", "AutoProcessorMIX", "AutoTokenizerMIX", "MODELS", "ModelClasses"]


class ModelClasses(NamedTuple):
    """Where a model's classes are, as ``module:name``."""

    config: str
    model: str
    processor: str


_LLAVA = ModelClasses(
    config="paddlemix.models.llava.configuration:LlavaConfig",
    model="paddlemix.models.llava.modeling:LlavaLlamaForCausalLM",
    processor="paddlemix.processors.llava:LlavaProcessor",
)

# A further model is a further line here.
MODELS: Dict[str, ModelClasses] = {
    "llava": _LLAVA,  # the toolkit, Hugging Face's LLaVA-1.5
    "llava_llama": _LLAVA,  # the original release
    "llava_mistral": _LLAVA,
    "llava_next": _LLAVA,  # Hugging Face's LLaVA-1.6
    "llama": _LLAVA,  # a decoder alone, or with mm_* keys (LLaVA's first releases)
    "mistral": _LLAVA,
}


def _load(place: str) -> Any:
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def _classes(folder: Path) -> ModelClasses:
    from paddlemix.models.llava.checkpoint import read_config
    from paddlemix.models.llava.tensor_files import read_json

    path = folder / "config.json"
    # an adapter's folder leaves the config to its base
    model_type = read_json(path).get("model_type") if path.is_file() else read_config(folder).model_type
    if model_type not in MODELS:
        raise UserError(f"{path} has model_type {model_type!r}; expected one of {', '.join(sorted(MODELS))}.")
    return MODELS[model_type]


def _check_length(name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise UserError(f"{name} is {value!r}; expected a whole number of at least 1.")


class _Auto:
    def __init__(self):
        raise TypeError(f"{type(self).__name__} makes no objects of its own; call its from_pretrained(folder_or_name).")

    @staticmethod
    def _resolve(folder_or_name: Union[str, Path], weights: bool = False) -> Path:
        from paddlemix.models.llava.hub import resolve, resolve_small

        return resolve(folder_or_name) if weights else resolve_small(folder_or_name)


class AutoConfigMIX(_Auto):
    @classmethod
    def from_pretrained(cls, folder_or_name: Union[str, Path], **overrides) -> Any:
        """The configuration of a checkpoint, in any published layout.

        Args:
            overrides: keys of the configuration with other values than the checkpoint's.

        Raises:
            UserError: an unknown name or ``model_type``, a key that the configuration doesn't have.
        """
        folder = cls._resolve(folder_or_name)
        return _load(_classes(folder).config).from_pretrained(folder, **overrides)


class AutoModelMIX(_Auto):
    @classmethod
    def from_pretrained(
        cls, folder_or_name: Union[str, Path], config: Any = None, dtype: Optional[str] = None, **settings
    ) -> Any:
        """The model of a checkpoint, its weights loaded, ready to answer.

        Args:
            config: instead of the checkpoint's own.
            dtype: float32, float16 or bfloat16; default: the checkpoint's on a GPU, float32 on a CPU.
            settings: what the model's ``from_pretrained`` takes beside these.

        Raises:
            UserError: an unknown name or ``model_type``, half a checkpoint, a tensor that doesn't fit.
        """
        folder = cls._resolve(folder_or_name, weights=True)
        return _load(_classes(folder).model).from_pretrained(folder, config=config, dtype=dtype, **settings)


class AutoProcessorMIX(_Auto):
    @classmethod
    def from_pretrained(
        cls,
        folder_or_name: Union[str, Path],
        text_model_name_or_path: Union[str, Path, None] = None,
        *,
        train: Optional[str] = None,
        eval: Optional[str] = None,
        max_length: Optional[int] = None,
        **settings,
    ) -> Any:
        """The processor of a checkpoint.

        It also unpacks, as the toolkit's scripts do: ``processor, tokenizer = AutoProcessorMIX.from_pretrained(…)``.

        Args:
            text_model_name_or_path: a folder or name to take the tokenizer from, instead of the checkpoint's own.
            train, eval: the toolkit keeps two processors for some models and these choose one; LLaVA has one for both,
                so that training and chat treat a picture alike.
            max_length: written to ``tokenizer.model_max_length``.
            settings: what the model's processor takes, for LLaVA ``config`` and ``image_aspect_ratio``.

        Raises:
            UserError: an unknown name or ``model_type``, a missing or corrupt file, ``train`` and ``eval`` at once, a
                setting that the processor doesn't take.
        """
        if train and eval:
            raise UserError(f"train is {train!r} and eval is {eval!r}; expected one of them, or none.")
        _check_length("max_length", max_length)
        folder = cls._resolve(folder_or_name)
        from_pretrained = _load(_classes(folder).processor).from_pretrained
        parameters = list(inspect.signature(from_pretrained).parameters.values())
        takes = [each.name for each in parameters[1:] if each.kind is not inspect.Parameter.VAR_KEYWORD]
        # what asks for nothing, from callers of Hugging Face, the processor itself lets pass or refuses
        unknown = sorted(set(settings) - {*takes, "use_fast"})
        if unknown:
            raise UserError(
                f"AutoProcessorMIX can't honour {', '.join(unknown)}; it takes text_model_name_or_path, train, eval, "
                f"max_length, {', '.join(takes)}."
            )
        processor = from_pretrained(folder, **settings)
        if text_model_name_or_path is not None:
            processor.tokenizer = AutoTokenizerMIX.from_pretrained(text_model_name_or_path)
        if max_length is not None:
            processor.tokenizer.model_max_length = max_length
        return processor


class AutoTokenizerMIX(_Auto):
    @classmethod
    def from_pretrained(
        cls, folder_or_name: Union[str, Path], *, model_max_length: Optional[int] = None, **settings
    ) -> Any:
        """The tokenizer of a checkpoint; of an adapter without one, its base's.

        Args:
            model_max_length: instead of what the tokenizer's files say.

        Raises:
            UserError: an unknown name, no tokenizer in the folder, a setting that nothing here reads, a length below 1.
        """
        from paddlemix.models.llava.checkpoint import processor_folder
        from paddlemix.processors.tokenizer import load_tokenizer

        if settings:
            raise UserError(
                f"AutoTokenizerMIX can't honour {', '.join(sorted(settings))}; it takes model_max_length. Other settings "
                "are attributes of the tokenizer that it gives."
            )
        _check_length("model_max_length", model_max_length)
        tokenizer = load_tokenizer(processor_folder(cls._resolve(folder_or_name)))
        if model_max_length is not None:
            tokenizer.model_max_length = model_max_length
        return tokenizer

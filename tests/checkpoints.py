"""Folders in the published layouts for tests: the tiny models of fixtures/tiny_models.py, written as their publishers do."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.fixtures import tiny_models as tiny
from tests.support import llama2_tokenizer_folder

# ---- PyTorch's .bin without PyTorch ----


class _Import:
    """A name that the pickle asks for; never called here, only written."""

    def __init__(self, module, name):
        self.module, self.name = module, name

    def __call__(self):
        raise AssertionError


class _Storage:
    def __init__(self, key, array):
        self.key, self.array = key, array


class _Tensor:
    def __init__(self, storage):
        self.storage = storage


class _TorchPickler(pickle._Pickler):
    """Writes what torch.save (2.x) writes: _rebuild_tensor_v2 of storages that are persistent ids."""

    dispatch = dict(pickle._Pickler.dispatch)
    kinds = {"float32": "FloatStorage", "float16": "HalfStorage", "uint16": "BFloat16Storage", "int64": "LongStorage"}

    def persistent_id(self, obj):
        if not isinstance(obj, _Storage):
            return None
        kind = _Import("torch", self.kinds[str(obj.array.dtype)])
        return ("storage", kind, obj.key, "cpu", obj.array.size)

    def save_import(self, obj):
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())

    def save_tensor(self, obj):
        array = obj.storage.array
        strides = tuple(n // array.itemsize for n in array.strides)
        arguments = (obj.storage, 0, tuple(array.shape), strides, False, {})
        self.save_reduce(_Import("torch._utils", "_rebuild_tensor_v2"), arguments, obj=obj)

    dispatch[_Import] = save_import
    dispatch[_Tensor] = save_tensor


def torch_save(tensors, path):
    """A .bin of name -> array (uint16 stands for bfloat16)."""
    storages = {name: _Storage(str(i), np.ascontiguousarray(array)) for i, (name, array) in enumerate(tensors.items())}
    buffer = io.BytesIO()
    _TorchPickler(buffer, protocol=2).dump({name: _Tensor(storage) for name, storage in storages.items()})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue())
        archive.writestr("archive/byteorder", "little")
        for storage in storages.values():
            archive.writestr(f"archive/data/{storage.key}", storage.array.tobytes())
        archive.writestr("archive/version", "3\n")


# ---- files of a checkpoint ----


def write_json(path, values):
    Path(path).write_text(json.dumps(values, indent=2), encoding="utf-8")


def write_tensors(folder, tensors, stem="model", suffix="safetensors", shards=1):
    """One file or several with their index, as Hugging Face, the original release and PaddleNLP name them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}

    def save(part, path):
        if suffix == "safetensors":
            save_file(part, path, metadata={"format": "pt"})
        elif suffix == "bin":
            torch_save(part, path)
        else:
            import paddle

            paddle.save(dict(part), str(path))

    if shards == 1:
        save(tensors, folder / f"{stem}.{suffix}")
        return
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}"
        part = {name: tensors[name] for name in names[i::shards]}
        save(part, folder / file)
        weight_map.update({name: file for name in part})
    size = sum(array.nbytes for array in tensors.values())
    write_json(folder / f"{stem}.{suffix}.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})


def add_image_token(folder):
    """<image> and <pad> after LLaMA-2's pieces, as Hugging Face's LLaVA tokenizers have them."""
    added = {"<image>": tiny.IMAGE_TOKEN, "<pad>": tiny.PAD_TOKEN}
    path = folder / "tokenizer.json"
    if path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        values["added_tokens"] += [{"id": number, "content": token, **flags} for token, number in added.items()]
        path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    write_json(folder / "added_tokens.json", added)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", {**config, "pad_token": "<pad>", "padding_side": "left"})


def write_hugging_face(folder, kind="llava", newer=False, tensors=None, **how):
    """``kind``: llava or llava_next; ``newer``: the names of transformers 4.52 and later."""
    folder = Path(folder)
    tensors = tiny.weights(kind) if tensors is None else tensors
    write_tensors(folder, tiny.newer_names(kind, tensors) if newer else tensors, **how)
    write_json(folder / "config.json", tiny.CONFIGS[kind])
    write_json(folder / "preprocessor_config.json", tiny.PREPROCESSORS[kind])
    llama2_tokenizer_folder(folder, model=False, json_file=True)
    add_image_token(folder)
    return folder


def flat_config(kind, **changes):
    """config.json of the original release and of the toolkit."""
    config = {
        **{key: value for key, value in tiny.TEXT.items() if key != "model_type"},
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "square" if kind == "llava" else "anyres",
        "mm_hidden_size": tiny.VISION["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
    }
    if kind == "llava_next":
        pinpoints = [[width, height] for height, width in tiny.PINPOINTS]
        config.update(mm_patch_merge_type="spatial_unpad", image_grid_pinpoints=pinpoints)
    return {**config, **changes}


def write_clip(folder, tensors, full=True):
    """A CLIP tower of its own, as openai/clip-vit-large-patch14-336 is on the hub: the text tower is in it too."""
    vision = {
        name[len("vision_tower.") :]: array for name, array in tensors.items() if name.startswith("vision_tower.")
    }
    if full:
        vision["text_model.embeddings.token_embedding.weight"] = np.zeros((4, 8), np.float32)
        vision["text_model.encoder.layers.0.self_attn.q_proj.weight"] = np.zeros((8, 8), np.float32)
        vision["vision_model.embeddings.position_ids"] = np.arange(17)[None]
        vision["logit_scale"] = np.float32([2.6])
        vision["visual_projection.weight"] = np.zeros((16, 24), np.float32)
        vision["text_projection.weight"] = np.zeros((16, 8), np.float32)
    write_tensors(folder, vision, stem="pytorch_model", suffix="bin")
    sizes = {key: value for key, value in tiny.VISION.items() if key != "model_type"}
    write_json(folder / "config.json", {"model_type": "clip", "vision_config": sizes} if full else tiny.VISION)
    write_json(folder / "preprocessor_config.json", tiny.PREPROCESSORS["llava"])


def write_original(folder, kind="llava", tower="inside", shards=2, **config):
    """v1.5 with kind llava (two .bin shards, a separate tower), v1.6 with llava_next (safetensors, tower inside).

    ``tower``: "inside", or a folder that gets the CLIP checkpoint and that mm_vision_tower then names.
    """
    folder = Path(folder)
    tensors = tiny.weights(kind)
    renamed = tiny.original_names(tensors)
    if tower != "inside":
        write_clip(Path(tower), tensors)
        config.setdefault("mm_vision_tower", str(tower))
        renamed = {name: array for name, array in renamed.items() if "vision_tower" not in name}
    if kind == "llava":
        renamed["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        write_tensors(folder, renamed, stem="pytorch_model", suffix="bin", shards=shards)
    else:
        write_tensors(folder, renamed, shards=shards)
    config.setdefault("vision_config", tiny.VISION) if tower == "inside" else None
    write_json(folder / "config.json", flat_config(kind, **config))
    write_json(folder / "preprocessor_config.json", tiny.PREPROCESSORS["llava"])
    llama2_tokenizer_folder(folder)
    return folder


def write_toolkit(folder, kind="llava", suffix="pdparams", shards=1, **config):
    folder = Path(folder)
    stem = "model" if suffix == "safetensors" else "model_state"
    write_tensors(folder, tiny.toolkit_names(tiny.weights(kind)), stem=stem, suffix=suffix, shards=shards)
    write_json(folder / "config.json", flat_config(kind, vision_config=tiny.VISION, **config))
    write_json(folder / "preprocessor_config.json", tiny.PREPROCESSORS["llava"])
    llama2_tokenizer_folder(folder)
    return folder

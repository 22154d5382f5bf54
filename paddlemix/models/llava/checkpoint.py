"""Checkpoints: any published layout, told from what its folder holds, becomes the weights of a model, and back.

    name or folder -> folder (hub.py) -> LlavaConfig (published_configs.py)
                                      -> stored tensors (tensor_files.py, unpickling.py) -> our names (layouts.py) -> model

Loading is strict, streams tensor by tensor, and runs no code of the checkpoint's.
"""

import logging
import mmap
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import dropwhile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple, Union

import numpy as np
import paddle

from paddlemix.errors import UserError
from paddlemix.models.llava import layouts, published_configs
from paddlemix.models.llava.adapter_files import config_of, read_adapter
from paddlemix.models.llava.configuration import LlavaConfig
from paddlemix.models.llava.hub import has_tokenizer, local_tower, resolve, resolve_tower
from paddlemix.models.llava.onednn import keep_to_one_thread
from paddlemix.models.llava.tensor_files import (
    FLOAT_DTYPES,
    WEIGHT_FILES,
    FileTensor,
    Source,
    TensorSpec,
    convert,
    empty,
    fill,
    find_weights,
    open_tensor_file,
    open_weights,
    read_json,
    write_json,
    write_weights,
)

__all__ = [
    "collect",
    "load_projector",
    "load_tower",
    "load_weights",
    "lora_base",
    "merge_lora",
    "needed_folders",
    "no_init",
    "processor_folder",
    "read_config",
    "recorded_base",
    "resolve",
    "save_model",
    "save_weights",
    "separate_tower",
    "stored_dtype",
    "with_bases",
]

logger = logging.getLogger(__name__)

MODEL_DTYPES = ("float32", "float16", "bfloat16")
_WORKERS = min(4, os.cpu_count() or 1)


# ---------------------------------------------------------------------------------------------------------------------
# config


def read_config(folder: Union[str, Path], adapter: Optional[Path] = None) -> LlavaConfig:
    """The configuration of a checkpoint in any layout of interface section 4.

    Args:
        adapter: folder of a LoRA adapter that goes over it; its own config.json, if there is one, is read instead,
            since that has the conversation template and image aspect ratio that the adapter was trained with.

    Raises:
        UserError: no config.json, or one that the model can't honour; it names the key and what was expected.
    """
    base = folder = Path(folder)
    if adapter is not None:
        if adapter.resolve() == folder.resolve():
            raise UserError(
                f"{adapter} is named as the model and as the adapter too, so that it would be applied twice; name it once, "
                "as the model, or name the model that it adapts."
            )
        if (adapter / "config.json").is_file():
            folder = adapter
    path = folder / "config.json"
    if not path.is_file():
        recorded = lora_base(folder)
        if recorded is not None:
            return read_config(recorded)
        raise _no_checkpoint(folder)
    raw = read_json(path)
    try:
        kind = published_configs.kind_of(raw, path)
        if kind == "nested":
            pads = published_configs.pads_pictures(folder)
            values = published_configs.read_nested(raw, path, pads, lambda: _has_head(folder))
        else:
            values = published_configs.read_flat(
                raw, path, lambda name: _tower_sizes(name, folder, base), kind == "text"
            )
        ends = published_configs.end_tokens(folder)
        if ends is not None:
            values["eos_token_id"] = ends
        values["conversation_template"] = published_configs.conversation_template(raw, folder)
        return LlavaConfig(**values)
    except UserError as error:
        raise error if str(folder) in str(error) else UserError(f"{path}: {error}") from error
    except (TypeError, ValueError, AttributeError, KeyError, ZeroDivisionError, SyntaxError) as error:
        raise UserError(
            f"{path} holds a value of the wrong kind ({error}); expected the sizes of a LLaVA model."
        ) from error


def _has_head(folder: Path) -> bool:
    return bool(find_weights(folder)) and any(name.endswith("lm_head.weight") for name in open_weights(folder))


def _no_checkpoint(folder: Path) -> UserError:
    inside = published_configs.files_of(folder)
    runs = sorted((name for name in inside if re.fullmatch(r"checkpoint-\d+", name)), key=lambda name: int(name[11:]))
    if runs:
        return UserError(f"{folder} has no config.json of its own; open its last checkpoint, {folder / runs[-1]}.")
    held = f"it holds {', '.join(inside[:6])}" if inside else "it is empty"
    return UserError(
        f"{folder} is no checkpoint ({held}); expected config.json, the tokenizer's files, preprocessor_config.json and "
        f"weights ({', '.join(name for name in WEIGHT_FILES if not name.endswith('.index.json'))})."
    )


def _tower_sizes(name: str, folder: Path, base: Path) -> Dict[str, Any]:
    """Sizes of the CLIP tower of a flat checkpoint without a vision_config of its own.

    Args:
        folder: whose config.json names the tower.
        base: the checkpoint that it goes over, if it is an adapter's.
    """
    hint = published_configs.KNOWN_TOWERS.get(name)
    sizes = _tower_sizes_in(folder, name, hint) or hint
    if sizes is not None:
        return dict(sizes)
    places = _tower_places(with_bases(base), folder)
    for place in places[1:]:
        sizes = _tower_sizes_in(place, name, hint)
        if sizes is not None:
            return sizes
    config = resolve_tower(name, folder, paddle_first=_is_toolkit_folder(places[-1])) / "config.json"
    return published_configs.clip_sizes(read_json(config), config)


def _tower_sizes_in(folder: Path, name: str, hint: Optional[Mapping[str, Any]]) -> Optional[Dict[str, Any]]:
    """The same from what lies there; None if that has no tower."""
    shapes = _tower_shapes(folder)
    if not shapes or not hint or tuple(shapes.get(layouts.TOWER + "class_embedding", ())) != (hint["hidden_size"],):
        place = local_tower(name, folder)
        if place is not None:
            return published_configs.clip_sizes(read_json(place / "config.json"), place / "config.json")
    return published_configs.infer_clip_sizes(shapes, name, folder, hint) if shapes else None


def _tower_places(folders: List[Path], adapter: Optional[Path]) -> List[Path]:
    """Where a CLIP tower may lie: with the config.json that names it first, then with what an adapter goes over.

    Args:
        folders: of :func:`with_bases`.
        adapter: what goes over them, if anything does.
    """
    places = folders if adapter in (None, folders[0]) else [adapter, *folders]
    return list(dropwhile(lambda place: not (place / "config.json").is_file(), places)) or places


def _local_tower(name: str, places: List[Path]) -> Optional[Path]:
    return next((tower for tower in (local_tower(name, place) for place in places) if tower is not None), None)


def _tower_shapes(folder: Path) -> Dict[str, Tuple[int, ...]]:
    """Our name -> stored shape of the vision tower's tensors among a checkpoint's own weights."""
    shapes = {}
    for published, tensor in open_weights(folder).items() if find_weights(folder) else ():
        known, target = layouts.read_name(published)
        if known and target is not None and target.startswith(layouts.TOWER):
            shapes[target] = tuple(tensor.shape)
    return shapes


def separate_tower(folder: Path, config: LlavaConfig, adapter: Optional[Path] = None) -> Optional[Path]:
    """The folder of the CLIP tower that ``mm_vision_tower`` names, if it is on this machine or has to be; None for one inside
    the checkpoint's weights, or one whose pictures are known to be CLIP's.

    Args:
        adapter: folder of a LoRA adapter that goes over the checkpoint; the tower may be with it.
    """
    name, places = config.mm_vision_tower, _tower_places(with_bases(folder), adapter)
    tower = _local_tower(name, places) if name else None
    if tower is not None or not name or name in published_configs.KNOWN_TOWERS or any(map(_tower_shapes, places)):
        return tower
    return resolve_tower(name, places[0], paddle_first=_is_toolkit_folder(places[-1]))


def _is_toolkit_folder(folder: Path) -> bool:
    return bool(find_weights(folder)) and layouts.is_toolkit(open_weights(folder))


# ---------------------------------------------------------------------------------------------------------------------
# what a folder holds, under our names


class Collected(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        sources: our name -> source.
        unknown: published names that no layout knows.
        tower: the same of a vision tower in a folder of its own, and that folder.
    """

    sources: Dict[str, Source]
    unknown: List[str]
    tower: Optional[Tuple[Dict[str, Source], List[str], Path]] = None

    @property
    def everything(self) -> Dict[str, Source]:
        """Sources of all parts."""
        return {**self.sources, **(self.tower[0] if self.tower else {})}

    def without(self, names: Set[str]) -> "Collected":
        """The same without the tensors of these names."""

        def kept(sources: Dict[str, Source]) -> Dict[str, Source]:
            return {name: source for name, source in sources.items() if name not in names}

        tower = (kept(self.tower[0]), *self.tower[1:]) if self.tower else None
        return Collected(kept(self.sources), self.unknown, tower)

    def check(self, expected: Mapping[str, Tuple[int, ...]], config: LlavaConfig, folder: Path) -> None:
        """Holds each folder against what the model needs of it, as :func:`check` does."""
        if self.tower is not None:
            check(
                {name: expected[name] for name in expected if name.startswith(layouts.TOWER)},
                *self.tower[:2],
                config,
                self.tower[2],
            )
            expected = {name: shape for name, shape in expected.items() if not name.startswith(layouts.TOWER)}
        check(expected, self.sources, self.unknown, config, folder)


def collect(folder: Path, config: LlavaConfig, tower_places: Sequence[Path] = ()) -> Collected:
    """Every tensor of a checkpoint, its tower included.

    Tensors that LLaVA never uses (rotary tables, the text tower of a full CLIP, …) are left out.

    Args:
        tower_places: where a tower of its own may lie, the folder whose config.json names it first; default ``folder``.
    """
    places = list(tower_places) or [folder]
    tensors = open_weights(folder)
    toolkit = layouts.is_toolkit(tensors)
    sources: Dict[str, Source] = {}
    unknown: List[str] = []
    for published, tensor in tensors.items():
        known, place = layouts.place_in(published, toolkit)
        if not known:
            unknown.append(published)
        elif place.name is not None:
            _put(sources, place.name, Source(tensor, published, place.transpose), folder)
    has_tower = any(name.startswith(layouts.TOWER) for name in sources)
    if config.vision is not None and not has_tower:
        if not config.mm_vision_tower:
            raise UserError(
                f"{folder} has no vision tower inside, and {places[0] / 'config.json'} no mm_vision_tower that names one."
            )
        tower = _local_tower(config.mm_vision_tower, places)
        tower = tower or resolve_tower(config.mm_vision_tower, places[0], paddle_first=toolkit)
        return Collected(sources, unknown, (*collect_tower(tower), tower))
    return Collected(sources, unknown)


def collect_tower(folder: Path) -> Tuple[Dict[str, Source], List[str]]:
    """The same for the folder of a CLIP tower alone, PaddleNLP's or Hugging Face's."""
    tensors = open_weights(folder)
    paddle_names = layouts.is_paddle_tower(tensors)
    sources: Dict[str, Source] = {}
    unknown: List[str] = []
    for published, tensor in tensors.items():
        known, target = layouts.read_tower_name(published)
        if not known:
            unknown.append(published)
        elif target is not None:
            transpose = layouts.is_linear(target) and not paddle_names
            _put(sources, target, Source(tensor, published, transpose), folder)
    if not sources:
        raise UserError(f"{folder} holds no CLIP vision tower ({', '.join(unknown[:3])}, …); expected CLIP's ViT.")
    return sources, unknown


def _put(sources: Dict[str, Source], name: str, source: Source, folder: Path) -> None:
    if name in sources:
        raise UserError(f"{folder} holds {source.published} and {sources[name].published}, which are the same tensor.")
    sources[name] = source


def _never_used(name: str, published: str, config: LlavaConfig, folder: Path) -> bool:
    """Whether a tensor that the model hasn't is one that LLaVA's forward never reaches."""
    if name == layouts.HEAD:
        return config.tie_word_embeddings
    if name == layouts.NEWLINE:
        # the toolkit's class makes one always; where config.json has no merge type, nothing reads it
        unread = "unpad" not in config.mm_patch_merge_type
        return unread and published == name and "mm_patch_merge_type" not in read_json(folder / "config.json")
    if not name.startswith(layouts.TOWER) or config.vision is None:
        return False
    layer = re.match(r"transformer\.layers\.(\d+)\.", name[len(layouts.TOWER) :])
    if layer is not None:
        return int(layer.group(1)) < config.vision.num_hidden_layers  # after the selected one, so not built
    return name[len(layouts.TOWER) :].startswith("ln_post.")


def _some(names: List[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def check(
    expected: Mapping[str, Tuple[int, ...]],
    sources: Mapping[str, Source],
    unknown: List[str],
    config: LlavaConfig,
    folder: Path,
) -> None:
    """Holds what a folder has against what the model needs.

    Args:
        expected: our name -> shape.

    Raises:
        UserError: a tensor is missing, unexpected, wrongly shaped, or holds no floating-point numbers.
    """
    published = {name: source.published for name, source in sources.items()}
    unexpected = unknown + [
        theirs
        for name, theirs in published.items()
        if name not in expected and not _never_used(name, theirs, config, folder)
    ]
    absent, missing = [name for name in expected if name not in sources], []
    for name in absent:
        theirs = layouts.name_beside(name, published)
        missing.append(theirs if theirs == name else f"{theirs} (here {name})")
    problems = []
    if missing:
        hint, projector = "", (layouts.PROJECTOR, layouts.NEWLINE)
        if all(name.startswith(projector) for name in absent) and not any(
            name.startswith(projector) for name in sources
        ):
            hint = " (the projector: fine-tuning makes a new one with tune_mm_mlp_adapter, or reads pretrain_mm_mlp_adapter)"
        problems.append(f"lacks {len(missing)} tensor(s) that its config.json needs: {_some(missing)}{hint}")
    if unexpected:
        towerless = config.vision is None and any(name.startswith(layouts.PROJECTOR) for name in sources)
        hint = " (mm_vision_tower is missing there, which names the vision tower)" if towerless else ""
        problems.append(
            f"has {len(unexpected)} tensor(s) that its config.json has no place for: {_some(unexpected)}{hint}"
        )
    wrong = [name for name in expected if name in sources and tuple(sources[name].shape) != tuple(expected[name])]
    if wrong:
        each = [
            f"{sources[name].published} is {list(sources[name].tensor.shape)}, expected "
            f"{list(expected[name][::-1] if sources[name].transpose else expected[name])}"
            for name in sorted(wrong)[:5]
        ]
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        problems.append(f"has {len(wrong)} tensor(s) of another shape: {'; '.join(each)}{more}")
    integers = [name for name in expected if name in sources and sources[name].tensor.dtype not in FLOAT_DTYPES]
    if integers and not problems:
        found = ", ".join(f"{sources[name].published} is {sources[name].tensor.dtype}" for name in integers[:3])
        problems.append(f"has {len(integers)} tensor(s) that hold no floating-point numbers ({found})")
    if problems:
        raise UserError(f"{folder} does not fit the model: it {', and it '.join(problems)}.")


# ---------------------------------------------------------------------------------------------------------------------
# into the model


@contextmanager
def no_init(dtype: str = "float32") -> Iterator[None]:
    """Layers built inside have parameters of ``dtype`` without memory and without values; ``load_weights`` gives both."""
    from paddlenlp.transformers.model_utils import no_init_weights

    before = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        with paddle.LazyGuard(), no_init_weights():
            yield
    finally:
        paddle.set_default_dtype(before)


def assign(parameter: paddle.Tensor, values: np.ndarray) -> None:
    """Makes ``values`` (bfloat16 as uint16 bits) the numbers of a parameter; on a CPU without a copy."""
    place = paddle.framework._current_expected_place()
    parameter.get_tensor().set(values, place, place.is_cpu_place())


def _dtype_of(parameter: paddle.Tensor) -> str:
    return str(parameter.dtype).replace("paddle.", "")


def _stream(parameters: Mapping[str, paddle.Tensor], sources: Mapping[str, Source]) -> None:
    """Reads, converts and assigns the parameters one after another; a few at a time are under way in threads.

    On a CPU a large tensor that lies in its file as the model has it is mapped, not read.
    """
    on_cpu = paddle.framework._current_expected_place().is_cpu_place()
    maps: Dict[Path, mmap.mmap] = {}

    def load(name: str) -> np.ndarray:
        parameter, source = parameters[name], sources[name]
        values = empty(tuple(parameter.shape), _dtype_of(parameter))
        fill(values, _dtype_of(parameter), source.tensor, source.transpose)
        return values

    copied = []
    for name, parameter in parameters.items():
        source, values = sources[name], None
        if on_cpu and isinstance(source.tensor, FileTensor) and not source.transpose:
            if source.tensor.dtype == _dtype_of(parameter):
                values = source.tensor.map(maps)
        if values is None:
            copied.append(name)
        else:
            assign(parameter, values)
    with ThreadPoolExecutor(_WORKERS, initializer=keep_to_one_thread) as pool:
        pending = [pool.submit(load, name) for name in copied[: 2 * _WORKERS]]
        for i, name in enumerate(copied):
            assign(parameters[name], pending.pop(0).result())
            if i + 2 * _WORKERS < len(copied):
                pending.append(pool.submit(load, copied[i + 2 * _WORKERS]))


def load_weights(
    model: paddle.nn.Layer,
    folder: Union[str, Path],
    dtype: Optional[str] = None,
    new_projector: bool = False,
    adapter: Optional[Path] = None,
) -> None:
    """Fills a model, built under :func:`no_init` or not, from a checkpoint in any layout.

    A LoRA folder's base is loaded and the adapter added to it. Peak memory is that of the weights in the model's dtype
    plus some megabytes. On a CPU, large tensors of our own layout stay in the file until they are used
    (:meth:`FileTensor.map`).

    Args:
        model: LlavaLlamaForCausalLM of the folder's config.
        dtype: what the parameters are expected to be; they keep the dtype that they were built with.
        new_projector: a folder without any projector will do, such as a language model whose config.json names a tower:
            the projector then begins with random weights, which training is to align.
        adapter: a LoRA adapter to add. What it brings whole, such as the projector, ``folder`` may lack.

    Raises:
        UserError: half a checkpoint, or a tensor that is missing, unexpected or wrongly shaped.
    """
    adapters = [] if adapter is None else [adapter]
    folders = with_bases(Path(folder))
    adapters += folders[:-1]  # the first of them goes over all others
    brought = {name for each in adapters for name in read_adapter(each).whole}
    _load_whole(model, folders[-1], new_projector, brought, _tower_places(folders, adapter))
    for each in reversed(adapters):
        merge_lora(model, each)


def _load_whole(
    model: paddle.nn.Layer, folder: Path, new_projector: bool, brought: Set[str], tower_places: List[Path]
) -> None:
    """Without adapters, and without the tensors ``brought`` by one."""
    if not find_weights(folder):
        if not (folder / "config.json").is_file():
            raise _no_checkpoint(folder)
        raise UserError(f"{folder} has a config.json but no weights; expected one of {', '.join(WEIGHT_FILES)}.")
    parameters = {name: parameter for name, parameter in model.named_parameters() if name not in brought}
    held = collect(folder, model.config, tower_places).without(brought)
    sources = held.everything
    if new_projector and not any(name.startswith(layouts.PROJECTOR) for name in sources):
        for name in [name for name in parameters if name.startswith((layouts.PROJECTOR, layouts.NEWLINE))]:
            if name not in sources:
                _draw(parameters.pop(name), name, model.config.initializer_range)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    held.check(shapes, model.config, folder)
    _stream(parameters, sources)


def _draw(parameter: paddle.Tensor, name: str, deviation: float) -> None:
    """Gives a parameter its first value: zero for a bias, else normal numbers, the same each time."""
    random = np.random.default_rng([ord(letter) for letter in name])
    shape = tuple(parameter.shape)
    drawn = np.zeros(shape) if name.endswith(".bias") else random.normal(0.0, deviation, shape)
    values = empty(shape, _dtype_of(parameter))
    convert(drawn.astype(np.float32), "float32", _dtype_of(parameter), out=values)
    assign(parameter, values)


def load_tower(model: paddle.nn.Layer, name_or_folder: Union[str, Path]) -> None:
    """Fills the vision tower of a model from a CLIP checkpoint of its own (folder or name)."""
    folder = resolve(name_or_folder)
    sources, unknown = collect_tower(folder)
    parameters = {name: p for name, p in model.named_parameters() if name.startswith(layouts.TOWER)}
    check({name: tuple(p.shape) for name, p in parameters.items()}, sources, unknown, model.config, folder)
    _stream(parameters, sources)


# The last two are what was trained beside an adapter, here and with PEFT.
PROJECTOR_FILES = (
    *("mm_projector.safetensors", "mm_projector.bin", "mm_projector.pdparams"),
    *("non_lora_state.safetensors", "non_lora_trainables.bin"),
)


def load_projector(model: paddle.nn.Layer, path: Union[str, Path]) -> None:
    """Fills the projector from a file of its own (``pretrain_mm_mlp_adapter``).

    Takes the original release's ``mm_projector.bin`` (``model.mm_projector.0.weight``), the toolkit's, and this
    project's; a folder with such a file or with a whole checkpoint too. ``image_newline`` is taken if the model has it.
    """
    path = Path(os.path.expanduser(path))
    if path.is_dir():
        found = [path / name for name in PROJECTOR_FILES]
        tensors = next((open_tensor_file(file) for file in found if file.is_file()), None) or open_weights(path)
    elif path.is_file():
        tensors = open_tensor_file(path)
    else:
        raise UserError(f"There is no projector at {path}; expected mm_projector.bin (pretrain_mm_mlp_adapter).")
    toolkit = layouts.is_toolkit(tensors) or path.suffix == ".pdparams"
    parts = (layouts.PROJECTOR, layouts.NEWLINE)
    sources: Dict[str, Source] = {}
    for published, tensor in tensors.items():
        # DeepSpeed and PEFT put prefixes of their own before the original's names
        match = re.search(
            r"(?:(?:llama|model)\.)?(?:mm_projector\..*|multi_modal_projector\..*|image_newline)$", published
        )
        name = match.group(0) if match else published
        name = "model." + name if name.startswith(("mm_projector.", "image_newline")) else name
        known, place = layouts.place_in(name, toolkit)
        if known and place.name is not None and place.name.startswith(parts):
            _put(sources, place.name, Source(tensor, published, place.transpose), path)
    parameters = {name: p for name, p in model.named_parameters() if name.startswith(parts)}
    parameters = {name: p for name, p in parameters.items() if name != layouts.NEWLINE or name in sources}
    if not sources:
        raise UserError(f"{path} holds no projector; expected tensors such as model.mm_projector.0.weight.")
    sources = {name: source for name, source in sources.items() if name != layouts.NEWLINE or name in parameters}
    check({name: tuple(p.shape) for name, p in parameters.items()}, sources, [], model.config, path)
    _stream(parameters, sources)


# ---------------------------------------------------------------------------------------------------------------------
# LoRA


def lora_base(folder: Path) -> Optional[Path]:
    """The folder of the base that a LoRA output records, or None if ``folder`` is no LoRA output.

    A LoRA output has lora_config.json (PEFT's: adapter_config.json) with ``base_model_name_or_path`` and the adapter's
    weights; one that was merged has whole weights too, and then needs no base.

    Raises:
        UserError: a base that isn't there, or adapters that name each other.
    """
    return (with_bases(Path(folder)) + [None])[1]


def with_bases(folder: Path) -> List[Path]:
    """A checkpoint; of an adapter also what it adapts, and so on.

    Raises:
        UserError: as :func:`lora_base`.
    """
    folders, base = [folder], _base_needed(folder)
    while base is not None:
        if base.resolve() in [each.resolve() for each in folders]:
            raise UserError(f"{folder} adapts itself by way of {base}; set base_model_name_or_path to a whole model.")
        folders.append(base)
        base = _base_needed(base)
    return folders


def needed_folders(folder: Path, config: LlavaConfig, adapter: Optional[Path] = None) -> List[Path]:
    """Folders that a checkpoint can't be opened without: its own, those of an adapter's bases, and of a CLIP tower.

    Args:
        adapter: folder of a LoRA adapter that goes over it; the tower may be with it.
    """
    folders, name = with_bases(folder), config.mm_vision_tower
    places = [*folders, *([] if adapter is None else [adapter])]
    towers = [local_tower(name, each) for each in places] if name else []
    return [*folders, *(tower for tower in towers if tower is not None)]


def processor_folder(folder: Path) -> Path:
    """Where tokenizer and image processor are: an adapter that has none leaves them to its base."""
    return next((each for each in with_bases(folder) if has_tokenizer(each)), folder)


def stored_dtype(folder: Path) -> str:
    """The dtype that most of a checkpoint's numbers have, an adapter's of its base; float32 where no model can have it."""
    sizes = dict.fromkeys(MODEL_DTYPES, 0)
    for tensor in open_weights(with_bases(folder)[-1]).values():
        if tensor.dtype in sizes:
            sizes[tensor.dtype] += tensor.size
    return max(sizes, key=lambda dtype: sizes[dtype])


def _base_needed(folder: Path) -> Optional[Path]:
    """None too for an adapter that was merged into its own folder."""
    return None if config_of(folder) is None or find_weights(folder) else recorded_base(folder)


def recorded_base(folder: Path) -> Path:
    """What ``base_model_name_or_path`` of an adapter names: a folder beside it, a path, or a model's name.

    Raises:
        UserError: none is recorded, or it isn't there.
    """
    path = config_of(folder)
    recorded = read_json(path).get("base_model_name_or_path")
    if not recorded:
        raise UserError(f"{path} doesn't say which model it adapts; set base_model_name_or_path there.")
    beside = folder / str(recorded)
    try:
        base = beside if beside.is_dir() else resolve(str(recorded))
    except UserError as error:
        raise UserError(
            f"{folder} adapts {recorded}, which can't be opened ({str(error).rstrip('.')}); set base_model_name_or_path in "
            f"{path}."
        ) from error
    if base.resolve() == folder.resolve():
        raise UserError(f"{path} names its own folder as base_model_name_or_path; set it to the model that it adapts.")
    return base


def merge_lora(model: paddle.nn.Layer, folder: Union[str, Path]) -> None:
    """Adds an adapter to a model's weights: W += scaling · A·B (Hu et al., 2021), and replaces what else was trained.

    ``scaling`` is lora_alpha / r, or lora_alpha / sqrt(r) with rslora (Kalajdzievski, 2023). A is [in, r], B [r, out].

    Args:
        folder: this project's, PaddleNLP's or PEFT's; :mod:`adapter_files` says what each holds.

    Raises:
        UserError: half an adapter, one of another model, or a variant of LoRA that can't be merged.
    """
    folder = Path(folder)
    adapter = read_adapter(folder)
    parameters = dict(model.named_parameters())
    tied = {"llama.embed_tokens.weight", layouts.HEAD} & set(adapter.pairs) if model.config.tie_word_embeddings else ()
    if tied:
        raise UserError(
            f"{folder} adapts {_some(list(tied))}, but the embeddings and the head of this model are one tensor "
            "(tie_word_embeddings); expected an adapter of other layers."
        )

    def used(name: str) -> bool:
        return name in parameters or not (
            name.startswith(layouts.TOWER) and _never_used(name, name, model.config, folder)
        )

    pairs = {name: pair for name, pair in adapter.pairs.items() if used(name)}
    whole = {name: source for name, source in adapter.whole.items() if used(name)}
    problems = [name for name in (*pairs, *whole) if name not in parameters]
    if problems:
        raise UserError(f"{folder} adapts {_some(problems)}, which the model hasn't; it belongs to another base.")
    for name, pair in pairs.items():
        shape = tuple(parameters[name].shape)
        expected = ((shape[0], adapter.rank), (adapter.rank, shape[-1]))
        if len(shape) != 2 or (pair.A.shape, pair.B.shape) != expected:
            raise UserError(
                f"{folder} adapts {name} {list(shape)} with A {list(pair.A.shape)} and B {list(pair.B.shape)}; expected "
                f"{list(expected[0])} and {list(expected[1])}."
            )
    check({name: tuple(parameters[name].shape) for name in whole}, whole, [], model.config, folder)
    _stream({name: parameters[name] for name in whole}, whole)
    for name, source in whole.items():
        dtype = _dtype_of(parameters[name])
        _check_finite(read_values(parameters[name]), dtype, f"{folder} brings {source.published}")
    for name, pair in pairs.items():
        dtype = _dtype_of(parameters[name])
        values = empty(tuple(parameters[name].shape), dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # it is said below
            product = _float32(pair.A) @ _float32(pair.B)
            product *= np.float32(adapter.scaling)
            product += convert(read_values(parameters[name]), dtype, "float32")
            convert(product, "float32", dtype, out=values)
        made = f"{folder} adds {pair.A.published} and {pair.B.published} to {name} of the base"
        _check_finite(values, dtype, made)
        assign(parameters[name], values)


def _check_finite(values: np.ndarray, dtype: str, made: str) -> None:
    if not np.isfinite(convert(values, dtype, "float32")).all():
        raise UserError(
            f"{made}, which gives NaN or infinities in {dtype}; expected finite numbers: look at these tensors and "
            "at lora_alpha, or take a wider dtype."
        )


def _float32(source: Source) -> np.ndarray:
    values = convert(source.tensor.read(), source.tensor.dtype, "float32")
    return values.T if source.transpose else values


# ---------------------------------------------------------------------------------------------------------------------
# out of the model


def read_values(tensor: Any) -> np.ndarray:
    """A parameter's numbers as an array, bfloat16 as uint16 bits."""
    return np.asarray(tensor.numpy() if isinstance(tensor, paddle.Tensor) else tensor)


def save_weights(
    model_or_state: Union[paddle.nn.Layer, Mapping[str, Any]], folder: Union[str, Path], max_shard_bytes: int = 5 << 30
) -> List[Path]:
    """Writes the parameters to safetensors under our names, tensor by tensor; returns the files.

    Each file is written aside and renamed. Above ``max_shard_bytes`` there are several and an index.

    Args:
        model_or_state: a layer, or name -> tensor.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = model_or_state
    if isinstance(state, paddle.nn.Layer):
        state = dict(state.named_parameters())
    specs = {}
    for name, tensor in state.items():
        dtype = _dtype_of(tensor) if isinstance(tensor, paddle.Tensor) else str(np.asarray(tensor).dtype)
        specs[name] = TensorSpec("bfloat16" if dtype == "uint16" else dtype, tuple(int(n) for n in tensor.shape))
    return write_weights(folder, specs, lambda name: read_values(state[name]), max_shard_bytes)


def save_model(
    model: paddle.nn.Layer,
    folder: Union[str, Path],
    state_dict: Optional[Mapping[str, Any]] = None,
    max_shard_size: Union[int, str] = "5GB",
) -> None:
    """Writes weights, generation_config.json and config.json, in that order: a folder with config.json is whole.

    Raises:
        UserError: the folder is a file, or adapters are in the model still.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"{folder} is a file; expected a folder to save the model in.")
    state = _without_empty_biases(state_dict if state_dict is not None else dict(model.named_parameters()))
    adapter = next((name for name in state if name.endswith(".lora_A")), None)
    if adapter is not None:
        raise UserError(
            f"the model holds adapters ({adapter}); save them by LoRAModel's save_pretrained, or call its merge() and "
            "restore_original_model() before."
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(state, folder, shard_bytes(max_shard_size))
    write_json(folder / "generation_config.json", model.generation_config.to_diff_dict())
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(str(folder))


def _without_empty_biases(state: Mapping[str, Any]) -> Dict[str, Any]:
    """Without the zeros that PaddleNLP's LoRAModel gives as a bias to layers without one when it takes adapters out."""
    return {
        name: tensor
        for name, tensor in state.items()
        if layouts.read_name(name)[0]
        or not (name.endswith("_proj.bias") and layouts.read_name(name[: -len("bias")] + "weight")[0])
        or np.any(read_values(tensor))
    }


def shard_bytes(size: Union[int, str]) -> int:
    """
    >>> shard_bytes("5GB")
    5000000000
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|KIB|MIB|GIB)?", str(size).strip().upper())
    if match is None or float(match.group(1)) <= 0:
        raise UserError(f"max_shard_size is {size!r}; expected a number of bytes, or such as 500MB or 5GB.")
    units: Dict[Optional[str], int] = {
        None: 1,
        "KB": 10**3,
        "MB": 10**6,
        "GB": 10**9,
        "KIB": 1 << 10,
        "MIB": 1 << 20,
        "GIB": 1 << 30,
    }
    return max(1, round(float(match.group(1)) * units[match.group(2)]))

"""A name becomes a folder: PaddleNLP's model store, the Hugging Face hub, a GGUF file, or the built-in model.

Only the clients of the stores themselves download; here is chosen which files, and said what to do without a network.
"""

import hashlib
import http.client
import json
import logging
import os
import re
from pathlib import Path
from textwrap import shorten
from typing import Callable, Iterable, Iterator, List, Optional, Union

from paddlemix.errors import UNWRITABLE, UserError
from paddlemix.models.llava.adapter_files import ADAPTER_FILES, config_of
from paddlemix.models.llava.tensor_files import WEIGHT_FILES, find_weights, read_json, write_json

__all__ = ["DEFAULT_MODEL", "cache_home", "resolve", "resolve_small", "resolve_tower"]

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "paddlemix/llava-smol-demo"

# A tokenizer is in one of these; the last is what PaddleNLP calls a tokenizer.model.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "sentencepiece.bpe.model")
# What a checkpoint consists of beside its weights; only config.json must be there.
SMALL_FILES = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *(*TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja", "lora_config.json"),
    "adapter_config.json",
)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+){1,2}")
_TIMEOUT_SECONDS = 10
# written beside the files of PaddleNLP's store once all are there: its client can't list what a model consists of
_COMPLETE = "paddlemix_download.json"


def cache_home() -> Path:
    """Where this package keeps what it makes: ``PPMIX_HOME``, default ``~/.paddlemix``."""
    return Path(os.path.expanduser(os.environ.get("PPMIX_HOME") or Path.home() / ".paddlemix"))


def resolve(name_or_folder: Union[str, Path], weights: bool = True) -> Path:
    """The folder of a checkpoint.

    Args:
        name_or_folder: a folder; a ``.gguf`` file (its decoder is converted once, into the cache); the built-in model's
            name; ``paddlemix/…`` from PaddleNLP's store (``PPNLP_ENDPOINT``, ``PPNLP_HOME``); any other ``org/name``
            from the Hugging Face hub (``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ``HF_HOME``).
        weights: whether they have to be there; without them, what is to be fetched is small.

    Raises:
        UserError: nothing of that name, or no network; it says which files to put where.
    """
    if not isinstance(name_or_folder, (str, os.PathLike)) or not os.fspath(name_or_folder).strip():
        held = "empty" if isinstance(name_or_folder, str) else repr(name_or_folder)
        raise UserError(f"The model's name is {held}; expected a folder, or a name such as {DEFAULT_MODEL}.")
    text = os.fspath(name_or_folder)
    path = Path(os.path.expanduser(text))
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        raise UserError(f"The model's name {text[:60]!r}… is neither a folder nor a name ({error.strerror}).") from None
    if is_folder:
        return path
    if is_file:
        if path.suffix == ".gguf":
            return _converted_gguf(path)
        raise UserError(f"{path} is a file; expected the folder of a checkpoint, a .gguf file, or a model's name.")
    if text.strip("/") == DEFAULT_MODEL:
        from paddlemix.models.llava.demo import assemble

        return Path(assemble())
    if path.is_absolute() or text.startswith((".", "~")) or not _NAME.fullmatch(text.rstrip("/")):
        raise UserError(
            f"There is no folder {text!r}; expected the folder of a checkpoint, or a name such as "
            f"paddlemix/llava/llava-v1.5-7b, llava-hf/llava-1.5-7b-hf or {DEFAULT_MODEL}."
        )
    name = text.rstrip("/")
    if name.startswith("paddlemix/"):
        return _from_paddle(_paddle_names(name), weights)
    return _from_hugging_face(name, weights)


def resolve_small(name_or_folder: Union[str, Path]) -> Path:
    """The folder of a checkpoint whose config, tokenizer or image processor is wanted: weights are fetched only where those
    can't be read without them.

    Raises:
        UserError: as :func:`resolve`.
    """
    folder = resolve(name_or_folder, weights=False)
    return resolve(name_or_folder) if config_of(folder) is not None or _needs_weights(folder) else folder


def _needs_weights(folder: Path) -> bool:
    """Whether only the weights say how large the model's vision tower is, what its pictures are, or whether it has a head."""
    from paddlemix.models.llava.published_configs import KNOWN_TOWERS

    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    tower, text = config.get("mm_vision_tower"), config.get("text_config")
    preprocessor = folder / "preprocessor_config.json"
    if not isinstance(tower, (str, type(None))):
        return False  # reading the config says so
    if tower and tower not in KNOWN_TOWERS:
        return not (config.get("vision_config") and preprocessor.is_file())
    if tower and not config.get("vision_config") and preprocessor.is_file():
        crop = read_json(preprocessor).get("crop_size")
        crop = crop.get("height") if isinstance(crop, dict) else crop
        if crop not in (None, KNOWN_TOWERS[tower]["image_size"]):  # a tower of another size under a known name
            return True
    return isinstance(text, dict) and bool(config.get("tie_word_embeddings")) and "tie_word_embeddings" not in text


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer is in a folder, whatever its kind."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def local_tower(name: str, checkpoint: Path) -> Optional[Path]:
    """A CLIP tower inside the checkpoint, beside it, or at the path ``name``; None if there is none."""
    base = name.rstrip("/").split("/")[-1]
    inside = [checkpoint / "vision_tower", checkpoint / base, checkpoint / name]
    for place in (*inside, checkpoint.parent / base, Path(os.path.expanduser(name))):
        if place != checkpoint and (place / "config.json").is_file():
            return place
    return None


def resolve_tower(name: str, checkpoint: Path, paddle_first: bool) -> Path:
    """The folder of the CLIP tower that ``mm_vision_tower`` names.

    Looked for inside the checkpoint, beside it, as a path, and then in the stores.

    Args:
        checkpoint: the folder whose config.json names the tower.
        paddle_first: ask PaddleNLP's store before the Hugging Face hub (the toolkit's checkpoints).
    """
    place = local_tower(name, checkpoint)
    if place is not None:
        return place
    base = name.rstrip("/").split("/")[-1]
    if Path(name).is_absolute() or name.startswith((".", "~")) or not _NAME.fullmatch(name):
        raise UserError(
            f"mm_vision_tower of {checkpoint} is {name!r} and there is no such folder; put the CLIP tower's config.json and "
            f"weights into {checkpoint / base}, or set mm_vision_tower in config.json."
        )
    stores = [lambda: _from_paddle([name]), lambda: _from_hugging_face(name)]
    problems = []
    for store in stores if paddle_first else stores[::-1]:
        try:
            return store()
        except UserError as error:
            problems.append(error)
    raise UserError(
        f"{checkpoint} has no vision tower inside and {name}, which its mm_vision_tower names, can't be fetched; put the "
        f"tower's config.json and weights ({_weight_choice()}) into {checkpoint / base}."
    ) from problems[0]


def _weight_choice() -> str:
    return " or ".join(name for name in WEIGHT_FILES if not name.endswith(".index.json"))


def _unreachable(
    name: str, store: str, folder: Path, reason: str, remedy: str = "check the name and the network"
) -> UserError:
    return UserError(
        f"{name} can't be fetched from {store} ({reason}); {remedy}, or put config.json, the "
        f"tokenizer's files, preprocessor_config.json and the weights ({_weight_choice()}, with their index if sharded) "
        f"into {folder} and use that folder."
    )


def _failed(error: Exception, name: str, store: str, folder: Path, cache: Path, variable: str) -> UserError:
    """What a download's error means to the user.

    Args:
        folder: where a copy by hand goes.
        cache: what was written to, which ``variable`` of the environment names.
    """
    remedy = {}
    if any(getattr(cause, "errno", None) in UNWRITABLE for cause in _causes(error)):
        remedy["remedy"] = f"look at the room and the rights of {cache}, or name another place by {variable}"
    elif _status(error) in (401, 403) and variable == "HF_HOME":
        remedy["remedy"] = "check the name, or, if it is private or gated, accept its terms and set HF_TOKEN"
    return _unreachable(name, store, folder, _reason(error), **remedy)


# ---------------------------------------------------------------------------------------------------------------------
# PaddleNLP's model store


def _paddle_names(name: str) -> List[str]:
    """What the store may hold a model as: the toolkit wrote ``paddlemix/llava-v1.5-7b`` first and
    ``paddlemix/llava/llava-v1.5-7b`` later, and ``llava-v1.6-7b`` in its text for the ``llava-v1.6-vicuna-7b`` of its commands."""
    parts = name.split("/")
    if len(parts) == 2 and parts[1].startswith("llava"):
        names = [f"paddlemix/llava/{parts[1]}", name]
    elif len(parts) == 3 and parts[1] == "llava":
        names = [name, f"paddlemix/{parts[2]}"]
    else:
        return [name]
    if parts[-1] in ("llava-v1.6-7b", "llava-v1.6-13b"):
        names += [other.replace("v1.6-", "v1.6-vicuna-") for other in names]
    return names


def _paddle_cache() -> Path:
    home = os.environ.get("PPNLP_HOME")
    return Path(os.path.expanduser(home if home else Path.home() / ".paddlenlp")) / "models"


def _from_paddle(names: List[str], weights: bool = True) -> Path:
    cache, store = _paddle_cache(), "PaddleNLP's model store"
    for name in names:
        if _is_complete(cache / name, weights):
            return cache / name
    for name in names:
        if _put_there_by_hand(cache / name):
            return cache / name
    problem = None
    for name in names:
        try:
            if _fetch_from_paddle(name, cache, weights):
                return cache / name
        except UserError:
            raise
        except (OSError, ValueError) as error:  # what PaddleNLP's and requests' errors derive from
            problem = error
            if _status(error) != 403:  # which an object store may mean by "not here"
                break
    if problem is not None:
        raise _failed(problem, names[0], store, cache / names[0], cache, "PPNLP_HOME") from problem
    raise _unreachable(names[0], store, cache / names[0], "no such model there")


def _fetch_from_paddle(name: str, cache: Path, weights: bool) -> bool:
    """Downloads all files of a model that the store has; False if it has no such model."""
    from paddlenlp.utils.download.bos_download import bos_url, get_bos_file_metadata

    endpoint = os.environ.get("PPNLP_ENDPOINT")
    endpoint = endpoint and endpoint.rstrip("/")

    def fetch(file: str) -> Optional[Path]:
        place = cache / name / file
        if place.is_file():
            return place
        try:
            size = get_bos_file_metadata(bos_url(name, file, endpoint=endpoint)).size
        except OSError as error:
            # Anything but 404 may be over in a minute, and says nothing about whether the file is there. But an object
            # store that lists nothing answers 403 for what it hasn't got.
            if _status(error) == 404 or (_status(error) == 403 and file != "config.json"):
                return None
            raise
        _download_from_paddle(name, file, cache, endpoint, size)
        return place

    files = _fetch_known(name, "PaddleNLP's model store", fetch, weights)
    if files and (not weights or {*WEIGHT_FILES, *ADAPTER_FILES} & set(files)):
        write_json(cache / name / _COMPLETE, {"files": files, "weights": weights})
    return bool(files)


def _download_from_paddle(name: str, file: str, cache: Path, endpoint: Optional[str], size: Optional[int]) -> None:
    """Fetches one file into the cache; what an earlier try has left is taken up.

    Args:
        size: what the store says of the file, in bytes; None if it doesn't.

    Raises:
        OSError: whatever the network or the disk has done; a file of another size than ``size`` is removed.
    """
    from paddlenlp.utils.download.bos_download import bos_download

    place = cache / name / file
    begun = place.with_name(f"{file}.incomplete")  # PaddleNLP's
    for attempt in range(2):
        resumed = begun.is_file()
        try:
            bos_download(name, file, cache_dir=str(cache), endpoint=endpoint, resume_download=True)
        except OSError as error:
            if _status(error) != 416 or attempt:  # all of it was there already
                raise
            begun.unlink(missing_ok=True)
            continue
        if size is None or place.stat().st_size == size:
            return
        found = place.stat().st_size
        place.unlink()
        if not resumed:  # else the server may not know how to go on, and sent all of it once more
            raise OSError(f"{file} came with {found} bytes of {size}")
    raise OSError(f"{file} came with another size than {size} bytes")


def _fetch_known(name: str, store: str, fetch: Callable[[str], Optional[Path]], weights: bool = True) -> List[str]:
    """Fetches a model file by file from a store that can't list what it has.

    Args:
        fetch: file name -> where it is now, or None if the store hasn't got it.
        weights: whether to fetch them too.

    Returns:
        the files; none if there is no config.json, and so no such model.
    """
    if fetch("config.json") is None:
        return []
    logger.info("fetching %s from %s", name, store)
    files = ["config.json", *(file for file in SMALL_FILES if file != "config.json" and fetch(file))]
    if not weights:
        return files
    for file in WEIGHT_FILES:
        path = fetch(file)
        if path is None:
            continue
        files.append(file)
        if file.endswith(".index.json"):
            weight_map = read_json(path).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"{path}, from {store}, has no weight_map that names the shards of {name}.")
            shards = sorted(set(weight_map.values()))
            missing = [shard for shard in shards if os.path.basename(shard) != shard or fetch(shard) is None]
            if missing:
                raise UserError(f"{store} has {name} without its shards {', '.join(missing[:3])}.")
            files += shards
        return files
    return files + [file for file in ADAPTER_FILES if fetch(file)]


def _is_complete(folder: Path, weights: bool) -> bool:
    marker = folder / _COMPLETE
    if not marker.is_file():
        return False
    known = read_json(marker)
    if weights and not known.get("weights", True):
        return False
    files = known.get("files")
    return isinstance(files, list) and all((folder / str(file)).is_file() for file in files)


def _put_there_by_hand(folder: Path) -> bool:
    """Whether a folder of the cache holds a whole model that this package didn't download."""
    try:
        return (
            (folder / "config.json").is_file()
            and bool(find_weights(folder))
            and (has_tokenizer(folder) or (folder / "preprocessor_config.json").is_file())
        )
    except UserError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# the Hugging Face hub


def _from_hugging_face(name: str, weights: bool = True) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    store = "the Hugging Face hub"
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    offline = constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    cache = _hugging_face_cache()
    if name.count("/") != 1:
        raise _unreachable(name, store, Path.cwd() / name, "expected org/name")
    problem = None
    if not offline:
        try:
            try:
                published = HfApi(endpoint=endpoint).model_info(name, timeout=_TIMEOUT_SECONDS).siblings or []
            except RepositoryNotFoundError:
                raise
            except HfHubHTTPError:
                published = None
            if published is None:  # a mirror that hands out files and lists none
                return _from_mirror(name, store, endpoint, cache, weights)
            files = _needed([sibling.rfilename for sibling in published], weights)
            if "config.json" not in files:
                raise _unreachable(name, store, Path.cwd() / name, "it has no config.json there")
            logger.info("fetching %s from %s into %s", name, store, cache)
            return Path(snapshot_download(name, cache_dir=cache, endpoint=endpoint, allow_patterns=files))
        except UserError:
            raise
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            problem = error
    try:
        folder = Path(snapshot_download(name, cache_dir=cache, local_files_only=True))
        if (folder / "config.json").is_file() and (not weights or find_weights(folder) or config_of(folder)):
            return folder
    except (LocalEntryNotFoundError, HFValidationError, OSError, UserError) as error:
        logger.debug("no whole copy of %s in %s: %s", name, cache, error)
    if problem is not None:
        raise _failed(problem, name, store, Path.cwd() / name, cache, "HF_HOME") from problem
    raise _unreachable(name, store, Path.cwd() / name, "HF_HUB_OFFLINE is set")


def _from_mirror(name: str, store: str, endpoint: str, cache: Path, weights: bool) -> Path:
    """Fetches from an endpoint that answers for files alone."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    def fetch(file: str) -> Optional[Path]:
        try:
            return Path(hf_hub_download(name, file, cache_dir=cache, endpoint=endpoint, etag_timeout=_TIMEOUT_SECONDS))
        except LocalEntryNotFoundError as error:
            response = getattr(error.__cause__, "response", None)
            if getattr(response, "status_code", None) == 404:
                return None
            raise
        except EntryNotFoundError:
            return None
        except HfHubHTTPError as error:
            if error.response is not None and error.response.status_code == 404:
                return None
            raise

    if not _fetch_known(name, store, fetch, weights):
        raise _unreachable(name, store, Path.cwd() / name, "it has no config.json there")
    return Path(fetch("config.json")).parent  # type: ignore[arg-type]


def _hugging_face_cache() -> Path:
    """The hub's cache; the environment is read now, the library read it when it was imported."""
    from huggingface_hub import constants

    if os.environ.get("HF_HUB_CACHE"):
        return Path(os.path.expanduser(os.environ["HF_HUB_CACHE"]))
    if os.environ.get("HF_HOME"):
        return Path(os.path.expanduser(os.environ["HF_HOME"])) / "hub"
    return Path(constants.HF_HUB_CACHE)


def _needed(published: Iterable[str], weights: bool) -> List[str]:
    """Of the files of a repository those to fetch: config, tokenizer, image processor, and one kind of weights."""
    names = set(published)
    files = [name for name in SMALL_FILES if name in names]
    if not weights:
        return files
    for stem, shard in (
        ("model.safetensors", r"model-\d+-of-\d+\.safetensors"),
        ("model_state.pdparams", r"model_state-\d+-of-\d+\.pdparams"),
        ("pytorch_model.bin", r"pytorch_model-\d+-of-\d+\.bin"),
    ):
        shards = sorted(name for name in names if re.fullmatch(shard, name))
        if f"{stem}.index.json" in names and (shards or stem not in names):
            return [*files, f"{stem}.index.json", *shards]
        if stem in names:
            return [*files, stem]
    return [*files, *(name for name in ADAPTER_FILES if name in names)]


def _reason(error: BaseException) -> str:
    """What a server answered, or the first line of an error, short enough to stand inside a sentence."""
    status = _status(error)
    if status is not None:
        return f"the server answers {status} {http.client.responses.get(status, '')}".rstrip()
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{type(error).__name__}: {shorten(lines[0], 160, placeholder=' …').rstrip('.')}"


def _causes(error: Optional[BaseException]) -> Iterator[BaseException]:
    """The error, and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> Optional[int]:
    """What the server answered, where that led to the error."""
    answers = (getattr(cause, "response", None) for cause in _causes(error))
    return next((answer.status_code for answer in answers if answer is not None), None)


# ---------------------------------------------------------------------------------------------------------------------
# a GGUF file


def _converted_gguf(path: Path) -> Path:
    """The cached folder that a GGUF file was converted to; made on first use, aside and renamed."""
    from paddlemix.models.llava.gguf_reader import convert_gguf

    stat = path.stat()
    key = json.dumps([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    folder = cache_home() / "gguf" / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not (folder / "config.json").is_file():  # written last
        logger.info("converting %s into %s", path, folder)
        try:
            convert_gguf(path, folder)
        except OSError as error:
            raise UserError(
                f"{path} can't be converted into {folder}: {error.strerror or error}; name another place by PPMIX_HOME."
            ) from error
    return folder

"""The output folder of a run: what it holds, checkpoints that are whole or don't count, and what may be overwritten.

A checkpoint is written into a folder of another name and renamed when every file is on disk; its marker lists each
file's size and checksum, so that one which was cut short or damaged later is told apart and never picked.
No paddle here: a folder is judged before anything heavy starts.
"""

import json
import logging
import os
import re
import shutil
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from paddlemix.errors import UserError, naming

__all__ = [
    "MARKER",
    "RunPlan",
    "find_checkpoint",
    "is_whole",
    "plan_run",
    "remove_old_checkpoints",
    "remove_tree",
    "seal",
    "write_aside",
    "write_json",
]

logger = logging.getLogger(__name__)

MARKER = "checkpoint_complete.json"
RUN_FILE = "run.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
MODEL = re.compile(
    CHECKPOINT.pattern
    + r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|(non_lora|lora_model)_state\.safetensors"
    + r"|peft_model\.safetensors\.index\.json|lora_config\.json"
)
WHOLE_WEIGHTS = re.compile(
    r"(model|pytorch_model|model_state)(-\d+-of-\d+)?\.(safetensors|bin|pdparams)(\.index\.json)?"
)
RESULT = re.compile(r"train_log\.jsonl|loss\.png|(eval_)?predictions-\d+\.jsonl|(train|eval|predict|all)_results\.json")
PARTIAL = ".partial-"  # beginning of the names of folders that are being written or removed
LEFT_OVER = re.compile(re.escape(PARTIAL) + "|" + re.escape(RUN_FILE) + r"\.tmp\d+$")  # of a run that was killed

# Keys that may change between the two halves of a run without making it another run.
NOT_THE_RUN = frozenset(
    "output_dir overwrite_output_dir resume_from_checkpoint disable_tqdm report_to logging_dir run_name device "
    "dataloader_num_workers skip_memory_metrics save_total_limit wandb_api_key wandb_http_proxy".split()
)

# Keys with other values of which a checkpoint is one of another model.
_THE_MODEL = (
    "model_name_or_path text_model_name_or_path lora lora_path pretrain_mm_mlp_adapter version tune_mm_mlp_adapter"
).split()
_EDGE = 1 << 20  # bytes at each end of a file that its checksum covers: cheap for files of any size


class RunPlan(NamedTuple):
    """What a run does with its output folder.

    Attributes:
        action: ``start``, ``resume`` (from ``checkpoint``; None: the run was stopped before its first), or ``done``.
        checkpoint: the folder to go on from.
        stale: folders and files of an earlier run that are removed when this one begins.
        recorded: ``run.json`` tells of this run; False where it tells of a trained model, beside which results are put.
    """

    action: str
    checkpoint: Optional[Path] = None
    stale: tuple = ()
    recorded: bool = True


def plan_run(settings: Dict[str, Any], data_files: Sequence[Path] = ()) -> RunPlan:
    """Looks at the output folder and decides; writes nothing.

    A folder that holds an unfinished run is gone on with. ``overwrite_output_dir`` lets a run begin in a folder that
    holds another run, a finished one or other files; an unfinished run with the same settings and data is still gone
    on with, since that is the same command started again (``resume_from_checkpoint: false`` begins afresh). A finished
    one is done only as long as the weights that it read are the same files; an unfinished one goes on in any case.

    A run that saves no model (evaluation alone, a benchmark) takes no weights away, and isn't recorded in the place of
    one that does.

    Raises:
        UserError: the folder holds something else and may not be overwritten, or the named checkpoint isn't whole.
    """
    plan = _plan(settings, data_files)
    folder = Path(os.path.expanduser(settings["output_dir"]))
    inside = plan.checkpoint is not None and plan.checkpoint.resolve().parent == folder.resolve()
    if inside and settings.get("ignore_load_lr_and_optim"):
        raise UserError(
            f"ignore_load_lr_and_optim counts steps from 0 again, but output_dir {folder} holds the checkpoints of the run "
            f"so far; remove the key to go on, or name another output_dir and {plan.checkpoint} in resume_from_checkpoint."
        )
    return plan


def _plan(settings: Dict[str, Any], data_files: Sequence[Path]) -> RunPlan:
    folder = Path(os.path.expanduser(settings["output_dir"]))
    overwrite = settings.get("overwrite_output_dir", False)
    resume = settings.get("resume_from_checkpoint")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir names {folder}, which is a file; expected a folder.")
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"output_dir names {folder}, but nothing can be written to {there}.")
    held = sorted(path for path in folder.iterdir() if not LEFT_OVER.match(path.name)) if folder.exists() else []
    run = read_run(folder)
    if held and run is None and not overwrite:
        raise UserError(
            f"output_dir names {folder}, which holds {held[0].name} and no run of this tool; name an empty folder or "
            "set overwrite_output_dir to true."
        )
    if not saves_model(settings):
        if resume:
            raise UserError(
                "resume_from_checkpoint is set, but this run trains no model to keep; name the checkpoint in "
                "model_name_or_path instead."
            )
        if run is not None and saves_model(run["settings"]):
            return _beside_model(folder, settings)
    if isinstance(resume, str):
        return _resume_named(folder, Path(os.path.expanduser(resume)), run, overwrite)
    if resume is True:
        checkpoint = find_checkpoint(folder)
        if checkpoint is None:
            raise UserError(f"resume_from_checkpoint is true, but {folder} has no whole checkpoint.")
        return RunPlan("resume", checkpoint, _later_checkpoints(folder, checkpoint))
    if run is None:
        whole = sorted(path.name for path in held if WHOLE_WEIGHTS.fullmatch(path.name))
        if whole and settings.get("lora") and saves_model(settings):
            raise UserError(
                f"output_dir names {folder}, which holds a whole model ({whole[0]}), beside which an adapter would not be "
                "read; name another folder."
            )
        return RunPlan("start")
    stale = _run_files(folder, run)
    if resume is False:
        if not overwrite:
            raise UserError(
                f"resume_from_checkpoint is false, but output_dir {folder} holds a run; set overwrite_output_dir to true."
            )
        return RunPlan("start", stale=stale)
    changed = changed_keys(run["settings"], settings)
    same = not changed and run.get("data") == fingerprint_contents(data_files)
    if overwrite and not (same and run["status"] == "running"):
        return RunPlan("start", stale=stale)
    if run["status"] == "complete" and (not saves_model(run["settings"]) or _holds_model(held)):
        weights = fingerprint_files(_weight_files(settings))
        if same and (not weights or run.get("weights", weights) == weights):
            return RunPlan("done")
        further = ", or resume_from_checkpoint to true to train it further" if saves_model(settings) else ""
        other = "settings" if changed else "data or weights"
        raise UserError(
            f"output_dir names {folder}, which holds a finished run with other {other}; "
            f"name another folder, or set overwrite_output_dir to true{further}."
        )
    checkpoint = find_checkpoint(folder) if saves_model(run["settings"]) else None
    if checkpoint is None:
        return RunPlan("start", stale=stale)
    for key in _THE_MODEL:
        before, now = run["settings"].get(key), settings.get(key)
        if _same_place(before) != _same_place(now):
            raise UserError(
                f"output_dir names {folder}, which holds an unfinished run with {key} {before!r}, not {now!r}; name another "
                "folder, set overwrite_output_dir to true to begin afresh, or resume_from_checkpoint to true to go on with "
                "it."
            )
    return RunPlan("resume", checkpoint, _later_checkpoints(folder, checkpoint))


def _holds_model(files: Sequence[Path]) -> bool:
    """Whether the result of a run is among the files of its folder."""
    return any(MODEL.fullmatch(path.name) and path.suffix == ".safetensors" for path in files)


def _same_place(value: Any) -> Any:
    """A value of the configuration, a path of this machine in one form; absent and false are the same."""
    path = Path(os.path.expanduser(value)) if isinstance(value, str) else None
    return str(path.resolve()) if path is not None and path.exists() else value or None


def trains(settings: Dict[str, Any]) -> bool:
    """Whether a run trains; by default if it neither evaluates nor predicts."""
    return settings.get("do_train", not (settings.get("do_eval") or settings.get("do_predict")))


def saves_model(settings: Dict[str, Any]) -> bool:
    """Whether a run trains a model and keeps it."""
    return trains(settings) and not settings.get("benchmark", False)


def _beside_model(folder: Path, settings: Dict[str, Any]) -> RunPlan:
    """A run that saves no model, in the folder of one that does."""
    if settings.get("benchmark"):
        raise UserError(
            f"benchmark is true, but output_dir {folder} holds a training run, whose log it would replace; name another "
            "folder."
        )
    if not settings.get("overwrite_output_dir"):
        raise UserError(
            f"output_dir names {folder}, which holds a training run; name another folder, or set overwrite_output_dir to "
            "true to put the results beside the model, which stays as it is."
        )
    return RunPlan("start", recorded=False)


def check_sources(folder: Path, plan: RunPlan, sources: Sequence[Tuple[str, Path]], lora: bool) -> None:
    """Refuses to train from what the run itself would remove, or write over before it is done.

    Args:
        folder: ``output_dir`` of a run that saves its model.
        sources: keys of the configuration and the folders or files that weights are read from; ``model_name_or_path``
            may come several times, with the base of an adapter.
        lora: the result needs its base, so that this one must outlive the run.
    """
    folder, stale = folder.resolve(), {path.name for path in plan.stale}
    for key, path in sources:
        source = path.resolve()
        if source == folder:
            removed, own = any(not CHECKPOINT.fullmatch(name) for name in stale), True
        elif folder in source.parents:
            name = source.relative_to(folder).parts[0]
            removed, own = name in stale, bool(MODEL.fullmatch(name))
        else:
            continue
        if removed or (own and (plan.action == "start" or (lora and key == "model_name_or_path"))):
            raise UserError(
                f"output_dir is {folder}, but training there would remove or replace {path}, whose weights "
                f"{key} asks for; name another output_dir."
            )


def _resume_named(folder: Path, checkpoint: Path, run: Optional[Dict[str, Any]], overwrite: bool) -> RunPlan:
    """``resume_from_checkpoint`` names a folder."""
    if not checkpoint.is_dir():
        raise UserError(f"resume_from_checkpoint names {checkpoint}, which isn't a folder.")
    if not is_whole(checkpoint):
        raise UserError(
            f"resume_from_checkpoint names {checkpoint}, which isn't a whole checkpoint of this tool; name another "
            "checkpoint-N, or set it to true for the last whole one."
        )
    if checkpoint.resolve().parent == folder.resolve():
        return RunPlan("resume", checkpoint, _later_checkpoints(folder, checkpoint))
    if run is not None and not overwrite:
        raise UserError(
            f"resume_from_checkpoint names {checkpoint}, but output_dir {folder} holds another run; name an empty folder "
            "or set overwrite_output_dir to true."
        )
    return RunPlan("resume", checkpoint, _run_files(folder, run) if run is not None else ())


def _later_checkpoints(folder: Path, checkpoint: Path) -> tuple:
    """Checkpoints after the one to go on from: broken, or of a road that isn't taken any more."""
    source = checkpoint.resolve()  # which may be named by a link, or be a copy of another name
    try:
        step = int(json.loads((source / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        match = CHECKPOINT.fullmatch(source.name)
        step = int(match.group(1)) if match else -1
    return tuple(path for later, path in _checkpoints(folder) if later > step and path.resolve() != source)


def _weight_files(settings: Dict[str, Any]) -> List[Path]:
    """Files that the run reads weights from, where folders or files of this machine are named."""
    found: List[Path] = []
    keys = ("model_name_or_path", "lora_path", "pretrain_mm_mlp_adapter")
    for path in [Path(os.path.expanduser(settings[key])) for key in keys if settings.get(key)]:
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        found += [file for file in inside if file.suffix in (".safetensors", ".bin", ".pdparams", ".gguf")]
    return [file for file in found if file.is_file()]


def fingerprint_files(files: Sequence[Path]) -> List[List[Any]]:
    """Place, size and time of change of each file: whether a run started again reads the same weights."""
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in map(Path, files)]


def fingerprint_contents(files: Sequence[Path]) -> List[List[int]]:
    """Size and checksum of each file: whether a run started again reads the same data, from wherever."""
    return [list(_fingerprint(file, whole=True)) for file in map(Path, files)]


def changed_keys(before: Dict[str, Any], now: Dict[str, Any]) -> List[str]:
    """Keys in which two runs differ, those that don't make another run left out."""
    keys = (set(before) | set(now)) - NOT_THE_RUN
    return sorted(key for key in keys if before.get(key) != now.get(key))


def begin_run(folder: Path, settings: Dict[str, Any], plan: RunPlan, data_files: Sequence[Path] = ()) -> None:
    """Makes the folder, removes what the plan calls stale, and records the run."""
    if not plan.recorded:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in [path for path in folder.iterdir() if LEFT_OVER.match(path.name)]:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    for path in plan.stale:
        if path.is_dir():
            remove_checkpoint(path)
        else:
            path.unlink()
    data, weights = fingerprint_contents(data_files), fingerprint_files(_weight_files(settings))
    record_run(folder, {"status": "running", "settings": settings, "data": data, "weights": weights})


def removes_only_checkpoints(plan: RunPlan) -> bool:
    """Whether the run's own model stays where the plan is carried out."""
    return all(CHECKPOINT.fullmatch(path.name) for path in plan.stale)


def finish_run(folder: Path) -> None:
    """Marks the run as complete; only then is its folder no longer one to resume."""
    record_run(folder, {**(read_run(folder) or {"settings": {}}), "status": "complete"})


def record_run(folder: Path, run: Dict[str, Any]) -> None:
    """Makes the folder say ``run`` of the run that it holds."""
    write_json(folder / RUN_FILE, run)


def read_run(folder: Path) -> Optional[Dict[str, Any]]:
    """What ``folder`` says of the run that it holds: status, settings and more; None if it holds none."""
    try:
        run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        return run if isinstance(run.get("settings"), dict) and isinstance(run.get("status"), str) else None
    except (OSError, ValueError, AttributeError):
        return None


def _run_files(folder: Path, run: Dict[str, Any]) -> tuple:
    """What the run that is recorded in the folder left there; other files aren't touched."""
    return tuple(
        path
        for path in sorted(folder.iterdir())
        if RESULT.fullmatch(path.name) or (saves_model(run["settings"]) and MODEL.fullmatch(path.name))
    )


# checkpoints


def find_checkpoint(folder: Path) -> Optional[Path]:
    """The last whole checkpoint in a folder; a broken one is named in the log and passed over."""
    for _, path in reversed(_checkpoints(folder)):
        if is_whole(path):
            return path
        logger.warning("%s isn't whole, so it is passed over.", path)
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether every file is there as it was written."""
    try:
        files = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["files"]
        return all(_fingerprint(checkpoint / name) == tuple(known) for name, known in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _checkpoints(folder: Path) -> List:
    """(step, path) of every checkpoint-N, by step."""
    if not folder.is_dir():
        return []
    found = [(CHECKPOINT.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted((int(match.group(1)), path) for match, path in found if match)


def seal(folder: Path) -> None:
    """Writes the marker of a checkpoint whose files are all written; the files are flushed to the disk first."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
            files[str(path.relative_to(folder))] = _fingerprint(path)
    write_json(folder / MARKER, {"files": files})


def _fingerprint(path: Path, whole: bool = False) -> tuple:
    """Size, and checksum of the file's two ends, or of all of it."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        checksum = zlib.crc32(file.read(_EDGE))
        if whole:
            while block := file.read(_EDGE):
                checksum = zlib.crc32(block, checksum)
        elif size > _EDGE:
            file.seek(max(_EDGE, size - _EDGE))
            checksum = zlib.crc32(file.read(), checksum)
    return size, checksum


def publish(partial: Path, final: Path) -> None:
    """Gives a sealed folder its name in one step, in the place of an older one if there is any."""
    if final.exists():
        remove_checkpoint(final)
    os.replace(partial, final)
    _sync_folder(final.parent)


def remove_tree(folder: Path) -> None:
    """Removes a folder, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint; cut short, it leaves nothing that bears a checkpoint's name."""
    if path.is_symlink():
        path.unlink()
        return
    doomed = path.with_name(f"{PARTIAL}{path.name}-removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_old_checkpoints(folder: Path, keep: int, best: Optional[str] = None) -> None:
    """Keeps the newest ``keep`` whole checkpoints, and the best one among or beside them."""
    whole = [path for _, path in _checkpoints(folder) if (path / MARKER).exists()]
    best_path = Path(best).absolute() if best else None
    others = [path for path in whole if path.absolute() != best_path]
    # the best takes one of the places, but never that of the newest, from which a run goes on
    places = max(keep - (len(others) < len(whole)), 1)
    for path in others[: max(len(others) - places, 0)]:
        remove_checkpoint(path)


# files


@contextmanager
def write_aside(folder: Path) -> Iterator[Path]:
    """A new folder to write into; at the end its files move into ``folder``, each at once. Whole weights among them take
    the place of all that were there, in whatever files: an index of shards would be read before them. So does an adapter, and
    a tokenizer of others.

    An error leaves ``folder`` as it was, or not there.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{PARTIAL}files"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with naming(folder):
            yield partial
        from paddlemix.processors.llava import replaced_files

        names = sorted(path.name for path in partial.iterdir())
        for name in names:
            os.replace(partial / name, folder / name)
        # an adapter beside whole weights, such as those that it was merged into once, would not be read either
        if "lora_config.json" in names or any(WHOLE_WEIGHTS.fullmatch(name) for name in names):
            old = [path for path in folder.iterdir() if WHOLE_WEIGHTS.fullmatch(path.name) and path.name not in names]
            for path in sorted(old, key=lambda path: path.suffix != ".json"):
                path.unlink()
        for path in replaced_files(folder, names):
            path.unlink()
        _sync_folder(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if made and not any(folder.iterdir()):
            folder.rmdir()


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    partial = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with naming(path), open(partial, "w", encoding="utf-8") as file:
            json.dump(value, file, ensure_ascii=False, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Flushes a folder's list of names, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

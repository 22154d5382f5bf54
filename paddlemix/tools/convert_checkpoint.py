"""Writes a checkpoint in another layout: the toolkit's, the original release's, or Hugging Face's.

    python paddlemix/tools/convert_checkpoint.py --model_name_or_path IN --output_dir OUT --layout huggingface

IN is whatever the chat opens: a folder in any layout, an adapter (it is merged), a GGUF file, a name. OUT gets weights
(safetensors), config, tokenizer and image processor; it appears whole or not at all.
"""

import argparse
import glob
import json
import logging
import os
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

if __package__ in (None, ""):  # run by its path, from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from paddlemix.errors import UserError
from paddlemix.models.llava.adapter_files import ADAPTER_FILES
from paddlemix.models.llava.hub import SMALL_FILES
from paddlemix.models.llava.layouts import LAYOUTS
from paddlemix.runtime import prepare_cpu, quiet_start
from paddlemix.tools.command_line import Parser, exit_status

logger = logging.getLogger("paddlemix.convert")

DTYPES = ("float32", "float16", "bfloat16")
IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
OF_A_CHECKPOINT = re.compile(
    "|".join(re.escape(name) for name in (*SMALL_FILES, *ADAPTER_FILES, ".gitattributes", "README.md", "LICENSE"))
    + r"|(model|pytorch_model|model_state|mm_projector)\b.*\.(safetensors|bin|pdparams|json)"
)


def parse_arguments(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model_name_or_path", required=True, help="folder or name of the checkpoint")
    parser.add_argument("--output_dir", required=True, help="folder to write; it must not exist, or be empty")
    parser.add_argument("--layout", required=True, choices=LAYOUTS)
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default the checkpoint's")
    parser.add_argument("--max_shard_size", default="5GB", help="largest file of weights (default 5GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is in output_dir")
    return parser.parse_args(argv)


def convert(
    model_name_or_path: str,
    output_dir: str,
    layout: str,
    dtype: Optional[str] = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Writes the checkpoint; returns its folder.

    Raises:
        UserError: half a checkpoint, a folder in the way, a choice of the model that the layout can't say.
    """
    from tqdm import tqdm

    from paddlemix.models.llava import checkpoint
    from paddlemix.models.llava.conversion import ImageToken, open_plan
    from paddlemix.processors.llava import LlavaProcessor

    output = Path(os.path.expanduser(output_dir)).resolve()  # a link stays, and what it points to is written
    check_output(output, overwrite)  # before anything is downloaded
    remove_left_over(output)
    max_shard_bytes = checkpoint.shard_bytes(max_shard_size)
    source = checkpoint.resolve(model_name_or_path)
    config = checkpoint.read_config(source)
    for needed in (folder.resolve() for folder in checkpoint.needed_folders(source, config)):
        if output in (needed, *needed.parents):
            raise UserError(
                f"--output_dir {output} is or contains {needed}, which the checkpoint {source} is read from; name another "
                "folder."
            )
    processor = LlavaProcessor.from_pretrained(source, config=config)
    image_token = None
    if layout == "huggingface" and config.vision is not None:
        image_token = ImageToken(*token_ids(processor.tokenizer))
    if layout == "huggingface" and processor.chat_template is not None:
        logger.warning(
            "The chat template of %s has no place in the layout huggingface; the copy will be asked as %s.",
            source,
            config.conversation_template,
        )
        processor.chat_template = None
    plan = open_plan(source, layout, dtype, image_token)

    # an empty folder that is there may be a disk of its own, or all that the user may write to
    empty = output.is_dir() and not any(output.iterdir())
    aside = output if empty else output.parent
    made = [path for path in (aside, *aside.parents) if not path.exists()]
    aside.mkdir(parents=True, exist_ok=True)
    partial = aside / f".{output.name}.{os.getpid()}.partial"
    try:
        free = shutil.disk_usage(aside).free
        if plan.nbytes > free:
            raise UserError(f"{aside} has {size_text(free)} free, but the weights take {size_text(plan.nbytes)}.")
        partial.mkdir()
        with tqdm(total=plan.nbytes, unit="B", unit_scale=True, disable=None, desc=f"writing {layout}") as bar:
            plan.write(partial, max_shard_bytes, bar.update)
        processor.save_pretrained(partial)
        if image_token is not None:
            add_tokens(partial, {IMAGE_TOKEN: image_token.image, PAD_TOKEN: image_token.pad})
            write_processor_config(partial, plan.config)
            jinja = chat_jinja([source, checkpoint.processor_folder(source)], processor)
            if jinja:
                (partial / "chat_template.jinja").write_text(jinja, encoding="utf-8")
        if empty:  # config.json makes it a checkpoint, and comes last
            for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
                os.rename(path, output / path.name)
        else:
            replace(partial, output)
    except OSError as error:
        if error.errno is None:
            raise
        if error.filename is None or partial in Path(os.fspath(error.filename)).parents:
            raise UserError(f"{output} can't be written: {error.strerror or error}.") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for path in made:
            with suppress(OSError):  # something is in it
                path.rmdir()
    return output


def size_text(nbytes: int) -> str:
    """
    >>> size_text(2_440_000_000), size_text(71_300_000)
    ('2.4 GB', '71 MB')
    """
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


def remove_left_over(output: Path) -> None:
    """What a conversion into ``output`` that was killed has left, inside it or beside it."""
    for place in (output, output.parent):
        for path in place.glob(f".{glob.escape(output.name)}.*.partial"):
            if is_left_over(path.name, output):
                shutil.rmtree(path, ignore_errors=True)  # it may be somebody else's


def is_left_over(name: str, output: Path) -> bool:
    """Whether it is what a conversion into ``output``, of a process that is gone, wrote to."""
    match = re.fullmatch(rf"\.{re.escape(output.name)}\.(\d+)\.partial", name)
    if not match or os.name != "posix":  # elsewhere there is no asking
        return False
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False


def check_output(output: Path, overwrite: bool) -> None:
    """Refuses to write over anything; with ``overwrite`` over anything but a checkpoint."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_dir {output} is a file; name a folder.")
    inside = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    inside = [name for name in inside if not is_left_over(name, output)]
    if inside and not overwrite:
        raise UserError(
            f"--output_dir {output} is not empty ({', '.join(inside[:3])}); name another, or add --overwrite."
        )
    if inside and "config.json" not in inside:
        raise UserError(
            f"--output_dir {output} holds something other than a checkpoint ({', '.join(inside[:3])}), which --overwrite "
            "does not replace; name another folder."
        )
    others = [name for name in inside if not OF_A_CHECKPOINT.fullmatch(name)]
    if others:
        raise UserError(
            f"--output_dir {output} holds {', '.join(others[:3])} beside a checkpoint, which --overwrite would remove too; "
            "move it away, or name another folder."
        )


def replace(partial: Path, output: Path) -> None:
    """The finished folder takes its place; what was there goes only then."""
    if not output.exists():
        os.rename(partial, output)
        return
    old = partial.with_suffix(".old")
    os.rename(output, old)
    os.rename(partial, output)
    shutil.rmtree(old)


# ---- what transformers' processor needs beside the weights ----


def token_ids(tokenizer: Any) -> Sequence[int]:
    """Ids of <image> and of the padding token; those that the tokenizer lacks come after all others."""
    image = tokenizer.added_token_id(IMAGE_TOKEN)
    pad = tokenizer.added_token_id(PAD_TOKEN)
    following = len(tokenizer)
    if image is None:
        image, following = following, following + 1
    return image, following if pad is None else pad


def add_tokens(folder: Path, tokens: Dict[str, int]) -> None:
    """Makes the tokens known to every file of the tokenizer that names added tokens."""
    from paddlemix.models.llava.tensor_files import read_json, write_json

    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    path = folder / "tokenizer.json"
    if path.is_file():
        values = read_json(path)
        known = {entry["content"] for entry in values.get("added_tokens") or []}
        new = [{"id": index, "content": token, **flags} for token, index in tokens.items() if token not in known]
        values["added_tokens"] = [*(values.get("added_tokens") or []), *sorted(new, key=lambda entry: entry["id"])]
        path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    values = read_json(path)
    decoder = dict(values.get("added_tokens_decoder") or {})
    for token, index in tokens.items():
        decoder.setdefault(str(index), {"content": token, **flags})
    values.update(added_tokens_decoder=decoder, image_token=IMAGE_TOKEN, pad_token=PAD_TOKEN, padding_side="left")
    write_json(path, values)
    path = folder / "special_tokens_map.json"
    if path.is_file():
        write_json(path, {**read_json(path), "image_token": IMAGE_TOKEN, "pad_token": PAD_TOKEN})
    path = folder / "added_tokens.json"
    if path.is_file():
        write_json(path, {**read_json(path), **tokens})


def chat_jinja(sources: Sequence[Path], processor: Any) -> str:
    """The chat template for transformers' processor; empty if there is none in its form.

    A publisher's is taken as it is. Where a source's config records a template of this package, as what fine-tuning has
    written does, that one counts: the base's may lie beside it still.

    Args:
        sources: folders of a checkpoint; the processor's files are in the last.
    """
    from paddlemix.models.llava import published_configs
    from paddlemix.models.llava.conversation import get_template
    from paddlemix.models.llava.tensor_files import read_json
    from paddlemix.processors.chat_template import hugging_face_jinja

    if processor.chat_template is not None:  # of the toolkit's form
        return ""
    configs = [folder / "config.json" for folder in sources]
    if not any("conversation_template" in read_json(config) for config in configs if config.is_file()):
        of_tokenizer = published_configs.tokenizer_template(sources[-1])
        own = published_configs.processor_template(sources[-1]) or (of_tokenizer if "image" in of_tokenizer else "")
        if own:
            return own
    return hugging_face_jinja(get_template(processor.config.conversation_template))


def write_processor_config(folder: Path, config: Any) -> None:
    """processor_config.json: how many tokens transformers puts in place of <image>."""
    from paddlemix.models.llava.tensor_files import read_json, write_json

    anyres = config.image_aspect_ratio == "anyres"
    processor_class = "LlavaNextProcessor" if anyres else "LlavaProcessor"
    values = {
        "image_token": IMAGE_TOKEN,
        "num_additional_image_tokens": 1,  # CLIP's class token
        "patch_size": config.vision.patch_size,
        "processor_class": processor_class,
        "vision_feature_select_strategy": "default" if config.mm_vision_select_feature == "patch" else "full",
    }
    write_json(folder / "processor_config.json", values)
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        write_json(folder / name, {**read_json(folder / name), "processor_class": processor_class})


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_arguments(argv)
    prepare_cpu()
    quiet_start()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("paddlemix").setLevel(logging.INFO)

    def work() -> int:
        import paddle

        paddle.set_device("cpu")
        try:
            output = convert(
                args.model_name_or_path, args.output_dir, args.layout, args.dtype, args.max_shard_size, args.overwrite
            )
        except OSError as error:
            what = (
                f"{error.filename} can't be read or written"
                if error.filename
                else f"{args.output_dir} can't be written"
            )
            raise UserError(f"{what}: {error.strerror or error}.") from error
        print(output)
        return 0

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())

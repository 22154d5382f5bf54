"""Merges a LoRA adapter, and what was trained beside it, into its base: a checkpoint of its own, which the chat opens.

    python paddlemix/tools/merge_lora_params.py --model_name_or_path M --lora_path L --merge_model_path O

The merged folder has weights, config, tokenizer and image processor. It appears whole or not at all.
"""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Optional, Sequence

if __package__ in (None, ""):  # run by its path, from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from paddlemix.errors import UserError
from paddlemix.runtime import prepare_cpu, quiet_start
from paddlemix.tools.command_line import Parser, exit_status

logger = logging.getLogger("paddlemix.merge")

DTYPES = ("float32", "float16", "bfloat16")  # checkpoint.MODEL_DTYPES, without Paddle's import


def parse_arguments(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--model_name_or_path", help="folder or name of the base; default the one that the adapter records"
    )
    parser.add_argument("--lora_path", required=True, help="folder of the adapter")
    parser.add_argument(
        "--merge_model_path", help="where the merged checkpoint is written; default into the adapter's folder"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the merged weights; default the base's")
    parser.add_argument("--device", default="cpu", help="where the weights are held meanwhile: cpu, gpu, …")
    return parser.parse_args(argv)


def merge(
    lora_path: str,
    merge_model_path: Optional[str] = None,
    model_name_or_path: Optional[str] = None,
    dtype: Optional[str] = None,
) -> Path:
    """Writes the merged checkpoint; returns its folder.

    Raises:
        UserError: a base or an adapter that isn't there, isn't whole, or doesn't fit the other.
    """
    from paddlemix.models.llava import checkpoint
    from paddlemix.models.llava.adapter_files import config_of
    from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM
    from paddlemix.models.llava.tensor_files import read_json
    from paddlemix.processors.llava import LlavaProcessor
    from paddlemix.trainer.run_folder import MARKER, read_run, write_aside

    adapter = checkpoint.resolve(lora_path)
    config = config_of(adapter)
    if config is None:
        raise UserError(
            f"{adapter} has no lora_config.json (or adapter_config.json), so it isn't the folder of an adapter."
        )
    if merge_model_path is not None and not merge_model_path.strip():
        raise UserError(
            "--merge_model_path is empty; expected a folder, or leave it out to merge into the adapter's own."
        )
    if model_name_or_path is None and not read_json(config).get("base_model_name_or_path"):
        raise UserError(f"{adapter} doesn't record its base; name it with --model_name_or_path.")
    target = Path(os.path.expanduser(merge_model_path)) if merge_model_path else adapter
    if target.exists() and not target.is_dir():
        raise UserError(f"--merge_model_path names {target}, which is a file; expected a folder.")
    if (target / MARKER).exists():
        raise UserError(
            f"{target} is a checkpoint that training goes on from, which a merged model in it would end; name another folder in "
            "--merge_model_path."
        )
    if target.resolve() != adapter.resolve() and read_run(target) is not None:
        raise UserError(f"--merge_model_path names {target}, which holds a training run; name another folder.")
    there = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--merge_model_path names {target}, but nothing can be written to {there}.")
    if model_name_or_path is None:
        base = checkpoint.recorded_base(adapter)
    else:
        base = checkpoint.resolve(model_name_or_path)
    processor = LlavaProcessor.from_pretrained(base, adapter=adapter)
    for needed in checkpoint.needed_folders(base, processor.config, adapter):
        if target.resolve() == needed.resolve():
            raise UserError(f"--merge_model_path names {target}, which the base is read from; name another folder.")

    dtype = dtype or checkpoint.stored_dtype(base)
    model = LlavaLlamaForCausalLM.from_pretrained(base, config=processor.config, dtype=dtype, lora_path=adapter)
    with write_aside(target) as aside:
        model.save_pretrained(aside)
        processor.save_pretrained(aside)
    logger.info("Merged %s into %s: %s", adapter, base, target)
    return target


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_arguments(argv)
    prepare_cpu()
    quiet_start()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("paddlemix").setLevel(logging.INFO)

    def work() -> int:
        import paddle

        from paddlemix.trainer.arguments import check_device

        paddle.set_device(check_device({"device": args.device}))
        merge(args.lora_path, args.merge_model_path, args.model_name_or_path, args.dtype)
        return 0

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())

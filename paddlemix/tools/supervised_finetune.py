"""Full or LoRA fine-tuning, by one flat JSON file.

    python paddlemix/tools/supervised_finetune.py CONFIG.json [--key value …]
    python -m paddle.distributed.launch … paddlemix/tools/supervised_finetune.py CONFIG.json

The keys are those of ``paddlemix/trainer/arguments.py``; examples are in ``paddlemix/config/llava``. Started again
after it was killed, the same command goes on from the last whole checkpoint. SIGTERM and Ctrl-C save one first.
"""

import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

if __package__ in (None, ""):  # run by its path, from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from paddlemix.errors import UserError
from paddlemix.runtime import prepare_cpu, quiet_start
from paddlemix.tools.command_line import exit_status

logger = logging.getLogger("paddlemix.finetune")


def run(argv: Sequence[str]) -> int:
    """Parses, builds, trains, saves.

    Returns:
        The process's exit status: 0, or 128 and the number of the signal that stopped training.

    Raises:
        UserError: bad input, before anything is trained or written.
    """
    from paddlemix.datasets.files import parse_dataset_key
    from paddlemix.trainer.arguments import FinetuneArguments, check_device, configuration_file, read_settings
    from paddlemix.trainer.run_folder import plan_run

    settings = read_settings(argv)
    settings["device"] = check_device(settings)
    file = configuration_file(argv)
    entries = parse_dataset_key(settings["dataset"], file.parent if file else None)
    data_files = [
        path
        for split in entries.values()
        for entry in split
        for path in (*entry.data_files, entry.chat_template)
        if path is not None
    ]
    plan = plan_run(settings, data_files)
    if plan.action == "done":
        logger.info(
            "The run in %s is complete; set overwrite_output_dir to true to begin it again.", settings["output_dir"]
        )
        return 0
    args = FinetuneArguments(**settings)
    for needed, split, key in (
        (args.do_train, "train", "do_train"),
        (args.do_eval or args.do_predict, "eval", "do_eval"),
    ):
        if needed and not entries[split]:
            raise UserError(f"{key} is on, but dataset has no {split} entry; add one, or set {key} to false.")

    refuse_sharding_on_cpu(args)
    parts = build(args, settings, entries, plan)
    from paddlemix.trainer.run_folder import read_run, record_run, removes_only_checkpoints
    from paddlemix.trainer.trainer import LlavaTrainer

    before = read_run(Path(args.output_dir)) if plan.action == "resume" else None
    begins = partial(begin, args, settings, plan, data_files, before)
    trainer = LlavaTrainer(
        parts["model"],
        args,
        train_dataset=parts.get("train"),
        eval_dataset=parts.get("eval"),
        processor=parts["processor"],
        begin=begins,
    )
    if not args.do_train:
        begins()
    try:
        return work(trainer, plan)
    except UserError:
        if before is not None and not trainer.has_trained and args.should_save and removes_only_checkpoints(plan):
            record_run(Path(args.output_dir), before)  # so that the command that it holds can still go on
        raise


def refuse_sharding_on_cpu(args: Any) -> None:
    if args.device == "cpu" and any(kind.value == "stage2" for kind in args.sharding):
        raise UserError("sharding is 'stage2', which Paddle has on GPUs only; on CPUs use stage1.")


def build(args: Any, settings: Dict[str, Any], entries: Dict[str, List[Any]], plan: Any) -> Dict[str, Any]:
    """Processor, data and model, all checked; says what will be trained, on what, and in how much memory."""
    import paddle
    from paddlenlp.trainer import set_seed

    from paddlemix.datasets.packing import PackedDataset
    from paddlemix.datasets.supervised import SupervisedDataset
    from paddlemix.models.llava import checkpoint
    from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM
    from paddlemix.processors.llava import LlavaProcessor
    from paddlemix.processors.tokenizer import load_tokenizer
    from paddlemix.trainer.run_folder import check_sources, saves_model
    from paddlemix.trainer.weights import mark_differing

    paddle.set_device(args.device)
    set_seed(args.seed)
    with args.main_process_first(desc="fetching the model"):
        folder = checkpoint.resolve(args.model_name_or_path)
        adapter = checkpoint.resolve(args.lora_path) if args.lora_path else None
    config = read_config(folder, adapter, args, settings)
    if saves_model(settings):
        check_sources(Path(args.output_dir), plan, weight_sources(args, folder, config), args.lora)
    processor = LlavaProcessor.from_pretrained(
        folder, config=config, image_aspect_ratio=args.image_aspect_ratio, adapter=adapter
    )
    if args.text_model_name_or_path:
        processor.tokenizer = load_tokenizer(checkpoint.resolve(args.text_model_name_or_path))
        check_vocabulary(processor.tokenizer, config)
    if args.version:
        processor.chat_template = None
    if args.do_train:
        recorded = record_template(processor, entries["train"])
        if args.version and recorded and args.should_log:
            logger.warning(
                "version is %r, but all training data have a chat_template, which is what they are rendered with and the "
                "result is asked with; version changes nothing.",
                args.version,
            )

    parts: Dict[str, Any] = {"processor": processor}
    for split, wanted in (("train", args.do_train), ("eval", args.do_eval or args.do_predict)):
        if wanted:
            parts[split] = SupervisedDataset(
                entries[split], processor, args.max_length, progress=args.should_log and not args.disable_tqdm
            )
            check_lengths(parts[split], split, config)
    if args.do_predict or (args.do_eval and args.eval_with_do_generation):
        check_questions(parts["eval"], args)
    if args.do_train:
        counts, lengths = parts["train"].counts, [abs(length) for length in parts["train"].lengths]
        if args.mixtoken:
            parts["train"] = PackedDataset(parts["train"], args.max_length, args.seed)
            lengths = [abs(length) for length in parts["train"].lengths]
        check_batch(args, len(parts["train"]), args.dataset_world_size)

    config.dtype = args.compute_dtype
    with checkpoint.no_init(args.compute_dtype):
        model = LlavaLlamaForCausalLM(config)
    if args.do_train and not args.lora:
        freeze(model, args)
    checkpoint.load_weights(model, folder, args.compute_dtype, new_projector=takes_new_projector(model, args))
    if args.pretrain_mm_mlp_adapter:
        checkpoint.load_projector(model, args.pretrain_mm_mlp_adapter)
        mark_differing(model, "projector")
    if args.lora:
        model = adapt(model, args, settings, folder, adapter, plan.checkpoint)
        if args.do_train:
            freeze(model, args)
    if args.do_train and not counts["image"]:
        check_learns_from_text(model)
    parts["model"] = model
    if args.do_train and args.should_log:
        report(model, config, args, counts, lengths)
    return parts


def weight_sources(args: Any, folder: Path, config: Any) -> List[Tuple[str, Path]]:
    """Where the run reads weights from, each with the key that names it; an adapter's base and a CLIP tower too."""
    from paddlemix.models.llava import checkpoint

    sources = [("model_name_or_path", each) for each in checkpoint.needed_folders(folder, config)]
    for key in ("lora_path", "pretrain_mm_mlp_adapter"):
        if getattr(args, key):
            sources.append((key, Path(os.path.expanduser(getattr(args, key)))))
    return sources


def read_config(folder: Path, adapter: Optional[Path], args: Any, settings: Dict[str, Any]) -> Any:
    """The checkpoint's config, or that of the adapter which the run goes on from, with what the run changes in it."""
    from paddlemix.models.llava import checkpoint
    from paddlemix.models.llava.conversation import conv_templates

    config = checkpoint.read_config(folder, adapter)
    if args.version is not None:
        if args.version not in conv_templates:
            raise UserError(f"version is {args.version!r}; expected a template: {', '.join(sorted(conv_templates))}.")
        config.conversation_template = args.version
    if args.image_aspect_ratio is not None:
        config.image_aspect_ratio = args.image_aspect_ratio
    if "use_flash_attention" in settings:
        config.use_flash_attention = args.use_flash_attention
    config.validate()
    if config.vision is None:
        for key in ("unfreeze_mm_vision_tower", "tune_mm_mlp_adapter", "pretrain_mm_mlp_adapter"):
            if settings.get(key):
                raise UserError(f"{key} is set, but {folder} takes text only: it has no vision tower and no projector.")
    return config


def record_template(processor: Any, entries: List[Any]) -> bool:
    """Where all training data have one ``chat_template``, the model that comes out is asked in that way too.

    Returns:
        whether they have.
    """
    from paddlemix.processors.chat_template import load_chat_template, name_of

    files = [entry.chat_template for entry in entries]
    if not any(files):
        return False
    templates = [load_chat_template(file) if file else None for file in files]
    if any(template != templates[0] for template in templates):
        logger.warning(
            "The training data have several chat templates; the chat will use %s.",
            processor.config.conversation_template,
        )
        return False
    name = name_of(templates[0])
    processor.chat_template = None if name else templates[0]
    processor.config.conversation_template = name or processor.config.conversation_template
    return True


def check_lengths(dataset: Any, split: str, config: Any) -> None:
    longest = max(range(len(dataset)), key=lambda index: abs(dataset.lengths[index]))
    tokens, most = abs(dataset.lengths[longest]), config.max_position_embeddings
    if tokens > most and config.rope_scaling is None:
        raise UserError(
            f"{dataset.where(longest)}: the sample has {tokens} tokens, but the model reads {most} at most; set max_length "
            f"to {most} or less."
        )


def check_questions(dataset: Any, args: Any) -> None:
    """That there are answers to ask the model for; says how many are left out."""
    from paddlemix.trainer.evaluation import questions_of

    questions_of(dataset)
    if dataset.counts["answers_cut"] and args.should_log:
        logger.warning(
            "%s answers of the eval data lie behind the cut at max_length %s, so the model isn't asked for them.",
            f"{dataset.counts['answers_cut']:,}",
            f"{args.max_length:,}",
        )


def check_vocabulary(tokenizer: Any, config: Any) -> None:
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"text_model_name_or_path names a tokenizer of {len(tokenizer)} ids, but the model has {config.vocab_size}; name "
            "one of the model's own family."
        )


def check_batch(args: Any, samples: int, ranks: int) -> None:
    """That there is a step to take."""
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks
    if args.dataloader_drop_last and samples < size:
        raise UserError(
            f"dataloader_drop_last is true, but the {samples} samples don't fill one global batch of {size}; set it to "
            "false or make the batch smaller."
        )
    steps = max(samples // size if args.dataloader_drop_last else -(-samples // size), 1)  # of an epoch
    if args.max_steps < 1 and int(steps * args.num_train_epochs) < 1:
        raise UserError(
            f"num_train_epochs is {args.num_train_epochs:g}, which is less than one of the {steps} steps of an epoch; give it "
            "a larger value, or set max_steps."
        )


def takes_new_projector(model: Any, args: Any) -> bool:
    """Whether a base without a projector gets one: if a file of it is named, or nothing else is to be trained."""
    from paddlemix.trainer.freezing import count_parts

    if args.tune_mm_mlp_adapter or args.pretrain_mm_mlp_adapter:
        return True
    alone = {part for part, count in count_parts(model).items() if count.trained} == {"projector"}
    return args.do_train and not args.lora and alone


def adapt(
    model: Any,
    args: Any,
    settings: Dict[str, Any],
    folder: Path,
    adapter: Optional[Path],
    checkpoint: Optional[Path],
) -> Any:
    """The model with a new adapter, or with that of ``lora_path``; one that ``checkpoint``, to go on from, fits."""
    from paddlemix.trainer.adapters import (
        add_lora,
        check_against_adapter,
        check_against_checkpoint,
        read_lora_config,
    )
    from paddlemix.trainer.weights import load_trained_weights

    given = Path(os.path.expanduser(args.model_name_or_path))
    base = str(folder.resolve()) if given.exists() else args.model_name_or_path
    options = {
        "rank": args.lora_rank,
        "alpha": args.lora_alpha,
        "targets": args.lora_target_modules,
        "rslora": args.rslora,
        "dropout": args.lora_dropout,
        "dtype": args.compute_dtype,
        "base": base,
    }
    if adapter is None:
        if checkpoint is not None:
            check_against_checkpoint(model, options, checkpoint)
        return add_lora(model, **options)
    config = read_lora_config(adapter)
    check_against_adapter(settings, config, adapter)
    options.update(rank=config["r"], alpha=config["lora_alpha"], rslora=config.get("rslora", False))
    targets = config["target_modules"]
    options["targets"] = [targets] if isinstance(targets, str) else targets
    options["dropout"] = settings.get("lora_dropout", config.get("lora_dropout", 0.0))
    model = add_lora(model, **options)
    load_trained_weights(model, adapter)
    return model


def freeze(model: Any, args: Any) -> None:
    from paddlemix.trainer.freezing import count_parts, select_trained

    select_trained(
        model,
        lora=args.lora,
        tune_projector_only=args.tune_mm_mlp_adapter,
        freeze_projector=args.freeze_mm_mlp_adapter,
        unfreeze_tower=args.unfreeze_mm_vision_tower,
        include=args.freeze_include,
        exclude=args.freeze_exclude,
    )
    counts = count_parts(model)
    for key, part in (("mm_projector_lr", "projector"), ("mm_vision_tower_lr", "vision tower")):
        if getattr(args, key) is not None and not (part in counts and counts[part].trained):
            raise UserError(
                f"{key} is set, but nothing of the {part} is trained; remove it, or look at freeze_mm_mlp_adapter, "
                "freeze_include and freeze_exclude."
            )


ONLY_PICTURES_REACH = (
    "no sample of the training data has a picture, but only the vision tower or the projector is trained, which would learn "
    "nothing; add rows with pictures, or look at tune_mm_mlp_adapter, freeze_include and freeze_exclude."
)


def check_learns_from_text(model: Any) -> None:
    """Refuses to train what only pictures reach."""
    from paddlemix.trainer.freezing import named_model_parameters

    trained = [name for name, parameter in named_model_parameters(model) if not parameter.stop_gradient]
    if all(name.startswith(("llama.vision_tower.", "llama.mm_projector.", "llama.image_newline")) for name in trained):
        raise UserError(ONLY_PICTURES_REACH)


def report(model: Any, config: Any, args: Any, counts: Dict[str, int], lengths: List[int]) -> None:
    """Says what is trained, on how much, and what it takes in memory."""
    import numpy as np

    from paddlemix.trainer.freezing import count_parts
    from paddlemix.trainer.memory import available_memory, estimate_memory, format_bytes

    logger.info("Parameters trained:")
    for part, count in count_parts(model).items():
        logger.info("  %-14s %15s of %15s", part, f"{count.trained:,}", f"{count.total:,}")
    if args.bfloat16_products:
        logger.info("Linear layers multiply in bfloat16; weights, gradients, adapters and all else stay float32.")
    ranks = args.dataset_world_size
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks
    logger.info(
        "Data: %s samples with %s supervised tokens, of %s text tokens and %s picture tokens; %s samples in a global batch.",
        *(f"{number:,}" for number in (counts["samples"], counts["supervised"], counts["text"], counts["image"], size)),
    )
    if args.mixtoken:
        logger.info("Packed into %s rows of at most %s tokens.", f"{len(lengths):,}", f"{args.max_length:,}")
    rows = min(args.per_device_train_batch_size, len(lengths))
    longest = int(np.max(lengths))
    share = counts["supervised"] / max(sum(lengths), 1)
    parts = estimate_memory(
        model,
        config,
        rows=rows,
        tokens=longest,
        labelled=int(rows * longest * min(1.0, 2 * share)),
        tiles=rows * max(1, round(counts["image"] / max(counts["samples"], 1) / config.vision.num_patches))
        if config.vision is not None and counts["image"]
        else 0,
        recompute=args.recompute,
        tower_trained=args.unfreeze_mm_vision_tower,
        master_weights=args.fp16_opt_level == "O2",
        float32_gradients=args.amp_master_grad,
        compute_dtype=("float16" if args.fp16 else "bfloat16") if args.fp16 or args.bf16 else None,
        lora_dropout=args.lora and args.lora_dropout > 0,
        shards=max(args.sharding_parallel_degree, 1) if args.use_hybrid_parallel else 1,
        sharding=args.sharding[0].value if args.sharding else "",
    )
    total, have = sum(parts.values()), available_memory(args.device)
    described = ", ".join(f"{name} {format_bytes(count)}" for name, count in parts.items())
    logger.info(
        "Memory, estimated: %s; together %s%s.",
        described,
        format_bytes(total),
        f" of {format_bytes(have)} that {args.device} has free" if have else "",
    )
    if have and total > have:
        logger.warning(
            "That is more than there is; a smaller per_device_train_batch_size, recompute, lora or sharding takes less."
        )


def begin(
    args: Any, settings: Dict[str, Any], plan: Any, data_files: Sequence[Path], before: Optional[Dict[str, Any]]
) -> None:
    """The first thing that is written, and removed; ``before`` is what the folder says of the run that is gone on with."""
    import paddle.distributed as dist

    from paddlemix.trainer.arguments import SECRETS
    from paddlemix.trainer.run_folder import begin_run, changed_keys, fingerprint_contents

    settings = {key: value for key, value in settings.items() if key not in SECRETS}
    if plan.action == "resume":
        changed = changed_keys(before["settings"] if before else settings, settings)
        if changed and args.should_log:
            logger.warning("Going on with other settings than the run began with: %s.", ", ".join(changed))
        if before and before.get("data") != fingerprint_contents(data_files) and args.should_log:
            logger.warning("Going on with other data than the run began with: its files have changed.")
    if args.should_save:
        begin_run(Path(args.output_dir), settings, plan, data_files)
    if args.world_size > 1:
        dist.barrier()


def work(trainer: Any, plan: Any) -> int:
    """Trains, evaluates, saves; returns the exit status."""
    from paddlemix.trainer.callbacks import LogFileCallback, plot_loss
    from paddlemix.trainer.run_folder import finish_run, write_json

    args = trainer.args
    folder = Path(args.output_dir)
    results: Dict[str, Any] = {}
    if not plan.recorded:
        trainer.remove_callback(LogFileCallback)  # the log is that of the model beside the results
    if args.do_train:
        if plan.action == "resume" and args.should_log:
            logger.info("Going on from %s.", plan.checkpoint)
        output = trainer.train(plan.checkpoint)
        if trainer.interrupted:
            then = "a benchmark saves nothing" if args.benchmark else "the same command goes on from there"
            logger.warning("Stopped at step %d; %s.", trainer.state.global_step, then)
            return 128 + (trainer.stopper.signal_number or 0)
        results["train"] = output.metrics
        if args.benchmark:
            benchmark(trainer, results["train"])
        else:
            trainer.save_model()  # before the evaluation, whose data may turn out bad
            if args.should_save:
                logger.info("Trained model: %s", folder)
    if args.do_eval:
        results["eval"] = trainer.last_evaluation or trainer.evaluate()
    if args.do_predict:
        results["predict"] = trainer.write_predictions()
    if args.should_save:
        for name, metrics in results.items():
            write_json(folder / f"{name}_results.json", metrics)
        if args.do_train:
            plot_loss(folder)
        if plan.recorded:
            finish_run(folder)
    return 0


def benchmark(trainer: Any, metrics: Dict[str, float]) -> None:
    """``benchmark``: says how fast it was and what it took; the result isn't saved."""
    import resource

    import paddle

    from paddlemix.trainer.memory import format_bytes

    args, seconds = trainer.args, metrics["train_seconds"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if args.device.startswith("gpu"):
        peak = paddle.device.cuda.max_memory_allocated()
    if args.should_log:
        logger.info("Effective samples per second: %.3f", trainer.trained_samples * args.dataset_world_size / seconds)
        logger.info("Supervised tokens per second: %.2f", trainer.trained_supervised_tokens / seconds)
        logger.info("Peak memory: %s", format_bytes(peak))


def print_keys() -> None:
    """The keys that PaddleNLP's TrainingArguments don't have, with their defaults."""
    from dataclasses import fields

    from paddlemix.trainer.arguments import FinetuneArguments

    own = FinetuneArguments.__annotations__
    print("\nKeys, beside those of PaddleNLP's TrainingArguments:")
    for item in fields(FinetuneArguments):
        if item.name in own:
            default = "" if item.default is None else f" [{item.default}]"
            print(f"  {item.name}{default}: {item.metadata.get('help', '')}")


def main(argv: Optional[Sequence[str]] = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    prepare_cpu()
    quiet_start()
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        print_keys()
        return 0 if argv else 1
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("paddlemix").setLevel(logging.INFO)
    return exit_status(lambda: run(argv), "error: interrupted before a checkpoint was saved.")


if __name__ == "__main__":
    sys.exit(main())

"""Fine-tuning figures of this project beside transformers + PEFT, in turn, on the same model and data.

    python benchmarks/finetune.py --peer-python PEER/bin/python [--steps 12] [--batch 4] [--repeats 1] [--bfloat16]

The model is the built-in default one, the data easy-VQA; both are made under ``--folder`` on the first run. Both
sides train in float32 with two threads on the same batches in the same order: ours through
``supervised_finetune.py`` with ``"benchmark": true``, theirs in a loop of its own (forward, backward, AdamW). With
``--bfloat16`` both train in mixed precision too: ours with ``"bf16": true``, theirs under ``torch.autocast``. The
peer's environment holds ``torch==2.13.0 "transformers<5" peft``. Prints a Markdown table.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Optional

HERE = Path(__file__).resolve().parent
TOOLS = HERE.parent / "paddlemix" / "tools"
MODEL = "paddlemix/llava-smol-demo"
LORA = {"lora": True, "lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.0}
WARM_UP = 2  # steps that are not counted, on either side
PACKED = {"mixtoken": True, "per_device_train_batch_size": 1}


def prepare(folder: Path, rows: int) -> None:
    """easy-VQA as JSON, with all questions of a picture in a row and with one, and the model in Hugging Face's layout."""
    run = [sys.executable]
    for name, rounds in (("easy_vqa", 0), ("easy_vqa_single", 1)):
        if not (folder / name / "train.json").exists():
            script = HERE.parent / "paddlemix" / "examples" / "llava" / "easy_vqa.py"
            options = ["--output_dir", str(folder / name), "--rounds", str(rounds), "--limit", str(rows)]
            subprocess.run([*run, str(script), *options], check=True)
    if not (folder / "huggingface").exists():
        script = TOOLS / "convert_checkpoint.py"
        out = ["--output_dir", str(folder / "huggingface"), "--layout", "huggingface", "--dtype", "float32"]
        subprocess.run([*run, str(script), "--model_name_or_path", MODEL, *out], check=True)


def settings(folder: Path, arguments, **changes) -> dict:
    return {
        "model_name_or_path": MODEL,
        "dataset": {"train": [{"name": "chatml_dataset", "data_files": str(folder / "easy_vqa" / "train.json")}]},
        "output_dir": str(folder / "run"),
        "overwrite_output_dir": True,
        "max_steps": arguments.steps,
        "per_device_train_batch_size": arguments.batch,
        "max_length": arguments.max_length,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "do_train": True,
        "disable_tqdm": True,
        "benchmark": True,
        **changes,
    }


def ours(folder: Path, config: dict, threads: int) -> dict:
    """Runs the tool as a user does; tokens and seconds are those of its own log, the median of the steps from the third on."""
    path = folder / "benchmark.json"
    path.write_text(json.dumps(config, indent=2))
    variables = dict(os.environ, FLAGS_paddle_num_threads=str(threads), MKL_NUM_THREADS=str(threads))
    done = subprocess.run(
        [sys.executable, str(TOOLS / "supervised_finetune.py"), str(path)],
        capture_output=True,
        text=True,
        env=variables,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    speed = statistics.median(line["supervised_tokens"] / line["interval_runtime"] for line in counted_steps(config))
    peak, unit = re.search(r"Peak memory: ([\d.]+) (\w+)", done.stderr).groups()
    return {"tokens_per_second": speed, "peak_mb": float(peak) * {"GB": 1024, "MB": 1}[unit[0] + "B"]}


def counted_steps(config: dict) -> list:
    """What the run has logged of each step, from the third on."""
    log = [json.loads(line) for line in (Path(config["output_dir"]) / "train_log.jsonl").read_text().splitlines()]
    return [line for line in log if "interval_runtime" in line][WARM_UP:]


def theirs(folder: Path, batches: Path, lora: bool, bfloat16: bool, arguments) -> dict:
    command = [arguments.peer_python, str(HERE / "finetune_torch.py"), str(folder / "huggingface"), str(batches)]
    command += ["--threads", str(arguments.threads)] + (["--lora"] if lora else [])
    command += ["--bfloat16"] if bfloat16 else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def dump_batches(folder: Path, config: dict) -> Path:
    """The first ``max_steps`` batches as the collator gives them, in file order; one .npz for the peer."""
    import numpy as np

    from paddlemix.datasets.collator import LlavaCollator
    from paddlemix.processors.llava import LlavaProcessor

    processor = LlavaProcessor.from_pretrained(MODEL)
    rows = json.loads((folder / "easy_vqa" / "train.json").read_text())
    size = config["per_device_train_batch_size"]
    collator, held = LlavaCollator(0), {}
    for step in range(config["max_steps"]):
        samples = []
        for i in range(step * size, (step + 1) * size):
            row = dict(rows[i], image=str(folder / "easy_vqa" / rows[i]["image"]))
            samples.append(processor.encode_conversation(row, max_length=config["max_length"]))
        for key, value in collator(samples).items():
            held[f"{step}:{key}"] = value
    path = folder / "batches.npz"
    np.savez(path, **held)
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="python of the environment with torch and peft")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--bfloat16", action="store_true", help="mixed precision too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(".cache/benchmarks/finetune"))
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(HERE.parent))
    prepare(folder, rows=max(400, arguments.steps * arguments.batch))
    base = settings(folder, arguments)
    batches = dump_batches(folder, base)
    print(
        "| run | supervised tokens/s: paddle | transformers + PEFT | ratio | peak MB: paddle | transformers | ratio |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    runs = {"LoRA": LORA, "full": {}}
    if arguments.bfloat16:
        runs.update({f"{name}, bfloat16": {**changes, "bf16": True} for name, changes in runs.items()})
    for name, changes in runs.items():
        results = {"ours": [], "theirs": []}
        for _ in range(arguments.repeats):
            results["ours"].append(ours(folder, {**base, **changes}, arguments.threads))
            results["theirs"].append(theirs(folder, batches, "lora" in changes, "bf16" in changes, arguments))

        def median(side, key, results=results):
            return statistics.median(result[key] for result in results[side])

        cells = [name]
        for key in ("tokens_per_second", "peak_mb"):
            a, b = median("ours", key), median("theirs", key)
            cells += [f"{a:.0f}" if a > 99 else f"{a:.2f}", f"{b:.0f}" if b > 99 else f"{b:.2f}", f"{a / b:.2f}"]
        print("| " + " | ".join(cells) + " |", flush=True)
    print("\n| LoRA, rows of | batches | tokens in one | supervised tokens/s | padding |\n|---|---|---|---|---|")
    packing("all questions", folder / "easy_vqa", folder, base, arguments)
    packing("one question", folder / "easy_vqa_single", folder, base, arguments, arguments.max_length)


def packing(what: str, data: Path, folder: Path, base: dict, arguments, room: Optional[int] = None) -> None:
    """LoRA on padded batches and on packed sequences, and what share of either is padding.

    Args:
        what: the rows of ``data``, for the table.
        room: tokens of a packed sequence; as many as in a padded batch if None.
    """
    import numpy as np

    from paddlemix.datasets.packing import pack_lengths
    from paddlemix.processors.llava import LlavaProcessor

    processor = LlavaProcessor.from_pretrained(MODEL)
    rows = json.loads((data / "train.json").read_text())
    samples = [dict(row, image=str(data / row["image"])) for row in rows]
    lengths = [len(processor.encode_conversation(row)["input_ids"]) for row in samples]
    order = np.random.default_rng(0).permutation(lengths)
    batches = [order[i : i + arguments.batch] for i in range(0, len(order), arguments.batch)]
    room = room or arguments.batch * max(lengths)
    packs = pack_lengths(lengths, room)
    padded = [len(batch) * max(batch) for batch in batches]
    figures = {
        "padded": (statistics.mean(padded), 1 - sum(lengths) / sum(padded)),
        "packed": (room, 1 - sum(lengths) / (room * len(packs))),
    }
    base = {**base, **LORA, "dataset": {"train": [{"name": "chatml_dataset", "data_files": str(data / "train.json")}]}}
    for name, changes in (("padded", {}), ("packed", {**PACKED, "max_length": room})):
        speeds = [ours(folder, {**base, **changes}, arguments.threads) for _ in range(arguments.repeats)]
        speed = statistics.median(one["tokens_per_second"] for one in speeds)
        tokens, waste = figures[name]
        print(f"| {what} | {name} | {tokens:.0f} | {speed:.1f} | {100 * waste:.1f}% |", flush=True)


if __name__ == "__main__":
    main()

"""transformers + PEFT's side of finetune.py: trains on the given batches, prints one JSON line."""

import argparse
import json
import resource
import statistics
import time

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

IGNORE, IMAGE = -100, -200


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("batches")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = LlavaForConditionalGeneration.from_pretrained(arguments.folder, dtype=torch.float32)
    model.model.vision_tower.requires_grad_(False)
    if arguments.lora:
        from peft import LoraConfig, get_peft_model

        targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
        model = get_peft_model(
            model,
            LoraConfig(
                r=16, lora_alpha=32, lora_dropout=0.0, target_modules=targets, modules_to_save=["multi_modal_projector"]
            ),
        )
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    held = np.load(arguments.batches)
    steps = 1 + max(int(name.split(":")[0]) for name in held.files)
    image_token = model.config.image_token_id
    speeds = []
    for step in range(steps):
        started = time.perf_counter()
        batch = {name: torch.from_numpy(held[f"{step}:{name}"]) for name in ("input_ids", "labels", "attention_mask")}
        batch["input_ids"] = torch.where(batch["input_ids"] == IMAGE, image_token, batch["input_ids"])
        if f"{step}:pixel_values" in held.files:
            batch["pixel_values"] = torch.from_numpy(held[f"{step}:pixel_values"])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=arguments.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        if step >= 2:  # the first two warm up
            tokens = int((batch["labels"][:, 1:] != IGNORE).sum())
            speeds.append(tokens / (time.perf_counter() - started))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"tokens_per_second": statistics.median(speeds), "peak_mb": peak}))


if __name__ == "__main__":
    main()

"""A checkpoint's folder without weights (LLaMA-2's real tokenizer, a tiny config), pictures, and rows about them."""

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any, Dict, Iterable, List, Tuple

import numpy as np
from PIL import Image

from paddlemix.models.llava.configuration import LlavaConfig
from paddlemix.processors.image_processing import LlavaImageProcessor
from paddlemix.processors.llava import LlavaProcessor
from tests.support import llama2_tokenizer_folder

SIDE = 28
ANYRES = {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],  # (width, height)
}


def tiny_config(**changes: Any) -> LlavaConfig:
    sizes: Dict[str, Any] = dict(
        vocab_size=32000,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vision_config=dict(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=SIDE,
            patch_size=7,
        ),
    )
    return LlavaConfig(**{**sizes, **changes})


def tiny_folder(folder: Path, **changes: Any) -> Path:
    """What training opens of a checkpoint before its weights."""
    config = tiny_config(**changes)
    llama2_tokenizer_folder(folder)
    config.save_pretrained(str(folder))
    if config.vision is not None:
        LlavaImageProcessor(
            size=SIDE,
            crop_size=SIDE,
            image_aspect_ratio=config.image_aspect_ratio,
            image_grid_pinpoints=config.image_grid_pinpoints,
        ).save_pretrained(folder)
    return folder


def tiny_processor(folder: Path, **changes: Any) -> LlavaProcessor:
    return LlavaProcessor.from_pretrained(tiny_folder(folder, **changes))


def picture(path: Path, size: Tuple[int, int] = (40, 30), seed: int = 0, **save: Any) -> Path:
    """Noise of a seed, so that every picture differs, in the format that the name asks for."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **save)
    return path


def turned_exif() -> Image.Exif:
    """EXIF that swaps width and height."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def png_with_exif_behind_its_pixels(path: Path, size: Tuple[int, int]) -> Path:
    held = io.BytesIO()
    Image.new("RGB", size).save(held, "PNG")
    exif = turned_exif().tobytes()[6:]  # without JPEG's "Exif" mark
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    data = held.getvalue()
    path.write_bytes(data[:-12] + chunk + data[-12:])  # the last twelve bytes are IEND
    return path


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """JSON lines for ``.jsonl``, else an array with one row per line, so that row n is on line n + 1."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\n".join(lines) if path.suffix == ".jsonl" else "[\n" + ",\n".join(lines) + "\n]\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def mixed_rows(folder: Path) -> List[Dict[str, Any]]:
    """Rows of all formats, text-only, with one and with several pictures of all shapes, written under ``folder``."""
    for number, size in enumerate([(28, 28), (100, 25), (20, 90), (61, 47), (300, 200)]):
        picture(folder / f"{number}.png", size, seed=number)
    return [
        {"conversations": [["Name a colour.", "Red."], ["Another?", "Blue, I would say."]]},
        {"image": "0.png", "conversations": [["<image>\nWhat is this?", "Noise."], ["Sure?", "Yes, quite sure."]]},
        {
            "id": "7",
            "image": ["1.png", "2.png"],
            "conversations": [
                {"from": "human", "value": "Compare <image> with <image>, please."},
                {"from": "gpt", "value": "One is wide and one is tall."},
            ],
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "3.png"}, {"type": "text", "text": "So?"}]},
                {"role": "assistant", "content": "双方 😀 are fine."},
                {"role": "user", "content": [{"type": "image", "image": "4.png"}, {"type": "text", "text": "And?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Larger."}]},
            ]
        },
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello to you."}]},
        {"image": "2.png", "conversations": [["Is it tall?\n<image>", "Yes."]]},
    ]

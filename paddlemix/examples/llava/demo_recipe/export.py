"""The trained parts in the form in which the package ships them: fp16 safetensors, without the decoder they adapt."""

import json
from pathlib import Path
from typing import Dict

import numpy as np

__all__ = ["export"]

ADAPTER_CONFIG_KEYS = ("r", "lora_alpha", "rslora", "target_modules")


def export(trained: Path, folder: Path) -> Dict[str, int]:
    """Writes ``vision_tower.safetensors``, ``mm_projector.safetensors`` and ``adapter/`` to ``folder``.

    Args:
        trained: the output folder of the last stage, a LoRA adapter with the projector beside it.

    Returns:
        bytes of each file.
    """
    from safetensors.numpy import save_file

    from paddlemix import LlavaLlamaForCausalLM
    from paddlemix.models.llava.adapter_files import LORA_CONFIG, LORA_WEIGHTS
    from paddlemix.models.llava.tensor_files import convert, open_tensor_file

    (folder / "adapter").mkdir(parents=True, exist_ok=True)
    model = LlavaLlamaForCausalLM.from_pretrained(trained)
    sizes = {}

    def save(tensors: Dict[str, np.ndarray], name: str) -> None:
        save_file({key: value.astype(np.float16) for key, value in tensors.items()}, str(folder / name))
        sizes[name] = (folder / name).stat().st_size

    for part in ("vision_tower", "mm_projector"):
        state = {key: value.numpy() for key, value in model.state_dict().items() if key.startswith(f"llama.{part}.")}
        save(state, f"{part}.safetensors")
    source = next(trained / name for name in LORA_WEIGHTS if (trained / name).is_file())
    adapter = {key: convert(tensor.read(), tensor.dtype, "float32") for key, tensor in open_tensor_file(source).items()}
    save(adapter, f"adapter/{LORA_WEIGHTS[0]}")
    config = json.loads((trained / LORA_CONFIG).read_text(encoding="utf-8"))
    kept = {key: config[key] for key in ADAPTER_CONFIG_KEYS if key in config}
    (folder / "adapter" / LORA_CONFIG).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return sizes

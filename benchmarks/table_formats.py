"""How a table of objects has to be written for the default model's decoder to copy a box from it, without any training.

    python benchmarks/table_formats.py

The table stands in the prompt, as embeddings of its words, in three formats; the decoder is given the right answer word by
word, and each digit of the box counts for itself. Prints a Markdown table of the shares that it would have said itself.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from paddlemix.runtime import prepare_cpu  # noqa: E402

prepare_cpu()

import numpy as np  # noqa: E402
import paddle  # noqa: E402

from paddlemix import LlavaLlamaForCausalLM, LlavaProcessor  # noqa: E402
from paddlemix.examples.llava.demo_recipe.questions import box_text  # noqa: E402
from paddlemix.examples.llava.demo_recipe.scenes import make_scene  # noqa: E402
from paddlemix.models.llava.demo import build, find_smollm2  # noqa: E402
from paddlemix.processors.tokenizer import encode_text  # noqa: E402

SCENES = range(5000, 5120)
FORMATS = {
    "as in an answer: `small red circle: 0.13, 0.22, …`": lambda box: [f": {box}\n"],
    "a point before each pair: `small red circle . 1 3 . 2 2 …`": lambda box: list(
        box.replace("0.", ".").replace(", ", "")
    ),
    "digits only: `small red circle 1 3 2 2 …`": lambda box: [*box.replace("0.", "").replace(", ", ""), ";"],
}


def main():
    folder = Path(".cache/benchmarks/decoder")
    if not folder.is_dir():
        build(folder, find_smollm2(), [])  # the decoder as it is published
    model, processor = LlavaLlamaForCausalLM.from_pretrained(folder), LlavaProcessor.from_pretrained(folder)
    model.eval()

    def ids(text):
        return encode_text(processor.tokenizer, text)

    print("| table | " + " | ".join(f"digit {n}" for n in range(1, 9)) + " |\n" + "|---" * 9 + "|")
    for name, written in FORMATS.items():
        right = [digits_said(model, ids, make_scene(seed), seed, written) for seed in SCENES]
        shares = np.mean([each for each in right if each is not None], axis=0)
        print(f"| {name} | " + " | ".join(f"{share:.2f}" for share in shares) + " |", flush=True)


@paddle.no_grad()
def digits_said(model, ids, scene, seed, written):
    """Which of the eight decimals of one object's box the decoder gives; None for a scene of one object."""
    if len(scene.objects) < 2:
        return None
    asked = random.Random(seed).choice(scene.objects)
    prompt = ids("<|im_start|>user\n")
    for obj in scene.objects:
        for piece in (f" {obj.full_name}", *written(box_text(obj.box))):
            prompt += ids(piece)
    prompt += ids(f"\nGive the box of the {asked.name}.<|im_end|>\n<|im_start|>assistant\n")
    answer = ids(box_text(asked.box))
    guess = model(paddle.to_tensor([prompt + answer])).logits[0].argmax(-1).tolist()[len(prompt) - 1 : -1]
    zero, point = ids("0.")
    decimals = [n for n in range(len(answer)) if n >= 2 and answer[n - 1] == point or n >= 3 and answer[n - 2] == point]
    assert len(decimals) == 8 and answer[0] == zero
    return [guess[n] == answer[n] for n in decimals]


if __name__ == "__main__":
    main()

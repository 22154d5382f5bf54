"""Draws a small data set that teaches the default model something new: what road signs say.

    python paddlemix/examples/llava/road_signs.py --output_dir data/road_signs

gives ``train.json`` (160 pictures), ``test.json`` (80 others) and ``images/``. A sign is a coloured shape that the model
can see already; what it means, it can only learn here. Two questions are asked about each picture: what its one sign says,
and whether a driver may go on.
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path
from typing import List, Optional

if __package__ in (None, ""):  # run by its path, from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from paddlemix.examples.llava.demo_recipe.scenes import Scene, SceneObject, draw_scene
from paddlemix.tools.command_line import exit_status

# what a sign looks like -> what it says, and whether one may go on
SIGNS = {
    ("red", "circle"): ("no entry", "no"),
    ("red", "triangle"): ("give way", "yes"),
    ("blue", "circle"): ("turn right", "yes"),
    ("blue", "rectangle"): ("parking", "yes"),
    ("yellow", "diamond"): ("main road", "yes"),
    ("green", "rectangle"): ("exit", "yes"),
    ("black", "cross"): ("railway", "no"),
    ("orange", "star"): ("danger", "no"),
}
SAYS, GO_ON = "What does the sign say?", "May a driver go on?"
TRAIN, TEST = range(0, 160), range(100_000, 100_080)


def sign_scene(seed: int) -> Scene:
    """A picture with one sign, anywhere, in any size; the signs take turns."""
    rng = random.Random(f"sign-{seed}")
    color, shape = sorted(SIGNS)[seed % len(SIGNS)]
    side = rng.uniform(0.2, 0.42)
    left, top = rng.uniform(0, 1 - side), rng.uniform(0, 1 - side)
    height = side * rng.uniform(0.7, 1) if shape == "rectangle" else side
    sign = SceneObject("small" if side < 0.28 else "large", color, shape, (left, top, left + side, top + height))
    return Scene(seed, tuple(rng.randint(230, 255) for _ in range(3)), (sign,))


def write(folder: Path) -> None:
    """``train.json`` with both questions in one row, and ``test.json`` with a row for each, told apart by their type."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = {"train": [], "test": []}
    for split, seeds in (("train", TRAIN), ("test", TEST)):
        for seed in seeds:
            scene, image = sign_scene(seed), f"images/{seed}.png"
            draw_scene(scene, 128).save(folder / image)
            says, go_on = SIGNS[scene.objects[0].color, scene.objects[0].shape]
            if split == "train":
                rounds = [[SAYS, says], [GO_ON, go_on]]
                random.Random(f"order-{seed}").shuffle(rounds)  # each is asked first in half of the rows
                rounds[0][0] = f"<image>\n{rounds[0][0]}"
                rows[split].append({"image": image, "conversations": rounds})
            else:
                rows[split] += [
                    {"image": image, "question_type": kind, "conversations": [[f"<image>\n{question}", answer]]}
                    for kind, question, answer in (("sign", SAYS, says), ("go on", GO_ON, go_on))
                ]
    for split, made in rows.items():
        (folder / f"{split}.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="data/road_signs")
    arguments = parser.parse_args(argv)

    def work() -> int:
        write(Path(os.path.expanduser(arguments.output_dir)))
        print(f"{len(TRAIN)} pictures to learn from and {len(TEST)} to test with are in {arguments.output_dir}")
        return 0

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())

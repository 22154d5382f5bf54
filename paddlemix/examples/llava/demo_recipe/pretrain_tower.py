"""Stage 1: teaches the vision tower to see the objects of a picture; the heads that ask for them are thrown away.

The tower's patches are taken in cells of 2 x 2. In the cell that holds an object's centre, all four patches tell the
object's colour, shape and size, and each of them one side of its box: left, top, right, bottom. Every patch is also asked
what covers it, which teaches the layers below quickly.

    python -m paddlemix.examples.llava.demo_recipe.pretrain_tower --output_dir OUT

Each step's pictures follow from its number, so a run that was stopped goes on from its last checkpoint as if it had not
been.
"""

import argparse
import logging
import random
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

import numpy as np
from PIL import Image

from paddlemix.examples.llava.demo_recipe.easy_vqa_data import find_easy_vqa, object_box, object_labels, read_questions
from paddlemix.examples.llava.demo_recipe.scenes import COLORS, SHAPES, SIZES, draw_scene, make_scene
from paddlemix.examples.llava.demo_recipe.training import Checkpoint, make_optimizer, quick_products
from paddlemix.tools.command_line import exit_status

logger = logging.getLogger("paddlemix.demo_recipe")

GRID = 8  # patches along a side
CELLS = GRID // 2
SIDE = 64
IMAGE_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
IMAGE_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
TOWER_PREFIX = "llama.vision_tower."

COLOR_NAMES = tuple(COLORS)
NOTHING_COLOR, NOTHING_SHAPE = len(COLOR_NAMES), len(SHAPES)
UNKNOWN = -1  # a label at which nothing is trained

VALIDATION_SEEDS = range(900_000_000, 900_000_512)

# (size or None, colour or None, shape or None, box)
Target = Tuple[Optional[str], Optional[str], Optional[str], Tuple[float, float, float, float]]


def cell_patches() -> np.ndarray:
    """[4, C]: for each place in a cell (and so for each side of the box), the patch of every cell in raster order."""
    rows, columns = np.divmod(np.arange(CELLS * CELLS), CELLS)
    first = 2 * rows * GRID + 2 * columns
    return np.stack([first, first + 1, first + GRID, first + GRID + 1])


def digits(box: Tuple[float, float, float, float]) -> List[Tuple[int, int]]:
    """The two decimals of each side: 0.23, 0.33, … -> (2, 3), (3, 3), …"""
    return [divmod(min(99, max(0, round(100 * side))), 10) for side in box]


def labels_of(objects: List[Target]) -> Dict[str, np.ndarray]:
    """Labels of one picture: color, shape, size [4, C] of the cells' patches, box [4, C] and digits [4, C, 2] of the side
    that a patch tells, cover_color and cover_shape [P] of all patches."""
    cells = CELLS * CELLS
    labels = {
        "color": np.full((4, cells), NOTHING_COLOR),
        "shape": np.full((4, cells), NOTHING_SHAPE),
        "size": np.full((4, cells), UNKNOWN),
        "box": np.full((4, cells), UNKNOWN, dtype=np.float32),
        "digits": np.full((4, cells, 2), UNKNOWN),
        "cover_color": np.full(GRID * GRID, NOTHING_COLOR),
        "cover_shape": np.full(GRID * GRID, NOTHING_SHAPE),
    }
    middle = (np.arange(GRID) + 0.5) / GRID
    for size, color, shape, box in objects:
        left, top, right, bottom = box
        column = min(CELLS - 1, int((left + right) / 2 * CELLS))
        row = min(CELLS - 1, int((top + bottom) / 2 * CELLS))
        cell = row * CELLS + column
        labels["color"][:, cell] = COLOR_NAMES.index(color) if color else UNKNOWN
        labels["shape"][:, cell] = SHAPES.index(shape) if shape else UNKNOWN
        labels["size"][:, cell] = SIZES.index(size) if size else UNKNOWN
        labels["box"][:, cell] = box
        labels["digits"][:, cell] = digits(box)
        inside = np.outer((middle >= top) & (middle < bottom), (middle >= left) & (middle < right)).reshape(-1)
        labels["cover_color"][inside] = labels["color"][0, cell]
        labels["cover_shape"][inside] = labels["shape"][0, cell]
    return labels


def scene_picture(seed: int, most: int = 5) -> Tuple[np.ndarray, List[Target]]:
    """A drawn scene as uint8 [64, 64, 3] and its objects; drawn at several sizes, as pictures come in practice."""
    scene = make_scene(seed, most=most)
    pixels = random.Random(seed).choice((SIDE, SIDE, 96, 128, 256))
    image = draw_scene(scene, pixels)
    if pixels != SIDE:
        image = image.resize((SIDE, SIDE), Image.BICUBIC)
    return np.asarray(image), [(o.size, o.color, o.shape, o.box) for o in scene.objects]


class EasyVQAPictures:
    """The train pictures of easy-VQA in memory, with what their questions say about them."""

    def __init__(self, data: Path):
        labels = object_labels(read_questions(data, "train"))
        self.pictures, self.targets = [], []
        for number, known in sorted(labels.items()):
            with Image.open(data / "train" / "images" / f"{number}.png") as file:
                image = file.convert("RGB")
            self.pictures.append(np.asarray(image))
            self.targets.append((None, known.get("color"), known.get("shape"), object_box(image)))

    def take(self, rng: random.Random) -> Tuple[np.ndarray, List[Target]]:
        """A picture by chance, mirrored half of the time."""
        number = rng.randrange(len(self.pictures))
        picture, (size, color, shape, box) = self.pictures[number], self.targets[number]
        if rng.random() < 0.5:
            picture, box = picture[:, ::-1], (1 - box[2], box[1], 1 - box[0], box[3])
        return picture, [(size, color, shape, box)]


def normalize(pictures: List[np.ndarray]) -> np.ndarray:
    """uint8 [64, 64, 3] each -> float32 pixel_values [N, 3, 64, 64], scaled as CLIP's image processor does."""
    stacked = np.stack(pictures).astype(np.float32) / 255
    return ((stacked - IMAGE_MEAN) / IMAGE_STD).transpose(0, 3, 1, 2)


def collate(
    samples: List[Tuple[np.ndarray, List[Target]]], label: Callable[[List[Target]], Dict[str, np.ndarray]]
) -> Tuple[np.ndarray, Dict[str, np.ndarray]]:
    """pixel_values of the pictures, and the labels that ``label`` makes of their objects, stacked."""
    each = [label(objects) for _, objects in samples]
    return normalize([picture for picture, _ in samples]), {k: np.stack([one[k] for one in each]) for k in each[0]}


def batch_of_step(step: int, size: int, easy: EasyVQAPictures, seed: int):
    """A quarter of easy-VQA, three quarters of scenes; the same for the same step."""
    rng = random.Random(f"tower-{seed}-{step}")
    from_easy = size // 4
    samples = [easy.take(rng) for _ in range(from_easy)]
    samples += [scene_picture(step * size + i) for i in range(size - from_easy)]
    return collate(samples, labels_of)


def grid_positions(width: int) -> np.ndarray:
    """[P, width]: sines and cosines of a patch's row and column, from half a wave over the grid to half a wave per patch.

    Neighbours are alike, so that attention knows from the first step what is near.
    """
    place = np.arange(GRID) + 0.5
    waves = np.geomspace(np.pi / GRID, np.pi / 2, width // 4)
    angles = place[:, None] * waves
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # [GRID, width / 2]
    rows, columns = np.divmod(np.arange(GRID * GRID), GRID)
    return np.concatenate([line[rows], line[columns]], axis=1).astype(np.float32)


def initialize_layers(layers, vision: Dict) -> None:
    """The spread of CLIP's own start (github.com/openai/CLIP, initialize_parameters), but that keys start as queries, so
    that a patch attends to what is like it: learns from fewer pictures (Trockman and Kolter, 2023, "Mimetic initialization
    of self-attention layers").
    """
    from paddle import nn

    width, depth = vision["hidden_size"], vision["num_hidden_layers"]
    spread = {
        "q_proj": width**-0.5,
        "v_proj": width**-0.5,
        "out_proj": width**-0.5 * (2 * depth) ** -0.5,
        "linear1": (2 * width) ** -0.5,
        "linear2": width**-0.5 * (2 * depth) ** -0.5,
    }
    for name, layer in layers.named_sublayers():
        if isinstance(layer, nn.Linear):
            nn.initializer.Normal(std=spread.get(name.split(".")[-1], 0.02))(layer.weight)
    for name, layer in layers.named_sublayers():
        if name.endswith("self_attn"):
            layer.k_proj.weight.set_value(layer.q_proj.weight.clone())


def initialize(model, vision: Dict) -> None:
    """:func:`initialize_layers`, and positions that start as waves."""
    import paddle

    width = vision["hidden_size"]
    initialize_layers(model, vision)
    embedding = model.tower.vision_tower.vision_model.positional_embedding.weight
    embedding.set_value(paddle.to_tensor(np.concatenate([np.zeros((1, width), np.float32), grid_positions(width)])))


def build(vision: Dict):
    """The tower and its heads, which are only for this stage."""
    from paddle import nn

    from paddlemix.models.llava.configuration import CLIPVisionConfig
    from paddlemix.models.llava.vision_tower import CLIPVisionTower

    class TowerWithHeads(nn.Layer):
        def __init__(self):
            super().__init__()
            width = vision["hidden_size"]
            self.tower = CLIPVisionTower(CLIPVisionConfig(**vision), select_layer=-1, select_feature="patch")
            self.color = nn.Linear(width, NOTHING_COLOR + 1)
            self.shape = nn.Linear(width, NOTHING_SHAPE + 1)
            self.size = nn.Linear(width, len(SIZES))
            self.side = nn.LayerList([nn.Linear(width, 1 + 20) for _ in range(4)])
            self.cover = nn.Linear(width, NOTHING_COLOR + NOTHING_SHAPE + 2)
            initialize(self, vision)

        def forward(self, pixel_values):
            import paddle

            features = self.tower(pixel_values)  # [N, P, D]
            patches = cell_patches()
            cells = features.index_select(paddle.to_tensor(patches.reshape(-1)), axis=1)
            cells = cells.reshape([0, *patches.shape, features.shape[-1]])  # [N, 4, C, D]
            sides = paddle.stack([head(cells[:, place]) for place, head in enumerate(self.side)], axis=1)
            cover = self.cover(features)
            return {
                "color": self.color(cells),
                "shape": self.shape(cells),
                "size": self.size(cells),
                "box": sides[..., 0],
                "digits": sides[..., 1:].reshape([0, 0, 0, 2, 10]),
                "cover_color": cover[:, :, : NOTHING_COLOR + 1],
                "cover_shape": cover[:, :, NOTHING_COLOR + 1 :],
            }

    return TowerWithHeads()


NOTHING_WEIGHT = 0.3
LOSS_WEIGHTS = {"color": 1, "size": 0.3, "shape": 1, "digits": 1, "cover_color": 0.5, "cover_shape": 0.5}


def loss_of(outputs, labels):
    """Cross-entropy of every head where there is a label, and the box's distance in tenths of the picture."""
    import paddle
    import paddle.nn.functional as F

    total = 0
    for name, weight in LOSS_WEIGHTS.items():
        logits = outputs[name].flatten(0, -2)
        target = paddle.to_tensor(labels[name]).astype("int64").flatten()
        classes = logits.shape[-1]
        # most cells and patches hold nothing; at full weight, saying "nothing" everywhere would be learnt for long
        balance = (
            paddle.ones([classes])
            if name in ("size", "digits")
            else paddle.to_tensor([1.0] * (classes - 1) + [NOTHING_WEIGHT])
        )
        loss = F.cross_entropy(logits, target, weight=balance, ignore_index=UNKNOWN, reduction="mean")
        total = total + weight * loss
    box = paddle.to_tensor(labels["box"])
    known = (box >= 0).astype("float32")
    distance = ((outputs["box"] - box).abs() * known).sum() / known.sum().clip(min=1)
    return total + 10 * distance


def accuracy_of(outputs, labels) -> Dict[str, float]:
    """Share of right labels; for colour and shape where there is an object, ``nothing`` where there is none."""
    result = {}
    there = labels["color"] != NOTHING_COLOR
    for name in ("color", "shape", "size", "digits"):
        guess = outputs[name].numpy().argmax(-1)
        known = (labels[name] != UNKNOWN) & (there if labels[name].ndim == 3 else there[..., None])
        result[name] = float((guess == labels[name])[known].mean())
    result["nothing"] = float((outputs["color"].numpy().argmax(-1) == NOTHING_COLOR)[~there].mean())
    boxes = outputs["box"].numpy()[there]
    result["box_error"] = float(np.abs(boxes - labels["box"][there]).mean())
    return result


def pretrain(output_dir: str, vision: Dict, **options) -> Dict[str, float]:
    """Trains, saves ``tower.safetensors`` in ``output_dir``, and returns the accuracy on drawn validation scenes.

    Args:
        vision: sizes of the tower.
        options: steps, batch_size, learning_rate, seed, easy_vqa (data folder) and save_minutes of :func:`_pretrain`.
    """
    import paddle

    # The optimizer's state goes by generated names, which must not depend on what this process built before.
    with paddle.utils.unique_name.guard():
        return _pretrain(output_dir, vision, **options)


def _pretrain(
    output_dir: str,
    vision: Dict,
    steps: int = 2000,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    seed: int = 1,
    easy_vqa: Optional[str] = None,
    save_minutes: float = 2.0,
) -> Dict[str, float]:
    import paddle
    from safetensors.numpy import save_file

    out = Path(output_dir)
    out.mkdir(parents=True, exist_ok=True)
    easy = EasyVQAPictures(find_easy_vqa(easy_vqa))
    paddle.seed(seed)
    model = build(vision)
    schedule, optimizer = make_optimizer(model.parameters(), steps, learning_rate)
    checkpoint = Checkpoint(out / "checkpoint.pdparams", {"model": model, "optimizer": optimizer})
    start = checkpoint.restore()

    began = saved = time.time()
    for step in range(start, steps):
        pixel_values, labels = batch_of_step(step, batch_size, easy, seed)
        with quick_products():
            loss = loss_of(model(paddle.to_tensor(pixel_values)), labels)
            loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        schedule.step()
        if step % 50 == 0:
            accuracy = accuracy_of(model(paddle.to_tensor(pixel_values)), labels) if step % 250 == 0 else {}
            text = " ".join(f"{name} {value:.3f}" for name, value in accuracy.items())
            pace = (step + 1 - start) * batch_size / (time.time() - began)
            logger.info("step %d/%d loss %.3f %.0f pictures/s %s", step, steps, float(loss), pace, text)
        if time.time() - saved > 60 * save_minutes:
            checkpoint.save(step + 1)
            saved = time.time()
    checkpoint.save(steps)
    figures = validate(model)
    logger.info("validation %s", figures)
    tower = {TOWER_PREFIX + name: value.numpy() for name, value in model.tower.state_dict().items()}
    save_file(tower, str(out / "tower.safetensors"))
    return figures


def validate(model) -> Dict[str, float]:
    import paddle

    pixel_values, labels = collate([scene_picture(seed) for seed in VALIDATION_SEEDS], labels_of)
    model.eval()
    with paddle.no_grad():
        parts = [model(paddle.to_tensor(pixel_values[i : i + 64])) for i in range(0, len(pixel_values), 64)]
    model.train()
    return accuracy_of({name: paddle.concat([part[name] for part in parts]) for name in parts[0]}, labels)


def main(argv: Optional[List[str]] = None) -> int:
    from paddlemix.models.llava.demo import DEMO_VISION

    parser = argparse.ArgumentParser(description="Pretrains the default model's vision tower.")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--easy_vqa", help="easy-VQA's data folder (default: the installed package's)")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    def work() -> int:
        pretrain(vision=DEMO_VISION, **vars(arguments))
        return 0

    return exit_status(work, "stopped; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())

"""The data of the teaching demo: pictures show what the answers say, and the test's pictures are not trained on."""

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

from paddlemix.examples.llava import road_signs
from paddlemix.examples.llava.demo_recipe.scenes import COLORS
from paddlemix.processors.rows import parse_row

ROOT = Path(__file__).parents[2]


def test_rows_and_pictures(tmp_path):
    script = ROOT / "paddlemix" / "examples" / "llava" / "road_signs.py"
    command = [sys.executable, str(script), "--output_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == f"160 pictures to learn from and 80 to test with are in {tmp_path}\n", done.stderr
    train, test = (json.loads((tmp_path / f"{split}.json").read_text()) for split in ("train", "test"))
    assert len(train) == 160 and len(test) == 160
    pictures = {split: {row["image"] for row in rows} for split, rows in (("train", train), ("test", test))}
    assert not pictures["train"] & pictures["test"]
    contents = [Image.open(tmp_path / name).tobytes() for names in pictures.values() for name in names]
    assert len(set(contents)) == 240
    first = []
    for row in train:
        messages, images = parse_row(row)
        answers = {messages[i]["content"].replace("<image>\n", ""): messages[i + 1]["content"] for i in (0, 2)}
        assert len(images) == 1 and (answers[road_signs.SAYS], answers[road_signs.GO_ON]) in road_signs.SIGNS.values()
        first.append(next(iter(answers)))
    assert 50 < first.count(road_signs.SAYS) < 110  # either question comes first, so that each is learnt by itself


def test_where_it_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert road_signs.main(["--output_dir=~/signs"]) == 0
    assert (tmp_path / "signs" / "train.json").is_file()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "images").write_text("x")
    assert road_signs.main(["--output_dir", str(tmp_path / "bad")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/bad/images can't be written: File exists.\n"


def test_every_sign_is_drawn_in_its_color():
    seen = set()
    for seed in list(road_signs.TRAIN)[:16] + list(road_signs.TEST)[:16]:
        scene = road_signs.sign_scene(seed)
        (sign,) = scene.objects
        picture = road_signs.draw_scene(scene, 64)
        middle = picture.getpixel((int(64 * sign.center[0]), int(64 * sign.center[1])))
        assert sum(abs(a - b) for a, b in zip(middle, COLORS[sign.color])) < 60
        seen.add((sign.color, sign.shape))
    assert seen == set(road_signs.SIGNS)

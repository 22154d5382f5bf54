"""LlavaImageProcessor against transformers and the original release (fixtures/make_image_fixtures.py)."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from paddlemix.errors import UserError
from paddlemix.models.llava.anyres import num_tiles
from paddlemix.models.llava.configuration import LlavaConfig
from paddlemix.processors.image_processing import CLIP_MEAN, CLIP_STD, FILE_NAME, LlavaImageProcessor

FIXTURES = Path(__file__).parents[1] / "fixtures"
GOLDEN = dict(np.load(FIXTURES / "image_processing.npz"))
if int(PIL.__version__.split(".")[0]) < 13:  # which resizes tall pictures in another order
    GOLDEN.update(np.load(FIXTURES / "image_processing_before_pillow13.npz"))
PICTURES = [key.split("/")[1] for key in GOLDEN if key.startswith("picture/")]
PHOTO = FIXTURES / "chelsea_small.png"

CANVASES = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # (width, height)
SMALL_CANVASES = [[width // 21, height // 21] for width, height in CANVASES]

MODES = {
    "square": dict(size=16, crop_size=16),
    "square_small_crop": dict(size=20, crop_size=16),
    "square_large_crop": dict(size=15, crop_size=20),
    "stretch": dict(size={"height": 16, "width": 16}, do_center_crop=False),
    "pad": dict(size=16, crop_size=16, image_aspect_ratio="pad"),
    "anyres": dict(size=16, crop_size=16, image_aspect_ratio="anyres", image_grid_pinpoints=SMALL_CANVASES),
}

# files as they are published: what a folder holds -> what is expected of it
CLIP_OLD = {
    "crop_size": 336,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
    "resample": 3,
    "size": 336,
}
CLIP_NEW = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(CLIP_MEAN),
    "image_processor_type": "CLIPImageProcessor",
    "image_std": list(CLIP_STD),
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
}
HF_PAD = {**CLIP_NEW, "image_processor_type": "LlavaImageProcessorFast", "do_pad": True}
HF_NEXT = {
    **CLIP_NEW,
    "aspect_ratio_setting": "anyres",
    "do_pad": True,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336]],  # (height, width)
    "image_processor_type": "LlavaNextImageProcessor",
}


def write(folder: Path, values, name=FILE_NAME) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


def make_config(**values) -> LlavaConfig:
    return LlavaConfig(vision_config={"image_size": values.pop("edge", 336)}, **values)


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("mode", MODES)
def test_pixel_values_equal_the_references(mode, picture):
    values = LlavaImageProcessor(**MODES[mode]).preprocess(Image.fromarray(GOLDEN[f"picture/{picture}"]))
    expected = GOLDEN[f"{mode}/{picture}"]
    assert values.dtype == np.float32 and values.flags.c_contiguous
    assert values.shape == expected.shape
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["photo", "tall_photo"])
@pytest.mark.parametrize("mode", ["square", "pad", "anyres"])
def test_a_photograph_at_real_size(mode, name):
    image = Image.open(PHOTO)
    if name == "tall_photo":
        image = image.transpose(Image.Transpose.ROTATE_90)
    values = LlavaImageProcessor(image_aspect_ratio=mode, image_grid_pinpoints=CANVASES).preprocess(image)
    golden = {key: GOLDEN[f"{name}/{mode}/{key}"] for key in ("shape", "places", "values", "sums", "sha256")}
    assert list(values.shape) == golden["shape"].tolist()
    np.testing.assert_allclose(values.reshape(-1)[golden["places"]], golden["values"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(values.sum(axis=(2, 3), dtype=np.float64), golden["sums"], atol=1e-2)
    # not only close: byte for byte
    assert hashlib.sha256(values.tobytes()).hexdigest() == str(golden["sha256"])


def test_any_size_gives_as_many_tiles_as_the_model_counts():
    config = make_config(edge=16, image_aspect_ratio="anyres", image_grid_pinpoints=SMALL_CANVASES)
    processor = LlavaImageProcessor.from_config(config)
    for size in [(1, 1), (1, 90), (90, 1), (17, 16), (100, 30), (30, 100), (48, 47)]:
        assert processor(Image.new("RGB", size)).shape == (num_tiles(size, config), 3, 16, 16)


def test_a_grey_or_transparent_picture_is_made_rgb_first():
    processor = LlavaImageProcessor(size=8, crop_size=8)
    white = processor(Image.new("RGB", (9, 9), "white"))
    np.testing.assert_array_equal(processor(Image.new("RGBA", (9, 9), (200, 0, 0, 0))), white)
    np.testing.assert_array_equal(processor(Image.new("L", (9, 9), 255)), white)


@pytest.mark.parametrize("values", [CLIP_OLD, CLIP_NEW, {}])
@pytest.mark.parametrize("ratio", ["square", "pad", "anyres"])
def test_a_clip_file_leaves_the_aspect_ratio_to_the_model(tmp_path, values, ratio):
    config = make_config(image_aspect_ratio=ratio, image_grid_pinpoints=CANVASES)
    processor = LlavaImageProcessor.from_pretrained(write(tmp_path / "m", values), config)
    image = Image.open(PHOTO)
    expected = LlavaImageProcessor(image_aspect_ratio=ratio, image_grid_pinpoints=CANVASES)(image)
    np.testing.assert_array_equal(processor(image), expected)
    assert processor.image_grid_pinpoints == CANVASES


def test_hugging_face_files_say_the_aspect_ratio(tmp_path):
    assert LlavaImageProcessor.from_pretrained(write(tmp_path / "a", HF_PAD)).image_aspect_ratio == "pad"
    no_pad = {**HF_PAD, "do_pad": False}
    assert LlavaImageProcessor.from_pretrained(write(tmp_path / "b", no_pad)).image_aspect_ratio == "square"
    # do_pad of llava_next is about batches
    anyres = LlavaImageProcessor.from_pretrained(write(tmp_path / "c", HF_NEXT))
    assert anyres.image_aspect_ratio == "anyres"
    assert anyres.image_grid_pinpoints == [[672, 336], [336, 672], [672, 672], [336, 1008]]  # (width, height)
    assert anyres(Image.new("RGB", (300, 1000))).shape[0] == 4
    assert anyres(Image.new("RGB", (1000, 300))).shape[0] == 3


def test_the_nested_file_of_newer_folders(tmp_path):
    folder = write(tmp_path / "m", {"image_processor": HF_PAD, "patch_size": 14}, "processor_config.json")
    assert LlavaImageProcessor.from_pretrained(folder).image_aspect_ratio == "pad"
    only_text = write(tmp_path / "n", {"patch_size": 14, "processor_class": "LlavaProcessor"}, "processor_config.json")
    assert LlavaImageProcessor.from_pretrained(only_text).image_aspect_ratio == "square"


def test_a_folder_without_a_file_takes_the_towers_size(tmp_path):
    config = make_config(edge=56, image_aspect_ratio="pad")
    processor = LlavaImageProcessor.from_pretrained(tmp_path, config)
    assert processor(Image.new("RGB", (9, 30))).shape == (1, 3, 56, 56)
    assert processor.image_aspect_ratio == "pad"
    assert LlavaImageProcessor.from_pretrained(tmp_path)(Image.new("RGB", (9, 30))).shape == (1, 3, 336, 336)


@pytest.mark.parametrize("mode", MODES)
def test_saved_and_read_again_it_is_the_same(tmp_path, mode):
    processor = LlavaImageProcessor(**MODES[mode], image_mean=(0.5, 0.4, 0.3), image_std=(0.2, 0.3, 0.4))
    path = processor.save_pretrained(tmp_path / "new" / "folder")
    again = LlavaImageProcessor.from_pretrained(path.parent)
    assert vars(again) == vars(processor)


@pytest.mark.parametrize(
    "ratio, hf_type",
    [("square", "CLIPImageProcessor"), ("pad", "LlavaImageProcessor"), ("anyres", "LlavaNextImageProcessor")],
)
def test_the_saved_file_means_the_same_to_transformers(tmp_path, ratio, hf_type):
    # what transformers makes of each of these files is what image_processing.npz was made with
    canvases = [[32, 16], [16, 48]]
    processor = LlavaImageProcessor(size=16, crop_size=16, image_aspect_ratio=ratio, image_grid_pinpoints=canvases)
    values = json.loads(processor.save_pretrained(tmp_path).read_text())
    assert values["image_processor_type"] == hf_type
    assert values["size"] == {"shortest_edge": 16} and values["crop_size"] == {"height": 16, "width": 16}
    assert values["image_grid_pinpoints"] == [[16, 32], [48, 16]]  # (height, width)
    assert values.get("do_pad", False) == (ratio == "pad")


def test_an_explicit_aspect_ratio_overrules_file_and_config(tmp_path):
    folder = write(tmp_path / "m", HF_PAD)
    config = make_config(image_aspect_ratio="anyres", image_grid_pinpoints=CANVASES)
    processor = LlavaImageProcessor.from_pretrained(folder, config, image_aspect_ratio="anyres")
    assert processor.image_aspect_ratio == "anyres" and processor.image_grid_pinpoints == CANVASES


@pytest.mark.parametrize(
    "values, config, words",
    [
        ("{", {}, "can't be read as JSON"),
        ("[1]", {}, "expected a JSON object"),
        ({"size": "big"}, {}, "size is 'big'; expected a number of pixels"),
        ({"size": {"longest_edge": 3}}, {}, "longest_edge"),
        ({"crop_size": -1}, {}, "crop_size"),
        ({"image_mean": [0.5, 0.5]}, {}, "image_mean has 2 numbers"),
        ({"image_std": [0, 1, 1]}, {}, "image_std"),
        ('{"crop_size": Infinity}', {}, "wrong kind"),
        ('{"size": {"shortest_edge": 1e400}}', {}, "wrong kind"),
        ({"image_mean": ["a", "b", "c"]}, {}, "wrong kind"),
        ({"resample": 17}, {}, "resample is 17"),
        ({"image_aspect_ratio": "oval"}, {}, "'oval'; expected one of square, pad, anyres"),
        ({"image_grid_pinpoints": [3]}, {}, "image_grid_pinpoints is"),
        (CLIP_NEW, {"edge": 224}, "336 x 336 pixels, but the vision tower takes 224 x 224"),
        ({"do_center_crop": False}, {}, "different sizes"),
        (HF_PAD, {"image_aspect_ratio": "anyres", "image_grid_pinpoints": CANVASES}, "make the two agree"),
        (HF_NEXT, {}, "make the two agree"),
        (HF_NEXT, {"image_aspect_ratio": "anyres", "image_grid_pinpoints": CANVASES}, "make the two agree"),
    ],
)
def test_a_bad_file_is_told_in_one_sentence(tmp_path, values, config, words):
    with pytest.raises(UserError, match=words) as caught:
        LlavaImageProcessor.from_pretrained(write(tmp_path / "m", values), make_config(**config))
    assert "\n" not in str(caught.value)
    assert FILE_NAME in str(caught.value) or "image_grid_pinpoints" in str(caught.value)


# ---- boxes ----


@pytest.mark.parametrize(
    "ratio, size, box, pixels",
    [
        ("pad", (400, 200), (0.0, 0.25, 1.0, 0.75), (0, 0, 400, 200)),  # the picture within its square
        ("pad", (400, 200), (0.25, 0.5, 0.5, 0.6), (100, 100, 200, 140)),
        ("pad", (200, 400), (0.5, 0.1, 0.75, 0.2), (100, 40, 200, 80)),
        ("pad", (200, 400), (0.0, 0.0, 1.0, 1.0), (0, 0, 200, 400)),  # what lies on the padding is clipped
        ("pad", (200, 200), (0.1, 0.2, 0.3, 0.4), (20, 40, 60, 80)),
        ("pad", (3, 2), (0.0, 0.0, 1.0, 1.0), (0, 0, 3, 2)),  # odd: the padding is below
        ("square", (400, 200), (0.0, 0.0, 1.0, 1.0), (100, 0, 300, 200)),  # the centre crop
        ("square", (200, 400), (0.5, 0.5, 1.0, 1.0), (100, 200, 200, 300)),
        ("anyres", (400, 200), (0.5, 0.5, 1.0, 1.0), (200, 100, 400, 200)),  # the whole picture, squeezed
    ],
)
def test_a_box_goes_back_to_the_pixels_of_the_picture(ratio, size, box, pixels):
    processor = LlavaImageProcessor(image_aspect_ratio=ratio, image_grid_pinpoints=CANVASES)
    assert processor.undo_box(box, size) == pytest.approx(pixels)


def test_a_stretched_picture_is_its_own_frame():
    processor = LlavaImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    assert processor.undo_box((0.5, 0, 1, 0.5), (400, 100)) == pytest.approx((200, 0, 400, 50))


@pytest.mark.parametrize("mode", MODES)
def test_boxes_mark_the_same_thing_in_the_picture_and_in_pixel_values(mode):
    # a white block in a black picture must be found, in the first tile, where normalise_box says
    settings = {**MODES[mode]}
    for key in ("size", "crop_size"):
        if key in settings:
            settings[key] = (
                {side: edge * 8 for side, edge in settings[key].items()}
                if isinstance(settings[key], dict)
                else settings[key] * 8
            )
    if "image_grid_pinpoints" in settings:
        settings["image_grid_pinpoints"] = [[side * 8 for side in point] for point in SMALL_CANVASES]
    processor = LlavaImageProcessor(**settings, do_rescale=False, do_normalize=False)
    for size, block in [((300, 200), (120, 60, 180, 110)), ((200, 300), (60, 120, 110, 180))]:
        image = Image.new("RGB", size)
        image.paste("white", block)
        tile = processor(image)[0, 0]
        rows, columns = np.nonzero(tile > 127)
        x1, y1, x2, y2 = processor.normalise_box(block, size)
        edge = tile.shape[0]
        found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert found == pytest.approx((x1 * edge, y1 * edge, x2 * edge, y2 * edge), abs=1)
        assert processor.undo_box((x1, y1, x2, y2), size) == pytest.approx(block)


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(60, 5000), (5000, 60), (1, 300), (301, 200), (200, 301), (90, 90), (5, 2)])
@pytest.mark.parametrize("band", [None, 1000])
def test_a_square_in_bands_is_resized_as_the_whole_one(size, band, monkeypatch):
    if band:
        monkeypatch.setattr("paddlemix.processors.image_processing.BAND_PIXELS", band)
    image, side = noise(*size), max(size)
    square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in CLIP_MEAN))
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    found = LlavaImageProcessor(image_aspect_ratio="pad")(image)
    assert np.array_equal(found, LlavaImageProcessor()(square))


@pytest.mark.parametrize("size", [(30, 2000), (2000, 30)])
def test_the_middle_of_a_thin_picture_is_that_of_the_whole_one(size, monkeypatch):
    processor = LlavaImageProcessor(size=40, crop_size=48, do_normalize=False, do_rescale=False)
    whole = processor(noise(*size))
    monkeypatch.setattr("paddlemix.processors.image_processing.MAX_PIXELS", 90_000)  # fewer than the whole has
    np.testing.assert_allclose(processor(noise(*size)), whole, rtol=0, atol=1)


@pytest.mark.parametrize(
    "ratio, size",
    [
        ("square", (1, 20000)),
        ("square", (20000, 1)),
        ("pad", (20000, 900)),
        ("pad", (108, 14000)),
        ("anyres", (1, 9000)),
    ],
)
def test_long_pictures_are_taken(ratio, size):
    processor = LlavaImageProcessor(image_aspect_ratio=ratio, image_grid_pinpoints=CANVASES)
    assert processor(Image.new("RGB", size, "white"))[0].max() > 1.9


def test_a_picture_too_thin_to_be_blown_up_is_refused():
    """It would take gigabytes, or minutes, on its way to a few thousand numbers."""
    uncropped = LlavaImageProcessor(do_center_crop=False)
    padded, cropped = LlavaImageProcessor(image_aspect_ratio="pad"), LlavaImageProcessor()
    for processor, size in ((uncropped, (1, 2000)), (padded, (1, 40000)), (padded, (10**6, 1)), (cropped, (1, 10**6))):
        with pytest.raises(UserError, match=rf"^The given picture \({size[0]} x {size[1]} pixels\) is too thin"):
            processor(Image.new("RGB", size))
        with pytest.raises(UserError, match="^cat.png .* is too thin"):
            processor.check(size, "cat.png")


def test_what_callers_of_hugging_face_write(tmp_path):
    processor = LlavaImageProcessor(size=16, crop_size=16)
    one, two = noise(40, 30), noise(20, 30)
    two.save(tmp_path / "two.png")
    expected = np.concatenate([processor(one), processor(two)])
    assert np.array_equal(processor([one, tmp_path / "two.png"]), expected)
    assert np.array_equal(processor(images=[np.asarray(one), str(tmp_path / "two.png")]), expected)
    assert np.array_equal(processor(np.stack([np.asarray(one)] * 2))[1:], expected[:1])
    for kind in ("np", "pd"):
        values = processor.preprocess([one, two], return_tensors=kind)
        assert isinstance(values["pixel_values"], np.ndarray) == (kind == "np")
        assert np.array_equal(np.asarray(values["pixel_values"]), expected)
        assert values["image_sizes"].tolist() == [[40, 30], [20, 30]]
    with pytest.raises(UserError, match="return_tensors is 'pt'; expected 'pd'"):
        processor.preprocess(one, return_tensors="pt")


def test_importing_the_room_is_light():
    code = (
        "import sys, paddlemix.processors.image_processing, paddlemix.processors.images, paddlemix.processors.boxes;"
        "import paddlemix.models.llava.anyres;"
        "print([name for name in ('paddle', 'paddlenlp', 'requests') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

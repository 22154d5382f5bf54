"""LlavaImageProcessor: a picture (PIL, RGB) becomes the tower's input, pixel_values [n, 3, H, W].

The three ways of ``image_aspect_ratio``:

    square   shortest edge to ``size``, centre crop to ``crop_size`` (CLIP's own way; LLaVA-1.0 and Hugging Face's 1.5)
    pad      first a square of the mean colour around the picture (LLaVA-1.5)
    anyres   n = 1 + columns x rows: the picture squeezed into a square, then the tiles of the best canvas (LLaVA-1.6)

The numbers equal those of transformers' CLIPImageProcessor, LlavaImageProcessor and LlavaNextImageProcessor (the ones
on PIL; their torch versions resize differently) and of ``llava/mm_utils.py`` of the original release, all with the
same Pillow: since version 13 it shrinks tall pictures vertically first, which moves some bytes by a few levels.
"""

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
from PIL import Image

from paddlemix.errors import UserError, folder_to_write, naming
from paddlemix.models.llava.anyres import select_best_resolution
from paddlemix.processors.images import MAX_PIXELS, image_list, load_image

if TYPE_CHECKING:  # the config brings PaddleNLP with it
    from paddlemix.models.llava.configuration import LlavaConfig

__all__ = ["CLIP_MEAN", "CLIP_STD", "FILE_NAME", "LlavaImageProcessor", "has_image_processor"]

logger = logging.getLogger("paddlemix.processors.image_processing")

FILE_NAME = "preprocessor_config.json"
NESTED_FILE_NAME = "processor_config.json"  # newer Hugging Face folders may nest the same under "image_processor"

# Radford et al., 2021: the mean and deviation of CLIP's training pictures
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

ASPECT_RATIOS = ("square", "pad", "anyres")
DEFAULT_SIZE = 336
BAND_PIXELS = 2**24  # of a padded square at once: 64 MiB, as PIL holds RGB
MAX_SQUARE = 2**30  # pixels of a padded square's rows that hold the picture: ten seconds

# the class in transformers that treats a picture in the same way
HF_TYPES = {"square": "CLIPImageProcessor", "pad": "LlavaImageProcessor", "anyres": "LlavaNextImageProcessor"}
SETTINGS = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std",
)  # fmt: skip

Box = Sequence[float]
Frame = Tuple[float, float, float, float]


class LlavaImageProcessor:
    """Turns pictures into pixel_values, and boxes between the picture's pixels and the frame that the model sees.

    Args:
        size: the edge after the resize: ``{"shortest_edge": n}`` or n keeps the aspect ratio,
            ``{"height": h, "width": w}`` does not.
        crop_size: ``{"height": h, "width": w}`` or n, the centre crop and the size of a tile.
        image_mean, image_std: per channel, for values in 0..1.
        rescale_factor: what the bytes are multiplied with.
        resample: PIL's number of the filter; 3 is bicubic.
        do_resize, do_center_crop, do_rescale, do_normalize: switch a step off.
        image_aspect_ratio: ``square``, ``pad`` or ``anyres``.
        image_grid_pinpoints: [width, height] of each canvas of anyres.
    """

    def __init__(
        self,
        size: Union[int, Dict[str, int], None] = None,
        crop_size: Union[int, Dict[str, int], None] = None,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        rescale_factor: float = 1 / 255,
        resample: int = 3,
        do_resize: bool = True,
        do_center_crop: bool = True,
        do_rescale: bool = True,
        do_normalize: bool = True,
        image_aspect_ratio: str = "square",
        image_grid_pinpoints: Optional[Sequence[Sequence[int]]] = None,
    ):
        self.size = _size_dict(DEFAULT_SIZE if size is None else size, "size")
        self.crop_size = _size_dict(DEFAULT_SIZE if crop_size is None else crop_size, "crop_size")
        self.image_mean = _per_channel(image_mean, "image_mean")
        self.image_std = _per_channel(image_std, "image_std")
        self.rescale_factor = float(rescale_factor)
        self.resample = resample
        self.do_resize = do_resize
        self.do_center_crop = do_center_crop
        self.do_rescale = do_rescale
        self.do_normalize = do_normalize
        self.image_aspect_ratio = image_aspect_ratio
        self.image_grid_pinpoints = [list(map(int, point)) for point in image_grid_pinpoints or []]
        if self.image_aspect_ratio not in ASPECT_RATIOS:
            raise UserError(
                f"image_aspect_ratio is {image_aspect_ratio!r}; expected one of {', '.join(ASPECT_RATIOS)}."
            )
        if self.image_aspect_ratio == "anyres" and not self.image_grid_pinpoints:
            raise UserError("image_aspect_ratio is 'anyres' but image_grid_pinpoints names no canvas.")
        if any(std <= 0 for std in self.image_std):
            raise UserError(f"image_std is {self.image_std}; expected numbers above 0.")
        try:
            Image.Resampling(self.resample)
        except ValueError:
            raise UserError(f"resample is {resample!r}; expected a number of PIL's filters, 0 to 5.") from None

    # ---- files ----

    @classmethod
    def from_config(cls, config: "LlavaConfig") -> "LlavaImageProcessor":
        """CLIP's own values at the tower's size, with the aspect ratio and the canvases of the model."""
        size = config.vision.image_size if config.vision is not None else DEFAULT_SIZE
        return cls(
            size=size,
            crop_size=size,
            image_aspect_ratio=config.image_aspect_ratio,
            image_grid_pinpoints=config.image_grid_pinpoints,
        )

    @classmethod
    def from_pretrained(
        cls, folder: Union[str, Path], config: Optional["LlavaConfig"] = None, image_aspect_ratio: Optional[str] = None
    ) -> "LlavaImageProcessor":
        """Reads ``preprocessor_config.json`` of CLIP, of Hugging Face's llava and llava_next, or our own.

        Args:
            folder: where the file is. Without one, ``config``'s values hold (:meth:`from_config`), else CLIP-L/336's.
            config: the model's; gives aspect ratio and canvases where the file doesn't, and the size to hold against.
            image_aspect_ratio: overrules both.

        Raises:
            UserError: the file isn't readable, holds a value of a wrong kind, makes pictures of another size than the
                tower takes, or disagrees with the config about anyres.
        """
        path, values = _read(Path(folder))
        settings = {key: values[key] for key in SETTINGS if values.get(key) is not None}
        # files of a type that never crops (or resizes) say so by null
        settings.update({key: False for key in SETTINGS if key.startswith("do_") and values.get(key, "") is None})
        if config is not None and config.vision is not None:
            settings.setdefault("size", config.vision.image_size)
            settings.setdefault("crop_size", config.vision.image_size)
        pinpoints = _file_pinpoints(values)
        ratio = _file_aspect_ratio(values, pinpoints)
        if config is not None:
            _check_agreement(path, ratio, pinpoints, config, overruled=image_aspect_ratio is not None)
            ratio = ratio or config.image_aspect_ratio
            pinpoints = pinpoints or config.image_grid_pinpoints
        try:
            processor = cls(
                **settings, image_aspect_ratio=image_aspect_ratio or ratio or "square", image_grid_pinpoints=pinpoints
            )
        except UserError as error:
            raise UserError(f"{path}: {error}" if path else str(error)) from None
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{path} holds a value of the wrong kind: {error}.") from error
        if config is not None and config.vision is not None:
            processor._check_tile_size(config.vision.image_size, path)
        return processor

    def save_pretrained(self, folder: Union[str, Path]) -> Path:
        """Writes ``preprocessor_config.json``, which transformers reads with the same meaning; returns its path."""
        # every class of transformers that reads this file takes the canvases as (height, width)
        values = {
            "image_processor_type": HF_TYPES[self.image_aspect_ratio],
            "image_aspect_ratio": self.image_aspect_ratio,
            **{key: getattr(self, key) for key in SETTINGS},
            "do_convert_rgb": True,
        }
        if self.image_aspect_ratio == "pad":
            values["do_pad"] = True
        if self.image_grid_pinpoints:
            values["image_grid_pinpoints"] = [[height, width] for width, height in self.image_grid_pinpoints]
        path = folder_to_write(folder) / FILE_NAME
        with naming(path):
            path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        return path

    def _check_tile_size(self, expected: int, path: Optional[Path]) -> None:
        squared = self.image_aspect_ratio != "square"  # what comes to the resize is a square already
        if self.do_center_crop:
            got = (self.crop_size["width"], self.crop_size["height"])
        elif self.do_resize and "shortest_edge" not in self.size:
            got = (self.size["width"], self.size["height"])
        elif self.do_resize and squared:
            got = (self.size["shortest_edge"],) * 2
        else:
            raise UserError(
                f"{path or FILE_NAME} leaves pictures of different sizes; set do_center_crop to true, or size to a "
                "height and a width."
            )
        if got != (expected, expected):
            raise UserError(
                f"{path or FILE_NAME} makes pictures of {got[0]} x {got[1]} pixels, but the vision tower takes "
                f"{expected} x {expected} (vision_config.image_size); mend crop_size and size."
            )

    # ---- pictures ----

    def check(self, size: Sequence[int], name: str = "The given picture") -> None:
        """Refuses a picture that is so thin that it would grow beyond all measure on its way to the model.

        Args:
            size: its width and height.
            name: what the error calls it.

        Raises:
            UserError: it is too thin.
        """
        width, height = size
        if self.image_aspect_ratio == "pad":
            side = max(width, height)
            made = side, side
            fits = side * height <= MAX_SQUARE and self._padded_size(size)[0] * side <= MAX_PIXELS
        elif self.image_aspect_ratio == "square" and self.do_resize:
            made = self._resized((width, height))
            fits = made[0] * (height if self.do_center_crop else made[1]) <= MAX_PIXELS
        else:
            return
        if not fits:
            raise UserError(
                f"{name} ({width} x {height} pixels) is too thin: on its way to the model it would have {made[0]} x "
                f"{made[1]}; cut it, or scale it down."
            )

    def preprocess(self, images: Any, return_tensors: Optional[str] = None) -> Union[np.ndarray, Dict[str, Any]]:
        """The tiles of a picture, or of a list of them behind each other.

        Args:
            images: a picture (PIL, path, URL, array), or a list of them.
            return_tensors: ``pd`` or ``np``, as Hugging Face's callers write it, for a dict with ``pixel_values`` and
                ``image_sizes`` [M, 2] (width, height).

        Returns:
            float32 [n, 3, H, W], of each picture the whole one first; n is the number of pictures unless anyres.

        Raises:
            UserError: a picture that can't be opened, or is too thin.
        """
        opened = [load_image(image) for image in image_list(images)]
        if not opened:
            raise UserError("The image processor got an empty list; expected a picture, or some.")
        tiles = [self._normalise(np.stack([np.asarray(tile) for tile in self._tiles(image)])) for image in opened]
        pixel_values = tiles[0] if len(tiles) == 1 else np.concatenate(tiles)
        if return_tensors is None:
            return pixel_values
        values = {"pixel_values": pixel_values, "image_sizes": np.array([image.size for image in opened], np.int64)}
        if return_tensors == "np":
            return values
        if return_tensors != "pd":
            raise UserError(
                f"return_tensors is {return_tensors!r}; expected 'pd' (Paddle's tensors) or 'np' (NumPy's arrays)."
            )
        import paddle

        return {name: paddle.to_tensor(value) for name, value in values.items()}

    __call__ = preprocess

    def _tiles(self, image: Image.Image) -> List[Image.Image]:
        self.check(image.size)
        if self.image_aspect_ratio == "pad":
            return [self._crop_middle(self._pad_and_resize(image))]
        if self.image_aspect_ratio == "anyres":
            return [self._crop_middle(self._resize(tile)) for tile in self._cut_tiles(image)]
        return [self._crop_middle(self._resize(image))]

    def _padded_size(self, size: Sequence[int]) -> Tuple[int, int]:
        side = max(size)
        return self._resized((side, side)) if self.do_resize else (side, side)

    def _pad_and_resize(self, image: Image.Image) -> Image.Image:
        """The picture in the middle of a square of the mean colour, resized.

        The square of a long picture is huge, so only a band of it is there at a time: PIL's resize makes rows narrower
        before it takes them together, and does so too where it gets them in bands.
        """
        side, (width, height) = max(image.size), image.size
        size = self._padded_size(image.size)
        mean = tuple(int(mean * 255) for mean in self.image_mean)
        narrow = Image.new("RGB", (size[0], side), mean)
        rows = max(1, BAND_PIXELS // side)
        for top in range(0, height, rows):
            part = image.crop((0, top, width, min(top + rows, height)))
            band = Image.new("RGB", (side, part.height), mean)
            band.paste(part, ((side - width) // 2, 0))
            narrow.paste(band.resize((size[0], part.height), self.resample), (0, (side - height) // 2 + top))
        return narrow.resize(size, self.resample)

    def _cut_tiles(self, image: Image.Image) -> List[Image.Image]:
        """The picture squeezed into a square, then the tiles of the best canvas, row by row."""
        canvas_width, canvas_height = select_best_resolution(image.size, self.image_grid_pinpoints)
        scale_x, scale_y = canvas_width / image.width, canvas_height / image.height
        if scale_x < scale_y:
            width, height = canvas_width, min(math.ceil(image.height * scale_x), canvas_height)
        else:
            width, height = min(math.ceil(image.width * scale_y), canvas_width), canvas_height
        canvas = Image.new("RGB", (canvas_width, canvas_height))  # black, as in both references
        canvas.paste(
            image.resize((width, height), self.resample), ((canvas_width - width) // 2, (canvas_height - height) // 2)
        )
        step = self.crop_size["height"]
        edge = self._short_edge
        return [image.resize((edge, edge), self.resample)] + [
            canvas.crop((left, top, left + step, top + step))
            for top in range(0, canvas_height, step)
            for left in range(0, canvas_width, step)
        ]

    def _resize(self, image: Image.Image) -> Image.Image:
        if not self.do_resize:
            return image
        size = self._resized(image.size)
        if size[0] * size[1] <= MAX_PIXELS or not self.do_center_crop:
            return image.resize(size, self.resample)
        # a thin picture: of what it is blown up to only the middle is needed; across before down, as PIL goes for the whole
        left, top, width, height = self._crop(size)
        left, top, right, bottom = max(left, 0), max(top, 0), min(left + width, size[0]), min(top + height, size[1])
        across, down, width = image.width / size[0], image.height / size[1], right - left
        box = (left * across, 0, right * across, image.height)
        image = image.resize((width, image.height), self.resample, box)
        return image.resize((width, bottom - top), self.resample, (0, top * down, width, bottom * down))

    def _crop_middle(self, image: Image.Image) -> Image.Image:
        if not self.do_center_crop:
            return image
        left, top, width, height = self._crop(image.size)
        return image.crop((left, top, left + width, top + height))  # what lies outside is black

    def _normalise(self, tiles: np.ndarray) -> np.ndarray:
        """uint8 [n, H, W, 3] -> float32 [n, 3, H, W], by a table: a byte has only 256 values."""
        values = np.arange(256, dtype=np.float64)
        if self.do_rescale:
            values = values * self.rescale_factor
        table = np.repeat(values.astype(np.float32)[None], 3, axis=0)
        if self.do_normalize:
            mean, std = (np.asarray(x, dtype=np.float32)[:, None] for x in (self.image_mean, self.image_std))
            table = (table - mean) / std
        return np.stack([table[channel][tiles[..., channel]] for channel in range(3)], axis=1)

    @property
    def _short_edge(self) -> int:
        return self.size["shortest_edge"] if "shortest_edge" in self.size else min(self.size.values())

    def _resized(self, size: Tuple[int, int]) -> Tuple[int, int]:
        """(width, height) after the resize step."""
        if "shortest_edge" not in self.size:
            return self.size["width"], self.size["height"]
        width, height = size
        edge = self.size["shortest_edge"]
        long = int(edge * max(width, height) / min(width, height))
        return (edge, long) if width <= height else (long, edge)

    def _crop(self, size: Tuple[int, int]) -> Tuple[int, int, int, int]:
        """(left, top, width, height) of the centre crop; negative where the picture is smaller than the crop."""
        width, height = self.crop_size["width"], self.crop_size["height"]
        return (size[0] - width) // 2, (size[1] - height) // 2, width, height

    # ---- boxes ----

    def undo_box(self, box: Box, image_size: Sequence[int]) -> Frame:
        """A box that the model named -> pixels of the picture.

        Args:
            box: x1, y1, x2, y2 in 0..1 of the frame that the model sees: the padded square for ``pad``, the centre
                crop for ``square``, the picture itself for ``anyres`` (whose first tile squeezes all of it).
            image_size: (width, height) of the picture.

        Returns:
            x1, y1, x2, y2 in pixels, clipped to the picture.
        """
        left, top, width, height = self._frame(image_size)
        x1, y1, x2, y2 = box
        return _clip((left + x1 * width, top + y1 * height, left + x2 * width, top + y2 * height), image_size)

    def normalise_box(self, box: Box, image_size: Sequence[int]) -> Frame:
        """The inverse of :meth:`undo_box`, to build data: pixels of the picture -> 0..1 of the model's frame.

        A part of the box that the model doesn't see (outside the centre crop) is cut off.
        """
        left, top, width, height = self._frame(image_size)
        x1, y1, x2, y2 = box
        return _clip(((x1 - left) / width, (y1 - top) / height, (x2 - left) / width, (y2 - top) / height), (1, 1))

    def _frame(self, image_size: Sequence[int]) -> Frame:
        """(left, top, width, height), in pixels of the picture, of what the first tile shows."""
        width, height = (int(side) for side in image_size)
        left = top = 0
        if self.image_aspect_ratio == "pad":
            side = max(width, height)
            left, top, width, height = -((side - width) // 2), -((side - height) // 2), side, side
        shown = (width, height)
        if self.image_aspect_ratio == "anyres":
            shown = (self._short_edge, self._short_edge)
        if self.do_resize:
            shown = self._resized(shown)
        if not self.do_center_crop:
            return left, top, width, height
        crop_left, crop_top, crop_width, crop_height = self._crop(shown)
        scale_x, scale_y = width / shown[0], height / shown[1]
        return left + crop_left * scale_x, top + crop_top * scale_y, crop_width * scale_x, crop_height * scale_y


def _clip(box: Frame, size: Sequence[float]) -> Frame:
    x1, y1, x2, y2 = box
    width, height = float(size[0]), float(size[1])
    return (
        min(max(x1, 0.0), width),
        min(max(y1, 0.0), height),
        min(max(x2, 0.0), width),
        min(max(y2, 0.0), height),
    )


def _size_dict(value: Union[int, Dict[str, int]], name: str) -> Dict[str, int]:
    """The old files hold a number, the new ones a dict; ``crop_size`` is a square, ``size`` the shortest edge."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = {"shortest_edge": int(value)} if name == "size" else {"height": int(value), "width": int(value)}
    allowed = ({"height", "width"}, {"shortest_edge"}) if name == "size" else ({"height", "width"},)
    if not isinstance(value, dict) or set(value) not in allowed or any(int(side) < 1 for side in value.values()):
        raise UserError(
            f"{name} is {value!r}; expected a number of pixels or a dict with "
            f"{' or '.join(' and '.join(sorted(keys)) for keys in allowed)}."
        )
    return {key: int(side) for key, side in value.items()}


def _per_channel(value: Union[float, Sequence[float]], name: str) -> List[float]:
    values = [float(value)] * 3 if isinstance(value, (int, float)) else [float(item) for item in value]
    if len(values) != 3:
        raise UserError(f"{name} has {len(values)} numbers; expected one for each of red, green and blue.")
    return values


def _read(folder: Path) -> Tuple[Optional[Path], Dict[str, Any]]:
    """The file that describes the processor and its values; (None, {}) where the folder has none."""
    for path in (folder / FILE_NAME, folder / NESTED_FILE_NAME):
        if not path.is_file():
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} can't be read as JSON: {error}.") from error
        if not isinstance(values, dict):
            raise UserError(f"{path} holds a {type(values).__name__}; expected a JSON object.")
        if path.name == NESTED_FILE_NAME:
            values = values.get("image_processor")
            if not isinstance(values, dict):  # older ones only describe the text side
                continue
        return path, values
    logger.debug("%s has no %s", folder, FILE_NAME)
    return None, {}


def has_image_processor(folder: Path) -> bool:
    """Whether the folder says how its pictures are treated."""
    return _read(folder)[0] is not None


def _file_type(values: Dict[str, Any]) -> str:
    # very old files name a feature_extractor_type instead
    return str(values.get("image_processor_type") or values.get("feature_extractor_type") or "")


def _file_pinpoints(values: Dict[str, Any]) -> Optional[List[List[int]]]:
    """[width, height] of each canvas; Hugging Face writes (height, width)."""
    pinpoints = values.get("image_grid_pinpoints")
    if not pinpoints:
        return None
    try:
        pairs = [(int(first), int(second)) for first, second in pinpoints]
    except (TypeError, ValueError):
        raise UserError(f"image_grid_pinpoints is {pinpoints!r}; expected a list of [height, width].") from None
    return [[second, first] for first, second in pairs]


def _file_aspect_ratio(values: Dict[str, Any], pinpoints: Optional[List[List[int]]]) -> Optional[str]:
    """What the file says about the aspect ratio, in our key or by its type; None where it says nothing."""
    if values.get("image_aspect_ratio"):
        return values["image_aspect_ratio"]
    kind = _file_type(values)
    if kind.startswith("LlavaNextImageProcessor"):
        return "anyres" if pinpoints else None
    if kind.startswith("LlavaImageProcessor") and values.get("do_pad") is not None:
        return "pad" if values["do_pad"] else "square"
    return None


def _check_agreement(
    path: Optional[Path], ratio: Optional[str], pinpoints: Optional[list], config: "LlavaConfig", overruled: bool
) -> None:
    """A model that counts anyres features needs a processor that cuts the same tiles."""
    if ratio is None or overruled:
        return
    if "anyres" in (ratio, config.image_aspect_ratio) and ratio != config.image_aspect_ratio:
        raise UserError(
            f"{path} says image_aspect_ratio {ratio!r} but the model's config says {config.image_aspect_ratio!r}; "
            "make the two agree."
        )
    if ratio == "anyres" and pinpoints and pinpoints != [list(point) for point in config.image_grid_pinpoints]:
        raise UserError(
            f"{path} has other image_grid_pinpoints than the model's config ({pinpoints} against "
            f"{config.image_grid_pinpoints}, as [width, height]); make the two agree."
        )

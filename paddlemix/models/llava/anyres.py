"""How many features a picture gives, and in which order: grid choice, unpad and packing, as pure functions.

Sizes are always (width, height), and so is every canvas of ``image_grid_pinpoints``. A picture is cut into *tiles*
(what the tower sees, ``tile`` pixels square), and every tile gives ``grid_size`` x ``grid_size`` features:

    square, pad   one tile, the whole picture
    anyres        the whole picture squeezed into one tile, then the tiles of the best canvas, row by row

The numbers equal those of LLaVA-NeXT in transformers, whose lists are (height, width), and of the original release
(``llava/mm_utils.py`` and ``llava/model/llava_arch.py``). The two differ in one place: the scaled side of the picture
inside the canvas is ``int(x)`` in the original and ``int(round(x, 7))`` in transformers, which mends products such as
14.999999999999998. The latter is used here: it is the exact result, and the published LLaVA-NeXT processors count by
it. With the canvases of LLaVA-1.6, 80 of all sizes below 2500 x 2500 (55 x 176, for one) get another number of rows or
columns in the original.

Nothing here needs Paddle except :func:`pack_image_features`, which imports it when it is called.
"""

from typing import TYPE_CHECKING, Optional, Sequence, Tuple

from paddlemix.errors import UserError

if TYPE_CHECKING:  # both are heavy to import
    import paddle

    from paddlemix.models.llava.configuration import CLIPVisionConfig, LlavaConfig

__all__ = ["grid_shape", "num_image_features", "num_tiles", "pack_image_features", "select_best_resolution"]

Size = Tuple[int, int]


def _as_size(size: Sequence[int]) -> Size:
    """(width, height) as plain integers: rows of image_sizes may come as arrays, whose float rounding differs."""
    width, height = (int(side) for side in size)
    if width < 1 or height < 1:
        raise UserError(f"A picture of {width} x {height} pixels has no content; expected at least 1 x 1.")
    return width, height


def _vision(config: "LlavaConfig") -> "CLIPVisionConfig":
    if config.vision is None:
        raise UserError("This model takes text only (its config has no vision_config), but a picture was given.")
    return config.vision


def select_best_resolution(size: Sequence[int], pinpoints: Sequence[Sequence[int]]) -> Size:
    """The canvas that keeps most of the picture's pixels and, among those, wastes least; the first one wins a tie.

    Args:
        size: (width, height) of the picture.
        pinpoints: (width, height) of each canvas.

    >>> select_best_resolution((1000, 500), [(336, 672), (672, 336), (672, 672)])
    (672, 336)
    """
    width, height = _as_size(size)
    if not pinpoints:
        raise UserError("image_grid_pinpoints is empty; expected at least one [width, height] for anyres.")

    def rank(canvas: Sequence[int]) -> Tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]  # max() takes the first of equals

    best = max(pinpoints, key=rank)
    return int(best[0]), int(best[1])


def grid_shape(size: Sequence[int], pinpoints: Sequence[Sequence[int]], tile: int) -> Tuple[int, int]:
    """(columns, rows) of tiles, each ``tile`` pixels square, on the best canvas for a (width, height) picture."""
    width, height = select_best_resolution(size, pinpoints)
    return width // tile, height // tile


def num_tiles(size: Sequence[int], config: "LlavaConfig") -> int:
    """How many rows of ``pixel_values`` a (width, height) picture takes."""
    if config.image_aspect_ratio != "anyres":
        return 1
    columns, rows = grid_shape(size, config.image_grid_pinpoints, _vision(config).image_size)
    return 1 + columns * rows


def num_image_features(size: Sequence[int], config: "LlavaConfig") -> int:
    """How many features (positions in the decoder) a (width, height) picture gives.

    With ``mm_patch_merge_type`` ``flat``: all features of all tiles. ``spatial``: the same number, the tiles' features
    in reading order of the picture. ``spatial_unpad``: without the rows and columns that only hold padding, and with
    a newline after each row. A picture that isn't cut into tiles gives its features alone (the original release merges
    only what comes as a list of pictures' tiles).

    Raises:
        UserError: ``cls_patch`` with a spatial merge of several tiles. A class token has no place in the grid (the
            original release fails on an assertion there, transformers on a reshape).
    """
    vision = _vision(config)
    per_tile = vision.num_patches + (config.mm_vision_select_feature == "cls_patch")
    tiles = num_tiles(size, config)
    merge = config.mm_patch_merge_type
    if tiles == 1 or merge == "flat":
        return tiles * per_tile
    if per_tile != vision.num_patches:
        raise UserError(
            f"mm_vision_select_feature is 'cls_patch', which mm_patch_merge_type {merge!r} with anyres can't place "
            "in the grid; expected 'patch', or mm_patch_merge_type 'flat'."
        )
    if merge == "spatial":
        return tiles * per_tile
    top, bottom, left, right = _unpadded_region(size, config)
    return per_tile + (bottom - top) * (right - left + 1)


def _unpadded_region(size: Sequence[int], config: "LlavaConfig") -> Tuple[int, int, int, int]:
    """(top, bottom, left, right) of the features that see the picture, on the canvas' grid of features.

    The region may be empty for a picture that is much longer than wide (or the other way round).
    """
    width, height = _as_size(size)
    vision = _vision(config)
    columns, rows = grid_shape(size, config.image_grid_pinpoints, vision.image_size)
    columns, rows = columns * vision.grid_size, rows * vision.grid_size
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return padding, rows - padding, 0, columns
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return 0, rows, padding, columns - padding


def pack_image_features(
    features: "paddle.Tensor",
    size: Sequence[int],
    config: "LlavaConfig",
    image_newline: Optional["paddle.Tensor"] = None,
) -> "paddle.Tensor":
    """The features of one picture in the order in which the decoder reads them.

    Args:
        features: [n, P, D], the tiles of one picture after the projector; the whole picture comes first.
        size: (width, height) of the picture.
        image_newline: [D], the vector that ends a row; needed by ``spatial_unpad``.

    Returns:
        [K, D] with K = ``num_image_features(size, config)``.

    Raises:
        UserError: the number of tiles or features isn't what the config says for this size.
    """
    import paddle

    vision = _vision(config)
    merge = config.mm_patch_merge_type
    expected = num_image_features(size, config)  # also refuses what can't be packed
    tiles, per_tile, depth = features.shape
    wanted = (num_tiles(size, config), vision.num_patches + (config.mm_vision_select_feature == "cls_patch"))
    if (tiles, per_tile) != wanted:
        raise UserError(
            f"A picture of {int(size[0])} x {int(size[1])} pixels came with {tiles} tiles of {per_tile} features; "
            f"expected {wanted[0]} of {wanted[1]} by image_aspect_ratio {config.image_aspect_ratio!r} and the tower."
        )
    if merge == "flat" or tiles == 1:
        return features.reshape([tiles * per_tile, depth])
    if merge == "spatial_unpad":
        if image_newline is None:
            raise UserError("mm_patch_merge_type is 'spatial_unpad', but the model has no image_newline.")
        image_newline = image_newline.astype(features.dtype)

    side = vision.grid_size
    columns, rows = grid_shape(size, config.image_grid_pinpoints, vision.image_size)
    # [rows, columns, side, side, D] of tiles -> the canvas in reading order
    canvas = features[1:].reshape([rows, columns, side, side, depth]).transpose([0, 2, 1, 3, 4])
    canvas = canvas.reshape([rows * side, columns * side, depth])
    parts = [features[0]]
    if merge == "spatial":
        parts.append(canvas.reshape([-1, depth]))
    else:
        top, bottom, left, right = _unpadded_region(size, config)
        height = bottom - top
        newlines = image_newline.reshape([1, 1, depth]).expand([height, 1, depth]) if height else None
        if height and right > left:
            lines = paddle.concat([canvas[top:bottom, left:right], newlines], axis=1)
            parts.append(lines.reshape([-1, depth]))
        elif height:  # a sliver: nothing is left of it but its rows' ends
            parts.append(newlines.reshape([-1, depth]))
    packed = paddle.concat(parts)
    assert packed.shape[0] == expected
    return packed

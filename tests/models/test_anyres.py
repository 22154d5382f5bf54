"""The counts and orders of transformers' LLaVA-NeXT and the original release (fixtures/make_image_fixtures.py)."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from paddlemix.errors import UserError
from paddlemix.models.llava.anyres import (
    grid_shape,
    num_image_features,
    num_tiles,
    pack_image_features,
    select_best_resolution,
)

GOLDEN = np.load(Path(__file__).parents[1] / "fixtures" / "anyres.npz")
SETTINGS = json.loads(str(GOLDEN["settings"]))
SIZES = GOLDEN["sizes"].tolist()


def make_config(
    edge=30, patch=10, canvases=((60, 30), (30, 60), (60, 60)), ratio="anyres", merge="spatial_unpad", **kw
):
    """What the functions read of a LlavaConfig; the real one needs PaddleNLP and is used below once."""
    side = edge // patch
    vision = SimpleNamespace(image_size=edge, patch_size=patch, grid_size=side, num_patches=side * side)
    values = dict(
        vision=vision,
        image_aspect_ratio=ratio,
        mm_patch_merge_type=merge,
        mm_vision_select_feature="patch",
        image_grid_pinpoints=[list(canvas) for canvas in canvases],
    )
    return SimpleNamespace(**{**values, **kw})


@pytest.mark.parametrize("name", SETTINGS)
def test_grids_tiles_and_feature_counts_equal_transformers(name):
    edge, patch, canvases = SETTINGS[name]
    config = make_config(edge, patch, canvases)
    table = [
        [*grid_shape(size, canvases, edge), num_tiles(size, config), num_image_features(size, config)] for size in SIZES
    ]
    assert len(table) > 2500
    np.testing.assert_array_equal(table, GOLDEN[f"{name}/table"])


@pytest.mark.parametrize(
    "size, canvas",
    [
        ((1000, 500), (672, 336)),
        ((500, 1000), (336, 672)),
        ((1000, 1000), (672, 672)),
        ((3000, 500), (1008, 336)),
        ((500, 3000), (336, 1008)),
        ((100, 100), (336, 672)),  # a tie: the first canvas
    ],
)
def test_best_canvas_by_hand(size, canvas):
    canvases = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    assert select_best_resolution(size, canvases) == canvas
    assert select_best_resolution(np.array(size), canvases) == canvas


def test_packing_puts_every_feature_where_transformers_puts_it():
    import paddle

    edge, patch, canvases = SETTINGS["tiny"]
    config = make_config(edge, patch, canvases)
    newline = paddle.full([1], -1.0)
    orders, start = GOLDEN["tiny/order"], 0
    for index in GOLDEN["tiny/order_index"].tolist():
        tiles = num_tiles(SIZES[index], config)
        features = paddle.arange(tiles * 9, dtype="float32").reshape([tiles, 9, 1])
        packed = pack_image_features(features, SIZES[index], config, newline).numpy()[:, 0]
        count = num_image_features(SIZES[index], config)
        assert len(packed) == count
        np.testing.assert_array_equal(packed, orders[start : start + count])
        start += count
    assert start == len(orders)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (70, 30), (31, 64), (500, 499), (9, 4000)])
@pytest.mark.parametrize("ratio", ["square", "pad", "anyres"])
@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
@pytest.mark.parametrize("select", ["patch", "cls_patch"])
def test_packed_length_is_the_count_in_every_combination(size, ratio, merge, select):
    import paddle

    config = make_config(ratio=ratio, merge=merge, mm_vision_select_feature=select)
    tiles, per_tile = num_tiles(size, config), 9 + (select == "cls_patch")
    features = paddle.rand([tiles, per_tile, 4])
    if ratio == "anyres" and merge != "flat" and select == "cls_patch":
        with pytest.raises(UserError, match="cls_patch"):
            num_image_features(size, config)
        with pytest.raises(UserError, match="cls_patch"):
            pack_image_features(features, size, config, paddle.zeros([4]))
        return
    packed = pack_image_features(features, size, config, paddle.full([4], 7.0))
    assert packed.shape == [num_image_features(size, config), 4]
    # the whole picture always comes first, as it left the tower
    np.testing.assert_array_equal(packed[:per_tile].numpy(), features[0].numpy())
    if tiles == 1:
        # llava_arch.py merges what comes as a list of tiles; padded pictures come as one batch, without newlines
        assert len(packed) == per_tile
    elif merge == "flat":
        np.testing.assert_array_equal(packed.numpy(), features.numpy().reshape(-1, 4))


def test_spatial_without_unpad_reads_the_canvas_line_by_line():
    import paddle

    config = make_config(merge="spatial")
    features = paddle.arange(3 * 9, dtype="float32").reshape([3, 9, 1])  # a wide canvas: two tiles beside each other
    packed = pack_image_features(features, (60, 30), config).numpy()[:, 0].tolist()
    assert packed[9:] == [9, 10, 11, 18, 19, 20, 12, 13, 14, 21, 22, 23, 15, 16, 17, 24, 25, 26]


def test_gradients_flow_to_features_and_newline():
    import paddle

    config = make_config()
    features, newline = paddle.rand([3, 9, 4]), paddle.rand([4])
    features.stop_gradient = newline.stop_gradient = False
    packed = pack_image_features(features, (100, 20), config, newline)
    packed.sum().backward()
    assert newline.grad.tolist() == [1.0] * 4  # one row is left of a very wide picture: 3 rows - 2 of padding
    assert features.grad.sum() == 4 * (9 + 6)


def test_mistakes_are_told():
    import paddle

    config = make_config()
    with pytest.raises(UserError, match="2 tiles of 9 features; expected 3 of 9"):
        pack_image_features(paddle.zeros([2, 9, 4]), (60, 30), config, paddle.zeros([4]))
    with pytest.raises(UserError, match="image_newline"):
        pack_image_features(paddle.zeros([3, 9, 4]), (60, 30), config)
    with pytest.raises(UserError, match="0 x 30"):
        num_image_features((0, 30), config)
    with pytest.raises(UserError, match="text only"):
        num_image_features((3, 30), make_config(vision=None))
    with pytest.raises(UserError, match="image_grid_pinpoints"):
        select_best_resolution((3, 3), [])


def test_with_the_real_config():
    from paddlemix.models.llava.configuration import LlavaConfig

    edge, patch, canvases = SETTINGS["vit336"]
    config = LlavaConfig(
        vision_config={"image_size": edge, "patch_size": patch},
        image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints=canvases,
    )
    expected = GOLDEN["vit336/table"][:50, 3].tolist()
    assert [num_image_features(size, config) for size in SIZES[:50]] == expected
    assert num_image_features((640, 480), LlavaConfig(vision_config={})) == 576

"""Placeholders and features: where each one goes, and what is said when they don't fit."""

import paddle
import pytest

from paddlemix.errors import UserError
from paddlemix.models.llava.merge import merge_image_features

IMAGE = -200


def test_features_stand_where_their_placeholders_were():
    ids = paddle.to_tensor([[1, IMAGE, IMAGE, 5], [IMAGE, 6, 7, 8]])
    embeds = paddle.zeros([2, 4, 3])
    features = [paddle.full([2, 3], 1.0), paddle.full([1, 3], 2.0)]
    merged = merge_image_features(embeds, ids, features)
    assert merged[:, :, 0].tolist() == [[0, 1, 1, 0], [2, 0, 0, 0]]


def test_gradients_reach_features_and_text():
    ids = paddle.to_tensor([[1, IMAGE]])
    embeds, feature = paddle.ones([1, 2, 3]), paddle.ones([1, 3])
    embeds.stop_gradient = feature.stop_gradient = False
    (merge_image_features(embeds, ids, [feature]) * paddle.to_tensor([[[2.0], [5.0]]])).sum().backward()
    assert feature.grad.tolist() == [[5, 5, 5]]
    assert embeds.grad[0].tolist() == [[2, 2, 2], [0, 0, 0]]


@pytest.mark.parametrize("features", [None, [paddle.ones([3, 3])]])
def test_both_counts_are_in_the_error(features):
    ids = paddle.to_tensor([[1, IMAGE, IMAGE]])
    count = 3 if features else 0
    with pytest.raises(UserError, match=f"2 image placeholders, but {count} image features"):
        merge_image_features(paddle.zeros([1, 3, 3]), ids, features)

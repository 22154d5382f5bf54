"""Placeholders and image features become one sequence of embeddings."""

from typing import List, Optional

import paddle

from paddlemix.errors import UserError
from paddlemix.models.llava.constants import IMAGE_TOKEN_INDEX

__all__ = ["merge_image_features"]


def merge_image_features(
    inputs_embeds: paddle.Tensor, input_ids: paddle.Tensor, image_features: Optional[List[paddle.Tensor]]
) -> paddle.Tensor:
    """Puts each image feature where its placeholder stands.

    Args:
        inputs_embeds: [B, T, D]; what stands at placeholders is overwritten.
        input_ids: [B, T]; IMAGE_TOKEN_INDEX at every place of an image feature.
        image_features: one [K_i, D] per picture, in the order of the placeholders (row by row); None for no picture.

    Returns:
        [B, T, D]; gradients flow to both.

    Raises:
        UserError: the placeholders and the features differ in number; both are named.

    ids [[1, -200, -200, 5]] with one picture of features [[a], [b]] gives [[e(1), a, b, e(5)]].
    """
    places = paddle.nonzero((input_ids == IMAGE_TOKEN_INDEX).flatten()).flatten()
    features = paddle.concat(image_features, axis=0) if image_features else None
    given = 0 if features is None else features.shape[0]
    if places.shape[0] != given:
        raise UserError(
            f"the prompt has {places.shape[0]} image placeholders, but {given} image features came from "
            f"{len(image_features or [])} picture(s); pass pixel_values and image_sizes of just the pictures in the prompt."
        )
    if features is None:
        return inputs_embeds
    flat = inputs_embeds.flatten(0, 1)
    return paddle.scatter(flat, places, features.astype(flat.dtype)).reshape(inputs_embeds.shape)

"""Values that data, processor and model agree on (``llava/constants.py`` of the original release)."""

IGNORE_INDEX = -100  # a label at which nothing is trained
IMAGE_TOKEN_INDEX = -200  # an input id whose embedding is an image feature

IMAGE_TOKEN = "<image>"
IMAGE_START_TOKEN = "<im_start>"
IMAGE_END_TOKEN = "<im_end>"

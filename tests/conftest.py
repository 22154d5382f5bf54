"""Before any test imports Paddle: threads and MKL's path, as the entry points have them."""

from paddlemix.runtime import prepare_cpu

prepare_cpu()

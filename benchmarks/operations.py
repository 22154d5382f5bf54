"""What single operations cost on this CPU, in the forms that the model has a choice of.

    python benchmarks/operations.py

Prints four Markdown tables of milliseconds (the median of 20): operations of a layer that reads four rows of 256 tokens in
SmolLM2-135M; operations of the last block of a layer's attention that reads 2048; all products with weights of one decoding
step there, by Paddle and by NumPy; and the parts of a layer of the ViT-L/14-336 tower.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from paddlemix.runtime import prepare_cpu  # noqa: E402

prepare_cpu()

import numpy as np  # noqa: E402
import paddle  # noqa: E402
import paddle.nn.functional as F  # noqa: E402

from paddlemix.models.llava.attention import BLOCK, attend  # noqa: E402
from paddlemix.models.llava.tensor_files import empty  # noqa: E402
from paddlemix.models.llava.vision_tower import quick_gelu  # noqa: E402

ROWS, TOKENS, WIDTH, HEADS, MLP = 4, 256, 576, 9, 1536
LAYERS, KEYS, VOCABULARY = 30, 192, 49152


def milliseconds(function, *arguments) -> float:
    times = []
    for _ in range(23):
        started = time.perf_counter()
        function(*arguments)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[3:])


def of_a_layer():
    """[(name, ms)]"""
    hidden = paddle.randn([ROWS, TOKENS, WIDTH])
    heads = paddle.randn([ROWS, HEADS, TOKENS, WIDTH // HEADS])
    table = paddle.randn([1, 1, TOKENS, WIDTH // HEADS])
    whole_table = table.tile([ROWS, HEADS, 1, 1])
    scores = paddle.randn([ROWS, HEADS, TOKENS, TOKENS])
    mask = paddle.randn([ROWS, 1, TOKENS, TOKENS])
    whole_mask = mask.tile([1, HEADS, 1, 1])
    gate, up = paddle.randn([ROWS * TOKENS, MLP]), paddle.randn([ROWS * TOKENS, MLP])
    ones = paddle.ones([WIDTH, 1])

    def transposed():
        return heads.transpose([0, 2, 1, 3]).reshape([ROWS, TOKENS, WIDTH])

    def swiglu_by_tanh():
        half = gate * 0.5
        return (half * paddle.tanh(half) + half) * up

    rows = []
    for strided in (True, False):
        paddle.set_flags({"FLAGS_use_stride_kernel": strided})
        rows.append((f"heads to rows, FLAGS_use_stride_kernel={int(strided)}", milliseconds(transposed)))
    rows += [
        ("rotary table times heads, broadcast", milliseconds(lambda: heads * table)),
        ("the same in full shape", milliseconds(lambda: heads * whole_table)),
        ("laying it out in full shape", milliseconds(lambda: table.tile([ROWS, HEADS, 1, 1]))),
        ("scores plus a mask of each row, broadcast", milliseconds(lambda: scores + mask)),
        ("the same in full shape", milliseconds(lambda: scores + whole_mask)),
        ("mean over the width", milliseconds(lambda: hidden.mean(-1, keepdim=True))),
        ("the same as a product with ones", milliseconds(lambda: paddle.matmul(hidden, ones) / WIDTH)),
        ("SwiGLU, F.swiglu", milliseconds(lambda: F.swiglu(gate, up))),
        ("SwiGLU by tanh", milliseconds(swiglu_by_tanh)),
    ]
    return rows


def of_a_long_prefill():
    """The scores of the last 128 of 2048 queries, and what is done to them."""
    scores, key = paddle.randn([1, HEADS, BLOCK, 2048]), paddle.randn([1, HEADS, 2048, WIDTH // HEADS])
    query, mask = paddle.randn([1, HEADS, BLOCK, WIDTH // HEADS]), paddle.randn([1, 1, BLOCK, 2048])
    whole_mask = mask.tile([1, HEADS, 1, 1])
    return [
        ("product of queries and keys", milliseconds(lambda: paddle.matmul(query, key, transpose_y=True))),
        ("plus a mask, broadcast", milliseconds(lambda: scores + mask)),
        ("plus a mask in full shape", milliseconds(lambda: scores + whole_mask)),
        ("the same, overwriting the scores", milliseconds(lambda: scores.add_(whole_mask))),
        ("softmax", milliseconds(lambda: F.softmax(scores, axis=-1))),
        ("softmax, overwriting the scores", milliseconds(lambda: F.softmax_(scores, axis=-1))),
    ]


def of_a_step():
    """All products of a step: 30 layers and the head, whose weights together don't fit into a cache."""
    sizes = [(WIDTH, WIDTH), (WIDTH, KEYS), (WIDTH, KEYS), (WIDTH, WIDTH), (WIDTH, MLP), (WIDTH, MLP), (MLP, WIDTH)]
    random = np.random.default_rng(0)

    def drawn(*shape):
        """A weight that lies in memory as a model's do."""
        values = empty(shape, "float32")
        random.standard_normal(out=values, dtype=np.float32)
        return values

    layers = [[drawn(*size) for size in sizes] for _ in range(LAYERS)]
    head = drawn(VOCABULARY, WIDTH)
    narrow, turned = [layer[-1] for layer in layers], [drawn(WIDTH, MLP) for _ in range(LAYERS)]
    tensors = [[paddle.to_tensor(weight) for weight in layer] for layer in layers]
    head_tensor = paddle.to_tensor(head)

    def by_numpy(inputs):
        return [inputs[len(weight)] @ weight for layer in layers for weight in layer]

    def by_paddle(inputs):
        for layer in tensors:
            for weight in layer:
                paddle.matmul(inputs[weight.shape[0]], weight)
        return paddle.matmul(inputs[WIDTH], head_tensor, transpose_y=True)

    vectors = {width: random.standard_normal(width, np.float32) for width in (WIDTH, MLP)}
    rows = [
        ("the layers' products with one row, NumPy", milliseconds(lambda: by_numpy(vectors))),
        (
            f"of these, the {LAYERS} with [{MLP}, {WIDTH}]",
            milliseconds(lambda: [vectors[MLP] @ each for each in narrow]),
        ),
        ("the same weights turned", milliseconds(lambda: [each @ vectors[MLP] for each in turned])),
        ("the product with the embeddings, NumPy", milliseconds(lambda: head @ vectors[WIDTH])),
    ]
    for count in (1, 2, 8):
        several = {width: random.standard_normal((count, width), np.float32) for width in (WIDTH, MLP)}
        moved = {width: paddle.to_tensor(values) for width, values in several.items()}
        rows.append((f"all products with {count} rows, Paddle", milliseconds(by_paddle, moved)))
        if count > 1:
            both = milliseconds(by_numpy, several) + milliseconds(np.matmul, several[WIDTH], head.T)
            rows.append((f"all products with {count} rows, NumPy", both))
    return rows


def of_a_tower_layer():
    """577 tokens of width 1024, 16 heads."""
    hidden, wide = paddle.randn([1, 577, 1024]), paddle.randn([1, 577, 4096])
    heads = paddle.randn([1, 16, 577, 64])
    square, up, down = paddle.randn([1024, 1024]), paddle.randn([1024, 4096]), paddle.randn([4096, 1024])
    with paddle.no_grad():
        return [
            ("queries, keys, values, output: four products", 4 * milliseconds(lambda: F.linear(hidden, square))),
            ("first product of the MLP", milliseconds(lambda: F.linear(hidden, up))),
            ("second product of the MLP", milliseconds(lambda: F.linear(wide, down))),
            ("attention", milliseconds(lambda: attend(heads, heads, heads))),
            ("quick GELU", milliseconds(lambda: quick_gelu(wide))),
        ]


def main():
    for title, measure in (
        ("a layer, 4 x 256 tokens", of_a_layer),
        ("the last block of attention, 2048 tokens", of_a_long_prefill),
        ("a decoding step", of_a_step),
        ("a layer of the tower", of_a_tower_layer),
    ):
        print(f"\n| {title} | ms |\n|---|---|")
        for name, value in measure():
            print(f"| {name} | {value:.2f} |", flush=True)


if __name__ == "__main__":
    main()

"""What single operations cost on this CPU, in the forms that the model has a choice of.

    python benchmarks/operations.py

Prints Markdown tables of milliseconds (the median of 20): fresh memory; operations of a layer that reads four rows of 256 tokens in
SmolLM2-135M, and what learning adds to them; operations of the last block of a layer's attention that reads 2048; all products
with weights of one decoding step there, by Paddle, by NumPy and by oneDNN; its scores; and the parts of a layer of the
ViT-L/14-336 tower.
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
from paddle import nn  # noqa: E402

from paddlemix.models.llava.attention import BLOCK, attend  # noqa: E402
from paddlemix.models.llava.host_passes import scores_of_few  # noqa: E402
from paddlemix.models.llava.lean import layer_norm, quick_gelu, swiglu  # noqa: E402
from paddlemix.models.llava.linear import bfloat16_products, project, project_back, project_quick_gelu  # noqa: E402
from paddlemix.models.llava.onednn import products  # noqa: E402
from paddlemix.models.llava.tensor_files import empty  # noqa: E402

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
        ("SwiGLU by oneDNN's swish", milliseconds(lambda: swiglu(gate, up))),
    ]
    return rows


def of_learning():
    """Forward and backward pass of what learns, 4 x 256 tokens."""
    x, layer = paddle.randn([ROWS, TOKENS, WIDTH]), nn.Linear(WIDTH, MLP)
    norm = nn.LayerNorm(WIDTH)
    grad, grad_norm = paddle.randn([ROWS, TOKENS, MLP]), paddle.randn([ROWS, TOKENS, WIDTH])
    x.stop_gradient = False
    flat, ones = grad.reshape([-1, MLP]), paddle.ones([1, ROWS * TOKENS])

    def learn(compute, grad):
        paddle.autograd.backward([compute()], [grad])
        for each in (x, *layer.parameters(), *norm.parameters()):
            each.clear_gradient(False)

    def in_bfloat16():
        with bfloat16_products():
            learn(lambda: project(layer, x), grad)

    written_out = (lambda: layer_norm(x, norm.weight, norm.bias, 1e-5)), grad_norm
    return [
        ("a product with a bias, Paddle", milliseconds(learn, lambda: layer(x), grad)),
        ("the same, oneDNN", milliseconds(learn, lambda: project(layer, x), grad)),
        ("the same, oneDNN, bfloat16", milliseconds(in_bfloat16)),
        ("gradient of a bias: a sum over rows", milliseconds(lambda: flat.sum(0))),
        ("the same as a product with ones", milliseconds(lambda: paddle.matmul(ones, flat))),
        ("layer norm, Paddle", milliseconds(learn, lambda: norm(x), grad_norm)),
        ("the same, its gradient written out", milliseconds(learn, *written_out)),
    ]


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
        (
            "the same, oneDNN",
            milliseconds(lambda: products().softmax(scores.data_ptr(), HEADS * BLOCK, 2048)),
        ),
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
    linears = [[linear(weight) for weight in layer] for layer in layers]
    narrow = [[linear(weight, "bfloat16") for weight in layer] for layer in layers]
    embedding = nn.Embedding(VOCABULARY, WIDTH)
    embedding.weight.set_value(head)
    narrow_embedding = nn.Embedding(VOCABULARY, WIDTH).to(dtype="bfloat16")

    def by_numpy(inputs):
        for layer in layers:
            for weight in layer:
                inputs[len(weight)] @ weight
        inputs[WIDTH] @ head.T

    def by_paddle(inputs):
        for layer in linears:
            for each in layer:
                paddle.matmul(inputs[each.weight.shape[0]], each.weight)
        paddle.matmul(inputs[WIDTH], embedding.weight, transpose_y=True)

    def by_onednn(inputs):
        """Straight to it: ``project`` leaves one row to others."""
        kernels = products()
        for layer in layers:
            for weight in layer:
                x = inputs[len(weight)]
                result = np.empty((len(x), weight.shape[1]), np.float32)
                kernels(x.ctypes.data, weight.ctypes.data, result.ctypes.data, len(x), *weight.shape)
        x, result = inputs[WIDTH], np.empty((len(inputs[WIDTH]), VOCABULARY), np.float32)
        kernels(x.ctypes.data, head.ctypes.data, result.ctypes.data, len(x), WIDTH, VOCABULARY, turned=True)

    def by_onednn_in_bfloat16(inputs):
        for layer in narrow:
            for each in layer:
                project(each, inputs[each.weight.shape[0]])
        project_back(narrow_embedding, inputs[WIDTH])

    rows = []
    with paddle.no_grad():
        for count in (1, 8, 33):
            several = {width: random.standard_normal((count, width), np.float32) for width in (WIDTH, MLP)}
            moved = {width: paddle.to_tensor(values) for width, values in several.items()}
            what = f"all products with {count} row{'s' if count > 1 else ''}"
            rows += [
                (f"{what}, Paddle", milliseconds(by_paddle, moved)),
                (f"{what}, NumPy", milliseconds(by_numpy, several)),
                (f"{what}, oneDNN", milliseconds(by_onednn, several)),
                (f"{what}, oneDNN, bfloat16", milliseconds(by_onednn_in_bfloat16, moved)),
            ]
    return rows


def of_a_steps_attention():
    """Scores of a step's queries, three to a key head of 64, over keys in all layers, by NumPy."""
    random = np.random.default_rng(0)
    rows = []
    for context in (64, 640, 2048):
        keys = [random.standard_normal((1, KEYS // 64, context, 64), np.float32) for _ in range(LAYERS)]
        query = random.standard_normal((1, KEYS // 64, 3, 64), np.float32)

        def plain(keys=keys, query=query):
            for each in keys:
                query @ each.transpose(0, 1, 3, 2)

        def turned(keys=keys, query=query):
            for each in keys:
                scores_of_few(query, each)

        rows += [
            (f"{context} keys: queries times keys", milliseconds(plain)),
            (f"{context} keys: keys times queries, turned", milliseconds(turned)),
        ]
    return rows


def linear(weight, dtype="float32"):
    """A Linear of these numbers."""
    layer = nn.Linear(*weight.shape, bias_attr=False)
    layer.weight.set_value(weight)
    layer.eval()
    return layer.to(dtype=dtype)


def of_a_tower_layer():
    """577 tokens of width 1024, 16 heads."""
    hidden, wide = paddle.randn([1, 577, 1024]), paddle.randn([1, 577, 4096])
    heads = paddle.randn([1, 16, 577, 64])
    square, up, down = nn.Linear(1024, 1024), nn.Linear(1024, 4096), nn.Linear(4096, 1024)
    with paddle.no_grad():
        return [
            ("queries, keys, values, output: four products, Paddle", 4 * milliseconds(lambda: square(hidden))),
            ("the same, oneDNN", 4 * milliseconds(lambda: project(square, hidden))),
            ("first product of the MLP and quick GELU, Paddle", milliseconds(lambda: quick_gelu(up(hidden)))),
            ("the same, oneDNN", milliseconds(lambda: project_quick_gelu(up, hidden))),
            ("second product of the MLP, Paddle", milliseconds(lambda: down(wide))),
            ("the same, oneDNN", milliseconds(lambda: project(down, wide))),
            ("attention", milliseconds(lambda: attend(heads, heads, heads))),
        ]


def of_fresh_memory():
    """A gigabyte that this program has not held yet, a byte of each page written, as weights need it that are not mapped."""

    def write():
        np.empty(1 << 30, np.uint8)[::4096] = 1

    started = time.perf_counter()
    write()
    first = 1000 * (time.perf_counter() - started)
    return [("the first time", first), ("once it was held and given back", milliseconds(write))]


def main():
    for title, measure in (
        ("a gigabyte of fresh memory", of_fresh_memory),
        ("a layer, 4 x 256 tokens", of_a_layer),
        ("learning, 4 x 256 tokens", of_learning),
        ("the last block of attention, 2048 tokens", of_a_long_prefill),
        ("a decoding step", of_a_step),
        ("scores of a decoding step", of_a_steps_attention),
        ("a layer of the tower", of_a_tower_layer),
    ):
        print(f"\n| {title} | ms |\n|---|---|")
        for name, value in measure():
            print(f"| {name} | {value:.2f} |", flush=True)


if __name__ == "__main__":
    main()

"""What single operations of a layer cost on this CPU, in the forms that the model has a choice of.

    python benchmarks/operations.py

Prints a Markdown table, milliseconds (the median of 20). Shapes are those of four rows of 256 tokens in SmolLM2-135M.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from paddlemix.runtime import prepare_cpu  # noqa: E402

prepare_cpu()

import paddle  # noqa: E402
import paddle.nn.functional as F  # noqa: E402

ROWS, TOKENS, WIDTH, HEADS, MLP = 4, 256, 576, 9, 1536


def milliseconds(function) -> float:
    times = []
    for _ in range(23):
        started = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[3:])


def main():
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
    print("| operation | ms |\n|---|---|")
    for name, value in rows:
        print(f"| {name} | {value:.2f} |")


if __name__ == "__main__":
    main()

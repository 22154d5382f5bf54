"""Physical limits of LLaVA-1.5 on a GPU: bytes and operations, from the sizes alone.

    python benchmarks/limits.py [--bandwidth 2039] [--tflops 312]

Defaults are an A100-80GB's published figures (GB/s of memory, dense bf16 TFLOP/s). Nothing is run.
"""

import argparse

VIT_L_336 = dict(width=1024, mlp=4096, layers=23, patches=576)  # the selected layer is the last but one
DECODERS = {
    "7B": dict(width=4096, mlp=11008, layers=32, heads=32, groups=32, vocab=32000),
    "13B": dict(width=5120, mlp=13824, layers=40, heads=40, groups=40, vocab=32000),
}
BYTES = 2  # bfloat16


def decoder_weights(d):
    """Weights of the layers' matrices, and of one vocabulary matrix (embedding or head)."""
    head = d["width"] // d["heads"]
    attention = 2 * d["width"] ** 2 + 2 * d["width"] * head * d["groups"]
    return d["layers"] * (attention + 3 * d["width"] * d["mlp"]), d["vocab"] * d["width"]


def cache_bytes(d):
    """Bytes of keys and values of one token."""
    return 2 * d["layers"] * d["groups"] * (d["width"] // d["heads"]) * BYTES


def prefill_flops(d, tokens):
    """Multiply-adds count two; causal attention is half a square; one position goes through the head."""
    layers, vocabulary = decoder_weights(d)
    attention = 2 * 2 * d["layers"] * d["width"] * tokens * tokens / 2
    return 2 * layers * tokens + attention + 2 * vocabulary


def tower_flops(t):
    tokens = t["patches"] + 1
    weights = t["layers"] * (4 * t["width"] ** 2 + 2 * t["width"] * t["mlp"])
    return 2 * weights * tokens + 2 * 2 * t["layers"] * t["width"] * tokens**2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, default=2039, help="GB/s")
    parser.add_argument("--tflops", type=float, default=312, help="dense bf16 TFLOP/s")
    arguments = parser.parse_args()
    bandwidth, flops = arguments.bandwidth * 1e9, arguments.tflops * 1e12

    print("| quantity | " + " | ".join(DECODERS) + " |\n|---|---|---|")
    rows = {}
    for name, d in DECODERS.items():
        layers, vocabulary = decoder_weights(d)
        read = (layers + vocabulary) * BYTES
        rows[name] = [
            ("decoder weights read per token, GB", read / 1e9),
            ("cache per token, MB", cache_bytes(d) / 1e6),
            ("cache of 640 tokens (a picture and a question), GB", 640 * cache_bytes(d) / 1e9),
            ("decode at context 640: at most tokens/s", bandwidth / (read + 640 * cache_bytes(d))),
            ("decode at context 4096: at most tokens/s", bandwidth / (read + 4096 * cache_bytes(d))),
            ("batch of 8 at context 640: at most tokens/s", 8 * bandwidth / (read + 8 * 640 * cache_bytes(d))),
            ("prefill of 640 tokens, TFLOP", prefill_flops(d, 640) / 1e12),
            ("prefill of 640 tokens: at least ms", prefill_flops(d, 640) / flops * 1e3),
            ("prefill of 2944 tokens (anyres, five tiles), TFLOP", prefill_flops(d, 2944) / 1e12),
            ("prefill of 2944 tokens: at least ms", prefill_flops(d, 2944) / flops * 1e3),
            ("full fine-tuning, 1 sample of 640 tokens, TFLOP (forward, backward)", 3 * prefill_flops(d, 640) / 1e12),
            ("full fine-tuning, AdamW: weights, gradients, master, moments, GB", (layers + 2 * vocabulary) * 16 / 1e9),
        ]
    for i, (label, _) in enumerate(rows["7B"]):
        print(f"| {label} | " + " | ".join(f"{rows[name][i][1]:.3g}" for name in rows) + " |")
    tower = tower_flops(VIT_L_336)
    print(
        f"\nTower (ViT-L/14-336, 23 layers), one tile: {tower / 1e12:.3g} TFLOP, at least {tower / flops * 1e3:.2g} ms."
    )


if __name__ == "__main__":
    main()

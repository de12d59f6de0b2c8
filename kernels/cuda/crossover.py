"""From how many tokens on unpacking the weight and the vendor's matmul beat the packed matmul."""

from __future__ import annotations

# By class of GPU (compute capability 8.0 is 80; the newest class that is not newer counts). Estimates, not measured:
# `python -m benchmarks.gpu` measures them. From roughly where the tensor cores, at the rate that mma.sync reaches, take
# longer than unpacking and the vendor's instructions do.
TOKENS = {75: 17, 80: 512, 86: 512, 89: 512, 90: 256, 100: 256, 120: 512}


def crossover(capability: int) -> int:
    """Return the tokens for a GPU such as 90 for compute capability 9.0."""
    return TOKENS[max(known for known in TOKENS if known <= max(capability, min(TOKENS)))]


# The same for weights with dropped groups, on every GPU: an estimate too. 24 tokens of 4096 inputs fetch 400 MB of x in
# shared memory for 8 million kept weights, which takes about as long as writing and reading 16 million in 16 bits.
KEPT_FROM = 25

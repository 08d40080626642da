"""Sizes of the pieces in which statistics are computed; apart, so that a plan can read them without torch."""

BLOCK = 128  # queries per attention block; larger blocks fall out of the cache, smaller ones starve the product
BLOCK_BYTES = 7 << 20  # scores of a block on a CPU; longer texts run fewer heads, then fewer queries, at a time
SMALLEST_BLOCK = 32
TOKENS, ROWS = 128, 512  # tokens the lens reads at a time, and rows (layers × tokens) that fill a matrix product
VOCAB_TILE = 2048  # the product writes the vocabulary in slices that stay in the cache
STRIP = 16  # rows of the lens reduced at a time, so that the passes over them stay in the cache
RUN = 64  # consecutive vocabulary entries of which the top-k search first compares only the largest
DEVICE_ROWS = 2048  # rows, layers × tokens, that an accelerator reads at a time
DEVICE_TILE = 4096  # vocabulary entries of a tile on an accelerator; rows × tile stay near its cache

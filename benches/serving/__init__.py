"""`orchestra serve` against transformers' continuous batching, interleaved in one run."""

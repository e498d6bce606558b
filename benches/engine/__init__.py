"""The engine, served, beside vLLM's and transformers' on the same checkpoint; see `__main__`."""

"""Planning a step: orchestra's scheduler beside vLLM's own."""

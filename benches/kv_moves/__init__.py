"""Two workers that move KV between them, beside the same two that do not."""

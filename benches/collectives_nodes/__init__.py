"""All-reduce between nodes: by node against flat, over a link of limited rate."""

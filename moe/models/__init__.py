"""transformers' models with their experts taken out: loading, families, attention over the paged KV cache."""

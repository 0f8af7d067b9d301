"""The engine process: scheduler, paged KV cache, model and sampler behind one loop."""

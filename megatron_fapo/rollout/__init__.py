"""vLLM engines as Ray actors, and the pool that merges their streams of samples."""

"""The loop, where its processes run, and what a run keeps."""

"""What a run says of itself: metrics, samples, logs, progress, the report."""

"""One training loop for every engine: data, schedule, cadence, checkpoints, metrics."""

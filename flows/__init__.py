"""What runs, in which order: recipes, the pipeline, and the command `cairn`."""

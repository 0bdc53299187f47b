"""What is told of evaluations: the significance of differences, and the report as a page and as Markdown."""

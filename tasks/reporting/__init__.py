"""What is told of evaluations: the significance of differences, what was published of others, and the report itself."""

"""Everything that knows tensors: descriptions of models, their weights, and the engines that step them."""

"""The recipes that come with Cairn."""

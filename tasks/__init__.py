"""The stages of a run: each a frozen config and a plain function from input folders to an output folder."""

"""The behaviour suite: questions in files, their scorers, and the sandbox in which answers in Python run."""

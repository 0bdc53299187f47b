"""The store: immutable artifacts, their records, names and leases. Knows files and digests, nothing of models."""

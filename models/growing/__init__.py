"""Larger models out of trained ones, on canonical named arrays: one implementation for every engine."""

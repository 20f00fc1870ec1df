"""Formats that a lens can lie in."""

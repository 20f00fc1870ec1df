"""Stages from text to lens, run in order."""

"""Stages from text to lens: which they are, run here one after another or submitted as jobs."""

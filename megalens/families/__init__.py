"""Language models of every make, walked block by block in one way."""

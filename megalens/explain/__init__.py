"""What a lens says of activations, and what else could be said."""

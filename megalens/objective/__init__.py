"""What trains a lens: the terms of its loss."""

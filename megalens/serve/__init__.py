"""A server that explains activations to many clients at once: the routes of the field's NLA servers, ours beside them, and a page."""

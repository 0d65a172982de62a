"""Drop-in modules on the ops."""

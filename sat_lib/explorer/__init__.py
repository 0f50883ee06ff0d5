"""Interactive exploration of attention maps."""

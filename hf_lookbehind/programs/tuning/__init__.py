"""Settings chosen on a validation split."""

"""The demo: five methods on real images."""

"""What an iteration costs, measured."""

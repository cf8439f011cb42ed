"""The model card: what it says, as plain data, and how it says it."""

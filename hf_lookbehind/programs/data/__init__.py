"""Data: sources, rows, images, labels, texts in blocks."""

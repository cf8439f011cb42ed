"""Models: loaded for a task, with tokenizers and adapters."""

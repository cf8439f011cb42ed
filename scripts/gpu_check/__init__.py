"""Whether everything holds on a GPU, how fast it is there and how lean: one command, for a machine without network.

From a copied tree, with torch, transformers and accelerate: `PYTHONPATH=. python -m scripts.gpu_check`.
"""

import importlib.util
from pathlib import Path

import hf_lookbehind

if importlib.util.find_spec("hf_lookbehind.scripts") is None:  # a tree that nobody has installed
    hf_lookbehind.__path__.append(str(Path(__file__).parents[2]))

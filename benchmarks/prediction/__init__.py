"""How long a compiled kernel should take on a GPU, read off its intermediate and machine code; `predicted.py` is made of it."""

"""`effdense evaluate` and `effdense predict`: what `effdense train` has trained, used.

`trained.py` reads a checkpoint, `sources.py` reads images, `scores.py` runs the model over them, `measures.py` has what scikit-learn
says of the scores, `command.py` the options. Nothing else of effdense imports this, the command line apart.
"""

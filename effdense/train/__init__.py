"""`effdense train`: a DenseNet on real images, from one command, in one process or many.

`settings.py` says what a run is, `command.py` reads it from the command line, `loop.py` trains. Nothing else of effdense
imports this.
"""

"""`effdense train`: a DenseNet on real images, from one command, in one process or many.

`settings.py` has a run's settings, `command.py` reads them from the command line, `loop.py` trains. Nothing else of effdense
imports this.
"""

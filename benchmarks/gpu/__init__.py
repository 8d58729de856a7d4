"""`make gpu`: proves effdense on a GPU within minutes and without a network. `__main__.py` has the plan and the command line."""

"""Tools for whole models: the memory plan, the table of stages, feature reuse, and pictures."""

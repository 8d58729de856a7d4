"""Benchmarks: time and memory of effdense beside other ways to train DenseNets. Start with `python -m benchmarks.compare`."""

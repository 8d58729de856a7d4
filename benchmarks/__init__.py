"""What effdense saves against the ways DenseNets are trained today: `python -m benchmarks.compare`."""

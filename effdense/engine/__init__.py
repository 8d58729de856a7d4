"""The engine: a dense stage forward and backward, and what runs alone (a layer, a pool, a stem). It knows tensors, not modules."""

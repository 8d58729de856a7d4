"""A dense stage forward and backward, and what runs by itself: a layer, a pool, a stem. Tensors and settings, no modules."""

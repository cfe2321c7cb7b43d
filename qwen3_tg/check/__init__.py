"""Whether a device computes a model right: its own kernels against the numpy reference, layer by
layer, so that a wrong step is named and no more than one layer is in memory. See run.py."""

"""What can be known of the kernels without a GPU: resources, launches, saved bytes, host time."""

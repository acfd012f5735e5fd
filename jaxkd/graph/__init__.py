"""Which channels of a network hang together, what they cost, and how to cut them."""

"""Programs: plain Pyro models and guides made of parts, and the `VAE` that holds a pair."""

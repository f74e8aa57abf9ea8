"""A transparent model and windows of tokens come in, the distribution of every site's activations and the prefix go out."""

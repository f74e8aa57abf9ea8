"""A converted model run step by step: spikes on every wire behind a neuron, the sums of folded execution."""

"""Pure functions of tensors: the neuron's steps, attention, spike products, Hadamard transforms. No modules, no files, no configuration."""

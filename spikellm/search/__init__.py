"""Statistics of a site come in, a code for each of its neuron groups goes out, with its errors on text that decided nothing."""

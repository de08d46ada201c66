"""What `eval.kernels` asks of a library, each in a process of its own: definition, evaluate, sample and facts."""

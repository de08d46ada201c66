"""Pure array functions, one folder per primitive: the definition, the training form, the one-token step."""

"""Small NNX parts: parameters with their logical axes, and the layers mixers are made of."""

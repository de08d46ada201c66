"""Mixers built on softmax attention."""

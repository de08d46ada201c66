"""Published recipes, one file each: the command, the hardware it is meant for, and what to expect of it.

The text is the user's: `--config.data.path` and `--config.data.tokenizer`, as in README.
"""

"""Configs: Python files with `get_config(arg: str = "") -> ConfigDict`. None of them touches a device."""

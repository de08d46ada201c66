"""The device mesh, and which logical axis lies on which mesh axis."""

"""Registered models in use: talking to one, and serving one."""

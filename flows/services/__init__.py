"""Servers and workers: start, end, state, addresses of pages, and what is deployed in them."""

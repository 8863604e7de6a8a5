"""Suspended jobs: what is stored of them."""

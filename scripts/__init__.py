"""Thin command lines over the packages: `python -m scripts.<verb>`."""

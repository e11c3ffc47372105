"""Thin bridges to the libraries that users train with."""

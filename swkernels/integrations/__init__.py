"""Thin bridges to other libraries: those that users train, quantize and evaluate with."""

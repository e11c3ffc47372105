"""What runs do: one function for each kind, from a configuration to figures."""

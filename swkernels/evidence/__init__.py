"""Evidence about any weight of a model: rank it, take it away, scale it, restore what it makes.

``Edits`` changes weights where they lie and puts them back bit for bit; a ``Yardstick`` says what a
model is measured by. Every function returns a ``Result`` with ``to_dict``, ``to_dataframe``,
``save`` and ``plot``.
"""

"""The published experiments as recipes on the public API: ``swkernels study``.

A study is a ``Recipe``: the runs that it takes and what it says about their figures. Runs are kept
in a folder as JSON lines, shared by the studies that need the same, and made once.
"""

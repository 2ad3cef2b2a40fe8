"""What runs have left in their folders, read back: tables, curves, comparisons, pages.

No run is needed and none is started; files in a folder are treated as untrusted.
"""

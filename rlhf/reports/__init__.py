"""What runs have left in their folders, read back: tables, curves, comparisons, pages."""

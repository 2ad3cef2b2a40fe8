"""What runs have left in their folders, read back: tables, curves, comparisons, pages.

No run is needed and none is started; whatever another program left in a folder is read as rubbish.
"""

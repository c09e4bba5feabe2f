"""Methods to compare with, one file each: equation, term, and requirements on the pair."""

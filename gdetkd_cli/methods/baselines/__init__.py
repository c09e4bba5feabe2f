"""Other methods, to compare with. Each file has the equation, the term, and its requirements on the pair."""

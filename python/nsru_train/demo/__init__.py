"""The demonstration: fictitious authors, a small model that knows them, and the comparison."""

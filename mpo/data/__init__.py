"""Load preference pairs: files of records, checked and read lazily."""

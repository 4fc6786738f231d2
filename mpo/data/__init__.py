"""Where pairs come from: files of records, checked and read lazily."""

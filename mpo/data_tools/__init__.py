"""Looking into preference data, checking it and bringing it into other forms: what `mpo data` does."""

"""Jobs that make data: each step maps records to records."""

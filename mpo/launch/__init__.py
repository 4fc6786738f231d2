"""On which machines and processes a job runs, and how they are started."""

"""The comparison of methods: its task, its preparation, its jobs and its report. See `../methods.md`."""

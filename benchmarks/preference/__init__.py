"""When preference terms help: the tasks, the start models and the jobs of `../methods2.py`."""

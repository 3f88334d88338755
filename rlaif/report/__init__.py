"""The report of a run, its status and next step, and the checks of the machine."""

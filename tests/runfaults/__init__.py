"""Faults of the system a run meets - full disks, vanished files, signals, too little memory - and how it is judged."""

"""What hangs outside the loop: events, dense output, times of each sample, progress."""

"""What a run was: its surroundings and configuration, and the data where it entered."""

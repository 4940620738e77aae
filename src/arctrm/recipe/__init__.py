"""`arctrm joint` with a table `[recipe]`: three trainings and an evaluation in one command."""

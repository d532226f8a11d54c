"""Ways of the literature to start new rows, as files for `student.transfer.input` and `output`."""

"""Tests of stage2_student/model/row_starts."""

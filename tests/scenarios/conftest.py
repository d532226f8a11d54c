"""Dumps of stage 1, from the fixtures of its own tests."""

from tests.stage1_teacher.conftest import copy as copy
from tests.stage1_teacher.conftest import whole as whole

"""Dumps of stage 1, as its own tests have them."""

from tests.stage1_teacher.conftest import copy as copy
from tests.stage1_teacher.conftest import whole as whole

"""The terms of the loss, by name.

May import `data`, `interfaces`, `pipeline`'s ground and `schemas`."""

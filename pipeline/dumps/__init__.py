"""A dump as it lies there: looked at, searched, counted, described by its card, carried to a hub, cleaned up.

May import all ground rooms but `pipeline.planning`."""
